"""From runs to numbers to figures: how coupled are routers and experts, and what does balance cost?

    python analyze.py                       # every run under out/
    python analyze.py out/aux out/kmeans    # these two
    python analyze.py --tokens=65536        # on more validation tokens

Prints a Markdown table, writes metrics.json and six figures to out/analysis/. Reads top to bottom:
metrics (pure functions of tensors), one run, the table, the figures, the command line.

Shapes: N tokens, C = n_embd, E = n_expert, K = top_k, H = d_expert (expert width).
Metrics are those of "Routers Learn the Geometry of Their Experts", arXiv 2605.12476; what its
summaries leave open is defined in the docstrings below, and is this project's choice."""
import argparse
import json
import math
import os
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import load_balance, load_checkpoint, router_cosines, router_similarity
from prepare_data import Parser, get_batch, open_dataset

ROUTER_STYLES = {  # Okabe-Ito colours; lines, markers and hatches tell them apart in grey
    "aux": ("#E69F00", "--", "s", "//"), "lossfree": ("#0072B2", "-", "o", ""),
    "kmeans": ("#009E73", "-.", "^", "xx"), "none": ("#000000", ":", "D", "..")}
OWN_STYLE = ("#CC79A7", (0, (5, 1)), "v", "\\\\")  # of a router that is not one of these four
PAPER_STD = {"aux": 0.015, "lossfree": 0.018, "kmeans": 0.008}  # load imbalance of its 1B models
# settings that make no other experiment: runs that differ in nothing else are seeds of one group
INCIDENTAL = {"seed", "out_dir", "device", "compile", "resume", "overwrite", "bench",
              "eval_interval", "eval_iters", "log_interval"}


# ---------------------------------------------------------------- metrics

def average_ranks(values: Tensor) -> Tensor:
    """values (N, E) -> the rank of each value in its column, from 0 (N, E) float64. Equal values
    share the mean of their ranks: (how many are smaller + how many are not larger - 1) / 2."""
    columns = values.t().contiguous()                                # (E, N)
    ordered = columns.sort(dim=-1).values
    smaller = torch.searchsorted(ordered, columns)                   # (E, N)
    not_larger = torch.searchsorted(ordered, columns, right=True)    # (E, N)
    return (smaller + not_larger - 1).double().t() / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """a, b (N, E) -> (E): the Pearson correlation of the ranks of each column; nan for a
    constant."""
    a, b = average_ranks(a), average_ranks(b)
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt()


def expert_activations(x: Tensor, w_gate: Tensor, w_up: Tensor, budget: int = 2**22) -> Tensor:
    """How strongly every expert reacts to every token, chosen or not: norms over the H neurons.

        a_ti = ||W_gate_i x_t||,   ||silu(W_gate_i x_t)||,   ||silu(W_gate_i x_t) * (W_up_i x_t)||

    x (N, C), w_gate, w_up (E, H, C) -> (3, N, E). Goes through the tokens in chunks: of the
    pre-activations (tokens, E, H), `budget` numbers exist at a time."""
    E, H, _ = w_gate.shape
    norms = []
    for chunk in x.split(max(1, budget // (E * H))):                 # (n, C)
        gate = (chunk @ w_gate.flatten(0, 1).t()).view(-1, E, H)     # (n, E, H)
        up = (chunk @ w_up.flatten(0, 1).t()).view(-1, E, H)         # (n, E, H)
        silu = F.silu(gate)
        norms.append(torch.stack([v.norm(dim=-1) for v in (gate, silu, up.mul_(silu))]))
    return torch.cat(norms, dim=1)


def relative_activations(activations: Tensor) -> Tensor:
    """a_ti / mean over t of a_ti, (N, E): 1 is what expert i does on an average token."""
    return activations / activations.mean(0).clamp(min=1e-30)


def coupling_by_rank(scores: Tensor, activations: Tensor) -> Tensor:
    """scores, activations (N, E) -> (E): mean over tokens of the relative activation of the expert
    that the router ranks 1st, 2nd, ... E-th for that token. Falls with the rank where both are
    coupled."""
    order = scores.argsort(dim=1, descending=True, stable=True)      # (N, E)
    return relative_activations(activations).gather(1, order).mean(0)


def selected_ratio(activations: Tensor, indices: Tensor) -> Tensor:
    """Mean relative activation over the selected pairs (t, i) / over the others; nan if K = E."""
    relative = relative_activations(activations)
    selected = torch.zeros_like(relative, dtype=torch.bool).scatter_(1, indices, True)
    return relative[selected].mean() / relative[~selected].mean()


def signed_similarity(directions: Tensor) -> Tensor:
    """directions (E, C) -> mean over the pairs i < j of cos(r_i, r_j); nan for one expert."""
    E = len(directions)
    return router_cosines(directions).triu(diagonal=1).sum() / (E * (E - 1) // 2 or math.nan)


def chance_similarity(C: int) -> float:
    """Expected |cos| of two random directions in C dimensions, sqrt(2 / (pi C))."""
    return math.sqrt(2 / (math.pi * C))


def alignments(directions: Tensor, w_gate: Tensor) -> dict[str, Tensor]:
    """directions r (E, C), w_gate (E, H, C) -> three (E, E), row i a direction, column j an expert:

        alignment           |cos(r_i, v_j)|, v_j = top right singular vector of W_gate_j
        mean_row_alignment  |cos(r_i, v_j)|, v_j = mean over the H rows of W_gate_j
        neuron_alignment    mean over the neurons m of |cos(r_i, W_gate_j[m])|"""
    r = F.normalize(directions.float(), dim=-1)                              # (E, C)
    top = torch.linalg.svd(w_gate, full_matrices=False).Vh[:, 0]             # (E, C)
    mean_row = F.normalize(w_gate.mean(1), dim=-1)                           # (E, C)
    neurons = [(r @ F.normalize(w, dim=-1).t()).abs().mean(1) for w in w_gate]  # E of (E)
    return {"alignment": (r @ top.t()).abs(), "mean_row_alignment": (r @ mean_row.t()).abs(),
            "neuron_alignment": torch.stack(neurons, dim=1)}


def matched_mismatched(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """cosines (E, E) -> mean over i = j, mean over i != j (nan for one expert)."""
    E, matched = len(cosines), cosines.trace()
    return matched / E, (cosines.sum() - matched) / (E * (E - 1) or math.nan)


def unrouted_gradient_share(gradient: Tensor, indices: Tensor) -> Tensor:
    """gradient (N, E) at the router's logits, indices (N, K) -> the share of its energy, the sum of
    its squares, on pairs (t, i) where token t does not go to expert i; nan without any gradient."""
    energy = gradient.double().square()
    return energy.scatter(1, indices, 0.0).sum() / energy.sum()


# ---------------------------------------------------------------- one run

class Run(NamedTuple):
    name: str
    config: dict         # all settings of the training, and the step reached
    metrics: dict        # key -> number, text, None or list: what metrics.json holds
    evaluations: dict    # step -> line of log.jsonl
    cosines: np.ndarray  # (E, E) of the router directions of the middle layer
    identity: dict       # "router", "gate", "up" -> |cos| of every gradient row with its one token
    notes: list[str]     # what the user should know


@contextmanager
def watch(routers):
    """Yields a list to which a forward pass appends (x (N, C), logits (N, E), Routing) of each
    router, first layer first. Hooks do not see the logits, which are no module's output: so
    router.logits is shadowed on each instance meanwhile."""
    seen, logits = [], []

    def keeping(method):
        return lambda x: logits.append(method(x)) or logits[-1]

    def collect(router, args, routing):
        seen.append((args[0], logits.pop(), routing))

    hooks = [router.register_forward_hook(collect) for router in routers]
    for router in routers:
        router.logits = keeping(router.logits)
    try:
        yield seen
    finally:
        for router, hook in zip(routers, hooks):
            hook.remove()
            del router.logits


@torch.no_grad()
def observe(model, batches) -> tuple[Tensor, list]:
    """batches: pairs of idx and targets (B, T) -> mean cross-entropy, and for each layer the scores
    (N, E), activations (3, N, E) and indices (N, K). Hidden states are kept for one batch at a
    time."""
    loss, n_tokens, layers = 0.0, 0, [([], [], []) for _ in model.blocks]
    for idx, targets in batches:
        with watch(model.routers()) as seen:
            loss += model(idx, targets)[1].double() * idx.numel()
        n_tokens += idx.numel()
        for block, (x, logits, routing), (scores, activations, indices) in zip(
                model.blocks, seen, layers):
            scores.append(block.moe.router.squash(logits))
            activations.append(expert_activations(x, block.moe.w_gate, block.moe.w_up))
            indices.append(routing.indices)
    return loss / n_tokens, [(torch.cat(s), torch.cat(a, dim=1), torch.cat(i))
                             for s, a, i in layers]


def router_gradients(model, idx: Tensor, targets: Tensor) -> list:
    """One batch (B, T) -> for each layer d(loss + aux_loss) / d(router logits) (N, E), the selected
    experts (N, K), and x (N, C). Leaves no gradient in the model."""
    with watch(model.routers()) as seen:
        _, loss, aux_loss = model(idx, targets)
    gradients = torch.autograd.grad(  # a router may send none: its gates need not use the logits
        loss + aux_loss, [logits for _, logits, _ in seen], allow_unused=True,
        materialize_grads=True)
    return [(g, routing.indices, x.detach()) for g, (x, _, routing) in zip(gradients, seen)]


def one_token_gradients(moe, x: Tensor) -> dict[str, Tensor]:
    """The identity behind the coupling. One token x (C) through one SMoE layer, with a random
    linear loss of the output plus aux_loss -> |cos| of each gradient row with x: "router" (E, 1),
    "gate" and "up" (E, H). All are 1, as each gradient row is (scalar) * x; nan where a row gets no
    gradient."""
    y, aux_loss = moe(x[None, None])                                     # (1, 1, C)
    direction = torch.randn(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)  # (C)
    names = {"router.weight": "router", "w_gate": "gate", "w_up": "up"}  # kmeans: no router
    weights = {names[name]: p for name, p in moe.named_parameters() if name in names}
    gradients = torch.autograd.grad((y * direction).sum() + aux_loss, list(weights.values()))
    cosines, x = {}, x.double()  # float32 would lose the squares of small gradients
    for part, gradient in zip(weights, gradients):
        gradient = gradient.double().view(len(moe.w_gate), -1, len(x))   # (E, 1 or H, C)
        norm = gradient.norm(dim=-1)
        cosine = (gradient @ x).abs() / (norm * x.norm())
        cosines[part] = cosine.masked_fill(norm < 1e-30, math.nan)
    return cosines


def layer_metrics(block, scores: Tensor, activations: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """The metrics of one layer on the observed tokens, by their keys in metrics.json."""
    directions, w_gate = block.moe.router.directions.detach(), block.moe.w_gate.detach()
    load = torch.bincount(indices.flatten(), minlength=len(w_gate)).double()     # (E)
    std, violation = load_balance(load)
    metrics = {"load_std": std, "max_violation": violation,
               "load_sorted": load.sort(descending=True).values / load.sum(),
               "router_similarity": router_similarity(directions),
               "router_similarity_signed": signed_similarity(directions),
               "coupling_by_rank": coupling_by_rank(scores, activations[0]),
               "selected_ratio": selected_ratio(activations[0], indices)}
    for suffix, activation in zip(("", "_silu", "_swiglu"), activations):
        # an expert with a constant score or activation has no correlation and does not count
        metrics["coupling_spearman" + suffix] = spearman(scores, activation).nanmean()
    for key, cosines in alignments(directions, w_gate).items():
        metrics[key + "_matched"], metrics[key + "_mismatched"] = matched_mismatched(cosines)
    return metrics


def gradient_metrics(gradient: Tensor, indices: Tensor, identity: dict) -> dict[str, Tensor]:
    """The metrics of one layer that need gradients. kmeans has no router to send one to: nan."""
    nothing = torch.full((1, 1), math.nan)
    learned = "router" in identity
    metrics = {"unrouted_gradient_share":
               unrouted_gradient_share(gradient, indices) if learned else nothing.sum()}
    for part in ("router", "gate", "up"):
        cosines = identity.get(part, nothing)                            # (E, 1 or H)
        missing = cosines.isnan()
        metrics[f"identity_min_cos_{part}"] = cosines.masked_fill(missing, math.inf).min()
        metrics[f"identity_experts_{part}"] = (~missing).any(dim=1).double().sum()
    return metrics


def to_json(value):
    """Tensors -> numbers and lists; nan and infinity, which JSON has not, -> None."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [to_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_evaluations(path: Path) -> dict[int, dict]:
    """log.jsonl -> the lines with an evaluation, by step; a line cut short by a kill is skipped."""
    evaluations = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            if "val_loss" in entry:
                evaluations[entry["step"]] = entry
        except (ValueError, TypeError, KeyError):
            continue
    return evaluations


def measure_run(folder: Path, name: str, tokens: int, device: str) -> Run:
    """Everything about one run, on `tokens` validation tokens (rounded up to whole sequences), the
    same for all runs with the same data and block_size; gradients come from the first batch of
    them. In float32 and eval mode: nothing moves. Raises ValueError for a run that cannot be
    measured."""
    model, checkpoint = load_checkpoint(folder / "ckpt.pt")
    c, step = model.config, checkpoint["step"]
    config = asdict(c) | checkpoint["config"] | {"step": step}
    if "dataset" not in config:
        raise ValueError("its checkpoint does not name the dataset; train it again.")
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise ValueError("its weights are not finite; train it again with a lower --learning_rate.")
    data = open_dataset(Path("data", config["dataset"]), c.block_size, c.vocab_size)
    evaluations, sha256 = read_evaluations(folder / "log.jsonl"), data.meta["sha256"]
    notes = [] if evaluations else [f"{folder}/log.jsonl holds no evaluation, so the run is "
                                    "missing in training.png."]
    if checkpoint["data_sha256"] != sha256["train.bin"]:
        notes += [f"data/{config['dataset']} is not the data that {folder} was trained on: the run "
                  "may have seen some of the validation tokens in training."]

    model.to(device).eval()
    n_sequences, per_batch = math.ceil(tokens / c.block_size), max(1, 1024 // c.block_size)
    sizes = [min(per_batch, n_sequences - i) for i in range(0, n_sequences, per_batch)]

    def batch(i):
        return get_batch(data, "val", seed=0, step=0, micro_step=i, batch_size=sizes[i],
                         block_size=c.block_size, device=device)

    bar = dict(leave=False, disable=None)  # None: on a terminal only
    loss, observed = observe(model, map(batch, tqdm(range(len(sizes)), name, unit="batch", **bar)))
    layers, identities, gradients = [], [], router_gradients(model, *batch(0))
    for block, seen, (gradient, indices, x) in zip(
            model.blocks, tqdm(observed, name, unit="layer", **bar), gradients):
        identities.append(one_token_gradients(block.moe, x[0]))
        layers.append(layer_metrics(block, *seen)
                      | gradient_metrics(gradient, indices, identities[-1]))

    metrics = {"router": c.router, "seed": config.get("seed"), "step": step,
               "dataset": config["dataset"], "tokenizer": data.meta["tokenizer"]["name"],
               "val_sha256": sha256["val.bin"], "tokens": n_sequences * c.block_size,
               "n_params": model.num_params()[0], "n_params_active": model.num_params()[1],
               "perplexity": loss.exp(), "router_similarity_chance": chance_similarity(c.n_embd)}
    for key in layers[0]:
        by_layer = torch.stack([layer[key].double().cpu() for layer in layers])  # (n_layer, ...)
        metrics[key], metrics[f"{key}_by_layer"] = by_layer.nanmean(0), by_layer
    cosines = router_cosines(model.routers()[c.n_layer // 2].directions)
    identity = {part: torch.cat([layer[part].flatten() for layer in identities]).cpu().numpy()
                for part in identities[0]}
    return Run(name, config, {key: to_json(value) for key, value in metrics.items()}, evaluations,
               cosines.cpu().numpy(), identity, notes)


# ---------------------------------------------------------------- the table

COLUMNS = (  # header, keys, what the paper reports
    ("perplexity", ("perplexity",), "kmeans 2.2 % above lossfree, about level with aux"),
    ("load Std", ("load_std",), "aux 0.015, lossfree 0.018, kmeans 0.008"),
    ("max violation", ("max_violation",), ""),
    ("router similarity (chance)", ("router_similarity", "router_similarity_chance"),
     "aux nearly three times lossfree"),
    ("Spearman score, activation", ("coupling_spearman",), "positive, no number"),
    ("selected ratio", ("selected_ratio",), "above 1, no number"),
    ("alignment matched (mismatched)", ("alignment_matched", "alignment_mismatched"),
     "highest for kmeans, no number"),
    ("neuron alignment matched (mismatched)",
     ("neuron_alignment_matched", "neuron_alignment_mismatched"), ""),
    ("unrouted gradient share", ("unrouted_gradient_share",), "aux alone, no number"))


def mean_and_spread(seeds: list[dict], key: str) -> str:
    values = [metrics[key] for metrics in seeds if metrics[key] is not None]
    spread = f" ± {np.std(values, ddof=1):.2g}" if len(set(values)) > 1 else ""
    return f"{np.mean(values):.4g}{spread}" if values else "–"


def markdown_table(rows: list[tuple[str, list[dict]]]) -> str:
    """rows: (name, metrics of one run or of several seeds) -> Markdown, the paper's numbers last.
    Of several seeds: mean ± sample standard deviation."""
    first = {}  # val.bin -> metrics of its first row: perplexities compare on the same tokens only
    for _, seeds in rows:
        first.setdefault(seeds[0]["val_sha256"], seeds[0])
    letters = dict(zip(first, "abcdefghijklmnopqrstuvwxyz"))
    lines = [("run", "router", "seed", *(header for header, _, _ in COLUMNS)),
             ("---",) * (3 + len(COLUMNS))]
    for name, seeds in rows:
        cells = []
        for _, (key, *other), _ in COLUMNS:
            cells.append(mean_and_spread(seeds, key))
            cells[-1] += "".join(f" ({mean_and_spread(seeds, k)})" for k in other)
            if key == "perplexity" and len(first) > 1:
                cells[-1] += f" [{letters[seeds[0]['val_sha256']]}]"
        lines.append((name.replace("|", "\\|"), seeds[0]["router"],
                      ", ".join(str(metrics["seed"]) for metrics in seeds), *cells))
    lines.append(("**paper** (1B)", "all", "", *(paper for _, _, paper in COLUMNS)))
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    if len(first) > 1:
        corpora = ", ".join(f"[{letters[sha]}] {m['dataset']} in {m['tokenizer']} tokens"
                            for sha, m in first.items())
        table += ("\n\nPerplexities with different letters are not comparable: their validation "
                  f"tokens differ: {corpora}.")
    return table


# ---------------------------------------------------------------- the figures

class Group(NamedTuple):
    """Runs that differ in nothing but the seed: one line, one bar, one colour in every figure."""
    label: str     # what tells it from the other groups
    short: str     # the same, or a letter where there is no room for all labels
    settings: dict
    runs: list[Run]
    line: dict     # color, linestyle, marker
    hatch: str

    @property
    def legend(self) -> str:
        return self.label if self.short == self.label else f"{self.short}: {self.label}"

    def values(self, key: str) -> np.ndarray:
        """(seeds, ...) float, nan where there is no value."""
        return np.array([run.metrics[key] for run in self.runs], dtype=float)

    def mean(self, key: str) -> float:
        return self.values(key).mean()


def group_runs(runs: list[Run]) -> list[Group]:
    """In the order aux, lossfree, kmeans, none, others. A label names the router, and of preset,
    data set and as many other settings as it takes, what is not the most common value."""
    names = [run.config["router"] for run in runs]
    styles = ROUTER_STYLES | {name: OWN_STYLE for name in names if name not in ROUTER_STYLES}
    routers, found = list(styles), {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in INCIDENTAL}
        key = json.dumps(settings, sort_keys=True, default=str)
        found.setdefault(key, (settings, []))[1].append(run)
    found = sorted(found.values(), key=lambda group: routers.index(group[0]["router"]))
    labels = [settings["router"] for settings, _ in found]
    keys = ["config", "dataset", *(key for settings, _ in found for key in settings)]
    for key in dict.fromkeys(keys):
        values, before = [str(settings.get(key)) for settings, _ in found], list(labels)
        for i, value in enumerate(values):
            if key == "router" or value == max(values, key=values.count):
                continue
            if key in ("config", "dataset"):
                labels[i] += f", {value}"
            elif before.count(before[i]) > 1:
                labels[i] += f", {key}={value}"
    groups, roomy = [], len(labels) * max(map(len, labels)) <= 48
    for label, (settings, members) in zip(labels, found):
        at = routers.index(settings["router"])
        twins = sum(group.settings["router"] == settings["router"] for group in groups)
        color = styles[settings["router"]][0]  # twins share the colour, not the line
        linestyle, marker, hatch = styles[routers[(at + twins) % len(routers)]][1:]
        line = {"color": color, "linestyle": linestyle, "marker": marker, "markersize": 4,
                "markerfacecolor": color if twins < len(routers) else "white"}
        short = label if roomy else chr(ord("A") + len(groups))
        groups.append(Group(label, short, settings, members, line, hatch))
    return groups


def draw_line(ax, group: Group, x, values: np.ndarray) -> None:
    """values (seeds, points): their mean, and a band from the lowest seed to the highest."""
    ax.plot(x, values.mean(0), markevery=max(1, len(x) // 16), label=group.legend, **group.line)
    if len(values) > 1:
        ax.fill_between(x, values.min(0), values.max(0), color=group.line["color"], alpha=0.2, lw=0)


def draw_lines(ax, groups, key: str, first: int) -> None:
    """A line a group over first, first + 1, ...: ranks or layers."""
    for group in groups:
        values = group.values(key)                                   # (seeds, E or layers)
        draw_line(ax, group, np.arange(values.shape[1]) + first, values)
    ax.xaxis.get_major_locator().set_params(integer=True)


def draw_bars(ax, groups, key: str, shift=0.0, width=0.7, filled=True, missing="n/a") -> None:
    """A bar a group at the mean over seeds, with its number, and a whisker from the lowest seed to
    the highest. Filled: a white hatch on the colour; else the colour's hatch on white."""
    for x, group in enumerate(groups):
        values, color = group.values(key), group.line["color"]
        low, mean, high = values.min(), values.mean(), values.max()
        text = missing if np.isnan(mean) else f"{mean:.2g}".removeprefix("0") or "0"
        ax.bar(x + shift, mean, width, facecolor=color if filled else "white",
               edgecolor="white" if filled else color, hatch=group.hatch,
               label=group.legend if filled and group.short != group.label else None)
        if len(values) > 1:
            ax.errorbar(x + shift, mean, [[mean - low], [high - mean]], color="0.3", capsize=3)
        top = 0 if np.isnan(high) else high
        ax.annotate(text, (x + shift, top), (0, 4), ha="center", fontsize=8,
                    textcoords="offset points", rotation=0 if len(groups) < 6 else 90)
    labels = [group.short.replace(", ", "\n") for group in groups]
    ax.set_xticks(range(len(groups)), labels, fontsize=9)
    ax.set_xlim(-0.6, len(groups) - 0.4)
    ax.margins(y=0.1 if len(groups) < 6 else 0.25)


def draw_chance(ax, groups) -> None:
    """The |cos| of random directions, once for each width."""
    for i, C in enumerate(sorted({group.settings["n_embd"] for group in groups})):
        ax.axhline(chance_similarity(C), color="0.35", linestyle=(0, (1, 1 + 2 * i)), zorder=3,
                   label=f"chance, C = {C}")


def listed(groups, key: str, spec: str = ".2f") -> str:
    """"aux 0.31, kmeans 0.40"; no line breaks between a name and its number."""
    return ", ".join(f"{group.short}\u00a0{group.mean(key):{spec}}" for group in groups
                     if not math.isnan(group.mean(key))) or "none"


def add_legend(fig, ax) -> None:
    """The legend of `ax`, if it has any, below the whole figure in as many columns as fit."""
    handles, labels = ax.get_legend_handles_labels()
    if labels:
        columns = max(1, 110 // (8 + max(map(len, labels))))
        fig.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)


def draw_coupling(fig, groups) -> str:
    left, right = fig.subplots(1, 2)
    draw_lines(left, groups, "coupling_by_rank", 1)
    draw_lines(right, groups, "coupling_spearman_by_layer", 0)
    left.axhline(1, color="0.35", linestyle=(0, (1, 1)), label="no coupling")
    right.axhline(0, color="0.35", linestyle=(0, (1, 1)))
    left.set(xlabel="router rank of the expert (1: highest score)",
             ylabel="gate-neuron activation\n(1: the expert's mean over tokens)")
    right.set(xlabel="layer", ylabel="Spearman correlation of\nrouter score and activation")
    add_legend(fig, left)
    return f"Coupling: Spearman of score and activation {listed(groups, 'coupling_spearman')}"


def similarity_ratio(groups) -> str:
    """Router similarity of aux over that of lossfree where nothing else differs."""
    ratios = []
    for aux in groups:
        for free in groups:
            if free.settings["router"] == "lossfree" \
                    and aux.settings == free.settings | {"router": "aux"}:
                ratio = aux.mean("router_similarity") / free.mean("router_similarity")
                ratios.append(f"{ratio:.2f}{aux.label.removeprefix('aux')}")
    return "; ".join(ratios) or "unknown, as no two such runs differ in nothing else"


def draw_similarity(fig, groups) -> str:
    left, right = fig.add_gridspec(1, 2, width_ratios=(1.1, 1))
    columns, maps = math.ceil(math.sqrt(len(groups))), []
    left = left.subgridspec(math.ceil(len(groups) / columns), columns)
    matrices = [group.runs[0].cosines for group in groups]
    scale = max(0.01, *(np.abs(cosines - np.eye(len(cosines))).max() for cosines in matrices))
    for i, group in enumerate(groups):
        ax = fig.add_subplot(left[i // columns, i % columns])
        # from dark for -1 to light for +1: the sign survives in greyscale
        image = ax.imshow(matrices[i], vmin=-scale, vmax=scale, cmap="cividis")
        ax.set_title(f"{group.short}, layer {group.settings['n_layer'] // 2}", fontsize=9)
        ax.set(xticks=[], yticks=[], xlabel="expert", ylabel="expert")
        maps.append(ax)
    fig.colorbar(image, ax=maps, extend="max", location="bottom", shrink=0.8, aspect=30,
                  label="cosine of two router directions (diagonal: 1)")
    ax = fig.add_subplot(right)
    draw_lines(ax, groups, "router_similarity_by_layer", 0)
    draw_chance(ax, groups)
    ax.set(xlabel="layer", ylabel="mean |cosine| of two router directions", ylim=(0, None))
    add_legend(fig, ax)
    return (f"Router similarity, aux / lossfree: {similarity_ratio(groups)} "
            "(paper: nearly three times)")


def draw_alignment(fig, groups) -> str:
    axes = fig.subplots(1, 3)
    for ax, key, title in zip(axes, ("alignment", "mean_row_alignment", "neuron_alignment"), (
            "top singular vector of W_gate", "mean row of W_gate", "single rows of W_gate, mean")):
        draw_bars(ax, groups, f"{key}_matched", -0.2, 0.38)
        draw_bars(ax, groups, f"{key}_mismatched", 0.2, 0.38, filled=False)
        draw_chance(ax, groups)
        ax.set_title(title, fontsize=10)
    axes[0].set_ylabel("|cosine| with a router direction")
    axes[1].set_xlabel("filled: of the same expert      outlined: of another expert")
    add_legend(fig, axes[0])
    return f"Router-expert alignment, same expert: {listed(groups, 'alignment_matched')}"


def draw_load(fig, groups) -> str:
    columns = min(6, len(groups))
    rows, ax = math.ceil(len(groups) / columns), None
    fig.set_figheight(fig.get_figheight() + 1.5 * (rows - 1))
    top, bottom = fig.subfigures(2, 1, height_ratios=(rows, 1 + 0.1 * max(0, len(groups) - 5)))
    for i, group in enumerate(groups):
        ax = top.add_subplot(rows, columns, i + 1, sharey=ax)
        load = group.values("load_sorted_by_layer").mean(0)          # (layers, E)
        for depth, shares in zip(np.linspace(0, 1, len(load)), load):
            ax.plot(range(1, len(shares) + 1), shares * len(shares), color=group.line["color"],
                    alpha=1 - 0.7 * depth, linewidth=1 + 2 * depth)
        ax.axhline(1, color="0.35", linestyle=(0, (1, 1)))
        ax.set_title(group.short.replace(", ", "\n"), fontsize=10)
        ax.xaxis.get_major_locator().set_params(integer=True)
    top.supxlabel("expert, busiest first (thin and dark: first layer; wide and light: last layer; "
                  "dotted: uniform load)", fontsize=10)
    top.supylabel("load / uniform load", fontsize=10)
    ax = bottom.subplots()
    draw_bars(ax, groups, "load_std", width=0.5)
    for x, group in enumerate(groups):
        if group.settings["router"] in PAPER_STD:
            ax.plot(x + 0.35, PAPER_STD[group.settings["router"]], "kD", markersize=6)
    ax.set_ylabel("Std of the load share\n(diamond: the paper's, 1B)")
    add_legend(bottom, ax)
    return f"Load Std: {listed(groups, 'load_std', '.4f')} (paper: 0.015, 0.018, 0.008)"


def draw_training(fig, groups) -> str:
    axes, last = fig.subplots(1, 3), []
    for group in groups:
        logs = [run.evaluations for run in group.runs if run.evaluations]
        steps = sorted(set.intersection(*map(set, logs))) if logs else []
        if not steps:
            continue
        tokens = np.array(steps) * math.prod(group.settings.get(key, 1) for key in (
            "batch_size", "gradient_accumulation_steps", "block_size"))
        for ax, key in zip(axes, ("perplexity", "load_std", "router_similarity")):
            values = np.array([[log[step].get(key) for step in steps] for log in logs], dtype=float)
            draw_line(ax, group, tokens / 1e6, values)
            if key == "perplexity":
                last.append(f"{group.short}\u00a0{values[:, -1].mean():.2f}")
    for ax, label in zip(axes, ("validation perplexity", "Std of the load share",
                                "mean |cosine| of router directions")):
        ax.set(xlabel="training tokens (millions)", ylabel=label)
        ax.locator_params(axis="x", nbins=4)
    axes[0].set_yscale("log", subs=())
    axes[0].yaxis.get_major_locator().set_params(subs=(1, 1.5, 2, 3, 5, 7))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[1].set_ylim(0)
    axes[2].set_ylim(0)
    draw_chance(axes[2], groups)
    add_legend(fig, axes[2])
    return f"Training: last validation perplexity {', '.join(last) or 'unknown, without log.jsonl'}"


def draw_gradients(fig, groups) -> str:
    left, right = fig.subplots(1, 2, width_ratios=(1.6, 1))
    lowest, n_rows, jitter = 1.0, 0, np.random.default_rng(0)
    for p, part in enumerate(("router", "gate", "up")):
        for i, group in enumerate(groups):
            x = p + (i - (len(groups) - 1) / 2) * 0.8 / len(groups)
            cosines = np.concatenate([run.identity.get(part, np.empty(0)) for run in group.runs])
            cosines = cosines[~np.isnan(cosines)]
            lowest, n_rows = min(lowest, cosines.min(initial=1.0)), n_rows + len(cosines)
            left.plot(x + jitter.uniform(-0.25, 0.25, len(cosines)) / len(groups), cosines,
                      label=None if p else group.legend,
                      **group.line | {"linestyle": "", "markersize": 3})
            text = f"{group.mean(f'identity_experts_{part}'):.3g} of {group.settings['n_expert']}"
            left.annotate(text, (x, 0.95), rotation=90, ha="center", va="top", fontsize=8)
    draw_chance(left, groups)
    left.set_xticks(range(3), ["router rows", "gate neurons", "up neurons"])
    left.set(ylim=(0, 1.05), ylabel="|cosine| of gradient row and token",
             xlabel="one token (upright: experts that its gradient reaches)")
    draw_bars(right, groups, "unrouted_gradient_share", missing="no\ngradient")
    right.set(ylabel="share of router-gradient energy\nfrom tokens not routed to the expert")
    right.set_ylim(0, max(1e-3, right.get_ylim()[1]))
    add_legend(fig, left)
    return (f"One token: lowest |cosine| of {n_rows:,} gradient rows with it {lowest:.7f}. "
            f"Energy from unrouted tokens: {listed(groups, 'unrouted_gradient_share', '.2g')}")


FIGURES = {  # file: what draws it and returns its title, height in inches
    "coupling": (draw_coupling, 4.2), "similarity": (draw_similarity, 5),
    "alignment": (draw_alignment, 4.2), "load": (draw_load, 6), "training": (draw_training, 4),
    "gradients": (draw_gradients, 4.6)}


def draw_figures(runs: list[Run], out_dir: Path) -> list[Path]:
    """-> the PNG files, 1350 pixels wide. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure  # in place of pyplot: no global state, no display

    groups, paths = group_runs(runs), []
    for name, (draw, height) in FIGURES.items():
        fig = Figure(figsize=(9, height + 0.2 * max(0, len(groups) - 5)), layout="constrained")
        fig.suptitle(textwrap.fill(draw(fig, groups), 100), fontsize=11)
        paths.append(out_dir / f"{name}.png")
        fig.savefig(paths[-1], dpi=150)
    return paths


# ---------------------------------------------------------------- command line

def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", type=Path, metavar="RUN",
                        help="folder of a run, such as out/kmeans (default: all under out/)")
    parser.add_argument("--out_dir", type=Path, default=Path("out/analysis"), metavar="DIR",
                        help="where metrics.json and the figures go (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16384, metavar="N",
                        help="validation tokens that each run sees (default: %(default)s)")
    parser.add_argument("--device", default="auto",
                        help="auto, cpu, cuda or cuda:N (default: auto)")
    args = parser.parse_args(argv)
    if args.tokens < 1:
        parser.error(f"--tokens must be positive, not {args.tokens}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        parser.error(f"--device={args.device} is not a device of this machine")
    folders = args.run or sorted(path.parent for path in Path("out").rglob("ckpt.pt"))
    if not folders:
        raise ValueError("there is no run under out/; train one with python train.py.")
    args.run = list({folder.resolve(): folder for folder in folders}.values())  # each once
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out_dir={args.out_dir} cannot be a folder ({error.strerror}); name "
                         "another.") from error
    names, runs = [folder.resolve().name for folder in args.run], []
    for folder, name in zip(args.run, names):
        try:
            name = name if names.count(name) == 1 else folder.as_posix()
            runs.append(measure_run(folder, name, args.tokens, args.device))
            notes = runs[-1].notes
        except torch.OutOfMemoryError:
            notes = [f"{folder} is left out: it needs more memory than {args.device} has."]
        except (ValueError, OSError) as error:
            notes = [f"{folder} is left out: {textwrap.shorten(str(error), 400)}"]  # on one line
        for note in notes:
            print(note, file=sys.stderr)
    if not runs:
        raise ValueError("no run is left to analyze.")

    path = args.out_dir / "metrics.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({run.name: run.metrics for run in runs}, indent=1) + "\n")
    os.replace(temporary, path)  # a reader sees the old file or the new one
    print(markdown_table([(run.name, [run.metrics]) for run in runs]))
    groups = group_runs(runs)
    if len(groups) < len(runs):
        print("\nMean ± sample standard deviation over seeds:\n")
        print(markdown_table([(g.label, [run.metrics for run in g.runs]) for g in groups]))
    figures = []
    try:
        figures = draw_figures(runs, args.out_dir)
    except ImportError:
        print("matplotlib is missing: for the figures run pip install matplotlib, then this "
              "command again.", file=sys.stderr)
    print(f"\nWrote {', '.join(map(str, [path, *figures]))}.")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
