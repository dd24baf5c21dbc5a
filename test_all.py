"""The specification: each test is one sentence about the project, and can fail.

    python -m pytest test_all.py            # everything, without GPU or network
    python -m pytest test_all.py -k kmeans  # what is said of one subject"""
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import string
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import analyze
import model
import prepare_data
import train
from analyze import layer_metrics, observe_layers
from model import (
    Config, SMoE, SMoETransformer, expert_activations, experts_by_definition, load_balance,
    load_checkpoint, probe, router_similarity, spearman, watch)
from prepare_data import (
    Dataset, encode, eval_batches, get_batch, get_tokenizer, open_dataset, prepare, printable)
from routers import ROUTERS, update_routers

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]
SMALL = dict(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32, n_expert=8, top_k=2,
             d_expert=16)


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return SMoETransformer(Config(**{**SMALL, **changes}))


def make_layer(**changes):
    """One SMoE layer with outputs of order 1, so that no gradient drowns in rounding."""
    torch.manual_seed(0)
    moe = SMoE(Config(**{**SMALL, **changes}))
    for weight in [*moe.parameters(), moe.router.directions]:
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return moe


def tokens(batch=4, seed=1, device="cpu"):
    """-> idx, targets (2, batch, T)"""
    torch.manual_seed(seed)
    return torch.randint(SMALL["vocab_size"], (2, batch, SMALL["block_size"])).to(device)


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- the coupling

@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid"])
def test_for_one_token_router_rows_and_neuron_rows_have_gradients_along_the_token(score_fn):
    moe, x = make_layer(router="lossfree", score_fn=score_fn), torch.randn(1, 32)
    selected = moe.router(x).indices[0]
    y, _ = moe(x[None])
    y.backward(torch.randn_like(y))
    for weight in (moe.router.weight, moe.w_gate, moe.w_up):
        rows = weight.grad[selected].view(-1, 32)
        assert (F.cosine_similarity(rows, x).abs() - 1).abs().max() < 1e-5
        others = [i for i in range(8) if i not in selected]
        assert weight.grad[others].abs().max() == 0


def test_gradients_of_language_model_and_switch_loss_sum_to_0_over_experts_that_of_z_loss_not():
    """For each token: the sum over experts of the gradient at the logits, the common mode."""
    x, aux = torch.randn(50, 32), make_layer(router="aux", aux_loss_coef=1.0).router
    routing = aux(x)
    gate, = torch.autograd.grad((routing.gates * torch.randn(50, 2)).sum(), routing.logits)
    assert gate.abs().max() > 1e-2 and gate.sum(1).abs().max() < 1e-6    # (N, E), (N)
    routing = aux(x)
    switch, = torch.autograd.grad(routing.aux_loss, routing.logits)
    assert switch.abs().max() > 1e-4 and switch.sum(1).abs().max() < 1e-7
    routing = make_layer(router="lossfree", z_loss_coef=1.0).router(x)
    z_loss, = torch.autograd.grad(routing.aux_loss, routing.logits)
    assert (z_loss > 0).all()  # every row of R moves along -x, for every token


# ---------------------------------------------------------------- the routers

@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid"])
def test_gates_of_a_learned_router_are_its_scores_normalised_over_the_selected(score_fn):
    router, x = make_layer(router="none", score_fn=score_fn).router, torch.randn(50, 32)
    logits = x @ router.weight.t()
    top = (logits.softmax(-1) if score_fn == "softmax" else logits.sigmoid()).topk(2)
    routing = router(x)
    assert (routing.indices == top.indices).all()
    assert torch.allclose(routing.gates, top.values / top.values.sum(1, keepdim=True))


@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid"])
def test_auxiliary_loss_is_coef_times_e_times_sum_of_f_p_and_the_z_loss_adds_to_it(score_fn):
    router = make_layer(router="aux", aux_loss_coef=0.5, z_loss_coef=0.25, score_fn=score_fn).router
    routing = router(torch.randn(50, 32))
    p = (routing.scores / routing.scores.sum(1, keepdim=True)).mean(0)
    f = torch.bincount(routing.indices.flatten(), minlength=8) / 100
    z_loss = 0.25 * routing.logits.exp().sum(1).log().square().mean()
    assert torch.allclose(routing.aux_loss, 0.5 * 8 * (f * p).sum() + z_loss)


@pytest.mark.parametrize("router", ["lossfree", "kmeans"])
def test_the_bias_moves_by_the_sign_of_the_load_error(router):
    router = make_layer(router=router, bias_update_rate=0.25).router
    router.load.copy_(torch.tensor([9.0, 1, 4, 4, 4, 4, 6, 0]))  # mean 4
    update_routers([router])
    assert router.bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, -0.25, 0.25]
    assert router.load.abs().max() == 0


@pytest.mark.parametrize("name", ["lossfree", "kmeans"])
def test_the_bias_changes_the_selection_and_leaves_the_gates_alone(name):
    router, x = make_layer(router=name).router, torch.randn(50, 32)
    router.bias[3] = 100.0
    routing = router(x)
    assert (routing.indices == 3).any(1).all() and routing.aux_loss == 0
    chosen = routing.scores.gather(1, routing.indices)
    expected = (chosen / 0.1).softmax(1) if name == "kmeans" else F.normalize(chosen, p=1)
    assert torch.allclose(routing.gates, expected, atol=1e-6)


def test_kmeans_selects_the_nearest_centroids_by_cosine_whatever_their_length():
    router, x = make_layer(router="kmeans").router, torch.randn(50, 32) * 3
    router.centroids *= torch.rand(8, 1) * 10 + 0.1
    cosines = F.cosine_similarity(x[:, None], router.centroids[None], dim=-1)  # (N, E)
    routing = router(x)
    assert torch.allclose(routing.scores, cosines, atol=1e-6)
    assert (routing.indices == cosines.topk(2).indices).all()


def test_kmeans_centroid_is_the_ema_of_the_hidden_states_routed_to_it():
    router = make_layer(router="kmeans", ema_decay=0.75).router
    router.bias[0] = -100.0  # an empty expert, for certain
    before, routed = router.centroids.clone(), [[] for _ in range(8)]
    for x in torch.randn(3, 20, 32):  # three micro-batches
        for row, experts in zip(x, router(x).indices):
            for i in experts:
                routed[i].append(row)
    assert router.load.tolist() == [len(rows) for rows in routed]
    update_routers([router])
    for i, rows in enumerate(routed):
        mean = torch.stack(rows).mean(0) if rows else before[i]
        assert torch.allclose(router.centroids[i], 0.75 * before[i] + 0.25 * mean, atol=1e-6)
    assert router.total.abs().max() == 0


def test_kmeans_has_no_parameters_and_sends_a_gradient_to_the_hidden_states_only():
    router, x = make_layer(router="kmeans").router, torch.randn(10, 32, requires_grad=True)
    (router(x).gates ** 2).sum().backward()
    assert list(router.parameters()) == [] and not router.centroids.requires_grad
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("router", ROUTERS)
def test_in_eval_mode_nothing_moves(router):
    model = make_model(router=router)
    model(*tokens())  # training: counts
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()(*tokens())
    update_routers(model.routers())
    assert same_state(before, dict(model.named_buffers()))


@pytest.mark.parametrize("router", ROUTERS)
def test_routers_work_in_float32_under_bfloat16_autocast(router):
    router, x = make_layer(router=router).router, torch.randn(50, 32)
    expected = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(router(x), expected))


# ---------------------------------------------------------------- the experts

def test_the_definition_is_the_sum_over_the_experts_of_each_token():
    moe, x = make_layer().double(), torch.randn(5, 32).double()
    indices, gates = moe.router(x)[:2]
    y = experts_by_definition(x, indices, gates, moe.w_gate, moe.w_up, moe.w_down)
    for t in range(5):
        expected = sum(g * moe.w_down[i] @ (F.silu(moe.w_gate[i] @ x[t]) * (moe.w_up[i] @ x[t]))
                       for i, g in zip(indices[t], gates[t]))
        assert torch.allclose(y[t], expected)


def careless(a, b, offs, grouped_mm=model.grouped_mm):  # nan for experts without rows: as on B200
    out = grouped_mm(a, b, offs=offs)
    if out.ndim == 3:
        out[offs.diff(prepend=offs.new_zeros(1)) == 0] = math.nan
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router, top_k, n_used", [
    *((router, 2, 8) for router in ROUTERS), ("lossfree", 2, 2), ("lossfree", 1, 1)])
def test_the_layer_equals_its_definition_also_where_experts_get_no_tokens(
        router, top_k, n_used, dtype, device, monkeypatch):
    """Output and all gradients of a layer, router included, against the loop in float64."""
    monkeypatch.setattr(model, "grouped_mm", careless)
    moe = make_layer(router=router, n_embd=64, top_k=top_k).to(device, dtype)
    if n_used < 8:
        moe.router.bias[3:3 + n_used] = 100.0  # all tokens to one expert, or to two
    x = torch.randn(64, 64).to(device, dtype)
    grad, inputs = torch.randn_like(x), [x.requires_grad_(), *moe.parameters()]
    y = moe(x[None])[0][0]
    got = [y, *torch.autograd.grad(y, inputs, grad)]
    assert moe.router.load.count_nonzero() == n_used
    routing = moe.router(x)
    y = experts_by_definition(x.double(), routing.indices, routing.gates.double(),
                              moe.w_gate.double(), moe.w_up.double(), moe.w_down.double())
    expected = [y, *torch.autograd.grad(y, inputs, grad.double())]
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(got, expected, strict=True):  # with top_k = 1 the router's gradient is 0
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


# ---------------------------------------------------------------- the transformer

def test_state_dict_has_the_documented_names_and_shapes():
    V, C, E, H = (SMALL[k] for k in ("vocab_size", "n_embd", "n_expert", "d_expert"))
    block = {"norm1.weight": (C,), "norm2.weight": (C,), "attn.qkv_proj.weight": (3 * C, C),
             "attn.o_proj.weight": (C, C), "attn.q_norm.weight": (C // 2,),
             "attn.k_norm.weight": (C // 2,), "moe.w_gate": (E, H, C), "moe.w_up": (E, H, C),
             "moe.w_down": (E, C, H)}
    router = {"aux": {"weight": (E, C)}, "none": {"weight": (E, C)},
              "lossfree": {"weight": (E, C), "bias": (E,)},
              "kmeans": {"centroids": (E, C), "bias": (E,)}}
    for name, extra in router.items():
        shapes = block | {f"moe.router.{k}": v for k, v in extra.items()}
        expected = {f"blocks.{layer}.{k}": v for layer in range(2) for k, v in shapes.items()}
        expected |= {"embed.weight": (V, C), "norm.weight": (C,), "head.weight": (V, C)}
        got = {k: tuple(v.shape) for k, v in make_model(router=name).state_dict().items()}
        assert got == expected


def test_a_token_has_no_influence_on_earlier_logits():
    model, (idx, targets) = make_model().eval(), tokens()
    changed = idx.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 64
    a, b = model(idx, targets)[0], model(changed, targets)[0]
    assert torch.allclose(a[:, :10], b[:, :10], atol=1e-6)
    assert (a[:, 10:] - b[:, 10:]).abs().max() > 1e-3


def test_attention_sees_relative_positions_alone():
    """RoPE: the same tokens, three places later, with nothing before them that they could see."""
    model, x = make_model(), torch.randn(1, 8, 32)
    attn, cos, sin = model.blocks[0].attn, model.cos, model.sin
    here, later = attn(x, cos[:8], sin[:8]), attn(x, cos[3:11], sin[3:11])
    assert torch.allclose(here, later, atol=1e-6)
    assert not torch.allclose(here, attn(x, torch.ones(8, 8), torch.zeros(8, 8)), atol=1e-4)


def test_loss_is_the_mean_cross_entropy_without_the_routers_losses():
    model, (idx, targets) = make_model(router="aux").eval(), tokens()
    logits, loss, aux_loss = model(idx, targets)
    assert logits.shape == (4, 16, 64)
    assert torch.allclose(loss, F.cross_entropy(logits.reshape(-1, 64), targets.reshape(-1)))
    assert aux_loss.item() == pytest.approx(2 * 0.01, rel=0.5)  # two layers near balance


def test_generate_continues_beyond_the_block_size_and_at_temperature_0_takes_the_likeliest():
    model, (idx, _) = make_model(), tokens()
    out = model.generate(idx, 5, temperature=0)
    assert out.shape == (4, 21) and torch.equal(out[:, :16], idx) and model.training
    assert all(router.load.sum() == 0 for router in model.routers())  # a sample is no training
    assert torch.equal(out, model.generate(idx, 5, top_k=1))
    model.eval()
    for n in range(16, 21):
        assert torch.equal(out[:, n], model(out[:, n - 16:n])[0][:, -1].argmax(-1))


def test_generate_refuses_what_has_no_meaning_and_leaves_the_model_in_its_mode():
    model, (idx, _) = make_model(), tokens()
    for wrong, sentence in ((dict(top_k=0), "top_k must be 1 or more, not 0."),
                            (dict(temperature=-1.0), "temperature must be 0 or more, not -1.0.")):
        assert refusal(model.generate, idx, 1, **wrong) == sentence
    with pytest.raises(IndexError):
        model.generate(idx + 1000, 1)
    assert model.training


def test_weights_start_as_the_docstring_says():
    model = make_model(n_embd=256, n_layer=8, router="lossfree")
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all()
        else:
            std = 0.02 / 4 if name.endswith(("o_proj.weight", "w_down")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
    centroids = make_model(n_embd=256).routers()[0].centroids
    assert torch.allclose(centroids.norm(dim=1), torch.full((8,), 16.0))  # sqrt(C)


def test_num_params_counts_all_weights_and_those_one_token_uses():
    model = make_model(router="lossfree")
    total, active = model.num_params()
    assert total - active == 2 * 6 * 3 * 32 * 16  # layers, idle experts, matrices
    assert model.flops_per_token() == 6 * (
        2 * (4 * 32 * 32 + 2 * 3 * 32 * 16 + 8 * 32) + 64 * 32) + 6 * 2 * 16 * 32


# ---------------------------------------------------------------- learning

def trainer(router, device="cpu"):
    """-> a model, and a function that takes a training step with it on some micro-batches."""
    model, c = make_model(router=router).to(device), train.TrainConfig(learning_rate=0.01, **SMALL)
    optimizer = train.make_optimizer(model, c)
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    return model, lambda *batches: train.train_step(model, model.routers(), optimizer, batches,
                                                    autocast, c)


@pytest.mark.parametrize("router", ROUTERS)
def test_each_router_overfits_one_batch(router):
    _, step = trainer(router)
    batch = tokens()
    losses = [step(batch)[0] for _ in range(60)]
    assert losses[0] > 4.0 and losses[-1] < 0.3


def test_learning_rate_warms_up_linearly_and_falls_by_half_a_cosine():
    c = train.TrainConfig(max_iters=110, warmup_iters=10, learning_rate=1.0)
    rates = [train.learning_rate(step, c) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[59] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))
    short = train.TrainConfig(max_iters=20, warmup_iters=100, learning_rate=1.0)
    assert train.learning_rate(10, short) == 1  # a short run reaches its rate as well


def test_weight_decay_is_on_matrices_alone():
    model = make_model(router="lossfree")
    decayed, free = train.make_optimizer(model, train.TrainConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and free["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} == {2, 3} and {p.ndim for p in free["params"]} == {1}


def plain_step(batches, grad_clip):
    """-> the gradient that a training step hands to its optimizer"""
    model = make_model(router="lossfree")
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    train.train_step(model, model.routers(), torch.optim.SGD(model.parameters(), lr=1.0), batches,
                     contextlib.nullcontext(), train.TrainConfig(grad_clip=grad_clip))
    return before - torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch():
    idx, targets = tokens(batch=8)
    parts = list(zip(idx.split(2), targets.split(2)))
    whole = plain_step([(idx, targets)], grad_clip=0.0)
    assert torch.allclose(plain_step(parts, grad_clip=0.0), whole, atol=1e-6)


def test_a_gradient_longer_than_grad_clip_is_scaled_to_it():
    assert plain_step([tokens()], grad_clip=0.125).norm().item() == pytest.approx(0.125, rel=1e-4)


@NEEDS_CUDA
@pytest.mark.parametrize("router", ROUTERS)
def test_two_runs_of_a_training_step_agree_to_the_last_bit(router):
    """At this size: attention's own backward pass adds atomically over long sequences."""
    states = []
    for _ in range(2):
        model, step = trainer(router, "cuda")
        step(tokens(device="cuda"), tokens(seed=2, device="cuda"))
        states.append(model.state_dict())
    assert same_state(*states)


@NEEDS_CUDA
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] not in (9, 10),
    reason="grouped_mm has a kernel of its own on H100, H200 and B200 alone")
@pytest.mark.parametrize("router", ROUTERS)
def test_a_training_step_never_waits_for_the_gpu(router):
    (_, step), batch = trainer(router, "cuda"), tokens(device="cuda")
    step(batch)  # the first one sets up the libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("router", ROUTERS)
def test_the_compiled_model_is_one_graph_that_equals_the_eager_one(router, device, monkeypatch):
    """bfloat16, since grouped_mm compiles in nothing else. On the CPU with aot_eager: the default
    back end differs in the kernels it writes, for which it needs a C++ compiler and a minute."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("inductor" if device == "cuda" else "aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, fullgraph=True,
                                                            backend=backend))
    eager, model = make_model(router=router).to(device), make_model(router=router).to(device)
    compiled = train.compiled(model)
    for step in range(3):
        for run in (eager, compiled):
            with torch.autocast(device, torch.bfloat16):
                _, loss, aux_loss = run(*tokens(seed=step, device=device))
            (loss + aux_loss).backward()
            update_routers(run.routers())
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        assert relative_error(q.grad, p.grad) < 2e-2, name
    for a, b in zip(eager.routers(), model.routers()):
        assert relative_error(b.directions, a.directions) < 1e-3
    assert backend.frame_count == 1  # no recompilation after the first step


@pytest.mark.parametrize("device", DEVICES)
def test_the_routers_gradient_stays_float32_in_the_compiled_backward_pass(device, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    x, gradients = torch.randn(1, 64, 64, device=device), []
    for prepare_model in (lambda moe: moe, train.compiled):
        moe = make_layer(router="aux", n_embd=64, aux_loss_coef=1.0).to(device)
        run = prepare_model(moe)
        with torch.autocast(device, torch.bfloat16):
            _, aux_loss = run(x)
        aux_loss.backward()  # its way to the rows is the router's alone
        gradients.append(moe.router.weight.grad)
    assert relative_error(*gradients) < 1e-6  # 3e-3 where a product is in bfloat16


# ---------------------------------------------------------------- a run

ROOT = Path(train.__file__).parent
TOY = ["--dataset=toy", "--vocab_size=320", "--block_size=16", "--n_layer=2", "--n_head=2",
       "--n_embd=32", "--n_expert=8", "--top_k=2", "--d_expert=16", "--batch_size=2",
       "--max_iters=6", "--eval_interval=3", "--eval_tokens=64", "--final_eval_tokens=128",
       "--log_interval=1", "--warmup_iters=2", "--device=cpu"]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with data/toy, a small text."""
    folder = tmp_path_factory.mktemp("toy")
    text = "".join(f"{i} is followed by {i + 1}.\n" for i in range(500))
    (folder / "numbers.txt").write_text(text)
    prepare(folder / "numbers.txt", name="toy", data_root=folder / "data")
    return folder


@pytest.fixture
def workdir(toy, tmp_path, monkeypatch):
    """An empty working directory that sees data/toy."""
    (tmp_path / "data").symlink_to(toy / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_train(*flags):
    """train.main in this process, on the toy settings; flags override."""
    train.main([*TOY, *flags])


def resume(*flags):
    train.main(["--out_dir=out/a", "--resume", *flags])


def read_log(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]


def losses(out_dir):
    """The log without what depends on the clock."""
    timing = ("tokens_per_s", "mfu")
    return [{k: v for k, v in record.items() if k not in timing and v is not None}
            for record in read_log(out_dir)]


def checkpoint_of(out_dir):
    return torch.load(Path(out_dir) / "ckpt.pt", weights_only=True)


@contextlib.contextmanager
def changed_checkpoint(out_dir):
    yield (state := checkpoint_of(out_dir))
    torch.save(state, Path(out_dir) / "ckpt.pt")


def python(*args, code=0, env={}):
    """python ARGS in a process of its own, which finds our files and exits with `code`."""
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True,
                          timeout=240, env=os.environ | {"PYTHONPATH": str(ROOT)} | env)
    assert done.returncode == code, done.stderr
    return done


def test_the_main_command_prepares_its_corpus_trains_samples_and_sums_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = python(ROOT / "train.py", "--router=kmeans", "--max_iters=2", "--batch_size=1",
                  "--block_size=64", "--eval_tokens=64", "--final_eval_tokens=64",
                  env={"PYTHONIOENCODING": "ascii"})  # the sample holds more than ASCII
    *_, perplexity, load, place = done.stdout.splitlines()
    assert perplexity.startswith("validation perplexity ") and load.startswith("load CV ")
    assert place == "the run lies in out/kmeans; next: python analyze.py out/kmeans"
    assert "validation text" in done.stdout and "the model goes on" in done.stdout
    model, checkpoint = load_checkpoint("out/kmeans/ckpt.pt")
    assert checkpoint["step"] == 2 and model.config.router == "kmeans"


def test_a_second_run_that_prepares_the_same_corpus_more_slowly_trains_as_well(
        toy, tmp_path, monkeypatch):
    def slow(dataset):  # another run was faster
        Path("data").mkdir()
        Path("data/stdlib").symlink_to(toy / "data/toy")
        raise ValueError("another process has made data/stdlib meanwhile")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "prepare", slow)
    run_train("--dataset=stdlib", "--out_dir=out/a", "--max_iters=1")
    assert checkpoint_of("out/a")["step"] == 1


def test_the_log_has_an_object_every_log_interval_and_the_metrics_at_evaluations_from_0_on(workdir):
    run_train("--router=aux", "--out_dir=out/a")
    records = read_log("out/a")
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4, 5, 6]
    base = {"step", "train_loss", "aux_loss", "lr", "tokens_per_s", "mfu"}
    metrics = {"val_loss", "perplexity", "load_std", "max_violation", "router_similarity",
               "coupling_spearman", "val_tokens"}
    assert [r.keys() == base | metrics for r in records] == [True, *[False, False, True] * 2]
    assert records[1].keys() == base and records[1]["aux_loss"] > 0
    assert records[3]["perplexity"] == pytest.approx(math.exp(records[3]["val_loss"]))
    assert [records[i]["val_tokens"] for i in (0, 3, 6)] == [64, 64, 128]  # the last one is larger


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_agreement_that_is_logged_is_the_rank_correlation_of_score_and_activation(bfloat16):
    model, batch = make_model(router="none").eval(), tokens(batch=8)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16), watch(model.routers()) as seen:
        agreement, objective = probe(model, [batch])
    x, routing = seen[1][0]
    activations = [(x.float() @ w.t()).norm(dim=1) for w in model.blocks[1].moe.w_gate]
    expected = spearman(routing.scores, torch.stack(activations, dim=1)).mean()
    assert agreement[1].item() == pytest.approx(expected.item(), abs=1e-6)
    if not bfloat16:
        assert objective == pytest.approx(sum(model(*batch)[1:]).item())


class NoisyRouter(ROUTERS["kmeans"]):
    """It draws noise, in evaluations, too, and never takes the first expert."""

    def __init__(self, config):
        assert type(config) is Config  # in a training as from a checkpoint
        super().__init__(config)
        self.register_buffer("mask", torch.tensor([-math.inf] + [0.0] * (config.n_expert - 1)))

    def select(self, scores):
        return super().select(scores + torch.rand_like(scores) + self.mask)


@pytest.mark.parametrize("router", ["lossfree", "noisy"])
def test_a_run_that_ctrl_c_interrupts_and_resume_continues_equals_an_uninterrupted_one(
        router, workdir, monkeypatch, capsys):
    monkeypatch.setitem(ROUTERS, "noisy", NoisyRouter)
    run_train(f"--router={router}", "--out_dir=out/whole")
    learning_rate = train.learning_rate

    def interrupt(step, c):  # Ctrl-C in step 4, which no evaluation follows
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return learning_rate(step, c)

    monkeypatch.setattr(train, "learning_rate", interrupt)
    # Ctrl-C reaches the tee of `2>&1 | tee`, too: nobody reads what is said
    monkeypatch.setattr(os, "write", mock.Mock(side_effect=BrokenPipeError))
    monkeypatch.setattr(train.tqdm, "write", mock.Mock(side_effect=BrokenPipeError))
    run_train(f"--router={router}", "--out_dir=out/a")
    os.write.assert_called_once_with(2, b"\nstopping after this step\n")
    assert capsys.readouterr().out.endswith(
        "saved at step 4; go on with no other flags than --out_dir=out/a --resume\n")
    resume()  # the settings come from the checkpoint
    whole = losses("out/whole")
    assert losses("out/a") == [*whole[:4], losses("out/a")[4], *whole[5:]]  # 4: evaluated as well
    assert losses("out/a")[4].items() > whole[4].items()
    assert same_state(checkpoint_of("out/a")["model"], checkpoint_of("out/whole")["model"])
    analyze.main(["out/a", "--tokens=64"])
    assert "is outdated" not in capsys.readouterr().out


def test_a_run_knows_the_code_of_the_project_and_of_its_own_router_as_imported_and_no_other(
        tmp_path, monkeypatch):
    monkeypatch.setattr(model, "__file__", str(tmp_path / "model.py"))
    monkeypatch.setattr(model, "SOURCES", {name: name.encode() for name in (
        "model", "routers", "prepare_data", "train", "other")})
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace())
    for text in ("as imported", "edited while it trains"):
        (tmp_path / "mine.py").write_text(text)
        model.router_class("mine")
    before = model.code_of("mine")
    assert before["router_code"] == hashlib.sha256(b"as imported").hexdigest()[:12]
    assert before["code"] == model.code_of("aux")["code"]
    for edited, changes in (("other", [0, 0]), ("mine", [0, 1]), ("train", [1, 0])):
        model.SOURCES[edited] = b"edited"
        after = model.code_of("mine")
        assert changes == [before[key] != after[key] for key in ("code", "router_code")]
        before = after


def test_kill_9_during_a_save_leaves_the_last_good_checkpoint(workdir):
    run_train("--out_dir=out/a", "--max_iters=3")
    python("-c", """
import os, signal, torch, train
def killed_half_way(state, path):
    open(path, "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = killed_half_way
train.main(["--out_dir=out/a", "--resume", "--max_iters=6"])""", code=-signal.SIGKILL)
    assert load_checkpoint("out/a/ckpt.pt")[1]["step"] == 3
    with open("out/a/log.jsonl", "a") as log:
        log.write('{"step": 5, "tra')  # killed in the middle of a line, too
    resume("--max_iters=6")  # the lock died with its process
    assert [r["step"] for r in read_log("out/a")] == [0, 1, 2, 3, 4, 5, 6]  # each step once
    assert checkpoint_of("out/a")["step"] == 6


def test_what_finds_no_room_for_a_while_is_written_at_the_next_evaluation(
        workdir, monkeypatch, capsys):
    full = RuntimeError("[enforce fail at inline_container.cc:858] . unexpected pos 64 vs 0")
    save = mock.Mock(side_effect=[full, mock.DEFAULT], wraps=torch.save)
    monkeypatch.setattr(torch, "save", save)
    run_train("--out_dir=out/a")
    sentence = r"step 3, val_loss .*\nnot saved: out/a/ckpt.pt could not be written \(no room"
    assert re.search(sentence, capsys.readouterr().out)
    assert [r["step"] for r in read_log("out/a")] == [0, 1, 2, 3, 4, 5, 6] and save.call_count == 2


def test_a_full_disk_leaves_the_last_file_and_no_half_of_a_new_one_and_is_no_other_error(tmp_path):
    path = tmp_path / "ckpt.pt"
    path.write_text("good")
    for error, raised in ((RuntimeError("inline_container.cc:858: unexpected pos 64"), OSError),
                          (RuntimeError("CUDA error: device-side assert triggered"), RuntimeError)):
        with pytest.raises(raised), prepare_data.replacing(path) as temporary:
            temporary.write_text("half")
            raise error
        assert path.read_text() == "good" and os.listdir(tmp_path) == ["ckpt.pt"]


def test_a_run_whose_folder_is_moved_goes_on_in_another_and_mixes_with_no_other_run(
        workdir, monkeypatch, capsys):
    run_train("--out_dir=out/a", "--max_iters=3")

    def moved(*args, steps=itertools.count(4), train_step=train.train_step):
        step = next(steps)
        if step == 4:
            os.rename("out/a", "out/b")
        elif step == 7:
            assert checkpoint_of("out/b")["step"] == 3
            os.rename("out/a.moved1", "out/c")
            os.mkdir("out/a.moved1")
            with prepare_data.lock(Path("out/a.moved1")):  # another run begins there
                pass
        elif step == 9:
            assert "another process writes" in refusal(
                prepare_data.lock, Path("out/a.moved1.moved1"))
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", moved)
    resume("--max_iters=9")
    printed = capsys.readouterr().out
    assert "out/a was moved away: this run goes on in out/a.moved1.\n" in printed
    assert printed.endswith("next: python analyze.py out/a.moved1.moved1\n")
    assert checkpoint_of("out/c")["step"] == 6 and os.listdir("out/a.moved1") == ["lock"]
    assert checkpoint_of("out/a.moved1.moved1")["step"] == 9
    assert len(read_log("out/a.moved1.moved1")) == 10 and not Path("out/a").exists()


def test_a_weight_that_is_not_finite_stops_the_run_and_never_replaces_a_good_checkpoint(
        workdir, monkeypatch):
    run_train("--out_dir=out/a", "--max_iters=3")

    def explode(model, *args):  # a loss may be fine, and the step that it led to not
        model.state_dict()["embed.weight"][0] = math.nan
        signal.raise_signal(signal.SIGTERM)  # a request to save in that very step
        return torch.tensor([1.0, 0.0])

    monkeypatch.setattr(train, "train_step", explode)
    handler = signal.getsignal(signal.SIGINT)
    sentence = refusal(resume, "--max_iters=9")  # no evaluation follows step 4
    assert re.search("not finite at step 4; .* is out/a/ckpt.pt", sentence)
    assert checkpoint_of("out/a")["step"] == 3
    assert signal.getsignal(signal.SIGINT) is handler  # a notebook can be interrupted again


def test_a_loss_whose_exponential_overflows_is_no_reason_to_stop():
    assert math.isfinite(model.perplexity(1000.0))


def test_a_tilde_in_out_dir_is_the_home_folder(workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir / "home"))
    run_train("--out_dir=~/a", "--max_iters=1")
    assert (workdir / "home/a/ckpt.pt").exists() and not Path("~").exists()
    train.main(["--out_dir=~/a", "--resume", "--max_iters=2"])


@pytest.mark.parametrize("on_windows", [False, True])  # where nothing locks a file
def test_overwrite_keeps_what_it_replaces_under_another_name(on_windows, workdir, monkeypatch):
    if on_windows:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    run_train("--out_dir=out/a", "--max_iters=3")
    run_train("--out_dir=out/a", "--overwrite", "--max_iters=2")
    os.remove("out/a/ckpt.pt")  # a log alone is not lost either
    run_train("--out_dir=out/a", "--overwrite", "--max_iters=1")
    assert [len(read_log(f"out/{name}")) for name in ("a.old1", "a.old2", "a")] == [4, 3, 2]
    assert checkpoint_of("out/a.old1")["step"] == 3


def test_a_model_writes_plain_text_and_on_a_terminal_each_token_on_the_colour_of_its_expert(
        workdir, monkeypatch, capsys):
    run_train("--out_dir=out/a", "--max_iters=1")
    capsys.readouterr()
    model.main(["out/a", "--start=\udcff7 is ", "--tokens=9"])  # \xff in the command: no UTF-8
    assert re.fullmatch(r"\ufffd7 is  \| [^\033]+\n", capsys.readouterr().out)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    model.main(["out/a", "--start=12345678901234567890", "--tokens=30"])
    cells = re.findall(r"48;2;(\d+;\d+;\d+)m.?\033\[0m", capsys.readouterr().out, re.DOTALL)
    net, _ = load_checkpoint("out/a/ckpt.pt")
    with watch(net.eval().routers()) as seen:
        net(torch.tensor([list(b"1234567890123456")]))
    first = [model.expert_colors(8)[i] for i in seen[1][0][1].indices[:, 0]]
    assert cells[:16] == [";".join(str(int(255 * value)) for value in color) for color in first]
    assert len(cells) == 20 + 30


# ---------------------------------------------------------------- several processes

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.parametrize("router", ["aux", "kmeans"])
def test_two_processes_equal_one(router, workdir):
    """The same gradient_accumulation_steps, so the same batches: losses, weights and router state
    agree up to the order of float sums."""
    flags = [f"--router={router}", "--gradient_accumulation_steps=4"]
    python(*TORCHRUN, ROOT / "train.py", *TOY, *flags, "--out_dir=out/two")
    run_train(*flags, "--out_dir=out/one")
    for one, two in zip(losses("out/one"), losses("out/two"), strict=True):
        # abs: a rank correlation near 0 moves by more than a thousandth of itself
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    one, two = checkpoint_of("out/one")["model"], checkpoint_of("out/two")["model"]
    assert all(torch.allclose(two[name], p, atol=1e-5) for name, p in one.items())


def test_two_compiled_processes_equal_one_that_is_not_compiled(workdir):
    """DDP cuts the compiled graph at its gradient buckets; small ones here, so that it must.
    Back end and tolerance as in test_the_compiled_model_is_one_graph_that_equals_the_eager_one."""
    Path("compiled.py").write_text("""
import functools, sys, torch, train
torch.compile = functools.partial(torch.compile, backend="aot_eager")
class DDP(train.DDP):
    def __init__(self, model, **options):
        super().__init__(model, **options | {"bucket_cap_mb": 1})
train.DDP = DDP
train.main(sys.argv[1:])""")
    flags = ["--router=aux", "--n_embd=64", "--d_expert=128", "--n_layer=3",
             "--gradient_accumulation_steps=2", "--dtype=bfloat16", "--max_iters=3"]
    python(*TORCHRUN, "compiled.py", *TOY, *flags, "--compile", "--out_dir=out/two")
    run_train(*flags, "--out_dir=out/one")
    for key, steps in (("train_loss", (1, 2, 3)), ("val_loss", (3,))):
        one, two = ([read_log(f"out/{name}")[step][key] for step in steps]
                    for name in ("one", "two"))
        assert one == pytest.approx(two, rel=2e-3)


def test_sigterm_to_torchrun_saves_once_and_the_run_can_go_on(workdir):
    flags = [*TOY, "--out_dir=out/a", "--gradient_accumulation_steps=2", "--max_iters=100000"]
    process = subprocess.Popen([sys.executable, *TORCHRUN, ROOT / "train.py", *flags],
                               stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not Path("out/a/ckpt.pt").exists() and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert out.count("stopped and saved at step") == 1
    step = int(re.search(r"saved at step (\d+)", out)[1])
    assert checkpoint_of("out/a")["step"] == step == read_log("out/a")[-1]["step"]


@NEEDS_CUDA
def test_a_run_on_the_gpu_resumes_there_and_loads_on_a_cpu(workdir):
    run_train("--device=cuda", "--out_dir=out/a", "--max_iters=3")
    resume("--max_iters=6")
    model, checkpoint = load_checkpoint("out/a/ckpt.pt")
    assert checkpoint["step"] == 6 and {p.device.type for p in model.parameters()} == {"cpu"}


# ---------------------------------------------------------------- a user's mistakes

def refusal(function, *args, **kwargs):
    """The one sentence with which it refuses these arguments."""
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    assert re.fullmatch(r".+\.", str(error.value))  # one line
    return str(error.value)


@contextlib.contextmanager
def inside(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def run_script(name, *flags, cwd="."):
    """python NAME FLAGS in the folder `cwd`, without the seconds that a process takes to import
    torch."""
    out, err, code, script = io.StringIO(), io.StringIO(), 0, str(ROOT / name)
    try:
        with (inside(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
              mock.patch.object(sys, "argv", [script, *map(str, flags)])):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.mark.parametrize("main, words", [
    (mock.Mock(side_effect=MemoryError()), "not enough memory"),
    (mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")), "not enough memory"),
    (lambda argv: Config(top_k=0), "top_k must be from 1 to n_expert"),
    (lambda argv: int("x"), None),
    (lambda argv: torch.optim.AdamW([torch.zeros(1)], betas=(2, 2)), None)])
def test_a_mistake_and_too_little_memory_are_a_sentence_and_a_bug_keeps_its_traceback(
        main, words, capsys):
    with pytest.raises(SystemExit if words else ValueError):
        prepare_data.cli(main)
    assert (words or "") in capsys.readouterr().err


@pytest.mark.parametrize("command, words", [
    ("train --router=best", "router must be one of aux, lossfree, kmeans, none, or the name"),
    ("train --router=../best", "a Python module beside model.py that registers a class"),
    ("train --router=test_all", "that registers a class under this name, not 'test_all'"),
    ("train --config=7b", "config must be one of tiny, small, 1b"),
    ("train --lr=1", "unrecognized arguments: --lr=1; python train.py --help lists the flags"),
    ("train --max_iters=many", "max_iters: invalid int value: 'many'"),
    ("train --learning_rate=nan", "learning_rate must be positive"),
    ("train --dataset=nothing", "data/nothing is not there; prepare_data.py makes it"),
    ("train --device=cuda:99", "device cuda:99 is not there"),
    ("train --block_size=100000", "block_size must be at most"),
    ("train --vocab_size=64", "such as 320"),
    ("train --vocab_size=0", "vocab_size must be positive"), ("train --top_k=9", "top_k must be"),
    ("train --n_head=3", "n_embd must be a multiple of 2 * n_head = 6"),
    ("train --d_expert=12", "d_expert must be a multiple of 8"),
    ("train --score_fn=tanh", "score_fn must be softmax or sigmoid"),
    ("train --z_loss_coef=0.1", "z_loss_coef must be 0.0 under kmeans, which does not read it"),
    ("train --compile --dtype=float32", "dtype must be bfloat16 with --compile"),
    ("train --resume", "out/kmeans/ckpt.pt is not there"),
    ("prepare_data --data=stdlib", "--help"), ("prepare_data --dataset=", "''"),
    ("prepare_data --dataset=nowhere", "'nowhere'"),
    ("prepare_data --tokenizer=gpt5", "TIKTOKEN_CACHE_DIR"),
    ("prepare_data --val_fraction=nan", "not nan"), ("prepare_data --glob=*.md", "not a folder"),
    ("prepare_data --name=../x", "another --name"),
    ("prepare_data --name=python", "another --name"),
    ("prepare_data --dataset=data --name=toy", "data/toy is there already; move it away, or pass"),
    ("prepare_data --dataset=data --glob=*.zzz", "holds no text file that matches *.zzz"),
    ("prepare_data --dataset=data --glob=/*", "--glob=/* is no pattern for names in a folder"),
    ("analyze", "there is no run in out/"), ("analyze nowhere", "no run is left"),
    ("analyze metrics.json --tokens=9", "--tokens goes with a run"),
    ("analyze --tokens=0", "--tokens must be positive"),
    ("analyze --device=abacus", "not a device"), ("analyze x --out_dir=/proc/x", "/proc/x"),
    ("model nothing", "nothing/ckpt.pt is not there"),
    ("model nothing --tokens=-1", "--tokens must be 0 or more")])
def test_a_users_mistake_is_a_sentence_and_exit_code_2_and_leaves_no_run(command, words, workdir):
    script, *flags = command.split()
    done = run_script(f"{script}.py", *(TOY if script == "train" else []), *flags)
    assert done.returncode == 2 and done.stdout == ""
    *left_out, sentence = done.stderr.splitlines()
    assert re.fullmatch(rf"{script}\.py: .+[.']", sentence) and words in sentence
    assert all(" is left out: " in line for line in left_out)
    assert not list(Path("out").glob("*/ckpt.pt"))


@pytest.mark.parametrize("flag, words", [
    ("--max_iters=6", "has done 6 steps of 6; pass a larger --max_iters"),
    ("--n_layer=3", "n_layer = 2"), ("--weight_decay=0.9 --max_iters=9", "weight_decay = 0.1"),
    ("--overwrite", "overwrite must be left out with --resume")])
def test_resume_refuses_what_would_make_it_another_run(flag, words, workdir):
    run_train("--out_dir=out/a")
    assert words in refusal(resume, *flag.split())


def test_resume_refuses_data_that_were_prepared_from_another_corpus(workdir):
    run_train("--out_dir=out/a")
    Path("data").unlink()
    Path("other.txt").write_text("another text, of some length\n" * 200)
    prepare("other.txt", name="toy")
    assert "data/toy is not the data" in refusal(resume, "--max_iters=9")


def test_a_folder_that_holds_a_run_or_is_in_use_by_one_is_refused(workdir):
    with train.claim(train.TrainConfig(out_dir="out/a")):
        assert "another process writes to out/a right now" in refusal(
            run_train, "--out_dir=out/a")
    with pytest.raises(ValueError, match="not finite") as kept:  # as a notebook keeps its error
        run_train("--out_dir=out/a", "--learning_rate=1e30")
    run_train("--out_dir=out/a", "--overwrite")
    assert "out/a already holds a run; pass --resume" in refusal(run_train, "--out_dir=out/a")
    os.remove("out/a/ckpt.pt")  # the log alone is worth something, but nothing to go on from
    assert "already holds a run; pass --overwrite" in refusal(run_train, "--out_dir=out/a")
    with mock.patch.object(train, "train_step", side_effect=MemoryError), pytest.raises(
            MemoryError):
        run_train("--out_dir=out/b")
    run_train("--out_dir=out/b", "--batch_size=1")  # a first step that failed leaves no run


@pytest.mark.parametrize("damage, words", [
    (lambda state: state["model"].pop("norm.weight"), "norm.weight"),
    (lambda state: state.pop("code"), "KeyError: 'code'"),
    (lambda state: state.pop("rng"), "KeyError: 'rng'"),
    (lambda state: state.clear(), "KeyError"), (None, "is damaged")])
def test_a_damaged_or_foreign_checkpoint_gets_one_sentence_that_names_it(damage, words, workdir):
    run_train("--out_dir=out/a", "--max_iters=3")
    if damage:
        with changed_checkpoint("out/a") as state:
            damage(state)
    else:
        os.truncate("out/a/ckpt.pt", 10_000)
    sentence = refusal(resume, "--max_iters=6")
    assert "out/a/ckpt.pt " in sentence and words in sentence


def test_a_field_that_was_added_to_config_since_has_its_default(workdir):
    run_train("--out_dir=out/a", "--max_iters=3")
    with changed_checkpoint("out/a") as state:
        del state["config"]["z_loss_coef"]
    assert load_checkpoint("out/a/ckpt.pt")[0].config.z_loss_coef == 0
    assert "z_loss_coef = 0.0" in refusal(resume, "--z_loss_coef=0.1", "--max_iters=6")


def test_help_names_every_field_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"--{field.name} " in text for field in train.fields(train.TrainConfig))
    assert "weight of the load-balancing loss (default: 0.01)" in text


def test_bench_prints_the_speed_beside_that_of_dense_products_and_writes_nothing(workdir, capsys):
    run_train("--bench")
    out = capsys.readouterr().out
    for words in ("ms a step", "tokens/s", "TFLOP/s", "MFU", "x the time of dense"):
        assert words in out
    assert not Path("out").exists()


# ---------------------------------------------------------------- data: texts become token files

EOT = 256  # ends a document in the tokenizer `bytes`


def write_folder(folder, texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def many(n, start=0):
    """n documents, all different, of a few lines each."""
    return {f"{i:03d}.txt": f"document {i}\n" * (1 + i % 5) for i in range(start, start + n)}


def prepared(folder, texts, **flags):
    """<folder>/data/texts, made from these texts in <folder>/texts."""
    return prepare(write_folder(folder / "texts", texts), data_root=folder / "data", **flags)


def documents(folder, *splits):
    """The texts in token files made with `bytes`, without the mark at their ends."""
    ids = np.concatenate([np.fromfile(folder / f"{split}.bin", "<u2") for split in splits])
    parts = np.split(ids, np.flatnonzero(ids == EOT) + 1)
    return [bytes(part[part != EOT].astype("u1")).decode() for part in parts if len(part)]


@pytest.fixture
def corpus(tmp_path):
    return prepared(tmp_path, many(60), val_fraction=0.1)


def byte_encoding(pattern=r"(?s).", eot=EOT):
    """A tiktoken encoding without merges."""
    return tiktoken.Encoding("test", pat_str=pattern, special_tokens={"<|endoftext|>": eot},
                             mergeable_ranks={bytes([i]): i for i in range(256)})


def test_a_sample_prints_as_text_whatever_ids_the_model_chose():
    ids = [*b"caf\xc3\xa9\n\t\x1b[31m", 0xC3, EOT, 257, 319, *"\u202e日".encode()]
    assert printable(get_tokenizer("bytes"), ids) == "café\n  [31m\ufffd 日"


def test_documents_come_back_whole_each_ends_with_endoftext_and_broken_or_double_ones_are_left_out(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_data, "PIECE", 64)
    texts = many(38) | {"a.txt": "\ufeffa\r\n\0日本👩‍👧", "b.txt": "one\n<|endoftext|>\ntwo"}
    out = prepared(tmp_path, texts | {
        "latin1.txt": b"caf\xe9", "half.txt": b"good line\n" * 100 + b"\xff" + b"good line\n" * 9,
        "copy.txt": texts["003.txt"], "empty.txt": ""}, val_fraction=0.2)
    assert sorted(documents(out, "train", "val")) == sorted(texts.values())
    assert all(np.fromfile(out / f"{s}.bin", "<u2")[-1] == EOT for s in ("train", "val"))
    train, val, *left_out = re.findall(r"\d+", capsys.readouterr().out.split(" of ")[1])[:4]
    assert int(train) + int(val) == 40 and left_out == ["2", "1"]


def test_the_content_of_a_document_alone_decides_its_split(tmp_path):
    texts = many(60)
    more = many(60, start=60) | {f"z{name}": text for name, text in texts.items()}
    few_val = set(documents(prepared(tmp_path / "few", texts, val_fraction=0.2), "val"))
    more_val = set(documents(prepared(tmp_path / "more", more, val_fraction=0.2), "val"))
    assert few_val and few_val == more_val & set(texts.values())
    splits = [prepare_data.split_of(hashlib.sha256(b"%d" % i).digest(), 0.05) for i in range(20000)]
    assert abs(splits.count("val") / 20000 - 0.05) < 0.005  # three standard deviations


@pytest.mark.parametrize("text, train", [
    ("äöüäö\r\n" * 50, "äöüäö\r\n" * 48), ("x" * 99 + "\n", "x" * 95)])  # at a line end if any
def test_the_tail_of_a_single_file_is_val(tmp_path, text, train):
    out = prepared(tmp_path, {"a.txt": text})
    assert documents(out, "train") == [train] and documents(out, "val") == [text[len(train):]]


@pytest.mark.parametrize("line", ["short\n", "longer than a piece 日本👩‍👧 " * 20 + "\n"])
def test_a_large_text_goes_through_in_small_pieces(tmp_path, monkeypatch, line):
    spy = mock.Mock(side_effect=encode)
    monkeypatch.setattr(prepare_data, "PIECE", 64)
    monkeypatch.setattr(prepare_data, "encode", spy)
    out = prepared(tmp_path, {"a.txt": line * 200})
    assert "".join(documents(out, "train", "val")) == line * 200
    assert max(len(call.args[1]) for call in spy.call_args_list) <= 2 * 64


def test_a_large_file_of_a_folder_counts_as_several_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "PIECE", 64)
    large = "".join(f"line {i}\n" for i in range(1000))
    out = prepared(tmp_path, {"a.txt": large, "b.txt": "small"})
    assert len(documents(out, "train")) > len(documents(out, "val")) > 2


def test_two_million_spaces_pass_a_tokenizer_that_gives_up_on_one_million():
    text = " " * 2_000_000 + "x"
    ids = encode(byte_encoding(r"\s+(?!\S)|\s+|\S+"), text)  # the pattern of gpt2
    assert ids.tolist() == list(text.encode())


def test_glob_picks_files_in_all_folders_but_hidden_ones_and_token_files(tmp_path):
    folder = write_folder(tmp_path, {name: "text" for name in (
        "a.md", ".b.md", "f.txt", "x.bin", "sub/c.md", "sub/d.txt", ".git/e.md")})
    found = ["".join(path.name[0] for path in prepare_data.find_files(folder, glob))
             for glob in ("*.md", "sub/*", "*")]
    assert found == ["ac", "cd", "afcd"]


def test_stdlib_is_the_source_of_the_standard_library_without_tests_and_python_adds_packages(
        tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "read_documents", lambda paths, val_fraction: paths)
    write_folder(tmp_path, {"site-packages/theirs.py": "x = 1", "my-packages/mine.py": "x = 1"})
    monkeypatch.setattr(sys, "path", [f"{tmp_path}/site-packages", f"{tmp_path}/my-packages"])
    stdlib, python = map(prepare_data.open_corpus, ("stdlib", "python"))
    names = {path.relative_to(sysconfig.get_path("stdlib")).as_posix() for path in stdlib}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert sum(path.stat().st_size for path in stdlib) > 5e6
    assert not {part for name in names for part in name.split("/")} & {"test", "site-packages"}
    assert set(python) == {*stdlib, tmp_path / "site-packages/theirs.py"}


def test_meta_json_describes_the_token_files_and_all_three_are_the_same_every_time(
        tmp_path, corpus):
    files = {path.name: path.read_bytes() for path in corpus.iterdir()}
    meta = json.loads(files["meta.json"])
    assert meta["dataset"] == str(tmp_path / "texts") and meta["tokenizer"]["name"] == "bytes"
    assert (meta["vocab_size"], meta["dtype"]) == (257, "uint16")
    for split in ("train", "val"):
        assert meta[f"n_{split}"] == len(files[f"{split}.bin"]) // 2
        assert meta["sha256"][f"{split}.bin"] == hashlib.sha256(files[f"{split}.bin"]).hexdigest()
    again = prepare(tmp_path / "texts", val_fraction=0.1, data_root=tmp_path / "again")
    assert files == {path.name: path.read_bytes() for path in again.iterdir()}


def test_a_vocabulary_above_65536_is_stored_as_uint32(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "get_tokenizer", lambda name: byte_encoding(eot=100_000))
    data = open_dataset(prepared(tmp_path, {"a.txt": "line\n" * 100}), 8, 100_096)
    assert data.meta["dtype"] == "uint32" and data.val.dtype == np.uint32
    assert data.val.tolist() == [*b"line\n" * 5, 100_000]


def test_max_tokens_bounds_both_splits_together_and_a_cut_document_counts(tmp_path, capsys):
    prepared(tmp_path / "one", {"a.txt": "line\n" * 500}, max_tokens=100)
    assert "95 train and 5 val tokens of 1 and 1 documents" in capsys.readouterr().out
    data = open_dataset(prepared(tmp_path, many(200), val_fraction=0.1, max_tokens=600), 8, 320)
    assert (len(data.train), len(data.val)) == (540, 60)


@pytest.mark.parametrize("failure, code, words", [
    (OSError(28, "No space left on device"), "2", "data/texts could not be made .*No space"),
    (lambda *args: signal.raise_signal(signal.SIGTERM), "130", "interrupted.")])
def test_a_full_disk_or_an_interrupt_leaves_no_half_of_a_data_set(
        failure, code, words, tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "texts", many(60))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "encode", mock.Mock(side_effect=failure))
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--dataset=texts"])
    with pytest.raises(SystemExit, match=code):
        prepare_data.cli(prepare_data.main)
    assert re.search(words, capsys.readouterr().err)
    assert os.listdir("data") == []


def test_a_download_is_checked_and_kept(tmp_path, monkeypatch):
    text = b"To be, or not to be\n" * 50
    replies = [OSError("no route"), io.BytesIO(b"404 page"), io.BytesIO(text)]  # and no fourth
    monkeypatch.setattr(prepare_data, "urlopen", mock.Mock(side_effect=replies))
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    for problem in ("no route", "another SHA-256"):
        assert problem in refusal(prepare, "shakespeare", data_root=tmp_path)
    for name in ("shakespeare", "again"):
        out = prepare("shakespeare", name=name, data_root=tmp_path)
        assert documents(out, "train") == ["To be, or not to be\n" * 48]


def test_fineweb_edu_is_streamed_to_max_tokens_or_to_where_it_breaks(
        tmp_path, monkeypatch, capsys):
    def load_dataset(path, name, split, streaming):
        yield from ({"text": f"web page {i}"} for i in range(5000))
        raise RuntimeError("read far beyond max_tokens")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    out = prepare("fineweb-edu", max_tokens=2000, val_fraction=0.1, data_root=tmp_path)
    assert documents(out, "val") and len(open_dataset(out, 8, 320).train) == 1800
    assert capsys.readouterr().err == ""
    out = prepare("fineweb-edu", name="broken", data_root=tmp_path)
    assert len(documents(out, "train", "val")) == 5000  # what arrived is kept
    assert "ends after 5000 documents" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    assert "pip install datasets" in refusal(prepare, "fineweb-edu", name="two", data_root=tmp_path)


def test_the_command_prepares_a_data_set_and_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "notes", many(60) | {"x.md": "not this one"})
    done = run_script("prepare_data.py", "--dataset=~/notes", "--val_fraction=0.1", "--glob=*.txt",
                      "--name=mine", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and done.stderr == ""
    train, val = re.search(r"^data/mine: .* of (\d+) and (\d+) documents", done.stdout).groups()
    assert int(train) + int(val) == 60
    assert open_dataset(tmp_path / "data/mine", 8, 257).meta["dataset"] == str(tmp_path / "notes")


@pytest.mark.parametrize("texts, part", [
    ({"a": "x"}, "pass another --val_fraction"), ({"a": b"ok\n" * 50 + b"\xc3"}, "as UTF-8"),
    ({"a": b"\xff", "b": b"\xfe"}, "2 broken files and 0 duplicates; pass another --val_fraction")])
def test_texts_that_make_no_two_splits_are_refused(tmp_path, texts, part):
    assert part in refusal(prepared, tmp_path, texts)
    assert not os.listdir(tmp_path / "data")


# ---------------------------------------------------------------- data: token files become batches

@pytest.mark.parametrize("damage, part", [
    (lambda d: (d / "val.bin").unlink(), "No such file.*val.bin"),
    (lambda d: os.truncate(d / "train.bin", 98), "49 train and"),
    (lambda d: (d / "meta.json").write_text("{}"), "KeyError"),
    (lambda d: (d / "meta.json").write_text((d / "meta.json").read_text().replace("sha256", "x")),
     "KeyError: 'sha256'")])
def test_a_damaged_data_set_is_refused(corpus, damage, part):
    damage(corpus)
    assert re.search(f"{part}.* move it away and make one", refusal(open_dataset, corpus, 8, 320))


BATCH = dict(seed=1, step=2, batch_size=4, block_size=16)
COUNT = np.arange(5000, dtype="<u2")  # as a token file: every token tells its place
COUNTING = Dataset(COUNT, COUNT[:1000], {"vocab_size": 5000})


def test_a_token_id_outside_the_vocabulary_is_reported_as_a_damaged_file():
    data = COUNTING._replace(meta={"vocab_size": 17})
    assert "train.bin is damaged" in refusal(get_batch, data, "train", **BATCH)


def test_targets_are_the_inputs_one_token_later_and_windows_lie_anywhere_in_their_split():
    data = Dataset(COUNT[:20], COUNT[:17], {"vocab_size": 20})
    x, y = get_batch(data, "train", **BATCH | {"batch_size": 200})
    assert x.shape == y.shape == (200, 16) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert set(x[:, 0].tolist()) == {0, 1, 2, 3}  # up to the last token of the split
    assert get_batch(data, "val", **BATCH)[1].tolist() == [list(range(1, 17))] * 4


def test_a_batch_is_a_pure_function_of_its_arguments():
    first, state = get_batch(COUNTING, "train", **BATCH)[0], torch.get_rng_state()
    np.random.seed(0)
    assert torch.equal(first, get_batch(COUNTING, "train", **BATCH)[0])
    assert torch.equal(state, torch.get_rng_state())
    for change in ({"seed": 2}, {"step": 3}, {"micro_step": 1}, {"rank": 1, "world_size": 2}):
        assert not torch.equal(first, get_batch(COUNTING, "train", **BATCH | change)[0])


@pytest.mark.parametrize("batch_size, world_size", [(1, 1), (7, 1), (64, 1), (4, 2), (3, 5)])
def test_evaluation_reads_the_same_windows_in_whatever_batches_and_processes(
        batch_size, world_size):
    batches = [batch for rank in range(world_size) for batch in eval_batches(
        COUNTING, 300, block_size=16, batch_size=batch_size, rank=rank, world_size=world_size)]
    assert all(torch.equal(y, x + 1) and len(x) <= batch_size for x, y in batches)
    starts = sorted(start for x, _ in batches for start in x[:, 0].tolist())
    assert starts == [i * 983 // 18 for i in range(19)]  # 19 windows of 16 tokens hold 300


@pytest.mark.parametrize("n_val", [17, 33, 1000])
def test_evaluation_windows_do_not_overlap_and_a_small_val_gives_all_it_has(n_val):
    data = COUNTING._replace(val=COUNT[:n_val])
    (x, _), = eval_batches(data, 10**9, block_size=16, batch_size=1000)
    assert len(x) == (n_val - 1) // 16 and (x[1:, 0] - x[:-1, 0] >= 16).all()


# ---------------------------------------------------------------- metrics with a known answer

def test_router_similarity_is_one_for_parallel_and_zero_for_orthogonal_directions():
    parallel = torch.randn(1, 16).expand(5, 16) * torch.tensor([1.0, 2, 3, -1, -2])[:, None]
    assert router_similarity(parallel).tolist() == pytest.approx([1, -0.2])  # 4 pairs alike of 10
    assert router_similarity(torch.eye(6)).tolist() == [0, 0]


def test_common_share_is_one_along_the_mean_zero_across_it_and_1_over_C_by_chance():
    mean = torch.tensor([0.0, 0, 2])
    assert analyze.common_share(torch.tensor([[0.0, 0, 5], [0, 0, -1]]), mean).item() == 1
    assert analyze.common_share(torch.eye(3)[:2], mean).item() == 0
    torch.manual_seed(0)
    assert analyze.common_share(torch.randn(5000, 64), torch.randn(64)).item() == pytest.approx(
        1 / 64, rel=0.1)


def test_load_std_and_violation_are_zero_for_an_even_load_and_greatest_for_one_expert():
    assert [v.item() for v in load_balance(torch.full((8,), 5.0))] == [0, 0]
    std, violation = load_balance(torch.tensor([40.0, 0, 0, 0]))
    assert (std.item(), violation.item()) == (pytest.approx(math.sqrt(3) / 4), 3)


def test_spearman_is_one_for_a_rising_function_minus_one_for_a_falling_nan_for_a_constant():
    a = torch.tensor([1.0, 2, 2, 3])                # ranks 0, 1.5, 1.5, 3
    b = torch.stack([a.exp(), -a ** 3, torch.ones(4), torch.tensor([1.0, 3, 2, 4])], dim=1)
    by_hand = 4.5 / math.sqrt(4.5 * 5)              # of the last one: its ranks are 0, 2, 1, 3
    assert spearman(a[:, None].expand(4, 4), b).tolist() == pytest.approx(
        [1, -1, math.nan, by_hand], nan_ok=True)


def test_coupling_by_rank_falls_where_activation_follows_the_score_and_is_flat_where_it_does_not():
    torch.manual_seed(0)
    scores = torch.rand(2000, 4)
    # the k-th largest of 4 uniform numbers is (5 - k) / 5 on average, relative to the mean 1/2
    assert analyze.coupling_by_rank(scores, 0.01 * scores).tolist() == pytest.approx(
        [1.6, 1.2, 0.8, 0.4], abs=0.03)
    strong = torch.tensor([1.0, 10, 100, 5]).expand(2000, 4)  # but for every token alike
    assert analyze.coupling_by_rank(scores, strong).tolist() == pytest.approx([1] * 4)


@pytest.mark.parametrize("indices, ratio", [([[0], [1]], 3), ([[1], [0]], 1 / 3)])
def test_selected_ratio_compares_selected_with_unselected_pairs(indices, ratio):
    activations = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    found = analyze.selected_ratio(activations, torch.tensor(indices))
    assert found.item() == pytest.approx(ratio)


def test_alignment_is_that_with_the_top_right_singular_vector_not_with_the_mean_row():
    rows = torch.eye(4, 10)
    w_gate = torch.stack([5 * rows, -5 * rows, rows[[1, 2, 3, 0]]], dim=1)  # mean row: another's
    directions = rows + torch.eye(10)[1] * torch.tensor([1.0, 0, 0, 0])[:, None]
    matched, mismatched = analyze.alignment(directions, w_gate)          # (4, 10), (4, 3, 10)
    # the first direction lies half way between the vectors of its own expert and of the second
    assert matched.item() == pytest.approx((3 + 0.5**0.5) / 4)
    assert mismatched.item() == pytest.approx(0.5**0.5 / 12, abs=1e-6)
    assert analyze.alignment(rows[:1], w_gate[:1])[1].isnan()


def test_unrouted_gradient_share_of_a_hand_made_gradient():
    gradient = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 5.0]])
    indices = torch.tensor([[0, 2], [2, 1]])
    assert analyze.unrouted_gradient_share(gradient, indices).item() == pytest.approx(16 / 50)
    assert analyze.unrouted_gradient_share(gradient * 0, indices).isnan()


def test_token_information_is_the_entropy_of_a_choice_by_the_id_alone_and_0_of_a_random_one():
    ids = torch.arange(16).repeat(1000)  # 16,000 tokens, four ids to an expert: entropy 2 bits
    assert analyze.token_information(ids, ids % 4, 4).item() == pytest.approx(2, abs=0.01)
    torch.manual_seed(0)
    ids, experts = torch.randint(100, (16384,)), torch.randint(16, (16384,))
    # by accident there are 99 * 15 / (2 * 16384 * ln 2) = 0.065 bits; what is left differs from
    # zero by sqrt(99 * 15) / (16384 ln 2) = 0.003 (chi-square of both, the shuffled one included)
    assert abs(analyze.token_information(ids, experts, 16).item()) < 0.01


def test_favourite_tokens_come_by_lift_and_only_from_those_seen_often_enough():
    ids = torch.tensor([7] * 30 + [8] * 30 + [9] * 19 + [5] * 30)
    experts = torch.tensor([0] * 30 + [0] * 20 + [1] * 10 + [1] * 19 + [1] * 10 + [0] * 20)
    text = {7: "def", 8: " ", 9: "rare", 5: "\n"}.get
    # expert 0 has 70 of 109 tokens: lift of 7 is 1.56, of 8 and 5 1.04; of 9 nothing is said
    found = analyze.favourite_tokens(ids, experts, 3, text)
    assert found[0][0] == "def" and set(found[0][1:]) == {"␣", r"\n"}
    assert found[1:] == [[], []]  # expert 2 got no token


def test_text_lines_are_whole_lines_of_text_with_the_expert_of_each_token():
    pieces = ["cut line\n", " some words of a", " line that is long enough\n", "===", "\n", "the"]
    lines = analyze.text_lines(torch.arange(6).repeat(9), torch.arange(6).repeat(9),
                               lambda token: pieces[token], T=6)
    assert lines == [[[pieces[1], 1], [pieces[2], 2]]] * 8


# ---------------------------------------------------------------- groups and tables

def a_run(perplexity=4.0, seed=1, step=6, tokens=64, val_tokens=128, **settings):
    """What metrics.json says of a run, as far as the tables need it."""
    settings = {"router": "aux", "seed": seed, "max_iters": 6, "top_k": 2, "z_loss_coef": 0.0,
                "data_sha256": "a", "val_sha256": "a", "code": "a", "router_code": "a",
                "measured_by": "a", "outdated": "no", "block_size": 16, "batch_size": 1,
                "gradient_accumulation_steps": 1, "eval_tokens": 64, "history": "none",
                "out_dir": f"out/{seed}"} | settings
    return {"router": settings["router"], "seed": seed, "step": step, "perplexity": perplexity,
            "val_tokens": val_tokens, "tokens": tokens, "settings": settings}


def test_runs_of_one_name_that_differ_in_the_seed_alone_are_one_group_and_no_copy_joins_it():
    runs = {"my-1": a_run(), "my-2": a_run(seed=2), "wide": a_run(top_k=4), "edited-3": a_run(
        seed=3), "my": a_run()}
    assert [(group.label, [run["seed"] for run in group.runs])
            for group in analyze.group_runs(runs)] == [
                ("my-1,2", [1, 2]), ("wide", [1]), ("edited-3", [3]), ("my", [1])]
    del runs["my"]
    assert analyze.group_runs(runs)[0].label == "my"


@pytest.mark.parametrize("change", [
    {"data_sha256": "b"}, {"code": "b"}, {"outdated": "yes"}, {"step": 3}, {"top_k": 4},
    {"measured_by": "b"}, {"tokens": 4096}, {"val_tokens": 64}, {"val_sha256": "b"},
    {"eval_tokens": 32},
    {"history": "max_iters was 3 until step 3"}])
def test_other_data_length_or_settings_are_another_group_and_a_line_says_so(change):
    groups = analyze.group_runs({"aux-1": a_run(), "aux-2": a_run(seed=2, **change)})
    (name, value), = change.items()
    mark = {"outdated": " (outdated)", "step": " (unfinished)"}.get(name, "")
    assert [group.label for group in groups] == ["aux-1", "aux-2" + mark]  # not both `aux`
    line = analyze.differing_settings(groups)
    shown = {"step": "steps done", "tokens": "tokens measured",
             "val_tokens": "tokens evaluated"}.get(name, name)
    assert re.search(rf"{shown} .+ \(aux-1\), {value} \(aux-2{re.escape(mark)}\)", line)
    assert ("So perplexity, " in line) == (name in ("val_sha256", "val_tokens"))
    assert ("Token information, " in line) == (name in ("val_sha256", "tokens"))


def test_groups_look_different_in_colour_or_marker_however_many_there_are():
    groups = analyze.group_runs({f"run{i}": a_run(router="aux", top_k=i) for i in range(40)})
    styles = {(group.style["color"], group.style["marker"]) for group in groups}
    assert len(styles) == 40
    assert groups[0].style["color"] == analyze.ROUTER_STYLES["aux"][0]


def test_the_table_marks_a_run_short_of_its_steps_and_has_no_mean_where_one_seed_lacks_a_value():
    rows = [("a", [a_run()]), ("b", [a_run(step=3), a_run() | {"perplexity": None}])]
    cells = [line.split(" | ") for line in analyze.markdown_table(rows).splitlines()[2:]]
    assert [row[3:5] for row in cells] == [["6", "4"], ["3 of 6, unfinished", "–"]]


def test_one_line_names_every_setting_in_which_the_runs_differ():
    groups = analyze.group_runs({"a-1": a_run(), "b": a_run(top_k=4, z_loss_coef=0.1), "a-2": a_run(
        seed=2), "c": a_run(router="kmeans")})
    assert analyze.differing_settings(groups) == (
        "Settings that differ: top_k 2 (a, c), 4 (b); z_loss_coef 0.0 (a, c), 0.1 (b).")
    assert "none but router or seed" in analyze.differing_settings(groups[::2])
    del groups[0].runs[0]["settings"]["top_k"]  # it is of older code
    assert "top_k – (a), 4 (b)" in analyze.differing_settings(groups[:2])


def test_differences_in_perplexity_are_paired_by_seed():
    aux, free = {1: 4.0, 2: 5.0, 3: 6.0}, {1: 4.04, 2: 5.1, 4: 9.0}  # +1 % and +2 %
    runs = {f"{name}-{seed}": a_run(perplexity, seed, router=name) for name, of in (
        ("aux", aux), ("lossfree", free)) for seed, perplexity in of.items()}
    groups = analyze.group_runs(runs)
    assert analyze.paired_differences(groups) == [
        "perplexity, lossfree - aux: +1.50 ± 0.50 % (paired by seed, n = 2)"]


@pytest.mark.parametrize("change, compared", [
    ({"router": "mine", "router_code": "b"}, True), ({"router_code": "b", "top_k": 4}, False),
    ({"top_k": 4, "tokens": 4096}, True),
    ({"router": "none", "top_k": 4}, False), ({"block_size": 32}, False)])  # another text
def test_groups_that_differ_in_one_thing_are_compared_and_a_router_with_its_code_is_one_thing(
        change, compared):
    runs = {f"{name}-{seed}": a_run(seed=seed, **settings)
            for name, settings in (("a", {}), ("b", change)) for seed in (1, 2)}
    assert len(analyze.paired_differences(analyze.group_runs(runs))) == compared


# ---------------------------------------------------------------- a model under observation

@pytest.mark.parametrize("router, changes, reached", [
    ("aux", {}, True), ("aux", {"score_fn": "sigmoid"}, True),
    ("lossfree", {"z_loss_coef": 0.1}, True), ("lossfree", {}, False),
    ("none", {"score_fn": "sigmoid"}, False), ("kmeans", {}, None)])
def test_only_an_auxiliary_loss_reaches_experts_that_a_token_does_not_go_to(
        router, changes, reached):
    found = analyze.gradient_shares(make_model(router=router, **changes).eval(), *tokens())
    for share in found:  # nan: there is no gradient
        assert share.isnan() if reached is None else 0 < share < 1 if reached else share == 0


def test_a_layer_is_what_router_and_experts_do_whatever_the_batches():
    model, (idx, targets) = make_model(router="kmeans").eval(), tokens()
    with watch(model.routers()) as seen:
        model(idx, targets)
    batches = [(idx[:1], targets[:1]), (idx[1:], targets[1:])]
    ids, layers = observe_layers(model, batches, torch.ones(2, 8), torch.zeros(2))
    assert torch.equal(ids, idx.flatten())
    for depth, (block, layer, [(x, routing)]) in enumerate(zip(model.blocks, layers, seen)):
        moe = block.moe
        assert layer.depth == depth and torch.equal(layer.indices, routing.indices)
        torch.testing.assert_close(
            (layer.directions, layer.w_gate, layer.w_up, layer.x, layer.scores),
            (moe.router.directions, moe.w_gate, moe.w_up, x, routing.scores))


def test_activations_are_norms_over_neurons_before_and_after_the_silu_and_of_the_product():
    moe, x = make_layer(), torch.randn(20, 32)
    found = expert_activations(x, moe.w_gate, moe.w_up)
    a, b = x @ moe.w_gate[3].t(), x @ moe.w_up[3].t()
    expected = [value.norm(dim=1) for value in (a, F.silu(a), F.silu(a) * b)]
    torch.testing.assert_close(found[:, :, 3], torch.stack(expected))
    shifted, = expert_activations(x, moe.w_gate, b_gate=torch.ones(8, 16))
    torch.testing.assert_close(shifted[:, 3], (a + 1).norm(dim=1))


class OwnRouter(ROUTERS["aux"]):
    """The same router, but its parameter is not called `weight`."""

    def __init__(self, config):
        super().__init__(config)
        self.rows = self._parameters.pop("weight")

    directions = property(lambda self: self.rows)

    def score(self, x):
        logits = x @ self.rows.t()
        return logits, logits.softmax(-1)


def test_an_own_routers_gradient_is_measured_whatever_its_parameter_is_called(monkeypatch):
    monkeypatch.setitem(ROUTERS, "own", OwnRouter)
    own, aux = make_model(router="own").eval(), make_model(router="aux").eval()
    for mine, other in zip(own.parameters(), aux.parameters()):
        mine.data.copy_(other.data)
    assert torch.equal(*(analyze.gradient_shares(model, *tokens()) for model in (own, aux)))
    for router in own.routers():  # rows that no gradient moves
        router.rows.requires_grad_(False)
    assert analyze.gradient_shares(own, *tokens()).isnan().all()
    for router in own.routers():  # nor logits that no gradient reaches
        router.rows.requires_grad_(True)
        monkeypatch.setattr(router, "score", lambda x, score=router.score: tuple(
            value.detach() for value in score(x)))
    assert analyze.gradient_shares(own, *tokens()).isnan().all()


# ---------------------------------------------------------------- the command, end to end

RUN = [*TOY, "--block_size=64", "--eval_tokens=64", "--final_eval_tokens=512"]
METRICS = (
    "load_std max_violation load_cv router_similarity router_similarity_signed common_share "
    "anisotropy coupling_spearman coupling_spearman_silu coupling_spearman_swiglu selected_ratio "
    "alignment_matched alignment_mismatched token_information expert_entropy"
).split()


@pytest.fixture(scope="module")
def workplace(toy, tmp_path_factory):
    """A folder with data/toy, and under out/ runs of three routers, one with two seeds."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "data").symlink_to(toy / "data")
    with inside(folder):
        for name in ("aux-1", "aux-2", "lossfree-1", "kmeans-1"):
            router, seed = name.split("-")
            train.main([*RUN, f"--router={router}", f"--seed={seed}", f"--out_dir=out/{name}"])
        shutil.copytree("out/aux-1", "out/aux-1.old1")  # as after --overwrite
    return folder


@pytest.fixture(scope="module")
def analysis(workplace):
    """(what the command printed, its folder of results, metrics.json)"""
    done = run_script("analyze.py", "--tokens=500", "--device=auto", cwd=workplace)
    assert done.returncode == 0, done.stderr
    folder = workplace / "out" / "analysis"
    return done, folder, json.loads((folder / "metrics.json").read_text(),
                                    parse_constant=pytest.fail)  # nan is no JSON


def analyze_in(folder, *flags):
    with inside(folder):
        analyze.main([str(flag) for flag in flags])


def test_without_arguments_every_run_has_every_metric_with_its_value_by_layer(analysis):
    assert set(analysis[2]) == {"aux-1", "aux-2", "lossfree-1", "kmeans-1"}
    for run in analysis[2].values():
        assert run["tokens"] == 512  # 500, up to whole sequences
        for key in METRICS:
            assert run[key] == pytest.approx(sum(run[f"{key}_by_layer"]) / 2)
        assert len(run["coupling_by_rank"]) == 8
        assert run["load_cv_sampling"] == pytest.approx(math.sqrt(7 / (2 * 512)))
    assert analysis[2]["kmeans-1"]["unrouted_gradient_share"] is None
    assert analysis[2]["lossfree-1"]["unrouted_gradient_share"] == 0
    # no curve has the last evaluation, which is on more tokens
    assert [record["step"] for record in analysis[2]["aux-1"]["log"]] == [0, 3]


def test_there_is_one_perplexity_a_run_that_of_its_last_evaluation(analysis, workplace):
    for name, run in analysis[2].items():
        last = read_log(workplace / "out" / name)[-1]
        assert run["perplexity"] == last["perplexity"] and run["val_tokens"] == 512
        assert run["load_std"] == pytest.approx(last["load_std"])


def test_the_tables_have_a_row_a_run_and_one_a_group(analysis):
    table = analysis[0].stdout.split("\n\n")[0].splitlines()
    assert [line.split(" | ")[0] for line in table] == [
        "| run", "| ---", "| aux-1", "| aux-2", "| kmeans-1", "| lossfree-1",
        "| aux, mean ± Std over seeds"]
    assert len({line.count("|") for line in table}) == 1
    assert "| aux | 1, 2 | 6 |" in table[-1] and table[-1].count("±") > 10


@pytest.mark.parametrize("name", analyze.FIGURES)
def test_the_figure_is_not_blank_and_is_drawn_again_from_metrics_json_alone(
        analysis, tmp_path_factory, name):
    read = pytest.importorskip("matplotlib.image").imread
    image = read(analysis[1] / name)
    assert image.shape[1] == 1350 and (image[..., :3] < 0.9).any(axis=-1).mean() > 0.02  # ink
    again = tmp_path_factory.getbasetemp() / "again"  # no data and no run there
    if not again.exists():
        again.mkdir()
        analyze_in(again, analysis[1] / "metrics.json", "--out_dir=.")
    assert np.array_equal(image, read(again / name))


@pytest.mark.filterwarnings("ignore:Data has no positive values")  # to draw on a log scale
def test_a_single_expert_gives_null_where_there_is_nothing_to_compare(workplace, tmp_path):
    with inside(workplace):
        train.main([*RUN, "--router=aux", "--n_expert=1", "--top_k=1", f"--out_dir={tmp_path}"])
        analyze.main([str(tmp_path), "--tokens=64", f"--out_dir={tmp_path}"])
    run, = json.loads((tmp_path / "metrics.json").read_text()).values()
    assert run["selected_ratio"] is None and run["alignment_mismatched"] is None
    assert run["load_cv"] == 0 and run["coupling_by_rank"] == pytest.approx([1])


def test_broken_runs_get_a_sentence_each_and_the_others_are_done(workplace, tmp_path):
    source = workplace / "out" / "aux-1"
    for name in ("own", "aux-1"):
        shutil.copytree(source, tmp_path / name)
    with changed_checkpoint(tmp_path / "own") as state:
        state["config"]["router"] = "mine"
    (tmp_path / "a.json").write_text("{}[")
    broken = (tmp_path / name for name in ("own", "a.json", "missing", "aux-1"))
    done = run_script("analyze.py", source, *broken, "--tokens=64", f"--out_dir={tmp_path}",
                      cwd=workplace)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    for line, sentence in zip(done.stderr.splitlines(), (
            "router must be one of", "not a metrics.json", "is not there",
            "there is another run called aux-1; rename one."), strict=True):
        assert "is left out: " in line and sentence in line
        assert "--" not in line  # no advice to pass a flag, as analyze.py has none for this
    assert list(json.loads((tmp_path / "metrics.json").read_text())) == ["aux-1"]


def test_a_bug_in_an_own_router_leaves_out_its_run_with_a_traceback(
        workplace, tmp_path, monkeypatch, capsys):
    with inside(workplace):
        monkeypatch.setitem(ROUTERS, "own", ROUTERS["aux"])
        train.main([*RUN, "--router=own", "--max_iters=1", f"--out_dir={tmp_path}/own"])
    monkeypatch.setitem(ROUTERS, "own", type("Own", (ROUTERS["aux"],), {"start": len}))
    analyze_in(workplace, tmp_path / "own", "out/aux-1", "--tokens=64", f"--out_dir={tmp_path}")
    printed = capsys.readouterr()
    assert "own is left out: Traceback" in printed.err and "len() takes" in printed.err
    assert "| aux-1 | aux |" in printed.out


def test_an_outdated_run_and_one_that_changed_are_named_and_the_home_folder_is_found(
        workplace, tmp_path, monkeypatch, capsys):
    shutil.copytree(workplace / "out/lossfree-1", tmp_path / "more")
    shutil.copytree(workplace / "out/aux-1", tmp_path / "shifted")
    with changed_checkpoint(tmp_path / "shifted") as state:
        state["evaluation"]["objective"] += 0.01
    now = model.code_of("lossfree")
    monkeypatch.setattr(train, "code_of", lambda router: now | {"code": "edited"})
    with inside(workplace):
        train.main([f"--out_dir={tmp_path}/more", "--resume", "--max_iters=9"])
    lossfree = ROUTERS["lossfree"]
    monkeypatch.setattr(lossfree, "score", lambda self, x, score=lossfree.score: tuple(
        -value for value in score(self, x)))
    monkeypatch.setenv("HOME", str(tmp_path))
    capsys.readouterr()
    analyze_in(workplace, "out/aux-1", "out/lossfree-1", "~/more", "~/shifted", "--tokens=64",
               "--out_dir=~/it")
    out, err = capsys.readouterr()
    assert re.findall(r"^(\S+) is outdated: the code", out, re.MULTILINE) == [
        "lossfree-1", "more", "shifted"] and err == ""
    changes = f"max_iters was 6 until step 6, code was {now['code']} until step 6."
    assert f"more changed on its way: {changes}" in out
    assert "aux-1 changed" not in out
    runs = json.loads((tmp_path / "it/metrics.json").read_text())
    assert not (workplace / "~").exists()
    assert analyze.group_runs(runs)[1].label == "lossfree-1 (outdated)"
    assert "lossfree-1 (outdated), shifted (outdated)), edited (more" in out
    # an edit may have changed gradients and nothing else
    assert [run["unrouted_gradient_share"] is None for run in runs.values()] == [
        False, False, True, False]


def test_seeds_with_other_evaluation_steps_are_one_curve_at_those_that_they_share():
    ax, group = mock.Mock(), analyze.group_runs({"a-1": a_run(), "a-2": a_run(seed=2)})[0]
    for run, points in zip(group.runs, ({0: 0.0, 5: 5.0, 10: 10.0}, {0: 0.0, 10: 30.0, 20: 42.0})):
        run["log"] = [{"step": step, "x": value} for step, value in points.items()]
    analyze.draw_curve(ax, group, "x")
    assert ax.plot.call_args.args[0].tolist() == [0, 160e-6]  # steps 0 and 10, in millions
    assert ax.plot.call_args.args[1].tolist() == [0, 20]


@pytest.mark.parametrize("change, marked", [
    ({"eval_tokens": 32}, True), ({"val_sha256": "b"}, True), ({"val_tokens": 64}, False)])
def test_curves_of_perplexity_and_balance_on_different_texts_are_marked(change, marked):
    groups = analyze.group_runs({"a": a_run(), "b": a_run(**change)})
    for run in (group.runs[0] for group in groups):
        run |= {"n_expert": 8, "log": [{"step": step} for step in (0, 5)]}
    fig, axes = mock.MagicMock(), [mock.MagicMock() for _ in range(3)]
    fig.subplots.return_value = axes
    analyze.draw_training(fig, groups)
    assert [ax.set_title.called for ax in axes] == [marked, marked, False]


def test_the_text_of_four_groups_is_shown_and_a_sentence_says_that_there_are_more(capsys):
    runs = {f"run{i}": a_run(top_k=i) | dict(
        n_expert=2, depth=[0], middle_depth=0, text=[[["x", 0]]], favourite_tokens=[["x"], []])
        for i in range(5)}
    fig = mock.MagicMock()
    analyze.draw_experts(fig, analyze.group_runs(runs))
    assert fig.add_subplot.call_count == 4 + 1  # and the list of favourite tokens
    assert "experts.png shows the first four of 5" in capsys.readouterr().err


# ---------------------------------------------------------------- any mixture of experts

try:
    import transformers
except ImportError:
    transformers = None
NEEDS_TRANSFORMERS = pytest.mark.skipif(transformers is None, reason="needs transformers")
E, K, C, H, T = 8, 2, 32, 16, 16
COMMON = dict(vocab_size=256, hidden_size=C, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=4, head_dim=8, num_experts_per_tok=K, max_position_embeddings=T,
              tie_word_embeddings=False, pad_token_id=None, bos_token_id=None, eos_token_id=None)
FAMILIES = {  # model type: the settings that are its own
    "olmoe": dict(num_experts=E, intermediate_size=H),
    "mixtral": dict(num_local_experts=E, intermediate_size=H),
    "qwen3_moe": dict(num_experts=E, moe_intermediate_size=H, norm_topk_prob=True),
    "deepseek_v3": dict(n_routed_experts=E, moe_intermediate_size=H, intermediate_size=H, n_group=1,
                        topk_group=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16,
                        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    "ernie4_5_moe": dict(moe_num_experts=E, moe_k=K, moe_intermediate_size=H, intermediate_size=H,
                         moe_num_shared_experts=1, moe_layer_start_index=0),
    "gpt_oss": dict(num_local_experts=E, intermediate_size=H, sliding_window=8)}


def save_hf(folder, model):
    """The model, and beside it a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    # Letters in random order: where two tokens see the same text, as in source code, their scores
    # are equal but for rounding, and so the rank correlation would hang on the machine.
    letters = random.Random(0).choices(string.ascii_letters, k=9 * T)
    (folder / "text.txt").write_text("".join(letters))
    return folder


def make_hf(kind, **changes):
    """A small random model, with weights so large that nothing drowns in rounding."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**{**COMMON, **FAMILIES.get(kind, {}), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, tensor in model.state_dict().items():
        if "norm" not in name:
            torch.nn.init.normal_(tensor, std=0.3)
    return model


def observe_hf(folder, text="text.txt", n_tokens=8 * T, dtype="auto"):
    return analyze.observe_hf(folder, text and str(folder / text), n_tokens, "cpu", dtype)


@torch.no_grad()
def by_definition(kind, model, tokens):
    """-> {depth: (the selected experts, fields of the Layer there, metrics)}, from the model's own
    tensors. Its selection bias, if any, is in no score."""
    inputs, layers = {}, {}
    for depth, block in enumerate(model.model.layers):
        if hasattr(block.mlp, "experts"):
            block.mlp.register_forward_pre_hook(
                lambda mlp, args, depth=depth: inputs.update({depth: args[0].flatten(0, 1)}))
    model(tokens.view(-1, T))
    for depth, x in inputs.items():                                      # (N, C)
        mlp = model.model.layers[depth].mlp
        router = mlp.router if kind == "gpt_oss" else mlp.gate
        logits = x @ router.weight.t() + getattr(router, "bias", 0)      # (N, E)
        scores = logits.sigmoid() if kind == "deepseek_v3" else logits.softmax(1)
        selection_bias = sum(bias.squeeze() for name, bias in router.state_dict().items()
                             if name.endswith("e_score_correction_bias"))
        chosen = (scores + selection_bias).topk(K).indices               # (N, K)
        W, b_gate = mlp.experts.gate_up_proj, torch.zeros(E, H)
        if kind == "gpt_oss":  # gate and up in turns, transposed, with a bias
            w_gate, b_gate = W[:, :, ::2].transpose(1, 2), mlp.experts.gate_up_proj_bias[:, ::2]
        else:
            w_gate = W[:, :H]                                            # (E, H, C)
        activation = (torch.einsum("ehc,nc->neh", w_gate, x) + b_gate).norm(dim=2)  # (N, E)
        fields = dict(x=x, directions=router.weight, scores=scores, w_gate=w_gate, b_gate=b_gate,
                      load=torch.bincount(chosen.flatten(), minlength=E))
        layers[depth] = chosen, fields, {
            "coupling_spearman": spearman(scores, activation).mean().item(),
            "anisotropy": (x.mean(0).square().sum() / x.square().sum(1).mean()).item()}
    return layers


@pytest.mark.parametrize("kind", FAMILIES)
@NEEDS_TRANSFORMERS
def test_a_mixture_in_transformers_is_observed_from_its_own_tensors(kind, tmp_path):
    model = make_hf(kind)
    run = observe_hf(save_hf(tmp_path, model))
    expected = by_definition(kind, model, run.tokens)
    assert [layer.depth for layer in run.layers] == list(expected)
    for layer, (chosen, fields, numbers) in zip(run.layers, expected.values()):
        assert layer.indices.sort().values.equal(chosen.sort().values)
        assert (layer.scores.gather(1, layer.indices).diff(dim=1) <= 0).all()  # best first
        for name, tensor in fields.items():
            torch.testing.assert_close(getattr(layer, name), tensor, rtol=1e-4, atol=1e-4)
        metrics = layer_metrics(layer, run.tokens)
        found = {key: metrics[key].item() for key in numbers}
        assert found == pytest.approx(numbers, rel=1e-3, abs=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = analyze.read_sequences(tokenizer, str(tmp_path / "text.txt"), 8 * T, T)
    logits = model(ids[:, :-1]).logits.flatten(0, 1)
    loss = F.cross_entropy(logits, ids[:, 1:].flatten()).item()
    assert math.log(run.about["perplexity"]) == pytest.approx(loss, rel=1e-4)


def test_nearly_even_gates_are_not_taken_for_those_of_other_logits():
    logits, others = torch.randn(2, 100, 64) * 0.3                                     # (N, E) each
    chosen, indices = logits.topk(8)                                                   # (N, K) each
    gates = chosen.softmax(-1)
    assert analyze.router_scores(logits, indices, gates).equal(logits.softmax(-1))
    assert "how it routes is not known" in refusal(analyze.router_scores, others, indices, gates)


def as_qwen3_moe(model):
    """Our model as transformers' Qwen3-MoE: the block is the same, the names are not."""
    twin = make_hf("qwen3_moe")
    state = {"model.embed_tokens.weight": model.embed.weight, "lm_head.weight": model.head.weight,
             "model.norm.weight": model.norm.weight}
    for i, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv_proj.weight.chunk(3)
        state |= {f"model.layers.{i}.{name}": tensor for name, tensor in {
            "input_layernorm.weight": block.norm1.weight, "self_attn.q_proj.weight": q,
            "post_attention_layernorm.weight": block.norm2.weight, "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v, "self_attn.o_proj.weight": block.attn.o_proj.weight,
            "self_attn.q_norm.weight": block.attn.q_norm.weight,
            "self_attn.k_norm.weight": block.attn.k_norm.weight,
            "mlp.gate.weight": block.moe.router.weight, "mlp.experts.down_proj": block.moe.w_down,
            "mlp.experts.gate_up_proj": torch.cat([block.moe.w_gate, block.moe.w_up], dim=1),
        }.items()}
    twin.load_state_dict(state)
    return twin


@NEEDS_TRANSFORMERS
def test_our_transformer_is_qwen3_moe_and_its_checkpoint_is_observed_as_our_run(tmp_path):
    model = make_model(router="aux", vocab_size=256, n_head=4, n_layer=3)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    twin = as_qwen3_moe(model)
    run = observe_hf(save_hf(tmp_path, twin))
    idx = run.tokens.view(-1, T)
    close(twin(idx).logits, model(idx, idx)[0])
    _, layers = observe_layers(model.eval(), [(idx, idx)], torch.zeros(3, E), torch.zeros(3))
    for ours, theirs in zip(layers, run.layers, strict=True):
        assert ours.depth == theirs.depth
        for name in ("directions", "w_gate", "x", "scores", "indices"):
            close(getattr(ours, name), getattr(theirs, name))


@NEEDS_TRANSFORMERS
def test_a_bfloat16_model_keeps_its_weights_and_is_measured_in_float32(tmp_path):
    save_hf(tmp_path, make_hf("olmoe").bfloat16())
    layer = observe_hf(tmp_path, text=None).layers[0]  # on the data set stdlib
    assert layer.w_gate.dtype == layer.directions.dtype == torch.bfloat16
    assert layer.w_gate.untyped_storage().nbytes() == 2 * layer.w_gate.nbytes  # a view: up is there
    assert layer.scores.dtype == torch.float32
    assert layer_metrics(layer, torch.arange(8 * T))["coupling_by_rank"].dtype == torch.float32


@NEEDS_TRANSFORMERS
def test_text_is_read_in_sequences_that_are_evenly_spaced(tmp_path, capsys):
    text = save_hf(tmp_path, make_hf("olmoe")) / "text.txt"
    text.write_text("".join(chr(ord("a") + i) * 40 for i in range(8)))
    run = observe_hf(tmp_path)
    assert "".join(map(run.text_of, run.tokens.tolist())) == "".join(c * T for c in "abcdefgh")
    assert "is short" not in capsys.readouterr().err
    text.write_text("a short text\n")
    assert len(observe_hf(tmp_path, n_tokens=T).tokens) == 12
    assert "is read in sequences of 12 tokens, not of 16" in capsys.readouterr().err


def with_one_layer_more(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))


@pytest.mark.parametrize("kind, changes, damage, sentence", [
    ("olmoe", {}, shutil.rmtree, "no model and tokenizer that transformers can load .OSError"),
    ("olmoe", {}, lambda folder: [path.unlink() for path in folder.glob("tokenizer*.json")],
     "there is no vocabulary"),
    ("olmoe", {}, with_one_layer_more, "weights are missing, such as model.layers.3."),
    ("olmoe", {"num_experts_per_tok": 1}, None, "it has one expert a token"),
    ("llama", {"intermediate_size": H}, None,
     r"it has no mixture of experts .*gate_up_proj \(E, 2H, C\)"),
    ("llama4_text", {"num_local_experts": E, "intermediate_size": H, "intermediate_size_mlp": H},
     None, "its experts are not called with hidden states")])
@NEEDS_TRANSFORMERS
def test_what_is_no_whole_mixture_of_experts_is_one_sentence(
        kind, changes, damage, sentence, tmp_path):
    save_hf(tmp_path / "model", make_hf(kind, **changes))
    if damage:
        damage(tmp_path / "model")
    assert re.search(sentence, refusal(observe_hf, tmp_path / "model"))


def test_without_transformers_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in refusal(observe_hf, Path("model"))


@NEEDS_TRANSFORMERS
def test_models_are_analysed_alone_and_beside_runs(workdir, capsys):
    olmoe, gpt_oss = (save_hf(workdir / kind, make_hf(kind)) for kind in ("olmoe", "gpt_oss"))
    Path("text.txt").write_text("without the end of a line " * 100)
    flags = [f"--hf={olmoe}", "--text=text.txt", "--tokens=64", "--dtype=float32", "--device=cpu"]
    analyze.main([f"--hf={gpt_oss}", *flags])
    out = capsys.readouterr().out
    assert "| olmoe | olmoe | – | – |" in out and "| gpt_oss | gpt_oss |" in out
    run_train("--router=aux", "--seed=1", "--out_dir=out/aux-1")
    analyze.main(["out/aux-1", *flags])
    runs = json.loads((workdir / "out/analysis/metrics.json").read_text())
    assert list(runs) == ["aux-1", "olmoe"] and runs["olmoe"]["coupling_spearman"] is not None
    assert runs["olmoe"].get("coupling_spearman_swiglu") is None and not runs["olmoe"]["log"]
    # no line of text to show, in the run neither: sequences of 16 bytes
    drawn = {path.name for path in (workdir / "out/analysis").glob("*.png")}
    assert drawn == set(analyze.FIGURES) - {"experts.png"}


# ---------------------------------------------------------------- the lesson

@pytest.fixture(scope="module")
def lesson():
    return json.loads((ROOT / "docs/lesson.ipynb").read_text())["cells"]


def test_the_lesson_has_at_most_fifteen_cells_and_stores_the_outputs_of_one_run_without_errors(
        lesson):
    code = [cell for cell in lesson if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(lesson) <= 15
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {o["output_type"] for o in outputs} == {"stream", "display_data"}  # no error
    assert {o["name"] for o in outputs if o["output_type"] == "stream"} == {"stdout"}  # no warning
    assert sum("image/png" in o.get("data", ()) for o in outputs) == 6
    # no path of a machine
    assert not re.search(r"/(home|root|tmp|work|Users)/", json.dumps(lesson))


def test_the_lesson_runs_from_top_to_bottom_and_its_numbers_are_what_its_text_says(
        lesson, toy, tmp_path, monkeypatch, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    for folder in ("data", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data/stdlib").symlink_to(toy / "data/toy")
    monkeypatch.chdir(tmp_path / "docs")
    monkeypatch.setattr(sys, "path", sys.path[:])
    it, printed = {}, []  # the notebook's names, what each cell prints
    for cell in (cell for cell in lesson if cell["cell_type"] == "code"):
        exec("".join(cell["source"]), it)
        it["steps"] = 4
        printed.append(capsys.readouterr().out)
    plt.close("all")
    chosen = it["chosen"]  # 1: one token moves the rows of two experts, along itself
    assert [printed[1].count(str([n * (i in chosen) for i in range(8)])) for n in (1, 32)] == [1, 2]
    assert printed[1].count("1.000000 to 1.000000") == 3
    own, another, reached = map(float, re.search(  # 2: as stored, since it takes a training
        r"own expert ([.\d]+), another ([.\d]+); (\d+) of 10,000", json.dumps(lesson)).groups())
    assert own > 1.2 * another and reached < 100
    model, switch, z_loss = (p / p.abs().max() for p in it["push"].values())  # 3
    assert ((model != 0).sum(1) == 2).all() and (switch != 0).all() and (z_loss < 0).all()
    assert max(model.sum(1).abs().max(), switch.sum(1).abs().max()) < 1e-5
    steps = it["bias"].abs() / 1e-3  # 4: whole steps, and the bias is back in its place
    assert torch.allclose(steps, steps.round(), atol=1e-3) and 0 < steps.max() < 4.001
    assert torch.equal(it["lossfree"].routers()[0].bias, it["bias"])
    assert it["tracks"].shape == (4, 8, 64) and it["cos"][-1] > it["cos"][0]  # 5
    assert (it["cells"].min(-1).values < 1).sum() == sum(map(len, it["lines"]))  # 6: every byte
    exercises = (ROOT / "docs/exercises.md").read_text()  # 7
    links = re.findall(r"\[exercise (\d), ([^\]]+)\]\(../docs/exercises.md\)", json.dumps(lesson))
    assert len(links) == 3 and all(f"{n}. **{name}**" in exercises for n, name in links)


# ---------------------------------------------------------------- no result misleads

def test_an_analysis_keeps_the_numbers_of_the_last_one_and_none_of_its_figures_beside_its_own(
        analysis, tmp_path, monkeypatch, capsys):
    (tmp_path / "one.json").write_text(json.dumps({"aux-1": analysis[2]["aux-1"]}))
    (tmp_path / "metrics.json").write_text("mine")
    (tmp_path / "training.png").write_text("of those")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # so there are no new figures
    analyze.main([str(tmp_path / "one.json"), f"--out_dir={tmp_path}"])
    assert "pip install matplotlib" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "metrics.json").read_text())) == ["aux-1"]
    assert (tmp_path / "metrics.old-1.json").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["lock", "metrics.json", "metrics.old-1.json",
                                            "one.json"]


def test_an_analysis_without_room_prints_its_table_and_leaves_the_last_one_as_it_was(
        analysis, tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.json").write_text("mine")
    monkeypatch.setattr(Path, "write_text", mock.Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError, match="metrics.json could not be written .No space left"):
        analyze.main([str(analysis[1] / "metrics.json"), f"--out_dir={tmp_path}"])
    assert "| kmeans-1 |" in capsys.readouterr().out
    assert (tmp_path / "metrics.json").read_text() == "mine"


def test_an_analysis_whose_table_nobody_reads_any_more_keeps_its_numbers(
        analysis, tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "print_table", mock.Mock(side_effect=BrokenPipeError))
    with pytest.raises(BrokenPipeError):
        analyze.main([str(analysis[1] / "metrics.json"), f"--out_dir={tmp_path}"])
    assert set(json.loads((tmp_path / "metrics.json").read_text())) == set(analysis[2])


def test_two_analyses_cannot_write_into_one_folder_at_once(analysis, workplace):
    with prepare_data.lock(analysis[1]):
        assert "another process writes to out/analysis right now" in refusal(
            analyze_in, workplace, "out/aux-1")


def test_ctrl_c_in_an_analysis_loses_no_run_that_was_measured(workplace, tmp_path, monkeypatch):
    observe = mock.Mock(side_effect=[analyze.observe_run, KeyboardInterrupt])
    monkeypatch.setattr(analyze, "observe_run", lambda *args, one=analyze.observe_run: (
        observe() and one(*args)))
    analyze_in(workplace, "out/aux-1", "out/aux-2", "--tokens=64", f"--out_dir={tmp_path}")
    assert list(json.loads((tmp_path / "metrics.json").read_text())) == ["aux-1"]


def test_a_run_is_added_to_the_metrics_json_of_earlier_ones(workplace, analysis, tmp_path):
    one = json.dumps({"earlier": analysis[2]["aux-1"]})
    (tmp_path / "metrics.json").write_text(one)
    (tmp_path / "more.json").write_text(one.replace("earlier", "another"))
    analyze_in(workplace, "out/aux-2", tmp_path / "more.json", tmp_path / "metrics.json",
               "--tokens=64", f"--out_dir={tmp_path}")
    assert list(json.loads((tmp_path / "metrics.json").read_text())) == [
        "aux-2", "another", "earlier"]


# ---------------------------------------------------------------- the README

README = (ROOT / "README.md").read_text()


def test_the_readmes_snippet_shows_the_identity(capsys):
    code = re.search(r"```python\n(import torch\nfrom model.*?)```", README, re.DOTALL)[1]
    torch.manual_seed(0)
    exec(code, {})
    cosines = torch.tensor([float(x) for x in re.findall(r"-?\d\.\d*", capsys.readouterr().out)])
    lossfree, aux = cosines.abs().view(2, 8 + 16 + 16)
    assert sorted(lossfree[:8].round(decimals=3).tolist()) == [0] * 6 + [1] * 2
    assert (torch.cat([lossfree[8:], aux]) - 1).abs().max() < 1e-3


def test_the_readmes_router_trains_and_goes_on_and_is_analyzed_by_the_commands_that_are_printed(
        workdir):
    for name in ("routers.py", "model.py", "prepare_data.py", "train.py", "analyze.py"):
        shutil.copy(ROOT / name, workdir)
    code = re.search(r"```python\n(# my_router\.py.*?)```", README, re.DOTALL)[1]
    Path("my_router.py").write_text(code)
    done = python("train.py", *TOY, "--router=my_router", "--max_iters=3")
    assert done.stdout.endswith("next: python analyze.py out/my_router\n")
    Path("my_router.py").write_text(code + "# edited")
    done = python("train.py", "--router=my_router", "--resume", "--max_iters=4")
    assert "This run changes on its way: max_iters was 3 until step 3, router_code" in done.stdout
    Path("my_router.py").write_text(code)
    # the table has a dash
    done = python("analyze.py", "out/my_router", env={"PYTHONIOENCODING": "ascii"})
    assert "is outdated" not in done.stdout  # a comment changes no number
    metrics = json.loads(Path("out/analysis/metrics.json").read_text())["my_router"]
    assert metrics["unrouted_gradient_share"] is None and metrics["perplexity"] > 0
    Path("my_router.py").unlink()
    assert "the name of a Python module beside model.py" in python(
        "model.py", "out/my_router", code=2).stderr.splitlines()[-1]


def test_the_numbers_of_the_results_page_are_those_of_its_metrics_json():
    text = (ROOT / "docs/results.md").read_text().split("On CPU A")[0]
    groups = analyze.group_runs(analyze.read_metrics(ROOT / "docs/metrics.json"))
    for group in groups[1:]:
        row, = re.findall(rf"^\| `{group.label}` \|.*", text, re.MULTILINE)
        for key, digits in (("perplexity", 3), ("load_cv", 3), ("max_violation", 3),
                            ("router_similarity", 3), ("coupling_spearman", 2),
                            ("selected_ratio", 3), ("token_information", 2)):
            values = group.values(key)
            assert f"| {values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f} |" in (
                re.sub(r" \(\d\.\d+\)", "", row)), key
    assert [group.label for group in groups] == ["none-1", "aux", "lossfree", "kmeans"]


def test_every_link_and_every_file_that_the_documents_name_is_there():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), f"{document.name}: {link}"
