"""Train an SMoE transformer, from a laptop's CPU to many GPUs.

    python train.py --router=kmeans                      # tiny model, Python's source, two cores
    python train.py --router=lossfree --config=small     # 0.1B parameters, one GPU
    torchrun --nproc_per_node=8 train.py --config=1b     # the paper's scale, one node
    python train.py --out_dir=out/kmeans --resume        # go on where a run stopped
    python train.py --bench --config=1b                  # speed and memory on synthetic tokens

Every field of TrainConfig below is a flag: --name=value, or --name, --no-name. A run writes
out/<run>/log.jsonl and out/<run>/ckpt.pt; Ctrl-C and SIGTERM finish the step and save."""
import argparse
import copy
import inspect
import json
import math
import os
import re
import shlex
import signal
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch._functorch.config
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.benchmark import Timer
from tqdm import tqdm

from model import (
    INCIDENTAL, Config, SMoETransformer, code_of, config_of, load_balance, load_checkpoint,
    perplexity, probe, read_checkpoint, router_similarity, watch)
from prepare_data import (
    Parser, cli, eval_batches, free_path, get_batch, get_tokenizer, lock, open_dataset, prepare,
    printable, replacing)
from routers import update_routers

# ---------------------------------------------------------------- settings

# A built-in router refuses settings that it does not read: kmeans with --score_fn=sigmoid would
# pass for a result about sigmoid scores. Your own may read any
NOT_READ = {
    "aux": ("bias_update_rate", "ema_decay", "gate_temperature"),
    "lossfree": ("aux_loss_coef", "ema_decay", "gate_temperature"),
    "kmeans": ("score_fn", "aux_loss_coef", "z_loss_coef"),
    "none": ("aux_loss_coef", "bias_update_rate", "ema_decay", "gate_temperature")}


@dataclass
class TrainConfig(Config):
    """The model's Config and everything else that makes a run."""
    config: str = "tiny"                  # preset: tiny, small or 1b; other flags override it
    out_dir: str = ""                     # where the run is written; empty: out/<router>
    dataset: str = "stdlib"               # folder in data/ (prepare_data.py makes it)
    batch_size: int = 4                   # sequences in a micro-batch on one device
    gradient_accumulation_steps: int = 1  # micro-batches in a step, over all processes
    max_iters: int = 1200                 # optimizer steps
    eval_interval: int = 200              # steps from one evaluation and checkpoint to the next
    eval_tokens: int = 16384              # validation tokens in an evaluation, always the same ones
    final_eval_tokens: int = 524288       # in that at max_iters; stdlib has 420k, so all of them
    log_interval: int = 10                # steps from one line of the log to the next
    learning_rate: float = 1e-3           # after the warm-up; a cosine takes it down to a tenth
    warmup_iters: int = 100               # steps of linear warm-up; at most half of all steps
    weight_decay: float = 0.1             # on matrices; norm weights have none
    beta1: float = 0.9                    # AdamW
    beta2: float = 0.95                   # AdamW
    grad_clip: float = 1.0                # largest norm of the gradient; 0: no clipping
    seed: int = 1                         # of the weights and of the batches
    device: str = "auto"                  # auto, cpu, cuda or cuda:N
    dtype: str = "auto"                   # auto (bfloat16 on CUDA or compiled), float32 or bfloat16
    compile: bool = False                 # torch.compile; needs bfloat16
    resume: bool = False                  # go on with the run in out_dir, with its settings
    overwrite: bool = False               # start anew; the run in out_dir is renamed
    bench: bool = False                   # measure speed and memory instead; writes nothing

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval",
                     "eval_tokens", "final_eval_tokens", "log_interval", "learning_rate"):
            self.check(getattr(self, name) > 0, name, "positive")
        for name in ("seed", "warmup_iters", "grad_clip", "weight_decay"):
            self.check(getattr(self, name) >= 0, name, "0 or more")
        self.check(re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device), "device",
                   "auto, cpu, cuda or cuda:N")
        self.check(self.dtype in ("auto", "float32", "bfloat16"), "dtype",
                   "auto, float32 or bfloat16")
        # the shape check of grouped_mm under torch.compile takes bfloat16 alone (torch 2.13)
        self.check(not (self.compile and self.dtype == "float32"), "dtype",
                   "bfloat16 with --compile (or pass --no-compile)")
        self.check(not (self.resume and self.overwrite), "overwrite", "left out with --resume")
        for name in NOT_READ.get(self.router, ()):
            default = getattr(Config, name)
            # with --resume it comes from the checkpoint, perhaps the default of older code
            self.check(self.resume or getattr(self, name) == default, name,
                       f"{default} under {self.router}, which does not read it")
        self.out_dir = os.path.expanduser(self.out_dir or f"out/{self.router}")


PRESETS = {
    "tiny": dict(),
    "small": dict(
        block_size=1024, n_layer=8, n_head=8, n_embd=512, n_expert=32, top_k=4, d_expert=256,
        dataset="python", batch_size=32, max_iters=10_000, eval_interval=500, warmup_iters=200,
        compile=True),
    "1b": dict(
        vocab_size=50304, block_size=1024, n_layer=16, n_head=16, n_embd=1024, n_expert=64, top_k=8,
        d_expert=256, dataset="fineweb-edu", batch_size=16, gradient_accumulation_steps=32,
        max_iters=100_000, eval_interval=1000, eval_tokens=2**20, final_eval_tokens=2**22,
        learning_rate=4e-4, warmup_iters=2000, compile=True),
}


def parse_args(argv: list[str]) -> TrainConfig:
    """Flags -> settings. Flags override the preset or, with --resume, the settings in the
    checkpoint. Raises ValueError."""
    comments = {}  # --help shows the comment beside each field
    for cls in (Config, TrainConfig):
        source = inspect.getsource(cls).replace("%", "%%")  # argparse formats what it shows
        comments |= re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE)
    parser = Parser(allow_abbrev=False, description=__doc__.split("\n")[0],
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in fields(TrainConfig):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {
            "type": field.type, "metavar": field.type.__name__}
        parser.add_argument(f"--{field.name}", default=field.default, **kind,
                            help=comments.get(field.name, "has no comment in its class"))

    # parsed twice: to find the preset or the checkpoint, then with its settings as the defaults
    named = parser.parse_args([flag for flag in argv if flag not in ("-h", "--help")])
    if named.config not in PRESETS:
        raise ValueError(f"config must be one of {', '.join(PRESETS)}, not {named.config!r}.")
    parser.set_defaults(**PRESETS[named.config])
    if named.resume:
        out_dir = os.path.expanduser(named.out_dir or f"out/{named.router}")
        old = read_checkpoint(Path(out_dir, "ckpt.pt"))["config"] | {"out_dir": out_dir}
        # settings that you have removed from the code since are left out
        parser.set_defaults(**{name: old[name] for name in old if name in vars(named)})
    return TrainConfig(**vars(parser.parse_args(argv)))


def check_resume(checkpoint: dict, c: TrainConfig) -> None:
    """Raises ValueError if nothing is left to do, or if a setting has changed that makes it another
    run. Another max_iters (it stretches the cosine of the learning rate) and edited code are
    allowed: begin() notes them."""
    # a field that you have added to the code since was at its default
    old = {field.name: field.default for field in fields(c)} | checkpoint["config"]
    for name in sorted(vars(c).keys() - INCIDENTAL - {"max_iters"}):
        if old[name] != getattr(c, name):
            raise ValueError(f"the run in {c.out_dir} was trained with {name} = {old[name]!r} and "
                             f"cannot go on with {getattr(c, name)!r}; start another one.")
    if checkpoint["step"] >= c.max_iters:
        raise ValueError(f"the run in {c.out_dir} has done {checkpoint['step']} steps of "
                         f"{c.max_iters}; pass a larger --max_iters to go on.")


# ---------------------------------------------------------------- the machine

class Machine(NamedTuple):
    device: torch.device
    dtype: torch.dtype         # of the activations
    autocast: torch.autocast   # the context of every forward pass
    rank: int                  # number of this process; 0 is the one that prints and writes
    world_size: int            # number of processes


def set_up(c: TrainConfig) -> Machine:
    """Finds the device and joins the other processes, if torchrun started several (it sets the
    environment variables). Raises ValueError for a device that is not there."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if c.gradient_accumulation_steps % world_size:
        raise ValueError(f"gradient_accumulation_steps = {c.gradient_accumulation_steps} does not "
                         f"divide among {world_size} processes; pass a multiple.")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if c.device == "auto" else c.device
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(name)
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device {device} is not there: torch {torch.__version__} sees "
                             f"{torch.cuda.device_count()} CUDA devices; pass --device=cpu.")
        torch.cuda.set_device(device)
    bfloat16 = c.dtype == "bfloat16" or c.dtype == "auto" and (device.type == "cuda" or c.compile)
    if world_size > 1:  # nccl sums gradients, gloo what is on the CPU: see `stop` in train()
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Machine(device, torch.bfloat16 if bfloat16 else torch.float32,
                   torch.autocast(device.type, torch.bfloat16, enabled=bfloat16), rank, world_size)


def make_model(c: TrainConfig, device: torch.device) -> SMoETransformer:
    """The weights depend on the seed and the settings of the model, not on device or rank. The
    model gets the fields of Config alone, as in load_checkpoint: a router that reads another
    setting of train.py fails here, and not after the training."""
    torch.manual_seed(c.seed)
    return SMoETransformer(config_of(vars(c))).to(device)


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """-> the same tensor, summed in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def compiled(model: torch.nn.Module):
    """torch.compile, with the backward pass outside autocast, as it is without the compiler; else
    the router's gradient would be bfloat16 and not float32."""
    torch._functorch.config.backward_pass_autocast = "off"
    return torch.compile(model)


# ---------------------------------------------------------------- a step, an evaluation

def make_optimizer(model: SMoETransformer, c: TrainConfig) -> torch.optim.AdamW:
    """AdamW in one fused kernel, on the CPU too; weight decay on matrices alone."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": c.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)


def learning_rate(step: int, c: TrainConfig) -> float:
    """Of step 1 .. max_iters: linear warm-up, then half a cosine down to a tenth of the peak."""
    warmup = min(c.warmup_iters, c.max_iters // 2)
    if step <= warmup:
        return c.learning_rate * step / warmup
    done = (step - warmup) / (c.max_iters - warmup)
    low = c.learning_rate / 10
    return low + (c.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * done))


def train_step(model, routers, optimizer, batches, autocast, c: TrainConfig) -> torch.Tensor:
    """One optimizer step over this process's micro-batches [(x, y)] -> (2) mean loss and aux_loss.
    Nothing here waits for a GPU, so that its queue never runs dry (docs/speed.md)."""
    losses = []
    for i, (x, y) in enumerate(batches):
        if isinstance(model, DDP):  # the gradients travel once a step, with the last micro-batch
            model.require_backward_grad_sync = i == len(batches) - 1
        with autocast:
            loss, aux_loss = model(x, y)[1:]  # keeps no reference to the large logits
        ((loss + aux_loss) / len(batches)).backward()  # the mean over micro-batches
        losses.append(torch.stack([loss, aux_loss]).detach())
    if c.grad_clip > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    update_routers(routers)
    return torch.stack(losses).mean(0)


def mean(values: torch.Tensor) -> float | None:
    """Over layers, without nan; None if all are nan (one expert), as JSON has no nan."""
    return None if values.isnan().all() else values.nanmean().item()


def evaluate(model, data, n_tokens: int, machine: Machine, c: TrainConfig) -> tuple:
    """-> metrics, evaluation. The metrics go to the log (README.md explains them); those of routers
    are means over layers. The evaluation goes to the checkpoint: the metrics, `load` (n_layer, E;
    tokens per expert) and `objective`. Loss and load are on about n_tokens validation tokens, the
    same for every seed and batch size, divided among the processes; coupling_spearman and objective
    (mean loss + aux_loss) are of probe() in model.py, on 2,048."""
    where = dict(block_size=c.block_size, device=machine.device)
    cuda = [machine.device.index] if machine.device.type == "cuda" else []
    sums = torch.zeros(2, dtype=torch.double, device=machine.device)     # of the loss, of tokens
    loads = torch.zeros(c.n_layer, c.n_expert, device=machine.device)
    model.eval()
    # fork_rng: what a router of your own draws here leaves the training as it was
    with machine.autocast, torch.random.fork_rng(cuda), torch.no_grad():
        with watch(model.routers()) as seen:
            for idx, targets in eval_batches(data, n_tokens, batch_size=c.batch_size,
                                             rank=machine.rank, world_size=machine.world_size,
                                             **where):
                sums[0] += model(idx, targets)[1].double() * idx.numel()
                sums[1] += idx.numel()
                for load, calls in zip(loads, seen):
                    _, routing = calls.pop()  # and forget it: memory stays flat
                    load += torch.bincount(routing.indices.flatten(), minlength=c.n_expert)
        agreement, objective = probe(model, eval_batches(data, 2048, batch_size=1, **where))
    model.train()
    loads = sum_over_processes(loads).cpu()                                           # (n_layer, E)
    loss, n = sum_over_processes(sums).tolist()
    val_loss = loss / n
    load_std, max_violation = load_balance(loads)                        # (n_layer) each
    similarity = torch.stack([router_similarity(r.directions)[0] for r in model.routers()])
    metrics = {"val_loss": val_loss, "perplexity": perplexity(val_loss),
               "load_std": load_std.mean().item(), "max_violation": max_violation.mean().item(),
               "router_similarity": mean(similarity), "coupling_spearman": mean(agreement),
               "val_tokens": int(n)}
    return metrics, metrics | {"load": loads, "objective": objective}


# ---------------------------------------------------------------- a run

def begin(c: TrainConfig, data, machine: Machine) -> tuple:
    """Starts a run, or goes on with the checkpoint in out_dir -> (model, optimizer, step, about:
    what each checkpoint says of the run: settings, log, history of changes, hashes, evaluation)."""
    code = code_of(c.router)
    config = asdict(c) | {"dtype": str(machine.dtype).removeprefix("torch."),  # what auto came to
                          "resume": False, "overwrite": False}
    about = dict(config=config, log=[], history=[], sha256=data.meta["sha256"],
                 tokenizer=data.meta["tokenizer"]["name"], **code)
    if not c.resume:
        model = make_model(c, machine.device)  # the same on every rank
        return model, make_optimizer(model, c), 0, about
    # read again: the folder is locked now, and its last run may have saved since parse_args
    model, checkpoint = load_checkpoint(Path(c.out_dir, "ckpt.pt"))
    check_resume(checkpoint, c)
    optimizer = make_optimizer(model.to(machine.device), c)
    # a copy: while its tensors are mapped from the file, Windows does not let it be replaced
    optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
    torch.set_rng_state(checkpoint["rng"])  # of the CPU: for a router that draws noise
    # with other code or another max_iters it is no longer the run that it was: say so
    before = {name: checkpoint[name] for name in code} | checkpoint["config"]
    changes = [f"{name} was {before[name]} until step {checkpoint['step']}"
               for name, now in {"max_iters": c.max_iters, **code}.items() if now != before[name]]
    if machine.rank == 0 and changes:
        print(f"This run changes on its way: {', '.join(changes)}.")
    about |= {"log": checkpoint["log"], "history": checkpoint["history"] + changes}
    return model, optimizer, checkpoint["step"], about


def train(raw_model, optimizer, step: int, about: dict, data, lock_file, machine: Machine,
          c: TrainConfig) -> int:
    """From `step` to max_iters, or until somebody asks to stop -> the step that it came to.
    `lock_file`: that of claim()."""
    device, dtype, autocast, rank, world_size = machine
    model = compiled(raw_model) if c.compile else raw_model
    if world_size > 1:
        # broadcast_buffers=False: update_routers keeps them equal on all ranks.
        # bucket_cap_mb: DDP sends gradients in buckets, and has the compiler cut the graph where
        # one ends; 220 MB hold a layer of 1b
        model = DDP(model, broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=220)

    tokens = c.gradient_accumulation_steps * c.batch_size * c.block_size
    peak = peak_flops(device, dtype)
    if not about["log"]:
        metrics, _ = evaluate(raw_model, data, c.eval_tokens, machine, c)
        about["log"] = [{"step": 0} | dict.fromkeys(
            ("train_loss", "aux_loss", "lr", "tokens_per_s", "mfu")) | metrics]
    if rank == 0:
        write_log(Path(c.out_dir), about["log"])
        counts = [f"{n / 1e6:.1f}M" for n in raw_model.num_params()]
        print(f"{c.router}: {counts[0]} parameters, {counts[1]} active a token, {world_size} x "
              f"{device} in {dtype}; {c.dataset}: {len(data.train):,} tokens, steps {step} to "
              f"{c.max_iters} read {(c.max_iters - step) * tokens:,}")
    start, start_step = time.perf_counter(), step  # from here tokens_per_s is measured
    stop = False
    bar = tqdm(total=c.max_iters, initial=step, unit="step",
               disable=None if rank == 0 else True)  # None: shown on a terminal only
    with bar, stop_requests() as signals:
        while step < c.max_iters and not stop:
            # batch: a pure function of seed, step and the micro-step's number over all processes
            step += 1
            batches = [get_batch(data, "train", seed=c.seed, step=step, micro_step=i, rank=rank,
                                 world_size=world_size, device=device, batch_size=c.batch_size,
                                 block_size=c.block_size)
                       for i in range(c.gradient_accumulation_steps // world_size)]

            # learn: forward, backward, optimizer, routers
            lr = learning_rate(step, c)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = train_step(model, raw_model.routers(), optimizer, batches, autocast, c)
            bar.update()

            # was any process asked to stop? (A tensor on the CPU: this does not wait for the GPU.)
            stop = bool(sum_over_processes(torch.tensor(len(signals))))

            # measure, once in a while
            evaluating = stop or step == c.max_iters or step % c.eval_interval == 0
            if not (evaluating or step % c.log_interval == 0):
                continue
            check_finite(raw_model, step, Path(c.out_dir, "ckpt.pt"))  # this waits for the device
            train_loss, aux_loss = (sum_over_processes(losses) / world_size).tolist()
            speed = (step - start_step) * tokens / (time.perf_counter() - start)
            rate = speed * raw_model.flops_per_token()  # FLOP/s
            record = {"step": step, "train_loss": train_loss, "aux_loss": aux_loss, "lr": lr,
                      "tokens_per_s": speed, "mfu": rate / (peak * world_size) if peak else None}
            bar.set_postfix(loss=f"{train_loss:.3f}")
            if evaluating:
                # the model that is not compiled: evaluation is rare, and need not compile again
                n = c.final_eval_tokens if step == c.max_iters else c.eval_tokens
                metrics, about["evaluation"] = evaluate(raw_model, data, n, machine, c)
                record |= metrics
            about["log"].append(record)

            # save: at an evaluation a checkpoint and the whole log, else the log's new line
            if rank == 0:
                problem = ""
                try:
                    lock_file = keep_claim(lock_file, c)
                    if evaluating:
                        save(Path(c.out_dir), about, raw_model, optimizer, step)
                    else:
                        with open(Path(c.out_dir, "log.jsonl"), "a") as log:
                            log.write(json.dumps(record) + "\n")
                except OSError as error:  # a disk may be full, or a network away, for a while
                    if stop or step == c.max_iters:
                        raise
                    problem = f"\nnot saved: {error} The next evaluation tries again."
                if evaluating:  # a line that could not be added needs no word: a save adds it
                    numbers = [f"{key} {value:.4g}" for key, value in metrics.items()
                               if isinstance(value, float)]
                    say(f"step {step}, {', '.join(numbers)}{problem}")
            # start the clock anew: tokens_per_s is of training alone
            start, start_step = time.perf_counter(), step
    return step


def say(text: str) -> None:
    """Prints it above the bar. Who reads it may be gone: no reason to end a training."""
    with suppress(OSError):
        tqdm.write(text)


def show_result(model, data, metrics: dict, machine: Machine, c: TrainConfig) -> None:
    """What the user sees last: how the model goes on with validation text, and three lines."""
    try:
        tokenizer = get_tokenizer(data.meta["tokenizer"]["name"])
    except ValueError as error:  # a node without network may lack the vocabulary
        print(f"No sample: {error}")
    else:
        start = torch.from_numpy(data.val[:min(100, c.block_size)].astype("int64"))     # (n)
        with machine.autocast:
            idx = model.generate(start[None].to(machine.device), 256, temperature=0.8)
        ids = idx[0].tolist()
        rule = "-" * 30
        print(f"{rule} validation text {rule}\n{printable(tokenizer, ids[:len(start)])}\n"
              f"{rule} the model goes on {rule}\n{printable(tokenizer, ids[len(start):])}\n"
              f"{'-' * 80}")
    collapsed = (c.n_expert / c.top_k - 1) ** 0.5  # the CV where K experts share all tokens
    print(f"validation perplexity {metrics['perplexity']:.3f} a token "
          f"({metrics['val_loss']:.3f} nats), on {metrics['val_tokens']:,} tokens")
    print(f"load CV {c.n_expert * metrics['load_std']:.3f} (even load: 0, all tokens to {c.top_k} "
          f"experts: {collapsed:.3f})")
    print(f"the run lies in {c.out_dir}; next: python analyze.py {shlex.quote(c.out_dir)}")


@contextmanager
def stop_requests():
    """Yields a list that Ctrl-C and SIGTERM append to: stop after this step."""
    signals = []

    def note(number, frame):
        signals.append(number)
        with suppress(OSError):  # whoever read it may be gone; print is not safe in a handler
            os.write(2, b"\nstopping after this step\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- the files of a run

def claim(c: TrainConfig):
    """-> a locked file: until it is closed, no other run can be in out_dir. Raises ValueError if
    another process runs in it or, without --resume or --overwrite, if it holds a run."""
    out_dir = Path(c.out_dir)
    names = [name for name in ("ckpt.pt", "log.jsonl") if (out_dir / name).exists()]
    if names == ["log.jsonl"] and (out_dir / "log.jsonl").read_bytes().count(b"\n") < 2:
        names = []  # a start that failed, as for want of memory, before its first step was logged
    if names and not (c.resume or c.overwrite):
        go_on = "--resume to go on with it, " if "ckpt.pt" in names else ""
        raise ValueError(f"{out_dir} already holds a run; pass {go_on}--overwrite to start anew, "
                         "which renames that folder, or another --out_dir.")
    out_dir.mkdir(parents=True, exist_ok=True)
    lock_file = lock(out_dir)  # before the folder is renamed: a run may be in it
    if names and c.overwrite:
        old = free_path(out_dir.parent, f"{out_dir.name}.old")
        out_dir.rename(old)  # the lock goes along
        print(f"The run in {out_dir} is now in {old}.")
        out_dir.mkdir()
        lock_file = lock(out_dir)
    return lock_file


def keep_claim(lock_file, c: TrainConfig):
    """Call it before the run writes. Takes the run's locked file, returns the one to go on with:
    the same, unless the run's folder was moved away (another run may have begun in its place). Then
    the run goes on in a new folder, its out_dir from now on."""
    out_dir = Path(c.out_dir)
    path = out_dir / "lock"
    if lock_file.name == os.devnull and out_dir.exists():  # Windows, where nothing is locked
        return lock_file
    if path.exists() and os.path.samestat(path.stat(), os.fstat(lock_file.fileno())):
        return lock_file
    new = free_path(out_dir.parent, f"{out_dir.name}.moved")
    new.mkdir(parents=True)
    lock_file = lock(new)
    c.out_dir = str(new)
    say(f"{out_dir} was moved away: this run goes on in {new}.")
    return lock_file


def open_data(c: TrainConfig, machine: Machine):
    """-> the Dataset in data/<dataset>; with --resume it must be that which the run was trained on.
    stdlib and python, which every machine has, are prepared here if they are missing."""
    folder = Path("data", c.dataset)
    if c.dataset in ("stdlib", "python") and not folder.exists() and machine.rank == 0:
        try:
            prepare(c.dataset)
        except (ValueError, OSError):
            if not folder.exists():  # else another run, started at the same time, was faster
                raise
    if machine.world_size > 1:
        dist.barrier()
    sha256 = read_checkpoint(Path(c.out_dir, "ckpt.pt"))["sha256"] if c.resume else None
    return open_dataset(folder, c.block_size, c.vocab_size, sha256)


def save(out_dir: Path, about: dict, model, optimizer, step: int) -> None:
    """Writes ckpt.pt, all that --resume and analyze.py need of a run except its data, then
    log.jsonl, a copy of the log in it."""
    with replacing(out_dir / "ckpt.pt") as temporary:
        torch.save(about | dict(model=model.state_dict(), optimizer=optimizer.state_dict(),
                                step=step, rng=torch.get_rng_state()), temporary)
    write_log(out_dir, about["log"])


def write_log(out_dir: Path, records: list[dict]) -> None:
    """Writes log.jsonl anew: on a resume, steps after the checkpoint disappear."""
    with replacing(out_dir / "log.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))


def check_finite(model, step: int, path: Path) -> None:
    """If the run has diverged, ends it before the weights are saved. (The loss, computed before the
    update, may be finite where they no longer are.)"""
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(f"the weights are not finite at step {step}; the last good checkpoint, if "
                         f"any, is {path}. Try a lower --learning_rate or a longer --warmup_iters.")


# ---------------------------------------------------------------- speed

PEAK_BF16 = {  # dense bf16 FLOP/s from the data sheets; the first that is part of the device's name
    "A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12,
    "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "4090": 165e12,
    "5090": 210e12, "MI300X": 1307e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The data-sheet bf16 FLOP/s of the device; None where there is no entry, or in float32."""
    if dtype != torch.bfloat16 or device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items()
                 if re.search(rf"{part}(?!\d)", name)), None)  # an A1000 is no A100


def bench(c: TrainConfig) -> None:
    """Trains on synthetic tokens and prints speed and memory, beside the limit: dense products of
    the same FLOPs, timed in the same minute."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--bench measures one device; start it with python, not torchrun.")
    device, dtype, autocast, _, _ = set_up(c)

    def seconds(function):  # the median of calls for three seconds; Timer waits for a GPU
        return Timer("function()", globals={"function": function},
                     num_threads=torch.get_num_threads()).blocked_autorange(min_run_time=3).median

    raw_model = make_model(c, device)
    model = compiled(raw_model) if c.compile else raw_model
    optimizer = make_optimizer(raw_model, c)
    size = (c.gradient_accumulation_steps, 2, c.batch_size, c.block_size)
    batches = list(torch.randint(c.vocab_size, size, device=device))  # x and y (B, T) each
    one_step = lambda: train_step(model, raw_model.routers(), optimizer, batches, autocast, c)
    start = time.perf_counter()
    one_step().tolist()  # compiles; tolist() waits for a GPU
    first = time.perf_counter() - start
    t = seconds(one_step)
    hardware, memory = f"CPU, {torch.get_num_threads()} threads", ""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
        memory = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    dense_rate = 2 * n**3 / seconds(lambda: a @ b)  # FLOP/s

    tokens = c.gradient_accumulation_steps * c.batch_size * c.block_size
    rate = tokens * raw_model.flops_per_token() / t
    peak = peak_flops(device, dtype)
    n_total, n_active = raw_model.num_params()
    print(f"{hardware}, torch {torch.__version__}, {dtype}{', compiled' if c.compile else ''}")
    print(f"{c.config}, {c.router}: {n_total / 1e6:.1f}M parameters, {n_active / 1e6:.1f}M active, "
          f"{tokens:,} tokens a step")
    print(f"{t * 1e3:.1f} ms a step ({first:.1f} s the first), {tokens / t:,.0f} tokens/s, "
          f"{rate / 1e12:.3f} TFLOP/s, MFU {f'{rate / peak:.1%}' if peak else 'unknown'}")
    print(f"{dense_rate / rate:.2f} x the time of dense {n} x {n} products of the same "
          f"FLOPs{memory}")


# ---------------------------------------------------------------- command line

def main(argv: list[str]) -> None:
    c = parse_args(argv)
    if c.bench:
        return bench(c)
    machine = set_up(c)
    data = open_data(c, machine)
    with claim(c) if machine.rank == 0 else nullcontext() as lock_file:
        if machine.world_size > 1:
            dist.barrier()  # no process takes its weights from a folder that is not locked yet
        model, optimizer, step, about = begin(c, data, machine)
        step = train(model, optimizer, step, about, data, lock_file, machine, c)
        if machine.rank == 0 and step == c.max_iters:
            show_result(model, data, about["log"][-1], machine, c)
        elif machine.rank == 0:
            print(f"stopped and saved at step {step}; go on with no other flags than "
                  f"--out_dir={shlex.quote(c.out_dir)} --resume")
    if machine.world_size > 1:  # together: one that leaves early can take gloo's threads down
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
