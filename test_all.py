"""The specification: each test is one sentence about the project, and can fail.

    python -m pytest test_all.py            # everything, without GPU or network
    python -m pytest test_all.py -k kmeans  # what is said of one subject"""
import contextlib
import functools
import hashlib
import http.server
import io
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import types
import urllib.error
import zipfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import analyze
import prepare_data
import train
from model import (
    Config, SMoE, SMoETransformer, load_balance, load_checkpoint, read_checkpoint,
    router_similarity)
from prepare_data import Dataset, get_batch, get_tokenizer, open_dataset, prepare
from routers import ROUTERS, update_routers

ROOT = Path(__file__).parent
BALANCED = ("aux", "lossfree", "kmeans")  # the three routers of the paper
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]
SMALL = dict(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32, n_expert=8, top_k=2,
             d_expert=16)


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return SMoETransformer(Config(**{**SMALL, **changes}))


def make_layer(seed=0, **changes):
    """One SMoE layer with weights of order 1, so that no gradient drowns in rounding."""
    torch.manual_seed(seed)
    moe = SMoE(Config(**{**SMALL, **changes}))
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    if hasattr(moe.router, "centroids"):
        torch.nn.init.normal_(moe.router.centroids)
    return moe


def tokens(batch=4, seed=1, device="cpu"):
    torch.manual_seed(seed)
    shape = (2, batch, SMALL["block_size"])
    return torch.randint(SMALL["vocab_size"], shape).to(device)  # idx, targets


def naive_smoe(moe, x, indices, gates):
    """The definition in float64, token by token. x (N, C), gates (N, K) -> (N, C)."""
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for i, g in zip(indices[t], gates[t]):
            hidden = F.silu(moe.w_gate[i].double() @ x[t]) * (moe.w_up[i].double() @ x[t])
            y[t] = y[t] + g * (moe.w_down[i].double() @ hidden)
    return y


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---------------------------------------------------------------- the experts

def check_layer_against_loop(moe, x, tolerance):
    """Output and all gradients of a layer, router included, against naive_smoe in float64."""
    grad = torch.randn_like(x)
    x1 = x.clone().requires_grad_()
    y, _ = moe(x1[None])
    y.backward(grad[None])
    got = [y[0], x1.grad] + [p.grad.clone() for p in moe.parameters()]
    moe.zero_grad()
    x2 = x.clone().requires_grad_()
    routing = moe.router(x2)
    y = naive_smoe(moe, x2.double(), routing.indices, routing.gates.double())
    y.backward(grad.double())
    expected = [y, x2.grad] + [p.grad for p in moe.parameters()]
    for a, b in zip(got, expected, strict=True):  # with top_k = 1 the router's gradient is 0
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()
    return routing


@pytest.mark.parametrize("router", ROUTERS)
def test_the_layer_equals_a_naive_loop_over_experts_in_values_and_gradients(router):
    check_layer_against_loop(make_layer(router=router), torch.randn(24, 32), 1e-5)


def test_the_layer_equals_the_naive_loop_when_most_experts_are_empty():
    moe = make_layer(router="lossfree")
    moe.router.bias[:2] = 100.0  # all tokens to experts 0 and 1
    routing = check_layer_against_loop(moe, torch.randn(24, 32), 1e-5)
    assert set(routing.indices.unique().tolist()) == {0, 1}


def test_the_layer_equals_the_naive_loop_for_fewer_assignments_than_experts():
    check_layer_against_loop(make_layer(n_expert=64), torch.randn(1, 32), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("router", ROUTERS)
def test_the_layer_in_bfloat16_stays_within_a_hundredth_of_the_float64_loop(router, device):
    moe = make_layer(router=router, n_embd=64).to(device, torch.bfloat16)
    check_layer_against_loop(moe, torch.randn(64, 64).to(device, torch.bfloat16), 1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_in_bfloat16_too_the_other_experts_may_stay_empty(top_k, device):
    moe = make_layer(router="lossfree", n_embd=64, top_k=top_k).to(device, torch.bfloat16)
    moe.router.bias[3:3 + top_k] = 100.0  # all tokens to one expert, or to two
    x = torch.randn(64, 64).to(device, torch.bfloat16)
    routing = check_layer_against_loop(moe, x, 1e-2)
    assert routing.indices.unique().tolist() == list(range(3, 3 + top_k))


def test_weight_gradients_of_an_expert_lie_in_the_span_of_the_tokens_routed_to_it():
    moe = make_layer(n_expert=4, top_k=1)
    x = torch.randn(24, 32)  # fewer tokens than dimensions: their span is not everything
    indices = moe.router(x).indices[:, 0]
    y, _ = moe(x[None])
    y.backward(torch.randn_like(y))
    for i in indices.unique():
        mine = x[indices == i]
        basis = torch.linalg.qr(mine.t()).Q                         # (C, tokens)
        rows = torch.cat([moe.w_gate.grad[i], moe.w_up.grad[i]])    # (2H, C)
        assert relative_error(rows @ basis @ basis.t(), rows) < 1e-5


# ---------------------------------------------------------------- the coupling

@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid"])
@pytest.mark.parametrize("router", ["aux", "lossfree", "none"])
def test_for_one_token_router_rows_and_neuron_rows_have_gradients_along_the_token(router, score_fn):
    moe = make_layer(router=router, score_fn=score_fn, aux_loss_coef=0.0)
    x = torch.randn(1, 32)
    indices = moe.router(x).indices[0]
    y, _ = moe(x[None])
    y.backward(torch.randn_like(y))
    for rows in (moe.router.weight.grad[indices], moe.w_gate.grad[indices].flatten(0, 1),
                 moe.w_up.grad[indices].flatten(0, 1)):
        assert (F.cosine_similarity(rows, x).abs() - 1).abs().max() < 1e-5
    others = [i for i in range(8) if i not in indices]
    assert moe.router.weight.grad[others].abs().max() == 0
    assert moe.w_gate.grad[others].abs().max() == 0


def test_only_the_auxiliary_loss_sends_a_gradient_to_rows_that_were_not_selected():
    moe = make_layer(router="aux")
    x = torch.randn(1, 32)
    routing = moe.router(x)
    routing.aux_loss.backward()
    others = [i for i in range(8) if i not in routing.indices[0]]
    rows = moe.router.weight.grad[others]
    assert rows.norm(dim=1).min() > 0
    assert (F.cosine_similarity(rows, x).abs() - 1).abs().max() < 1e-5


# ---------------------------------------------------------------- the routers

@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_picks_k_different_experts_with_gates_that_sum_to_one(router):
    indices, gates, aux_loss = make_layer(router=router).router(torch.randn(50, 32))
    assert indices.dtype == torch.int64 and indices.shape == gates.shape == (50, 2)
    assert (indices[:, 0] != indices[:, 1]).all()
    assert torch.allclose(gates.sum(1), torch.ones(50))
    assert (aux_loss > 0) == (router == "aux")


@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid"])
def test_gates_of_a_learned_router_are_its_scores_normalised_over_the_selected(score_fn):
    router = make_layer(router="none", score_fn=score_fn).router
    x = torch.randn(50, 32)
    logits = x @ router.weight.t()
    s = logits.softmax(-1) if score_fn == "softmax" else logits.sigmoid()
    assert torch.allclose(router.scores(x), s)
    top = s.topk(2)
    indices, gates, _ = router(x)
    assert (indices == top.indices).all()
    assert torch.allclose(gates, top.values / top.values.sum(1, keepdim=True))


@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid"])
def test_auxiliary_loss_is_coef_times_e_times_sum_of_f_and_p(score_fn):
    router = make_layer(router="aux", aux_loss_coef=0.5, score_fn=score_fn).router
    x = torch.randn(50, 32)
    s = router.scores(x)
    p = (s / s.sum(1, keepdim=True)).mean(0)
    f = torch.bincount(router(x).indices.flatten(), minlength=8) / 100
    assert torch.allclose(router(x).aux_loss, 0.5 * 8 * (f * p).sum())


def test_auxiliary_loss_is_its_coefficient_at_perfect_balance_and_more_when_uneven():
    router = make_layer(router="aux", n_embd=8, n_head=1, top_k=1, aux_loss_coef=0.5).router
    with torch.no_grad():
        router.weight.copy_(10 * torch.eye(8))
    even, uneven = torch.eye(8), torch.eye(8)[[0, 0, 0, 0, 1, 1, 2, 3]]
    assert router(even).aux_loss.item() == pytest.approx(0.5)
    assert router(uneven).aux_loss.item() > 1.0


@pytest.mark.parametrize("router", ["lossfree", "kmeans"])
def test_the_bias_moves_by_the_sign_of_the_load_error(router):
    router = make_layer(router=router, bias_update_rate=0.25).router
    router.load.copy_(torch.tensor([9.0, 1, 4, 4, 4, 4, 6, 0]))  # mean 4
    router.update()
    assert router.bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, -0.25, 0.25]
    assert router.load.abs().max() == 0


@pytest.mark.parametrize("router", ["lossfree", "kmeans"])
def test_the_bias_changes_the_selection_and_leaves_the_gates_alone(router):
    router = make_layer(router=router).router
    x = torch.randn(50, 32)
    before = router(x)
    router.bias[:] = 7.0  # the same for all: nothing may change
    assert all(torch.equal(a, b) for a, b in zip(router(x), before))
    router.bias[3] += 100.0
    indices, gates, _ = router(x)
    assert (indices == 3).any(1).all()
    chosen = router.scores(x).gather(1, indices)
    kmeans = hasattr(router, "centroids")
    expected = (chosen / 0.1).softmax(1) if kmeans else F.normalize(chosen, p=1)
    assert torch.allclose(gates, expected, atol=1e-6)


def test_kmeans_selects_the_nearest_centroids_by_cosine_whatever_their_length():
    router = make_layer(router="kmeans").router
    router.centroids *= torch.rand(8, 1) * 10 + 0.1
    x = torch.randn(50, 32) * 3
    cosines = F.cosine_similarity(x[:, None], router.centroids[None], dim=-1)  # (N, E)
    assert torch.allclose(router.scores(x), cosines, atol=1e-6)
    indices, gates, _ = router(x)
    assert (indices == cosines.topk(2).indices).all()
    assert torch.allclose(gates, (cosines.topk(2).values / 0.1).softmax(1), atol=1e-6)


def test_kmeans_centroid_is_the_ema_of_the_hidden_states_routed_to_it():
    router = make_layer(router="kmeans", ema_decay=0.75).router
    before = router.centroids.clone()
    micro_batches = torch.randn(3, 5, 32)  # few tokens: some expert stays empty
    routed = [[] for _ in range(8)]
    for x in micro_batches:
        for row, experts in zip(x, router(x).indices):
            for i in experts:
                routed[i].append(row)
    load = torch.tensor([float(len(r)) for r in routed])
    assert torch.equal(router.load, load)
    router.load[0], router.total[0], routed[0] = 0, 0, []  # an empty expert, for certain
    router.update()
    for i, rows in enumerate(routed):
        mean = torch.stack(rows).mean(0) if rows else None
        expected = before[i] if mean is None else 0.75 * before[i] + 0.25 * mean
        assert torch.allclose(router.centroids[i], expected, atol=1e-6)
    assert router.total.abs().max() == 0


def test_kmeans_has_no_parameters_and_sends_a_gradient_to_the_hidden_states_only():
    router = make_layer(router="kmeans").router
    assert list(router.parameters()) == []
    x = torch.randn(10, 32, requires_grad=True)
    (router(x).gates ** 2).sum().backward()
    assert x.grad.abs().max() > 0 and not router.centroids.requires_grad


@pytest.mark.parametrize("router", ROUTERS)
def test_in_eval_mode_nothing_moves(router):
    model = make_model(router=router)
    idx, targets = tokens()
    model(idx, targets)  # training: counts
    model.eval()
    before = {k: v.clone() for k, v in [*model.named_buffers(), *model.named_parameters()]}
    model(idx, targets)
    update_routers(model.routers())
    after = dict([*model.named_buffers(), *model.named_parameters()])
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("router", ROUTERS)
def test_routers_work_in_float32_under_bfloat16_autocast(router):
    router = make_layer(router=router).router
    x = torch.randn(50, 32)
    expected, scores = router(x), router.scores(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = router(x)
    assert got.gates.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router.scores(x), scores)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_updating_all_routers_at_once_equals_updating_each():
    together, apart = make_model(), make_model()
    for model in (together, apart):
        model(*tokens())
    update_routers(together.routers())
    for router in apart.routers():
        router.update()
    for a, b in zip(together.state_dict().values(), apart.state_dict().values()):
        assert torch.equal(a, b)


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


@pytest.mark.parametrize("router", ROUTERS)
def test_a_token_has_no_influence_on_earlier_logits(router):
    model = make_model(router=router).eval()
    idx, targets = tokens()
    changed = idx.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 64
    a, b = model(idx, targets)[0], model(changed, targets)[0]
    assert torch.allclose(a[:, :10], b[:, :10], atol=1e-6)
    assert (a[:, 10:] - b[:, 10:]).abs().max() > 1e-3


def test_loss_is_the_mean_cross_entropy_without_the_routers_losses():
    model = make_model(router="aux")
    idx, targets = tokens()
    logits, loss, aux_loss = model(idx, targets)
    assert logits.shape == (4, 16, 64)
    assert torch.allclose(loss, F.cross_entropy(logits.reshape(-1, 64), targets.reshape(-1)))
    assert aux_loss.item() == pytest.approx(2 * 0.01, rel=0.5)  # two layers near balance


def test_without_targets_the_model_returns_the_last_position_only():
    model = make_model().eval()
    idx, targets = tokens()
    logits, loss, _ = model(idx)
    assert loss is None and logits.shape == (4, 1, 64)
    assert torch.allclose(logits[:, 0], model(idx, targets)[0][:, -1], atol=1e-6)


def test_generate_continues_beyond_the_block_size_and_follows_the_likeliest_token():
    model = make_model()
    idx, _ = tokens()
    out = model.generate(idx, 5, top_k=1)
    assert out.shape == (4, 21) and torch.equal(out[:, :16], idx) and model.training
    assert all(router.load.sum() == 0 for router in model.routers())  # a sample is no training
    model.eval()
    for n in range(16, 21):
        assert torch.equal(out[:, n], model(out[:, n - 16:n])[0][:, -1].argmax(-1))


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
    assert total == sum(p.numel() for p in model.parameters())
    assert total - active == 2 * 6 * 3 * 32 * 16  # layers, idle experts, matrices
    assert model.flops_per_token() == 6 * (
        2 * (4 * 32 * 32 + 2 * 3 * 32 * 16 + 8 * 32) + 64 * 32) + 6 * 2 * 16 * 32


def test_the_1b_preset_has_about_a_billion_parameters():
    with torch.device("meta"):
        config = Config(**{k: v for k, v in train.PRESETS["1b"].items() if hasattr(Config, k)})
        model = SMoETransformer.__new__(SMoETransformer)
        SMoETransformer.init_weights, init = lambda self: None, SMoETransformer.init_weights
        try:
            model.__init__(config)
        finally:
            SMoETransformer.init_weights = init
    assert 0.96e9 < model.num_params()[0] < 1.0e9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("router", ROUTERS)
def test_two_runs_of_a_training_step_agree_to_the_last_bit(router, device):
    """On CUDA at this size: attention's own backward pass adds atomically over long sequences."""
    c, states = train.TrainConfig(**SMALL), []
    for _ in range(2):
        model = make_model(router=router).to(device)
        autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
        optimizer = train.make_optimizer(model, c)
        batches = [tokens(device=device), tokens(seed=2, device=device)]
        train.train_step(model, model.routers(), optimizer, batches, autocast, c)
        states.append(model.state_dict())
    assert same_state(*states)


@NEEDS_CUDA
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] not in (9, 10),
    reason="grouped_mm has a kernel of its own on H100, H200 and B200 alone")
@pytest.mark.parametrize("router", ROUTERS)
def test_a_training_step_never_waits_for_the_gpu(router):
    c = train.TrainConfig(**SMALL)
    model = make_model(router=router).cuda()
    optimizer, batches = train.make_optimizer(model, c), [tokens(device="cuda")]
    step = lambda: train.train_step(model, model.routers(), optimizer, batches,
                                    torch.autocast("cuda", torch.bfloat16), c)
    step()  # the first one sets up the libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("router", BALANCED)
def test_each_router_overfits_one_batch(router):
    model = make_model(router=router)
    idx, targets = tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = model(idx, targets)[1].item()
    for _ in range(60):
        _, loss, aux_loss = model(idx, targets)
        optimizer.zero_grad()
        (loss + aux_loss).backward()
        optimizer.step()
        update_routers(model.routers())
    assert first > 4.0 and loss.item() < 0.3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("router", ROUTERS)
def test_the_compiled_model_is_one_graph_that_equals_the_eager_one(router, device, monkeypatch):
    """bfloat16, since grouped_mm compiles in nothing else. On the CPU with aot_eager: the default
    back end differs in the kernels it writes, for which it needs a C++ compiler and a minute."""
    torch._dynamo.reset()
    eager, model = make_model(router=router).to(device), make_model(router=router).to(device)
    compiler, graphs = "inductor" if device == "cuda" else "aot_eager", []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    options = dict(fullgraph=True, backend=backend)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, **options))
    compiled = train.compiled(model)
    for step in range(3):
        for m, run in ((eager, eager), (model, compiled)):
            m.train()
            with torch.autocast(device, torch.bfloat16):
                _, loss, aux_loss = run(*tokens(seed=step, device=device))
            (loss + aux_loss).backward()
            update_routers(m.routers())
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        assert relative_error(q.grad, p.grad) < 2e-2, name
    for a, b in zip(eager.routers(), model.routers()):
        assert relative_error(b.directions, a.directions) < 1e-3
    assert len(graphs) == 1  # no recompilation after the first step
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        for seed in range(2):
            model.eval()
            compiled(*tokens(seed=seed, device=device))
    assert len(graphs) == 2  # and one for evaluation


@pytest.mark.parametrize("device", DEVICES)
def test_the_routers_gradient_stays_float32_in_the_compiled_backward_pass(device, monkeypatch):
    torch._dynamo.reset()
    x, results = torch.randn(64, 64, device=device), []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for prepare_model in (lambda moe: moe, train.compiled):
        moe = make_layer(router="aux", n_embd=64, aux_loss_coef=1.0).to(device)
        run = prepare_model(moe)
        with torch.autocast(device, torch.bfloat16):
            _, aux_loss = run(x[None])
        aux_loss.backward()  # its way to the rows is the router's alone
        results.append(moe.router.weight.grad)
    assert relative_error(*results) < 1e-6  # 3e-3 where a product is in bfloat16


@pytest.mark.parametrize("change, field", [
    (dict(n_embd=30, n_head=4), "n_embd"), (dict(top_k=0), "top_k"), (dict(top_k=9), "top_k"),
    (dict(vocab_size=0), "vocab_size"), (dict(n_layer=-1), "n_layer"),
    (dict(d_expert=0), "d_expert"), (dict(d_expert=6), "d_expert"), (dict(n_embd=34), "n_embd"),
    (dict(router="best"), "router"),
    (dict(score_fn="tanh"), "score_fn"), (dict(ema_decay=1.0), "ema_decay"),
    (dict(ema_decay=-0.1), "ema_decay"), (dict(bias_update_rate=-1.0), "bias_update_rate"),
    (dict(aux_loss_coef=float("nan")), "aux_loss_coef"),
    (dict(gate_temperature=0.0), "gate_temperature")])
def test_config_refuses_a_bad_value_and_names_its_field(change, field):
    with pytest.raises(ValueError, match=f"^{field} must be"):
        Config(**{**SMALL, **change})


# ---------------------------------------------------------------- training

TOY = ["--dataset=toy", "--vocab_size=320", "--block_size=16", "--n_layer=2", "--n_head=2",
       "--n_embd=32", "--n_expert=8", "--top_k=2", "--d_expert=16", "--batch_size=2",
       "--max_iters=6", "--eval_interval=3", "--eval_iters=2", "--log_interval=1",
       "--warmup_iters=2", "--device=cpu"]


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
    """An empty working directory that sees data/toy; the signal handlers come back afterwards."""
    (tmp_path / "data").symlink_to(toy / "data")
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_train(*flags):
    """train.main in this process, on the toy settings; flags override."""
    train.main([*TOY, *flags])


def read_log(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]


def losses(out_dir):
    timing = ("tokens_per_s", "mfu")
    return [{k: v for k, v in record.items() if k not in timing} for record in read_log(out_dir)]


def python(*args, **kwargs):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True,
                          timeout=240, **kwargs)


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_log_has_one_object_a_step_and_the_metrics_at_evaluations(workdir):
    run_train("--router=aux", "--out_dir=out/a")
    records = read_log("out/a")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    base = {"step", "train_loss", "aux_loss", "lr", "tokens_per_s", "mfu"}
    metrics = {"val_loss", "perplexity", "load_std", "max_violation", "router_similarity"}
    assert [r.keys() == base | metrics for r in records] == [False, False, True] * 2
    assert records[0].keys() == base and records[0]["aux_loss"] > 0
    assert records[2]["perplexity"] == pytest.approx(math.exp(records[2]["val_loss"]), rel=1e-5)


def test_learning_rate_warms_up_linearly_and_falls_by_half_a_cosine():
    c = train.TrainConfig(max_iters=110, warmup_iters=10, learning_rate=1.0, min_lr=0.1)
    rates = [train.learning_rate(step, c) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[59] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))


def test_weight_decay_is_on_matrices_alone():
    model = make_model(router="lossfree")
    decayed, free = train.make_optimizer(model, train.TrainConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and free["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} == {2, 3} and {p.ndim for p in free["params"]} == {1}


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch():
    idx, targets = tokens(batch=8)
    c = train.TrainConfig(grad_clip=0.0, **SMALL)
    results = []
    for batches in ([(idx, targets)], list(zip(idx.split(2), targets.split(2)))):
        model = make_model(router="lossfree")
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        autocast = torch.autocast("cpu", enabled=False)
        train.train_step(model, model.routers(), optimizer, batches, autocast, c)
        results.append(model.state_dict())
    for name in results[0]:
        assert torch.allclose(results[0][name], results[1][name], atol=1e-6), name


@pytest.mark.parametrize("router", BALANCED)
def test_a_run_that_ctrl_c_interrupts_and_resume_continues_equals_an_uninterrupted_one(
        router, workdir, monkeypatch, capsys):
    run_train(f"--router={router}", "--out_dir=out/whole")
    steps = []

    def interrupt(routers):  # Ctrl-C in the middle of step 4, which no evaluation follows
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        update_routers(routers)

    monkeypatch.setattr(train, "update_routers", interrupt)
    run_train(f"--router={router}", "--out_dir=out/halves")
    assert ("stopped and saved at step 4; go on with: python train.py --out_dir=out/halves "
            "--resume") in capsys.readouterr().out
    assert read_checkpoint("out/halves/ckpt.pt")["step"] == 4
    train.main(["--out_dir=out/halves", "--resume"])  # the settings come from the checkpoint
    assert losses("out/halves") == losses("out/whole")
    whole, halves = (read_checkpoint(f"out/{name}/ckpt.pt") for name in ("whole", "halves"))
    assert same_state(whole["model"], halves["model"])
    assert whole["best_loss"] == halves["best_loss"] and halves["step"] == 6


def test_resume_forgets_what_the_log_says_after_the_checkpoint(workdir):
    run_train("--out_dir=out/a")
    expected = losses("out/a")
    log, state = Path("out/a/log.jsonl"), torch.load("out/a/ckpt.pt", weights_only=True)
    run_train("--out_dir=out/b", "--max_iters=3")
    # as if killed -9 in step 5, in the middle of a line
    state = torch.load("out/b/ckpt.pt", weights_only=True)
    state["config"]["max_iters"] = 6
    torch.save(state, "out/b/ckpt.pt")
    lines = log.read_text().splitlines(keepends=True)
    Path("out/b/log.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    train.main(["--out_dir=out/b", "--resume"])
    assert [r["step"] for r in losses("out/b")] == [r["step"] for r in expected]


def test_kill_9_during_a_save_leaves_the_last_good_checkpoint(workdir):
    code = """
import os, signal, sys, torch, train
save, calls = torch.save, []
def killed_half_way(state, path):
    save(state, path)
    calls.append(1)
    if len(calls) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = killed_half_way
train.main(sys.argv[1:])"""
    done = python("-c", code, *TOY, "--out_dir=out/a", env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    model, checkpoint = load_checkpoint("out/a/ckpt.pt")
    assert checkpoint["step"] == 3
    train.main(["--out_dir=out/a", "--resume"])
    assert read_checkpoint("out/a/ckpt.pt")["step"] == 6


def test_a_full_disk_gets_one_sentence_and_leaves_the_last_good_checkpoint(workdir, monkeypatch):
    run_train("--out_dir=out/a", "--max_iters=3")

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:858] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="^step 6 could not be saved to out/a/ckpt.pt"):
        train.main(["--out_dir=out/a", "--resume", "--max_iters=6"])
    assert read_checkpoint("out/a/ckpt.pt")["step"] == 3
    assert not list(Path("out/a").glob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_checkpoint(workdir, monkeypatch):
    run_train("--out_dir=out/a", "--max_iters=3")
    monkeypatch.setattr(train, "train_step", lambda *args: torch.tensor([float("nan"), 0.0]))
    with pytest.raises(SystemExit, match="not finite at step 4; .* is out/a/ckpt.pt"):
        train.main(["--out_dir=out/a", "--resume", "--max_iters=6"])
    assert read_checkpoint("out/a/ckpt.pt")["step"] == 3


def test_overwrite_starts_anew_in_a_directory_that_holds_a_run(workdir):
    run_train("--out_dir=out/a")
    run_train("--out_dir=out/a", "--overwrite", "--max_iters=2")
    assert len(read_log("out/a")) == 2 and read_checkpoint("out/a/ckpt.pt")["step"] == 2


TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


def train_in_processes(n, code, *flags):
    """`code`, then a training with each router in turn, in n processes, which start once."""
    Path("several.py").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from torch import distributed as dist
start = dist.init_process_group
dist.init_process_group = lambda backend: dist.is_initialized() or start(backend)
stop, dist.destroy_process_group = dist.destroy_process_group, lambda: None
{code}
for router in {BALANCED}:
    train.main([*sys.argv[1:], f"--router={{router}}", f"--out_dir=out/several-{{router}}"])
stop()
""")
    return python(*TORCHRUN, f"--nproc_per_node={n}", "several.py", *TOY, *flags)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_equal_one_for_all_routers(processes, workdir):
    """The same gradient_accumulation_steps, so the same batches: losses, weights and router state
    agree up to the order of float sums."""
    done = train_in_processes(processes, "", "--gradient_accumulation_steps=4")
    assert done.returncode == 0, done.stderr
    for router in BALANCED:
        run_train(f"--router={router}", f"--out_dir=out/{router}",
                  "--gradient_accumulation_steps=4")
        for a, b in zip(losses(f"out/{router}"), losses(f"out/several-{router}"), strict=True):
            assert a == pytest.approx(b, rel=1e-4)
        a, b = (read_checkpoint(f"out/{n}{router}/ckpt.pt")["model"] for n in ("", "several-"))
        assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_compiled_processes_equal_one_that_is_not_compiled_for_all_routers(workdir):
    """DDP cuts the compiled graph at its gradient buckets; small ones here, so that it must.
    Back end and tolerance as in test_the_compiled_model_is_one_graph_that_equals_the_eager_one."""
    shape = ["--n_embd=64", "--d_expert=128", "--n_layer=3", "--gradient_accumulation_steps=2",
             "--dtype=bfloat16", "--max_iters=3"]
    done = train_in_processes(2, """
import functools
torch.compile = functools.partial(torch.compile, backend="aot_eager")
class DDP(train.DDP):
    def __init__(self, model, **kwargs):
        super().__init__(model, **kwargs | {"bucket_cap_mb": 1})
train.DDP = DDP""", "--compile", *shape)
    assert done.returncode == 0, done.stderr
    for router in BALANCED:
        run_train(f"--router={router}", f"--out_dir=out/{router}", *shape)
        a, b = (read_log(f"out/{name}{router}") for name in ("", "several-"))
        assert [r["train_loss"] for r in a] == pytest.approx([r["train_loss"] for r in b], rel=2e-3)
        assert a[-1]["val_loss"] == pytest.approx(b[-1]["val_loss"], rel=2e-3)


@NEEDS_CUDA
def test_a_run_on_the_gpu_resumes_there_and_loads_on_a_cpu(workdir):
    run_train("--device=cuda", "--max_iters=3")
    train.main(["--resume", "--max_iters=6"])
    model, checkpoint = load_checkpoint("out/kmeans/ckpt.pt")
    assert checkpoint["step"] == 6 and {p.device.type for p in model.parameters()} == {"cpu"}
    idx = tokens()[0]
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cuda", torch.bfloat16):
        on_cpu, on_gpu = model.eval()(idx)[0], model.cuda()(idx.cuda())[0]
    assert relative_error(on_gpu.cpu(), on_cpu) < 2e-2


def test_sigterm_to_torchrun_saves_once_and_the_run_can_go_on(workdir):
    flags = [*TOY, "--out_dir=out/a", "--gradient_accumulation_steps=2", "--max_iters=100000"]
    process = subprocess.Popen(
        [sys.executable, *TORCHRUN, "--nproc_per_node=2", ROOT / "train.py", *flags],
        stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not Path("out/a/ckpt.pt").exists() and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert out.count("stopped and saved at step") == 1
    step = int(re.search(r"saved at step (\d+)", out)[1])
    assert read_checkpoint("out/a/ckpt.pt")["step"] == step == read_log("out/a")[-1]["step"]


def run_script(name, *flags, cwd="."):
    """python NAME FLAGS in the folder `cwd`, without the seconds that a process takes to import
    torch."""
    out, err, before, code = io.StringIO(), io.StringIO(), os.getcwd(), 0
    script = str(ROOT / name)
    os.chdir(cwd)
    try:
        with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
              mock.patch.object(sys, "argv", [script, *map(str, flags)])):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    finally:
        os.chdir(before)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.mark.parametrize("flags, words", [
    (["--router=best"], "router must be one of aux, lossfree, kmeans, none, not 'best'"),
    (["--config=7b"], "config must be one of tiny, small, 1b"),
    (["--lr=1"], "unrecognized arguments: --lr=1"), (["extra"], "unrecognized arguments: extra"),
    (["--max_iters=many"], "max_iters: invalid int value: 'many'"),
    (["--resume=yes"], "'yes' is neither True nor False"),
    (["--dataset=nothing"], "data/nothing has no"), (["--dtype=float16"], "dtype must be auto"),
    (["--device=tpu"], "device must be auto, cpu, cuda or cuda:N"),
    (["--device=cuda:99"], "device cuda:99 is not there"),
    (["--n_embd=33"], "n_embd must be a multiple of"), (["--top_k=9"], "top_k must be from 1 to"),
    (["--batch_size=0"], "batch_size must be positive"), (["--max_iters=-1"], "max_iters must be"),
    (["--learning_rate=-1"], "learning_rate must be positive"),
    (["--learning_rate=nan"], "learning_rate must be positive"),
    (["--ema_decay=1"], "ema_decay must be in"), (["--beta2=1"], "beta2 must be in"),
    (["--block_size=100000"], "too few for block_size"),
    (["--vocab_size=64"], "pass --vocab_size=320"),
    (["--compile", "--dtype=float32"], "dtype must be bfloat16 with --compile"),
    (["--out_dir=out/none", "--resume"], "out/none/ckpt.pt is not there"),
    (["--dtype=bfloat16", "--d_expert=12"], "multiples of 8 in bfloat16"),
    (["--seed=-1"], "seed must be from 0")])
def test_a_bad_flag_gets_one_sentence_and_exit_code_2(flags, words, workdir):
    done = run_script("train.py", *TOY, *flags)
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("train.py: ")
    assert not Path("out").exists()


def test_a_directory_that_holds_a_run_is_refused_and_kept(workdir):
    run_train("--out_dir=out/a")
    before = Path("out/a/log.jsonl").read_bytes()
    done = run_script("train.py", *TOY, "--out_dir=out/a")
    assert done.returncode == 2 and "already holds a run" in done.stderr
    assert Path("out/a/log.jsonl").read_bytes() == before


def test_resume_of_a_finished_run_says_how_to_go_on(workdir):
    run_train("--out_dir=out/a")
    done = run_script("train.py", "--out_dir=out/a", "--resume")
    assert done.returncode == 2
    assert "has done all its 6 steps; pass a larger --max_iters" in done.stderr


@pytest.mark.parametrize("flag, words", [
    ("--n_layer=3", "n_layer = 2"), ("--router=aux", "router = 'kmeans'"),
    ("--dataset=other", "dataset = 'toy'"), ("--config=small", "config = 'tiny'")])
def test_resume_refuses_another_shape_router_or_data_set(flag, words, workdir):
    run_train("--out_dir=out/a")
    done = run_script("train.py", "--out_dir=out/a", "--resume", flag)
    assert done.returncode == 2
    assert f"was trained with {words}" in done.stderr and done.stderr.count("\n") == 1


def test_resume_refuses_data_that_were_prepared_from_another_corpus(workdir):
    run_train("--out_dir=out/a")
    Path("data").unlink()
    Path("other.txt").write_text("another text, of some length\n" * 200)
    prepare("other.txt", name="toy")
    done = run_script("train.py", "--out_dir=out/a", "--resume", "--max_iters=9")
    assert done.returncode == 2 and "data/toy is not the data" in done.stderr


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign"])
def test_a_damaged_or_foreign_checkpoint_gets_one_sentence(damage, workdir):
    run_train("--out_dir=out/a")
    path = Path("out/a/ckpt.pt")
    whole = path.read_bytes()
    if damage == "foreign":
        torch.save({"state_dict": {}}, path)
    else:
        half = whole[:len(whole) // 2]
        path.write_bytes({"truncated": half, "empty": b"", "text": b"hello"}[damage])
    done = run_script("train.py", "--out_dir=out/a", "--resume")
    assert done.returncode == 2
    assert "is damaged or not a checkpoint" in done.stderr and done.stderr.count("\n") == 1


def test_help_names_every_field_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for field in train.fields(train.TrainConfig):
        assert f"--{field.name} " in text
    assert "weight of the load-balancing loss (default: 0.01)" in text


def test_booleans_are_flags_or_take_true_and_false():
    assert train.parse_args(["--overwrite"])[0].overwrite is True
    assert train.parse_args(["--overwrite=True"])[0].overwrite is True
    assert train.parse_args(["--overwrite=False"])[0].overwrite is False


def test_a_preset_gives_the_defaults_that_flags_override():
    c, _ = train.parse_args(["--n_layer=3", "--config=1b"])
    assert (c.n_layer, c.n_embd, c.n_expert, c.top_k) == (3, 1024, 64, 8)
    assert c.batch_size * c.block_size * c.gradient_accumulation_steps == 2**19  # tokens a step


def test_bench_prints_speed_and_memory_and_writes_nothing(workdir, capsys):
    run_train("--bench")
    out = capsys.readouterr().out
    for words in ("ms a step", "tokens/s", "TFLOP/s", "MFU", "peak memory", "x the time of dense"):
        assert words in out
    assert not Path("out").exists()


def test_the_main_command_prepares_its_corpus_trains_samples_and_sums_up(tmp_path):
    done = python(ROOT / "train.py", "--router=kmeans", "--max_iters=2", "--eval_iters=1",
                  "--batch_size=1", "--block_size=64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/stdlib/meta.json").exists()
    *_, perplexity, load, place = done.stdout.splitlines()
    assert perplexity.startswith("validation perplexity ") and load.startswith("load Std ")
    assert place == "the run lies in out/kmeans; next: python analyze.py out/kmeans"
    model, checkpoint = load_checkpoint(tmp_path / "out/kmeans/ckpt.pt")
    assert checkpoint["step"] == 2 and model.config.router == "kmeans"


# ---------------------------------------------------------------- data

EOT = 256
EXOTIC = ["", "\0", "a\r\nb\rc\n", "\ufeffBOM", "é e\u0301 ß", "\u2028\u2029\x85",
          "日本語 עברית 👩‍👩‍👧‍👦", "\U0010ffff\ud7ff\ue000\uffff",
          " " * 1000, "<|endoftext|>", "x" * 65, "é" * 200]


def write_folder(folder, texts):
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def many(n, start=0):
    """n documents, all different, of a few lines each."""
    return {f"{i:03d}.txt": f"document {i}\n" * (1 + i % 5) for i in range(start, start + n)}


def decode(tokens):
    """Documents of a token file made with the `bytes` tokenizer."""
    return bytes(tokens.astype("u1")[tokens != EOT]).decode(), \
        [bytes(d[d != EOT].astype("u1")).decode() for d in np.split(
            tokens, np.flatnonzero(tokens == EOT) + 1) if len(d)]


def documents(folder, split):
    return decode(np.fromfile(folder / f"{split}.bin", "<u2"))[1]


@pytest.fixture
def corpus(tmp_path):
    """60 documents, prepared with a tenth for validation."""
    write_folder(tmp_path / "texts", many(60))
    return prepare(tmp_path / "texts", val_fraction=0.1, name="corpus", data_root=tmp_path / "data")


def fails(*args, **kwargs):
    """The sentence with which `prepare` refuses these arguments."""
    with pytest.raises(ValueError) as error:
        prepare(*args, **kwargs)
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


# ---------------------------------------------------------------- tokenizers

@pytest.mark.parametrize("text", EXOTIC)
def test_bytes_tokenizer_gives_the_utf8_bytes_of_any_text_and_decodes_them_back(text):
    enc = get_tokenizer("bytes")
    ids = prepare_data.encode(enc, text)
    assert ids.tolist() == list(text.encode()) and enc.decode(ids.tolist()) == text


def test_bytes_tokenizer_has_257_tokens_the_last_of_which_separates_documents():
    enc = get_tokenizer("bytes")
    assert (enc.n_vocab, enc.eot_token, enc.decode([EOT])) == (257, 256, "<|endoftext|>")


def test_encode_halves_a_text_that_the_tokenizer_gives_up_on():
    class Fragile:
        def encode_to_numpy(self, text, disallowed_special):
            if len(text) > 7:
                raise ValueError("Max stack size exceeded for backtracking")
            return np.frombuffer(text.encode(), "u1").astype("u4")
    assert bytes(prepare_data.encode(Fragile(), "spaces " * 30).astype("u1")) == b"spaces " * 30


def test_an_unknown_tokenizer_is_refused_with_the_known_names():
    sentence = fails(tokenizer="gpt-2")
    assert all(name in sentence for name in ("'gpt-2'", "bytes", "gpt2", "cl100k_base"))


def test_a_vocabulary_that_cannot_be_fetched_says_how_to_bring_it(monkeypatch):
    def no_network(name):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    assert "TIKTOKEN_CACHE_DIR" in fails(tokenizer="gpt2")


# ---------------------------------------------------------------- documents and the split

def test_documents_come_back_whole_and_each_ends_with_endoftext(tmp_path):
    texts = {f"{i}.txt": text for i, text in enumerate(EXOTIC) if text} | many(30)
    write_folder(tmp_path / "texts", texts)
    out = prepare(tmp_path / "texts", val_fraction=0.3, data_root=tmp_path / "data")
    train, val = documents(out, "train"), documents(out, "val")
    assert train and val and sorted(train + val) == sorted(texts.values())
    assert all(np.fromfile(out / f"{s}.bin", "<u2")[-1] == EOT for s in ("train", "val"))


def test_special_token_text_inside_a_document_stays_plain_text(tmp_path):
    write_folder(tmp_path / "texts", {"a.txt": "a\n<|endoftext|>\nb\n" * 20})
    out = prepare(tmp_path / "texts", data_root=tmp_path / "data")
    tokens = np.concatenate([np.fromfile(out / f"{s}.bin", "<u2") for s in ("train", "val")])
    assert (tokens == EOT).sum() == 1 and tokens[-1] == EOT
    assert decode(tokens)[0].count("<|endoftext|>") == 20


def test_the_split_of_a_document_depends_on_its_content_alone(tmp_path):
    texts = many(60)
    write_folder(tmp_path / "a", texts)
    write_folder(tmp_path / "b", {f"z{name}": text for name, text in reversed(texts.items())}
                 | many(60, start=60))
    a, b = (set(documents(prepare(tmp_path / name, val_fraction=0.2, data_root=tmp_path / "data"),
                          "val")) for name in "ab")
    assert a and a == b & set(texts.values())


def test_the_share_of_validation_documents_is_val_fraction():
    digests = [hashlib.sha256(bytes([i % 256, i // 256])).digest() for i in range(20000)]
    share = np.mean([prepare_data.split_of(digest, 0.05) == "val" for digest in digests])
    assert abs(share - 0.05) < 0.005  # three standard deviations


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_single_file_splits_at_the_line_end_nearest_to_the_cut(tmp_path, newline):
    text = "".join(f"Zeile {i}: äöü{newline}" for i in range(1000))
    (tmp_path / "book.txt").write_bytes(text.encode())
    out = prepare(tmp_path / "book.txt", val_fraction=0.1, data_root=tmp_path / "data")
    train, val = documents(out, "train"), documents(out, "val")
    assert out.name == "book" and train + val == [train[0], val[0]] and train[0] + val[0] == text
    assert train[0].endswith(newline)
    assert 0 <= len(train[0].encode()) - 0.9 * len(text.encode()) < 30  # within one line


@pytest.mark.parametrize("text", ["first\nsecond\n", "first\nsecond", "\nx", "first\n\n"])
def test_a_single_file_of_two_lines_gives_one_to_each_split(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    out = prepare(tmp_path / "a.txt", data_root=tmp_path / "data")
    lines = text.splitlines(keepends=True)
    assert documents(out, "train") + documents(out, "val") == lines


def test_a_folder_with_one_text_splits_like_a_single_file(tmp_path):
    write_folder(tmp_path / "texts", {"a.txt": "line\n" * 100})
    out = prepare(tmp_path / "texts", data_root=tmp_path / "data")
    assert documents(out, "train") == ["line\n" * 95] and documents(out, "val") == ["line\n" * 5]


@pytest.mark.parametrize(
    "line", ["short 日本\n", "longer than a piece 日本 " * 20 + "\n", "日本👩‍👧 "])
def test_a_large_file_read_in_pieces_gives_the_same_text(tmp_path, monkeypatch, line):
    monkeypatch.setattr(prepare_data, "PIECE_BYTES", 64)
    (tmp_path / "file").write_text(line * 50, encoding="utf-8", newline="")
    with open(tmp_path / "file", "rb") as file:
        pieces = list(prepare_data.read_text(file, (tmp_path / "file").stat().st_size))
    assert "".join(text for text, _ in pieces) == line * 50 and len(pieces) > 5
    assert max(len(text.encode()) for text, _ in pieces) <= 2 * 64 + 3
    assert line[-1] != "\n" or len(line) > 64 or all(text[-1] == "\n" for text, _ in pieces)


def test_broken_files_and_duplicates_are_left_out_and_counted(tmp_path, capsys):
    texts = many(40)
    write_folder(tmp_path / "texts", texts | {
        "latin1.txt": b"caf\xe9", "copy.txt": texts["003.txt"], "empty.txt": ""})
    (tmp_path / "texts" / "link.txt").symlink_to("004.txt")
    out = prepare(tmp_path / "texts", val_fraction=0.2, data_root=tmp_path / "data")
    assert sorted(documents(out, "train") + documents(out, "val")) == sorted(texts.values())
    summary = capsys.readouterr().out
    assert "40 documents" in summary and "1 broken and 2 duplicate" in summary


def test_glob_picks_files_by_name_and_hidden_files_and_token_files_are_no_text(tmp_path, corpus):
    folder = write_folder(tmp_path / "mixed", many(3) | {"a.md": "a", ".b.md": "b"})
    write_folder(folder / "sub", {"c.md": "c", "d.txt": "d"})
    write_folder(folder / ".git", {"e.md": "e"})
    os.rename(corpus, folder / "prepared")
    found = [[p.name for p in prepare_data.find_files(folder, glob)]
             for glob in ("*.md", "sub/*", "*")]
    assert found[:2] == [["a.md", "c.md"], ["c.md", "d.txt"]] and len(found[2]) == 3 + 3


def test_stdlib_is_the_source_of_the_standard_library_without_its_tests(monkeypatch):
    monkeypatch.setattr(prepare_data, "read_documents", lambda paths, val_fraction: paths)
    paths, n_bytes = prepare_data.open_corpus("stdlib", None, 0.05, Path("data"))
    names = {p.relative_to(sysconfig.get_path("stdlib")).as_posix() for p in paths}
    assert n_bytes > 5e6 and {"argparse.py", "json/decoder.py"} <= names
    assert all(name.endswith(".py") for name in names)
    assert not {part for name in names for part in name.split("/")} & {
        "test", "tests", "idle_test", "site-packages"}


# ---------------------------------------------------------------- token files

def test_meta_json_describes_the_token_files(corpus):
    meta = json.loads((corpus / "meta.json").read_text())
    sizes = {s: (corpus / f"{s}.bin").stat().st_size // 2 for s in ("train", "val")}
    assert meta["tokenizer"]["name"] == "bytes" and get_tokenizer("bytes").n_vocab == 257
    assert (meta["vocab_size"], meta["dtype"]) == (257, "uint16")
    assert (meta["n_train"], meta["n_val"]) == (sizes["train"], sizes["val"])
    assert meta["sha256"] == {name: hashlib.sha256((corpus / name).read_bytes()).hexdigest()
                              for name in ("train.bin", "val.bin")}


def test_the_same_corpus_gives_the_same_bytes_in_all_three_files(tmp_path, corpus):
    before = {name: (corpus / name).read_bytes() for name in prepare_data.FILES}
    prepare(tmp_path / "texts", val_fraction=0.1, name="corpus", data_root=tmp_path / "data")
    assert before == {name: (corpus / name).read_bytes() for name in prepare_data.FILES}


def test_the_bytes_do_not_depend_on_how_pieces_are_batched(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(prepare_data, "BATCH_PIECES", 1)
    again = prepare(tmp_path / "texts", val_fraction=0.1, name="b", data_root=tmp_path / "data")
    assert (again / "train.bin").read_bytes() == (corpus / "train.bin").read_bytes()


def test_a_vocabulary_above_65536_is_stored_as_uint32(tmp_path, monkeypatch):
    big = tiktoken.Encoding("big", pat_str=r"(?s).", special_tokens={"<|endoftext|>": 100000},
                            mergeable_ranks={bytes([i]): i for i in range(256)})
    monkeypatch.setattr(prepare_data, "get_tokenizer", lambda name: big)
    (tmp_path / "a.txt").write_text("line\n" * 100)
    out = prepare(tmp_path / "a.txt", data_root=tmp_path / "data")
    data = open_dataset(out, 8, 100096)
    assert data.meta["dtype"] == "uint32" and data.val.dtype == np.uint32
    assert data.val[-1] == 100000 and data.val[:-1].tolist() == list(b"line\n" * 5)


@pytest.mark.parametrize("single", [True, False])
def test_max_tokens_bounds_both_splits_together(tmp_path, single):
    write_folder(tmp_path / "texts", {"a.txt": "line\n" * 500} if single else many(200))
    out = prepare(tmp_path / "texts", val_fraction=0.1, max_tokens=600, data_root=tmp_path / "data")
    data = open_dataset(out, 8, 320)
    assert (len(data.train), len(data.val)) == (540, 60)


def test_a_failure_or_an_interrupt_leaves_the_old_data_set_and_no_temporary_files(
        tmp_path, corpus, monkeypatch):
    before = (corpus / "train.bin").read_bytes()
    write_folder(tmp_path / "other", many(90))
    for failure in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        def encode(enc, text, failure=failure):
            raise failure
        monkeypatch.setattr(prepare_data, "encode", encode)
        with pytest.raises((ValueError, KeyboardInterrupt), match="No space left|^$"):
            prepare(tmp_path / "other", name="corpus", data_root=tmp_path / "data")
        assert os.listdir(tmp_path / "data") == ["corpus"]
        assert (corpus / "train.bin").read_bytes() == before
        open_dataset(corpus, 8, 320)


def test_a_failed_rename_puts_the_old_data_set_back(tmp_path, corpus, monkeypatch):
    rename, before = os.rename, (corpus / "train.bin").read_bytes()

    def fragile(source, target):
        if Path(source).name == "new":
            raise PermissionError(13, "Permission denied")
        rename(source, target)
    monkeypatch.setattr(os, "rename", fragile)
    fails(write_folder(tmp_path / "other", many(90)), name="corpus", data_root=tmp_path / "data")
    assert (corpus / "train.bin").read_bytes() == before and len(os.listdir(tmp_path / "data")) == 1


def test_kill_9_leaves_the_old_data_set_whole_and_its_leftovers_are_removed_later(tmp_path, corpus):
    before = (corpus / "train.bin").read_bytes()
    write_folder(tmp_path / "other", many(90))
    code = ("import os, prepare_data as p; p.publish = lambda *_: os.kill(os.getpid(), 9)\n"
            f"p.prepare({str(tmp_path / 'other')!r}, name='corpus', data_root='data')")
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                             env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
    assert process.returncode == -signal.SIGKILL
    assert (corpus / "train.bin").read_bytes() == before
    left, = (tmp_path / "data").glob(".corpus.tmp-*")
    os.utime(left, (time.time() - 7200,) * 2)
    prepare(tmp_path / "texts", name="third", val_fraction=0.1, data_root=tmp_path / "data")
    assert sorted(os.listdir(tmp_path / "data")) == ["corpus", "third"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    texts = write_folder(tmp_path / "data", {}) / "texts"
    write_folder(texts, many(60))  # the corpus itself lies where the token files would go
    assert "pass another --name" in fails(texts, val_fraction=0.1, data_root=tmp_path / "data")
    assert len(os.listdir(texts)) == 60
    assert prepare(texts, name="t", val_fraction=0.1, data_root=tmp_path / "data").name == "t"


# ---------------------------------------------------------------- downloads and streams

class Server(http.server.BaseHTTPRequestHandler):
    replies = []  # bytes to send, one a request

    def do_GET(self):
        body = self.replies.pop(0)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_download_is_checked_and_retried_and_then_kept(tmp_path, monkeypatch):
    right = b"To be, or not to be\n" * 50
    monkeypatch.setattr(Server, "replies", [b"404 page", right[:100], right])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/input.txt"
        monkeypatch.setitem(prepare_data.DOWNLOADS, "shakespeare",
                            (url, "s.txt", hashlib.sha256(right).hexdigest()))
        out = prepare("shakespeare", data_root=tmp_path)
        prepare("shakespeare", data_root=tmp_path)  # no fourth request: the file was kept
        server.shutdown()
    assert documents(out, "train")[0] + documents(out, "val")[0] == right.decode()
    assert sorted(os.listdir(tmp_path)) == ["s.txt", "shakespeare"]


def test_without_network_the_message_names_the_file_its_place_and_the_command(
        tmp_path, monkeypatch):
    def urlopen(url, timeout):
        raise urllib.error.URLError("Name or service not known")
    monkeypatch.setattr(prepare_data.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    sentence = fails("enwik8", data_root=tmp_path)
    assert "http://mattmahoney.net/dc/enwik8.zip" in sentence
    assert f"{tmp_path}/enwik8.zip" in sentence
    assert "python prepare_data.py --dataset=enwik8" in sentence and not os.listdir(tmp_path)


def test_enwik8_fetched_by_hand_is_read_out_of_its_zip_file(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", "<page>\n" * 100)
    sha256 = hashlib.sha256((tmp_path / "enwik8.zip").read_bytes()).hexdigest()
    monkeypatch.setitem(prepare_data.DOWNLOADS, "enwik8", ("http://nowhere", "enwik8.zip", sha256))
    out = prepare("enwik8", data_root=tmp_path)
    assert documents(out, "train") == ["<page>\n" * 95]
    assert documents(out, "val") == ["<page>\n" * 5]


def test_fineweb_edu_is_streamed_and_stops_at_max_tokens(tmp_path, monkeypatch):
    def load_dataset(path, name, split, streaming):
        assert (path, split, streaming) == ("HuggingFaceFW/fineweb-edu", "train", True)
        yield from ({"text": f"web page {i}"} for i in range(5000))
        raise RuntimeError("read far beyond max_tokens")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    out = prepare("fineweb-edu", max_tokens=2000, val_fraction=0.1, data_root=tmp_path)
    data = open_dataset(out, 8, 320)
    assert (len(data.train), len(data.val)) == (1800, 200)


def test_fineweb_edu_without_its_package_or_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in fails("fineweb-edu", data_root=tmp_path)

    def load_dataset(*args, **kwargs):
        raise RuntimeError("offline")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert "copy its data/fineweb-edu here" in fails("fineweb-edu", data_root=tmp_path)


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("text, part", [
    ("", "too small to split"), ("one line\n", "too small to split"), ("x" * 100, "too small"),
    (b"\x89PNG\r\n\x1a\n\0\xff", "not UTF-8"), (b"ok\n" * 50 + b"\xc3", "not UTF-8")])
def test_a_file_that_cannot_be_text_of_two_splits_is_refused(tmp_path, text, part):
    write_folder(tmp_path / "texts", {"a.txt": text})
    assert part in fails(tmp_path / "texts" / "a.txt", data_root=tmp_path / "data")
    assert not os.listdir(tmp_path / "data")


def test_a_folder_without_enough_text_is_refused(tmp_path):
    folder, data = write_folder(tmp_path / "texts", {}), tmp_path / "data"
    assert "holds no text" in fails(folder, data_root=data)
    write_folder(folder / "sub", {"a": b"\xff", "b": b"\xfe"})
    assert "2 broken files" in fails(folder, data_root=data)
    assert "'*.md'" in fails(folder, glob="*.md", data_root=data)
    write_folder(folder / "few", {"a": "a", "b": "b"})
    assert "too small to split" in fails(folder, val_fraction=1e-6, data_root=data)
    assert not os.listdir(data)


@pytest.mark.parametrize("flags, part", [
    ("--dataset=nowhere", "'nowhere'"), ("--dataset=", "Unknown data set"),
    ("--tokenizer=gpt5", "Unknown tokenizer"), ("--val_fraction=0", "not 0.0"),
    ("--val_fraction=1", "not 1.0"), ("--val_fraction=nan", "not nan"),
    ("--val_fraction=half", "invalid float"), ("--max_tokens=1", "not 1"),
    ("--max_tokens=-9", "not -9"), ("--max_tokens=few", "invalid int"), ("--datset=x", "--datset"),
    ("--data=stdlib", "--data"), ("stdlib", "stdlib"), ("--glob=*.md", "not a folder"),
    ("--name=../x", "'../x'"), ("--name=.x", "'.x'"), ("--dataset=/", "''")])
def test_a_bad_flag_gets_one_sentence_on_stderr_and_exit_code_2(
        tmp_path, monkeypatch, capsys, flags, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        prepare_data.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and part in err
    assert os.listdir(tmp_path) in ([], ["data"])


def test_the_command_line_prepares_a_data_set_and_says_so_in_one_line(tmp_path):
    write_folder(tmp_path / "notes", many(60) | {"x.md": "not this one"})
    process = python(ROOT / "prepare_data.py", "--dataset=notes", "--val_fraction=0.1",
                     "--glob=*.txt", "--name=mine", cwd=tmp_path)
    assert process.returncode == 0 and process.stdout.count("\n") == 1
    assert process.stdout.startswith("data/mine: 60 documents") and process.stderr == ""
    open_dataset(tmp_path / "data" / "mine", 8, 257)


# ---------------------------------------------------------------- reading back

def edit_meta(folder, **changes):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("damage, part", [
    (lambda d: (d / "val.bin").unlink(), "has no val.bin"),
    (lambda d: (d / "meta.json").unlink(), "has no meta.json"),
    (lambda d: os.truncate(d / "train.bin", 99), "99 bytes"),
    (lambda d: os.rename(d / "val.bin", d / "train.bin") or (d / "val.bin").touch(), "bytes where"),
    (lambda d: (d / "meta.json").write_text('{"dataset": "x'), "json is damaged"),
    (lambda d: (d / "meta.json").write_bytes(b"\xff\xfe"), "json is damaged"),
    (lambda d: (d / "meta.json").write_text("[1, 2]"), "json is damaged"),
    (lambda d: (d / "meta.json").write_text('{"vocab_size": 65}'), "json is damaged"),
    (lambda d: edit_meta(d, n_train="many"), "json is damaged"),
    (lambda d: edit_meta(d, n_train=True), "json is damaged"),
    (lambda d: edit_meta(d, dtype="float32"), "json is damaged"),
    (lambda d: edit_meta(d, tokenizer={}), "json is damaged"),
    (lambda d: edit_meta(d, sha256={}), "json is damaged"),
    (lambda d: edit_meta(d, n_train=-1), "says -1"),
    (lambda d: edit_meta(d, dtype="uint32"), "bytes where")])
def test_a_damaged_data_set_is_refused_with_the_command_that_makes_it_anew(corpus, damage, part):
    damage(corpus)
    with pytest.raises(ValueError, match=part) as error:
        open_dataset(corpus, 8, 320)
    assert "python prepare_data.py --dataset=" in str(error.value)
    assert str(error.value).endswith("--name=corpus.")


def test_a_data_set_that_is_not_there_is_refused_with_its_command(tmp_path):
    with pytest.raises(ValueError, match="run python prepare_data.py --dataset=stdlib"):
        open_dataset(tmp_path / "stdlib", 8, 320)


def test_each_split_must_hold_block_size_plus_one_tokens(corpus):
    n = json.loads((corpus / "meta.json").read_text())["n_val"]
    assert len(open_dataset(corpus, n - 1, 320).val) == n
    with pytest.raises(ValueError, match=f"--block_size={n - 1}"):
        open_dataset(corpus, n, 320)


def test_a_model_with_too_small_a_vocabulary_is_told_which_one_to_take(corpus):
    open_dataset(corpus, 8, 257)
    with pytest.raises(ValueError, match="--vocab_size=320"):
        open_dataset(corpus, 8, 256)


BATCH = dict(seed=1, step=2, batch_size=4, block_size=16)


def test_targets_are_the_inputs_one_token_later_and_windows_lie_in_their_split(corpus):
    data = open_dataset(corpus, 16, 320)
    for split in ("train", "val"):
        x, y = get_batch(data, split, **BATCH)
        assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype == torch.int64
        assert x.is_contiguous() and y.is_contiguous() and torch.equal(x[:, 1:], y[:, :-1])
        windows = np.lib.stride_tricks.sliding_window_view(getattr(data, split), 17)
        for row in torch.cat([x, y[:, -1:]], dim=1).numpy():
            assert (windows == row).all(1).any()


def test_batches_reach_the_first_and_the_last_token_of_a_split():
    data = Dataset(np.arange(20, dtype="<u2"), np.arange(17, dtype="<u2"), {"vocab_size": 20})
    x, y = get_batch(data, "train", seed=0, step=0, batch_size=200, block_size=16)
    assert x.min() == 0 and y.max() == 19
    assert get_batch(data, "val", **BATCH)[1].tolist() == [list(range(1, 17))] * 4


def test_a_batch_is_a_pure_function_of_its_arguments(corpus):
    data = open_dataset(corpus, 16, 320)
    first = get_batch(data, "train", **BATCH)[0]
    np.random.seed(0), torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(first, get_batch(open_dataset(corpus, 16, 320), "train", **BATCH)[0])
    assert torch.equal(state, torch.get_rng_state())
    for change in ({"seed": 2}, {"step": 3}, {"micro_step": 1}, {"rank": 1, "world_size": 2}):
        assert not torch.equal(first, get_batch(data, "train", **{**BATCH, **change})[0])


def test_train_and_val_draw_different_offsets():
    tokens = np.arange(5000, dtype="<u2")
    data = Dataset(tokens, tokens, {"vocab_size": 5000})
    assert not torch.equal(get_batch(data, "train", **BATCH)[0], get_batch(data, "val", **BATCH)[0])


def test_two_processes_with_three_micro_steps_read_what_one_with_six_reads(corpus):
    data = open_dataset(corpus, 16, 320)
    one = [get_batch(data, "train", micro_step=i, **BATCH)[0] for i in range(6)]
    two = [get_batch(data, "train", micro_step=i, rank=rank, world_size=2, **BATCH)[0]
           for i in range(3) for rank in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_token_id_outside_the_vocabulary_is_reported_as_a_damaged_file(corpus):
    tokens = np.memmap(corpus / "train.bin", "<u2", mode="r+")
    tokens[:] = 40000  # same size, so that opening cannot notice
    tokens.flush()
    with pytest.raises(ValueError, match="train.bin is damaged.*40000"):
        get_batch(open_dataset(corpus, 16, 320), "train", **BATCH)


def test_memory_for_a_batch_does_not_grow_with_the_file(tmp_path):
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(8 << 30)  # sparse: 4G tokens, 0 bytes on disk
    data = Dataset(np.memmap(tmp_path / "train.bin", "<u2", mode="r"), None, {"vocab_size": 1})
    x, _ = get_batch(data, "train", **BATCH)
    assert x.shape == (4, 16)


# ---------------------------------------------------------------- analysis

RUN_SHAPE = SMALL | dict(vocab_size=320, block_size=32)
METRICS = (
    "perplexity load_std max_violation router_similarity router_similarity_signed "
    "coupling_spearman coupling_spearman_silu coupling_spearman_swiglu selected_ratio "
    "alignment_matched alignment_mismatched mean_row_alignment_matched "
    "mean_row_alignment_mismatched "
    "neuron_alignment_matched neuron_alignment_mismatched").split()


# ---------------------------------------------------------------- metrics with a known answer

def test_identical_router_directions_have_similarity_one():
    same = torch.randn(1, 16).expand(5, 16) * torch.tensor([1.0, 2, 3, -1, -2])[:, None]
    assert router_similarity(same).item() == pytest.approx(1)
    assert analyze.signed_similarity(same).item() == pytest.approx(-0.2)  # 4 pairs alike, 6 opposed


def test_orthogonal_router_directions_have_similarity_zero():
    assert router_similarity(torch.eye(6)).item() == 0
    assert analyze.signed_similarity(torch.eye(6)).item() == 0


def test_random_router_directions_have_the_chance_similarity():
    torch.manual_seed(0)
    assert router_similarity(torch.randn(200, 64)).item() == pytest.approx(
        analyze.chance_similarity(64), rel=0.05)


def test_uniform_load_has_std_and_violation_zero():
    std, violation = load_balance(torch.full((8,), 5.0))
    assert (std.item(), violation.item()) == (0, 0)


def test_all_load_on_one_expert_has_the_greatest_std_and_violation():
    std, violation = load_balance(torch.tensor([40.0, 0, 0, 0]))
    assert std.item() == pytest.approx(math.sqrt(3) / 4)
    assert violation.item() == 3


def test_average_ranks_share_the_mean_among_ties():
    values = torch.tensor([[3.0, 1.0], [1.0, 1.0], [3.0, 1.0], [2.0, 0.0], [3.0, 9.0]])
    assert analyze.average_ranks(values).tolist() == [[3, 2], [0, 2], [3, 2], [1, 0], [3, 4]]


def test_spearman_of_a_monotone_function_is_one_and_of_its_reverse_minus_one():
    torch.manual_seed(0)
    scores = torch.randn(100, 3, dtype=torch.double)
    activations = torch.stack([scores[:, 0].exp(), -scores[:, 1] ** 3, scores[:, 2]], dim=1)
    assert analyze.spearman(scores, activations).tolist() == pytest.approx([1, -1, 1])


def test_spearman_with_ties_matches_a_hand_computed_value():
    a = torch.tensor([1.0, 2, 2, 3])[:, None]  # ranks 0, 1.5, 1.5, 3
    b = torch.tensor([1.0, 3, 2, 4])[:, None]  # ranks 0, 2, 1, 3
    assert analyze.spearman(a, b).item() == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_spearman_of_a_constant_is_not_a_number():
    assert analyze.spearman(torch.ones(9, 1), torch.randn(9, 1)).isnan().all()


def test_expert_activations_in_chunks_equal_those_in_one_piece():
    torch.manual_seed(0)
    x, w_gate, w_up = torch.randn(50, 12), torch.randn(5, 7, 12), torch.randn(5, 7, 12)
    gate, up = (torch.einsum("nc,ehc->neh", x, w) for w in (w_gate, w_up))
    whole = torch.stack([v.norm(dim=-1) for v in (gate, F.silu(gate), F.silu(gate) * up)])
    for budget in (1, 5 * 7 * 3, 10**6):  # a token, three tokens, all tokens at a time
        torch.testing.assert_close(analyze.expert_activations(x, w_gate, w_up, budget), whole)


def test_expert_activations_keep_to_their_budget():
    x, w = torch.randn(64, 4), torch.randn(3, 5, 4)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.data_ptr() != x.data_ptr():
                largest = max(largest, result.numel())
            return result

    with Watch():
        analyze.expert_activations(x, w, w, budget=150)
    assert largest == 3 * 64 * 3  # the result itself: no (64, 3, 5), of 960 numbers, ever was


def test_coupling_by_rank_falls_where_activation_follows_the_score():
    torch.manual_seed(0)
    scores = torch.rand(2000, 4)
    curve = analyze.coupling_by_rank(scores, 3 * scores)
    # the k-th largest of 4 uniform numbers is (5 - k) / 5 on average, relative to the mean 1/2
    assert curve.tolist() == pytest.approx([1.6, 1.2, 0.8, 0.4], abs=0.03)


def test_coupling_by_rank_is_flat_where_activation_ignores_the_score():
    activations = torch.tensor([1.0, 10, 100]).expand(20, 3)  # strong experts, but for every token
    by_rank = analyze.coupling_by_rank(torch.randn(20, 3), activations)
    assert by_rank.tolist() == pytest.approx([1] * 3)


def test_selected_ratio_compares_selected_with_unselected_pairs():
    activations = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    assert analyze.selected_ratio(activations, torch.tensor([[0], [1]])).item() == pytest.approx(3)
    ratio = analyze.selected_ratio(activations, torch.tensor([[1], [0]]))
    assert ratio.item() == pytest.approx(1 / 3)


def test_an_expert_that_never_reacts_does_not_spoil_the_others():
    activations = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    ratio = analyze.selected_ratio(activations, torch.tensor([[0], [0]]))
    assert ratio.isinf()  # selected 1, unselected 0
    assert analyze.coupling_by_rank(activations, activations).tolist() == [1, 0]


def test_expert_gates_set_to_the_router_row_have_alignment_one():
    directions = torch.eye(4, 10)
    w_gate = directions[:, None].repeat(1, 6, 1) * torch.tensor([1.0, 2, 3, 4, 5, -1])[:, None]
    for cosines in analyze.alignments(directions, w_gate).values():
        matched, mismatched = analyze.matched_mismatched(cosines)
        assert matched.item() == pytest.approx(1)
        assert mismatched.item() == pytest.approx(0, abs=1e-6)


def test_alignment_pairs_direction_i_with_expert_j():
    directions, w_gate = torch.eye(3), torch.eye(3)[[0, 0, 2]][:, None].repeat(1, 5, 1)
    for cosines in analyze.alignments(directions, w_gate).values():
        torch.testing.assert_close(cosines, torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 0, 1]]))


def test_alignment_uses_the_top_right_singular_vector():
    top, other = torch.eye(6)[:2]
    w_gate = torch.stack([5 * top, -5 * top, other])[None]  # (1, 3, 6): the mean row is `other`
    found = analyze.alignments(top[None], w_gate)
    assert found["alignment"].item() == pytest.approx(1)
    assert found["mean_row_alignment"].item() == pytest.approx(0, abs=1e-6)
    assert found["neuron_alignment"].item() == pytest.approx(2 / 3)


def test_unrouted_gradient_share_of_a_hand_made_gradient():
    gradient = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 5.0]])
    indices = torch.tensor([[0, 2], [2, 1]])
    assert analyze.unrouted_gradient_share(gradient, indices).item() == pytest.approx(16 / 50)
    assert analyze.unrouted_gradient_share(gradient * 0, indices).isnan()


# ---------------------------------------------------------------- a model under observation

def small_model(router, **changes):
    return make_model(router=router, **RUN_SHAPE | changes).eval()


def run_tokens(n=2):
    idx = torch.randint(257, (n, 33), generator=torch.Generator().manual_seed(1))
    return idx[:, :-1], idx[:, 1:]


@pytest.mark.parametrize("router", ["aux", "lossfree", "none"])
@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid"])
def test_unrouted_pairs_get_a_router_gradient_from_the_auxiliary_loss_only(router, score_fn):
    model = small_model(router, score_fn=score_fn)
    for gradient, indices, _ in analyze.router_gradients(model, *run_tokens()):
        share = analyze.unrouted_gradient_share(gradient, indices).item()
        assert 0 < share < 1 if router == "aux" else share == 0


def test_router_gradients_are_the_gradients_at_the_logits():
    model = small_model("aux")
    idx, targets = run_tokens()
    found = analyze.router_gradients(model, idx, targets)
    _, loss, aux_loss = model(idx, targets)
    (loss + aux_loss).backward()
    for router, (gradient, _, x) in zip(model.routers(), found):  # dL/dR = (dL/dlogits)^T x
        torch.testing.assert_close(gradient.t() @ x, router.weight.grad)


@pytest.mark.parametrize("router", ["aux", "lossfree", "kmeans", "none"])
def test_observing_leaves_the_model_as_it_was(router):
    model = small_model(router)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analyze.observe(model, [run_tokens()])
    analyze.router_gradients(model, *run_tokens())
    analyze.one_token_gradients(model.blocks[0].moe, torch.randn(32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    for r in model.routers():
        assert not r._forward_hooks and "logits" not in vars(r) and r.load.sum() == 0


def test_observed_scores_and_selection_are_the_routers_own():
    model = small_model("kmeans")
    with analyze.watch(model.routers()) as seen:
        model(*run_tokens())
    _, layers = analyze.observe(model, [run_tokens()])
    for router, (x, _, routing), (scores, activations, indices) in zip(
            model.routers(), seen, layers):
        torch.testing.assert_close(scores, router.scores(x))
        assert torch.equal(indices, routing.indices)
        assert activations.shape == (3, 64, 8)


def test_observed_loss_is_the_mean_over_tokens_of_uneven_batches():
    model = small_model("none")
    idx, targets = run_tokens(3)
    loss, layers = analyze.observe(model, [(idx[:2], targets[:2]), (idx[2:], targets[2:])])
    assert loss.item() == pytest.approx(model(idx, targets)[1].item(), rel=1e-5)
    assert layers[0][0].shape == (96, 8)


@pytest.mark.parametrize("router", ["aux", "lossfree", "kmeans", "none"])
def test_one_token_gradient_rows_all_point_along_the_token(router):
    cosines = analyze.one_token_gradients(small_model(router).blocks[0].moe, torch.randn(32))
    for rows in cosines.values():
        reached = ~rows.isnan()
        assert (rows[reached] - 1).abs().max() < 1e-5
    experts = {part: (~rows.isnan()).any(dim=1).sum().item() for part, rows in cosines.items()}
    routers = {"aux": {"router": 8}, "kmeans": {}}.get(router, {"router": 2})  # aux: every row
    assert experts == routers | {"gate": 2, "up": 2}


# ---------------------------------------------------------------- the command, end to end

@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Two data sets, and under out/ short runs of three routers, one with two seeds."""
    root = tmp_path_factory.mktemp("workplace")
    text = root / "text.txt"
    text.write_text("".join(f"{i} squared is {i**2}, {i} cubed is {i**3}.\n" for i in range(1500)))
    for name in ("squares", "cubes"):
        prepare(text, name=name, data_root=root / "data",
                val_fraction=0.1 if name == "cubes" else 0.05)
    for router, seed in (("aux", 1), ("aux", 2), ("lossfree", 1), ("kmeans", 1)):
        make_run(root / "out" / f"{router}-{seed}", router=router, seed=seed)
    return root


def make_run(folder, steps=20, seed=1, dataset="squares", **changes):
    """A folder as train.py leaves it, its log cut short by a kill; the data lies two folders up."""
    model = make_model(seed, **RUN_SHAPE | changes)
    data = open_dataset(folder.parent.parent / "data" / dataset, block_size=32, vocab_size=320)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    lines = []
    folder.mkdir(parents=True)
    for step in range(1, steps + 1):
        _, loss, aux_loss = model(*get_batch(data, "train", seed=seed, step=step, batch_size=4,
                                             block_size=32))
        (loss + aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_routers(model.routers())
        line = {"step": step, "train_loss": loss.item(), "aux_loss": 0.0, "lr": 3e-3,
                "tokens_per_s": 1.0, "mfu": None}
        if step % 10 == 0:
            line |= {"val_loss": loss.item(), "perplexity": loss.exp().item(), "load_std": 0.01,
                     "max_violation": 0.1, "router_similarity": 0.2}
        lines.append(json.dumps(line))
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 21, "val_l')
    config = asdict(model.config) | dict(config="tiny", dataset=dataset, seed=seed, batch_size=4,
                                         gradient_accumulation_steps=1, out_dir=str(folder))
    torch.save({"model": model.state_dict(), "optimizer": {}, "step": steps, "config": config,
                "best_loss": 1.0, "data_sha256": data.meta["sha256"]["train.bin"],
                "rng": torch.get_rng_state()}, folder / "ckpt.pt")
    return folder


@pytest.fixture(scope="module")
def analysis(workplace):
    """(the finished process, its folder of results) of the command as a user types it."""
    done = python(ROOT / "analyze.py", "--tokens=500", cwd=workplace)
    assert done.returncode == 0, done.stderr
    return done, workplace / "out" / "analysis"


def test_analyze_without_arguments_measures_every_run(analysis):
    metrics = json.loads((analysis[1] / "metrics.json").read_text())
    assert set(metrics) == {"aux-1", "aux-2", "lossfree-1", "kmeans-1"}
    assert all(m["tokens"] == 512 for m in metrics.values())  # 500, up to whole sequences


def test_every_metric_is_there_with_its_value_by_layer(analysis):
    for m in json.loads((analysis[1] / "metrics.json").read_text()).values():
        assert all(isinstance(m[key], float) for key in METRICS)
        assert len(m["coupling_by_rank"]) == 8
        for key in METRICS[1:]:
            assert m[key] == pytest.approx(sum(m[f"{key}_by_layer"]) / 2)
        assert m["identity_min_cos_gate"] == pytest.approx(1, abs=1e-5)


def test_unrouted_gradient_share_is_above_zero_for_aux_zero_for_lossfree_null_for_kmeans(analysis):
    metrics = json.loads((analysis[1] / "metrics.json").read_text())
    assert metrics["aux-1"]["unrouted_gradient_share"] > 0
    assert metrics["lossfree-1"]["unrouted_gradient_share"] == 0
    assert metrics["kmeans-1"]["unrouted_gradient_share"] is None


def test_metrics_json_holds_no_nan(analysis):
    def refuse(constant):
        raise AssertionError(constant)
    json.loads((analysis[1] / "metrics.json").read_text(), parse_constant=refuse)


def test_measuring_a_run_twice_gives_the_same_numbers(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    first, second = (analyze.measure_run(Path("out/aux-1"), "a", 100, "cpu").metrics
                     for _ in range(2))
    assert first == second


def test_the_measured_router_similarity_is_that_of_the_checkpoint(analysis, workplace):
    model, _ = load_checkpoint(workplace / "out" / "kmeans-1" / "ckpt.pt")
    expected = [router_similarity(router.directions).item() for router in model.routers()]
    metrics = json.loads((analysis[1] / "metrics.json").read_text())
    assert metrics["kmeans-1"]["router_similarity_by_layer"] == pytest.approx(expected)


def test_the_table_has_a_row_a_run_and_the_papers_numbers_last(analysis):
    table = analysis[0].stdout.split("\n\n")[0].splitlines()
    assert [line.split(" | ")[0] for line in table] == [
        "| run", "| ---", "| aux-1", "| aux-2", "| kmeans-1", "| lossfree-1", "| **paper** (1B)"]
    assert len({line.count("|") for line in table}) == 1
    numbers = ("0.015", "0.018", "0.008", "2.2 %", "three times")
    assert all(number in table[-1] for number in numbers)


def test_several_seeds_get_a_table_of_means_with_spread(analysis):
    table = analysis[0].stdout.split("\n\n")[2]
    row = next(line for line in table.splitlines() if line.startswith("| aux |"))
    assert "| 1, 2 |" in row and "±" in row


@pytest.mark.parametrize("name", analyze.FIGURES)
def test_the_figure_is_a_png_that_is_not_blank(analysis, name):
    image = pytest.importorskip("matplotlib.image").imread(analysis[1] / f"{name}.png")
    assert image.shape[1] == 1350 and image.shape[0] > 500
    assert (image[..., :3] < 0.9).any(axis=-1).mean() > 0.02  # ink
    assert f"{name}.png" in analysis[0].stdout


def test_figures_of_many_settings_still_fit(workplace, monkeypatch, tmp_path, recwarn):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(workplace)
    runs = [analyze.measure_run(Path(f"out/{name}-1"), name, 32, "cpu")
            for name in ("aux", "kmeans")]
    many = [r._replace(config=r.config | {"max_iters": i}) for i in range(7) for r in runs]
    assert [group.short for group in analyze.group_runs(many)[:3]] == ["A", "B", "C"]
    assert len(analyze.draw_figures(many, tmp_path)) == 6
    assert not [w for w in recwarn if "layout" in str(w.message)]


def test_runs_that_differ_in_the_seed_alone_are_one_group(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    a = analyze.measure_run(Path("out/aux-1"), "a", 32, "cpu")
    b = a._replace(config=a.config | {"seed": 9, "out_dir": "elsewhere"})
    c = a._replace(config=a.config | {"aux_loss_coef": 0.1})
    groups = analyze.group_runs([a, b, c])
    assert [(g.label, len(g.runs)) for g in groups] == [("aux", 2), ("aux, aux_loss_coef=0.1", 1)]


def test_similarity_ratio_compares_runs_that_differ_in_the_router_alone(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    aux, free = (analyze.measure_run(Path(f"out/{name}-1"), name, 32, "cpu")
                 for name in ("aux", "lossfree"))
    expected = aux.metrics["router_similarity"] / free.metrics["router_similarity"]
    assert analyze.similarity_ratio(analyze.group_runs([aux, free])) == f"{expected:.2f}"
    other = free._replace(config=free.config | {"step": 7})
    assert "unknown" in analyze.similarity_ratio(analyze.group_runs([aux, other]))


def test_perplexities_on_different_validation_tokens_are_marked(workplace, tmp_path):
    make_run(workplace / "other" / "cubes", steps=1, dataset="cubes", n_embd=16, n_expert=4)
    done = run_script("analyze.py", "out/aux-1", "other/cubes", "--tokens=32",
                      f"--out_dir={tmp_path}", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "not comparable" in done.stdout
    rows = [line.split(" | ")[3] for line in done.stdout.splitlines()[2:4]]
    assert rows[0].endswith("[a]") and rows[1].endswith("[b]")


def test_perplexities_on_the_same_tokens_carry_no_mark(analysis):
    assert "not comparable" not in analysis[0].stdout


def test_a_single_expert_and_all_experts_selected_give_null_not_an_error(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    folder = make_run(workplace / "other" / "single", steps=1, router="aux", n_expert=1, top_k=1)
    metrics = analyze.measure_run(folder, "single", 32, "cpu").metrics
    assert metrics["selected_ratio"] is None and metrics["alignment_mismatched"] is None
    assert metrics["load_std"] == 0 and metrics["coupling_by_rank"] == pytest.approx([1])


def test_broken_runs_get_a_sentence_each_and_the_others_are_done(workplace, tmp_path):
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "ckpt.pt").write_bytes(b"not a checkpoint")
    checkpoint = torch.load(workplace / "out" / "aux-1" / "ckpt.pt")
    checkpoint["model"]["norm.weight"][0] = math.nan
    (tmp_path / "diverged").mkdir()
    torch.save(checkpoint, tmp_path / "diverged" / "ckpt.pt")
    done = run_script("analyze.py", tmp_path / "garbage", tmp_path / "diverged",
                      tmp_path / "missing", "out/aux-1", "--tokens=32",
                      f"--out_dir={tmp_path / 'analysis'}", cwd=workplace)
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 3 and "Traceback" not in done.stderr
    assert list(json.loads((tmp_path / "analysis" / "metrics.json").read_text())) == ["aux-1"]


@pytest.mark.parametrize("flags, sentence", [
    (["nowhere"], "nowhere/ckpt.pt is not there"), (["--tokens=0"], "--tokens must be positive"),
    (["--tokens=many"], "--tokens"), (["--device=abacus"], "not a device"),
    (["--figures"], "--figures"), (["--out_dir=text.txt"], "text.txt cannot be a folder")])
def test_a_users_mistake_is_a_sentence_and_exit_code_2(workplace, flags, sentence):
    done = run_script("analyze.py", *flags, cwd=workplace)
    assert done.returncode == 2
    assert sentence in done.stderr and "Traceback" not in done.stderr


def test_no_run_at_all_is_a_sentence_and_exit_code_2(tmp_path):
    done = run_script("analyze.py", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "train.py" in done.stderr


def test_without_matplotlib_the_numbers_come_and_a_sentence_says_how_to_get_figures(
        workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    analyze.main(["out/aux-1", "--tokens=32", f"--out_dir={tmp_path}"])
    printed = capsys.readouterr()
    assert "| aux-1 |" in printed.out and "pip install matplotlib" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_a_run_on_data_that_has_changed_since_is_pointed_out(workplace, tmp_path, monkeypatch):
    monkeypatch.chdir(workplace)
    checkpoint = torch.load("out/aux-1/ckpt.pt")
    torch.save(checkpoint | {"data_sha256": "another"}, tmp_path / "ckpt.pt")
    assert "not the data" in "".join(analyze.measure_run(tmp_path, "moved", 32, "cpu").notes)


# ---------------------------------------------------------------- the README

def test_the_readmes_router_of_your_own_trains(workdir, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(# my_router\.py.*?)```", readme, re.DOTALL)[1]
    monkeypatch.setitem(ROUTERS, "hash", None)  # removed again after the test
    monkeypatch.setattr(sys, "argv", ["my_router.py", *TOY, "--router=hash", "--out_dir=out/hash"])
    exec(compile(code, "my_router.py", "exec"), {"__name__": "__main__"})
    assert read_log("out/hash")[-1]["step"] == 6
    assert len(code.splitlines()) <= 25
    analyze.main(["out/hash", "--tokens=64"])  # the README: with my_router imported
    metrics = json.loads(Path("out/analysis/metrics.json").read_text())["hash"]
    assert metrics["unrouted_gradient_share"] is None and metrics["perplexity"] > 0
