"""From runs to numbers to figures: how coupled are routers and experts, and what does balance cost?

    python analyze.py                            # every run out/NAME
    python analyze.py out/aux-1 out/kmeans-1     # these two
    python analyze.py out/analysis/metrics.json  # draw again, from the numbers alone
    python analyze.py --hf=DIR                   # a mixture of experts that transformers can load

Prints a Markdown table, writes metrics.json and the figures to out/analysis/. Three parts, from top
to bottom: observe (a run -> what its layers do on validation tokens, the only part that opens
one), measure (pure functions of that), and, from metrics.json alone, group the runs, print the
table, draw. Behind them, observe once more: a transformers model.

Shapes: N tokens, C = n_embd, E = n_expert, K = top_k, H = d_expert (expert width).
The metrics follow "Routers Learn the Geometry of Their Experts", arXiv 2605.12476, but for some of
our own: common_share, token_information, load_cv_sampling, unrouted_gradient_share,
alignment_mismatched. What the paper's summaries leave open is this project's choice, and defined in
the docstrings below."""
import argparse
import hashlib
import json
import math
import os
import re
import sys
import textwrap
import traceback
from itertools import chain, combinations, cycle
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import (
    INCIDENTAL, code_hash, code_of, expert_activations, expert_colors, load_balance,
    load_checkpoint, perplexity, probe, router_cosines, router_similarity, spearman, watch)
from prepare_data import (
    Parser, cli, eval_batches, free_path, get_tokenizer, lock, mistake, open_corpus, open_dataset,
    printable, read_text, replacing, visible)

WIDTH = 70  # characters in a line of experts.png
BAR = dict(leave=False, disable=None)  # of every progress bar; None: shown on a terminal only


def warn(sentence: str) -> None:
    print(sentence, file=sys.stderr)


# ---------------------------------------------------------------- observe: a run -> its layers

class Layer(NamedTuple):
    """One SMoE layer as it was seen at work on N tokens, whatever model it belongs to."""
    depth: int            # its block's place in the model
    directions: Tensor    # (E, C) router rows or centroids
    w_gate: Tensor        # (E, H, C)
    w_up: Tensor | None   # (E, H, C); None with --hf, whose activation function is not known
    b_gate: Tensor | None  # (E, H) is added to W_gate x
    x: Tensor             # (N, C) hidden states
    scores: Tensor        # (N, E) of every expert for every token, before any selection bias
    indices: Tensor       # (N, K) the selected experts, best first (of a run: with its bias)
    load: Tensor          # (E) tokens that each expert got; of a run: in its last evaluation
    gradient_share: Tensor  # () unrouted_gradient_share, on one batch; nan with --hf


class Observed(NamedTuple):
    about: dict           # what metrics.json says of the model beside the metrics of its layers
    tokens: Tensor        # (N) ids, in the order of the layers' rows
    text_of: Callable     # token id -> its text
    layers: list[Layer]


def observe_run(folder: Path, n_tokens: int, device: str) -> Observed:
    """The run in `folder`, on n_tokens validation tokens (rounded up to whole sequences), its
    layers in float32, in eval mode: nothing moves. Perplexity and load are those of the run's last
    evaluation (after an early stop it is on eval_tokens tokens). Raises ValueError for a run that
    cannot be measured."""
    model, checkpoint = load_checkpoint(folder / "ckpt.pt")
    c = model.config
    config, evaluation = checkpoint["config"], checkpoint["evaluation"]
    # the curves are of evaluations on equally many tokens; the last one, on more, would be a jump
    n_eval = checkpoint["log"][0]["val_tokens"]
    log = [record for record in checkpoint["log"] if record.get("val_tokens") == n_eval]
    data = open_dataset(Path("data", config["dataset"]), c.block_size, c.vocab_size,
                        checkpoint["sha256"])

    # n tokens in the windows of train.py, about 1,024 tokens a batch
    def batches(n, size=max(1, 1024 // c.block_size)):
        return list(eval_batches(data, n, block_size=c.block_size, device=device, batch_size=size))

    model.to(device).eval()
    with torch.autocast(torch.device(device).type, torch.bfloat16,
                        enabled=config["dtype"] == "bfloat16"):  # as train.py does it
        agreement, objective = probe(model, batches(2048, size=1))
    # does the code, as it is now, compute what the run noted? (Rounding, in bfloat16 too, moves
    # less than this.)
    noted = evaluation["coupling_spearman"]  # None: one expert
    repeated = (abs(objective - evaluation["objective"]) < 0.004
                and (noted is None or abs(agreement.nanmean().item() - noted) < 0.001))
    code = {key: checkpoint[key] for key in ("code", "router_code")}
    shares = gradient_shares(model, *batches(1024)[0])                   # (n_layer)
    if code != code_of(c.router):  # after an edit an equal loss does not prove equal gradients
        shares *= math.nan
    tokens, layers = observe_layers(
        model, tqdm(batches(n_tokens), folder.name, **BAR), evaluation["load"].to(device), shares)
    # runs are averaged over seeds if these are equal, but for what experiment() leaves out. A field
    # that is newer than the run has its default, as in the model
    settings = vars(c) | config | code | {
        "outdated": "no" if repeated else "yes",
        "history": ", ".join(checkpoint["history"]) or "none",  # what a --resume has changed
        "data_sha256": checkpoint["sha256"]["train.bin"][:12],
        "val_sha256": checkpoint["sha256"]["val.bin"][:12]}
    about = {
        "router": c.router, "seed": config["seed"], "step": checkpoint["step"],
        "settings": settings, "log": log,
        "perplexity": evaluation["perplexity"], "val_tokens": evaluation["val_tokens"]}
    try:
        encoding = get_tokenizer(checkpoint["tokenizer"])
        text_of = lambda token: printable(encoding, [token]) or f"<{token}>"
    except ValueError as error:  # its vocabulary is not on this machine
        text_of = lambda token: f"<{token}>"
        warn(f"experts.png shows token ids: {error}")
    return Observed(about, tokens, text_of, layers)


@torch.no_grad()
def observe_layers(model, batches, loads: Tensor, shares: Tensor) -> tuple[Tensor, list[Layer]]:
    """batches of idx and targets (B, T), loads (n_layer, E), unrouted_gradient_share (n_layer) ->
    tokens (N), the layers."""
    tokens, layers = [], []
    with watch(model.routers()) as seen:
        for idx, targets in batches:
            model(idx, targets)
            tokens.append(idx.flatten())
    for depth, (block, calls) in enumerate(zip(model.blocks, seen)):
        moe = block.moe
        layers.append(Layer(
            depth, moe.router.directions.detach(), moe.w_gate.detach(), moe.w_up.detach(), None,
            x=torch.cat([x for x, _ in calls]),
            scores=torch.cat([routing.scores for _, routing in calls]),
            indices=torch.cat([routing.indices for _, routing in calls]), load=loads[depth],
            gradient_share=shares[depth]))
    return torch.cat(tokens), layers


def gradient_shares(model, idx: Tensor, targets: Tensor) -> Tensor:
    """One batch (B, T) -> (n_layer): how much of the gradient at the router's logits, of loss +
    aux_loss, is on experts that the token does not go to; nan where no gradient moves the router.
    The formula: unrouted_gradient_share, below."""
    with watch(model.routers()) as seen:
        _, loss, aux_loss = model(idx, targets)
    routings = [calls[0][1] for calls in seen]
    logits = [routing.logits for routing in routings]                    # n_layer of (N, E)
    if not (model.routers()[0].directions.requires_grad and logits[0].requires_grad):
        # centroids: the gradient goes on to x and moves no direction
        return torch.full((len(logits),), math.nan)
    gradients = torch.autograd.grad(loss + aux_loss, logits, materialize_grads=True)
    return torch.stack([unrouted_gradient_share(gradient, routing.indices)
                        for gradient, routing in zip(gradients, routings)])


# ---------------------------------------------------------------- measure: a layer -> its metrics

def relative_activations(activations: Tensor) -> Tensor:
    """a_ti / mean over t of a_ti, (N, E): 1 is what expert i does on an average token."""
    return activations / activations.mean(0).clamp(min=1e-30)


def coupling_by_rank(scores: Tensor, activations: Tensor) -> Tensor:
    """scores, activations (N, E) -> (E): mean over tokens of the relative activation of the expert
    that the router ranks 1st, 2nd, ... E-th for that token: how far both agree."""
    order = scores.argsort(dim=1, descending=True, stable=True)          # (N, E)
    return relative_activations(activations).gather(1, order).mean(0)


def selected_ratio(activations: Tensor, indices: Tensor) -> Tensor:
    """Mean relative activation over the selected pairs (t, i) / over the others; nan if K = E."""
    relative = relative_activations(activations)                         # (N, E)
    selected = torch.zeros_like(relative, dtype=torch.bool).scatter_(1, indices, True)
    return relative[selected].mean() / relative[~selected].mean()


def common_share(directions: Tensor, mean: Tensor) -> Tensor:
    """directions (E, C), mean hidden state (C) -> mean over i of cos(r_i, mean)^2: how much of a
    router direction points along the mean hidden state. Chance level: 1 / C."""
    return (F.normalize(directions, dim=-1) @ F.normalize(mean, dim=-1)).square().mean()


def top_direction(w: Tensor) -> Tensor:
    """w (H, C) -> its first right singular vector (C), the unit x that makes ||w x|| largest; from
    the smaller of w w^T and w^T w: for large experts five times as fast as an SVD."""
    if len(w) > w.shape[1]:
        return torch.linalg.eigh(w.t() @ w).eigenvectors[:, -1]
    return F.normalize(w.t() @ torch.linalg.eigh(w @ w.t()).eigenvectors[:, -1], dim=0)


def alignment(directions: Tensor, w_gate: Tensor) -> tuple[Tensor, Tensor]:
    """directions r (E, C), w_gate (E, H, C) -> mean over i = j and mean over i != j (nan for one
    expert) of |cos(r_i, v_j)|, v_j = first right singular vector of W_gate_j."""
    E = len(directions)
    top = torch.stack([top_direction(w.float()) for w in w_gate])        # (E, C)
    cosines = (F.normalize(directions, dim=-1) @ top.t()).abs()          # (E, E)
    matched = cosines.trace()
    return matched / E, (cosines.sum() - matched) / (E * (E - 1))


def unrouted_gradient_share(gradient: Tensor, indices: Tensor) -> Tensor:
    """gradient (N, E) at the router's logits, indices (N, K) -> the share of its energy, the sum of
    its squares, on pairs (t, i) where token t does not go to expert i; nan without any gradient."""
    energy = gradient.double().square()
    return energy.scatter(1, indices, 0.0).sum() / energy.sum()


def joint_counts(tokens: Tensor, experts: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """tokens, experts (N) -> the U different ids (U), how often each met each expert (U, E)."""
    ids, place = tokens.unique(return_inverse=True)                      # (U), (N)
    return ids, torch.bincount(place * E + experts, minlength=len(ids) * E).view(-1, E).double()


def entropy(counts: Tensor) -> Tensor:
    """counts (any shape) -> bits."""
    return torch.special.entr(counts / counts.sum()).sum() / math.log(2)


def token_information(tokens: Tensor, experts: Tensor, E: int) -> Tensor:
    """tokens, experts (N) -> their mutual information in bits, entropy(token) + entropy(expert) -
    entropy(both). At most entropy(expert); 0 for a router that does not look at the token. Counts
    of N tokens show some information even where there is none; the same computation on shuffled
    experts estimates how much, and is subtracted. With many rare ids (N not far above U * E) this
    takes away too much: so compare only results with the same vocabulary and the same N."""
    shuffle = torch.randperm(len(experts), generator=torch.Generator().manual_seed(0))

    def information(experts):
        counts = joint_counts(tokens, experts, E)[1]                     # (U, E)
        return entropy(counts.sum(1)) + entropy(counts.sum(0)) - entropy(counts)

    return information(experts) - information(experts[shuffle.to(experts.device)])


def layer_metrics(layer: Layer, tokens: Tensor) -> dict[str, Tensor]:
    """The metrics of one layer by their keys in metrics.json; tokens (N)."""
    directions, x, load = layer.directions.float(), layer.x.float(), layer.load.double()
    E, C = directions.shape
    first, mean = layer.indices[:, 0], x.mean(0)                         # (N), (C)
    activations = expert_activations(x, layer.w_gate, layer.w_up, layer.b_gate)  # (3 or 1, N, E)
    std, violation = load_balance(load)
    similarity, signed = router_similarity(directions)
    matched, mismatched = alignment(directions, layer.w_gate)
    metrics = {
        "load_std": std, "max_violation": violation, "load_cv": E * std,
        # the CV of as many independent draws of an expert, each with probability 1 / E
        "load_cv_sampling": ((E - 1) / load.sum()).sqrt(),
        "load_sorted": load.sort(descending=True).values / load.sum(),
        "router_similarity": similarity, "router_similarity_signed": signed,
        "router_similarity_chance": torch.tensor(math.sqrt(2 / (math.pi * C))),
        "common_share": common_share(directions, mean),
        "common_share_chance": torch.tensor(1 / C),
        # the share of the hidden states' energy that is in their mean
        "anisotropy": mean.square().sum() / x.square().sum(1).mean(),
        "coupling_by_rank": coupling_by_rank(layer.scores, activations[0]),
        "selected_ratio": selected_ratio(activations[0], layer.indices),
        "alignment_matched": matched, "alignment_mismatched": mismatched,
        "token_information": token_information(tokens, first, E),
        "expert_entropy": entropy(torch.bincount(first, minlength=E)),
        "unrouted_gradient_share": layer.gradient_share}
    for suffix, values in zip(("", "_silu", "_swiglu"), activations):
        # an expert with a constant score or activation has no correlation and does not count
        metrics["coupling_spearman" + suffix] = spearman(layer.scores, values).nanmean()
    return metrics


def favourite_tokens(tokens: Tensor, experts: Tensor, E: int, text_of) -> list[list[str]]:
    """tokens, experts (N) -> for each expert the five tokens with the greatest lift,
    P(expert | token) / P(expert), above 1, of those that occur at least 20 times."""
    ids, counts = joint_counts(tokens, experts, E)                       # (U), (U, E)
    lift = counts / counts.sum(1, keepdim=True) / (counts.sum(0) / counts.sum())
    lift = lift.masked_fill(counts.sum(1, keepdim=True) < 20, 0.0).nan_to_num()
    best = lift.topk(min(5, len(ids)), dim=0)                            # (5, E)
    visible_text = lambda i: text_of(ids[i].item()).replace("\n", "\\n").replace(" ", "␣")
    return [[visible_text(i) for value, i in zip(values, places) if value > 1]
            for values, places in zip(best.values.t(), best.indices.t())]


def text_lines(tokens: Tensor, experts: Tensor, text_of, T: int) -> list[list]:
    """tokens, experts (N) of sequences of length T -> eight lines, if possible of mostly letters:
    lists of [text of a token, its expert]. A line ends at a line end or at WIDTH characters; those
    cut by the ends of a sequence are passed over."""
    lines = []
    for ids, chosen in zip(tokens.split(T), experts.split(T)):
        own, line, chars = [], [], ""
        for token, expert in zip(ids.tolist(), chosen.tolist()):
            line.append([text_of(token), expert])
            chars += text_of(token)
            if "\n" in chars or len(chars) >= WIDTH:
                own.append((chars, line))
                line, chars = [], ""
        lines += own[1:]  # the first may begin in mid-line; the last, unfinished one is not in own
    good = [(chars, line) for chars, line in lines
            if 30 < len(chars) < WIDTH and sum(map(str.isalpha, chars)) > 0.6 * len(chars)]
    return [line for _, line in (good if len(good) >= 8 else lines)[:8]]


def to_json(values: Tensor):
    """-> a number or nested lists of them; nan and infinity, which JSON has not, -> None."""
    array = values.double().cpu().numpy()
    return np.where(np.isfinite(array), array, None).tolist()


def measure(observed: Observed) -> dict:
    """What metrics.json says of a model: all that the table and the figures need."""
    about, tokens, text_of, layers = observed
    measured = [layer_metrics(layer, tokens) for layer in tqdm(layers, "measure", **BAR)]
    by_layer = {key: torch.stack([metrics[key].double() for metrics in measured])
                for key in measured[0]}                                  # (n_layer, ...) each
    numbers = {f"{key}_by_layer": to_json(values) for key, values in by_layer.items()}
    numbers |= {key: to_json(values.nanmean(0)) for key, values in by_layer.items()}
    middle = layers[len(layers) // 2]
    first, E = middle.indices[:, 0], len(middle.directions)              # (N)
    code = code_hash("analyze", "model", "routers", about["router"])
    return about | numbers | {
        "settings": about["settings"] | {"measured_by": code}, "tokens": len(tokens),
        "n_expert": E, "top_k": middle.indices.shape[1], "middle_depth": middle.depth,
        "depth": [layer.depth for layer in layers],
        "cosines": to_json(router_cosines(middle.directions).double().round(decimals=3)),  # (E, E)
        "text": text_lines(tokens, first, text_of, about["settings"]["block_size"]),
        "favourite_tokens": favourite_tokens(tokens, first, E, text_of)}


# ---------------------------------------------------------------- groups and the table

COLUMNS = {  # header: keys
    "perplexity": ("perplexity",), "load CV": ("load_cv",), "max violation": ("max_violation",),
    "similarity, mean abs cos (chance)": ("router_similarity", "router_similarity_chance"),
    "signed": ("router_similarity_signed",), "common share": ("common_share",),
    "Spearman score, activation (after SiLU, SwiGLU)": (
        "coupling_spearman", "coupling_spearman_silu", "coupling_spearman_swiglu"),
    "selected ratio": ("selected_ratio",),
    "alignment matched (mismatched)": ("alignment_matched", "alignment_mismatched"),
    "token information, bits (ceiling)": ("token_information", "expert_entropy"),
    "unrouted gradient share": ("unrouted_gradient_share",)}
# where these differ, two runs were read different texts, or other windows of one
OTHER_TEXT = {"val_sha256", "block_size"}
ROUTER_STYLES = {  # colour (Okabe-Ito), line, marker: each tells them apart, in grey too
    "aux": ("#E69F00", "--", "s"), "lossfree": ("#0072B2", "-", "o"),
    "kmeans": ("#009E73", "-.", "^"), "none": ("#000000", ":", "D")}
OTHER_STYLES = (  # of further groups; 6 colours, 4 lines and 7 markers in turns: 84 combinations
    ("#CC79A7", "#56B4E9", "#8C564B", "#9A8B00", "#D55E00", "#7F3C8D"), ("--", "-", "-.", ":"),
    ("v", "P", "*", "<", "X", ">", "p"))


class Group(NamedTuple):
    """One run, or several called NAME-SEED that differ in the seed alone: one line, one colour."""
    label: str
    runs: list[dict]  # the metrics of each
    style: dict       # color, linestyle, marker

    def title(self) -> str:
        """What to call the first run, where a figure shows one alone."""
        seed = f", seed {self.runs[0]['seed']}" if len(self.runs) > 1 else ""
        return f"{self.label}{seed}, layer {self.runs[0]['middle_depth']}"

    def values(self, key: str) -> np.ndarray:
        """(seeds, ...) float, nan for null."""
        return np.array([run[key] for run in self.runs], dtype=float)

    def mean(self, key: str) -> np.ndarray:
        """(...) over seeds."""
        return self.values(key).mean(0)


def experiment(run: dict) -> dict:
    """The settings that must be equal in two runs for their numbers to be averaged: all but the
    seed, the preset's name and what changes nothing but rounding."""
    kept = {key: value for key, value in run["settings"].items()
            if key not in INCIDENTAL | {"seed", "config"}}
    return kept | {"steps done": run["step"], "tokens evaluated": run["val_tokens"],
                   "tokens measured": run["tokens"]}


def unfinished(run: dict) -> bool:
    """Was it stopped before its last step? (An --hf model has no steps.)"""
    return run["step"] != run["settings"].get("max_iters")


def differing(groups: list[Group]) -> dict[str, dict[str, list[str]]]:
    """The settings in which groups differ, as {setting: {value: labels of the groups with it}}.
    Where a run lacks a setting its value is "–"."""
    settings, found = [experiment(group.runs[0]) for group in groups], {}
    for key in dict.fromkeys(chain(*settings)):
        for group, own in zip(groups, settings):
            # that an --hf model (no max_iters) lacks the settings of a training goes without saying
            if key in own or "max_iters" in own:
                value = str(own.get(key, "–"))
                found.setdefault(key, {}).setdefault(value, []).append(group.label)
    return {key: values for key, values in found.items() if len(values) > 1}


def group_runs(runs: dict[str, dict]) -> list[Group]:
    """The groups, in the order of their first runs. The label of one run is its name, that of
    several NAME or, where two groups have that NAME, like NAME-1,3. It also says if a run was
    stopped early or is outdated (see observe_run)."""
    found = {}
    for name, run in runs.items():
        base = name.removesuffix(f"-{run['seed']}")
        # base != name: a run called aux does not join aux-1 and aux-2
        key = base, base != name, json.dumps(experiment(run), sort_keys=True)
        found.setdefault(key, []).append(name)
    bases = [base for base, *_ in found]
    groups, styles, others = [], dict(ROUTER_STYLES), zip(*map(cycle, OTHER_STYLES))
    for base, members in zip(bases, found.values()):
        seeds = ",".join(str(runs[name]["seed"]) for name in members)
        label = members[0] if len(members) == 1 else (
            base if bases.count(base) == 1 else f"{base}-{seeds}")
        first = runs[members[0]]
        if first["settings"].get("outdated", "no") != "no":
            label += " (outdated)"
        if unfinished(first):
            label += " (unfinished)"
        # the first group of a router has the fixed style
        color, line, marker = styles.pop(first["router"], None) or next(others)
        groups.append(Group(label, [runs[name] for name in members], dict(
            color=color, linestyle=line, marker=marker, markersize=4)))
    return groups


def mean_and_spread(runs: list[dict], key: str) -> str:
    values = [run.get(key) for run in runs]
    if None in values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.2g}" if len(set(values)) > 1 else ""
    return f"{np.mean(values):.4g}{spread}"


def markdown_table(rows: list[tuple[str, list[dict]]]) -> str:
    """rows: (name, metrics of one run or of several seeds) -> Markdown. Of several seeds: mean ±
    sample standard deviation."""
    lines = [("run", "router", "seed", "step", *COLUMNS), ("---",) * (4 + len(COLUMNS))]
    for name, runs in rows:
        step = "–" if runs[0]["step"] is None else str(runs[0]["step"])
        if unfinished(runs[0]):
            step += f" of {runs[0]['settings']['max_iters']}, unfinished"
        seeds = ", ".join("–" if run["seed"] is None else str(run["seed"]) for run in runs)
        cells = [name, runs[0]["router"], seeds, step]
        for key, *more in COLUMNS.values():
            others = ", ".join(mean_and_spread(runs, k) for k in more)
            cells.append(mean_and_spread(runs, key) + (f" ({others})" if more else ""))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def differing_settings(groups: list[Group]) -> str:
    """One line that names every setting in which the groups differ, but for the router."""
    found = differing(groups)
    parts = [f"{key} " + ", ".join(f"{value} ({', '.join(labels)})"
                                   for value, labels in values.items())
             for key, values in found.items() if key != "router"]
    line = f"Settings that differ: {'; '.join(parts) or 'none but router or seed'}."
    if (OTHER_TEXT | {"tokens evaluated"}) & found.keys():
        line += " So perplexity, of other text or windows, is not comparable."
    if (OTHER_TEXT | {"tokens measured"}) & found.keys():
        line += " Token information, of other text or another number of tokens, is not comparable."
    return line


def paired_differences(groups: list[Group]) -> list[str]:
    """By how many per cent the later group's perplexity is above the earlier's, paired by seed:
    mean ± standard error, for each two groups that share seeds and text and differ in one setting
    at most."""
    lines = []
    for earlier, later in combinations(groups, 2):
        percent = [100 * (x["perplexity"] / y["perplexity"] - 1)
                   for x in later.runs for y in earlier.runs if x["seed"] == y["seed"]]
        # how a run was measured has no part in its perplexity
        different = differing([later, earlier]).keys() - {
            "outdated", "measured_by", "tokens measured"}
        if "router" in different:  # a router of your own is a name and its code
            different -= {"router_code"}
        other_text = (OTHER_TEXT | {"tokens evaluated"}) & different
        if len(percent) > 1 and len(different) <= 1 and not other_text:
            error = np.std(percent, ddof=1) / math.sqrt(len(percent))
            lines.append(f"perplexity, {later.label} - {earlier.label}: {np.mean(percent):+.2f} ± "
                         f"{error:.2f} % (paired by seed, n = {len(percent)})")
    return lines


# ---------------------------------------------------------------- draw: metrics.json -> figures
# Each function in FIGURES draws on `fig`, and nothing where there is nothing to draw. The title
# there says how the figure is read, whatever the runs show.

DOTTED = dict(color="0.35", linestyle=(0, (1, 1)), linewidth=1.5)


def draw_line(ax, group: Group, x, values: np.ndarray) -> None:
    """x (points), values (seeds, points): their mean, and a band from the lowest seed to the
    highest."""
    ax.plot(x, values.mean(0), label=group.label, **group.style)
    ax.fill_between(x, values.min(0), values.max(0), color=group.style["color"], alpha=0.2, lw=0)


def draw_curve(ax, group: Group, key: str, factor: float = 1) -> None:
    """factor * the logged values of `key`, at the steps where all seeds have one."""
    curves = [{record["step"]: record[key] for record in run["log"] if record.get(key) is not None}
              for run in group.runs]                                     # {step: value} per seed
    if steps := sorted(set.intersection(*map(set, curves))):  # one expert has no similarity
        tokens = math.prod(group.runs[0]["settings"][name] for name in (
            "batch_size", "gradient_accumulation_steps", "block_size"))
        values = np.array([[curve[step] for step in steps] for curve in curves])
        draw_line(ax, group, np.array(steps) * tokens / 1e6, factor * values)
    ax.set_xlabel("training tokens (millions)")
    ax.locator_params("x", nbins=4)


def draw_points(ax, groups: list[Group], key: str, label: str, dotted: str) -> None:
    """One row per group: its mean over seeds, with the number on the right, and a whisker from the
    lowest seed to the highest. `dotted`: a metric to compare with."""
    for y, group in enumerate(groups):
        values = group.values(key)                                       # (seeds)
        ax.plot([values.min(), values.max()], [y, y], color="0.55", linewidth=2)
        ax.plot(values.mean(), y, group.style["marker"], color=group.style["color"])
        ax.text(1.02, y, f"{values.mean():.3g}", va="center", fontsize=8,
                transform=ax.get_yaxis_transform())
        ax.plot([group.mean(dotted)] * 2, [y - 0.5, y + 0.5], **DOTTED)
    ax.locator_params("x", nbins=5)
    ax.set(xlabel=label, ylim=(len(groups) - 0.4, -0.6))
    ax.set_yticks(range(len(groups)), [group.label for group in groups], fontsize=9)


def plain_numbers(axis) -> None:
    """On a logarithmic axis: 0.1, 0.3, 1, as one writes them."""
    axis.get_major_locator().set_params(subs=(1, 3))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def add_legend(fig, ax) -> None:
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", fontsize=9, ncols=5)


def draw_coupling(fig, groups) -> None:
    ax = fig.subplots()
    for group in groups:
        values = group.values("coupling_by_rank")                        # (seeds, E)
        draw_line(ax, group, range(1, values.shape[1] + 1), values)
    ax.axhline(1, **DOTTED, label="average, as if score and activation were unrelated")
    ax.locator_params("x", integer=True)
    ax.set(xlabel="rank of the expert for a token by the router's score (1: the highest)",
           ylabel="activation of the expert, ||W_gate x||\n(1: its average over all tokens)")
    add_legend(fig, ax)


def draw_load(fig, groups) -> None:
    left, right = fig.subplots(1, 2)
    for group in groups:
        values = group.values("load_sorted")                             # (seeds, E)
        E = values.shape[1]
        draw_line(left, group, range(1, E + 1), E * values - 1)
    left.axhline(0, **DOTTED, label="even load")
    left.set_yscale("symlog", linthresh=0.1)  # shows a collapse and a balanced load alike
    left.margins(y=0.1)
    plain_numbers(left.yaxis)
    left.locator_params("x", integer=True)
    left.set(xlabel="expert, busiest first", ylabel="load / even load - 1, mean over layers")
    add_legend(fig, left)
    draw_points(right, groups, "load_cv", "Std of the load / even load\n(dotted: that of "
                "independent draws)", "load_cv_sampling")
    right.set_xscale("log")
    plain_numbers(right.xaxis)


def draw_similarity(fig, groups) -> None:
    order = sorted(groups, key=lambda group: group.mean("router_similarity"))
    # the least alike, the middle, the most alike
    chosen = [order[i] for i in sorted({0, len(order) // 2, len(order) - 1})]
    maps = [np.array(group.runs[0]["cosines"]) for group in chosen]      # (E, E) each
    scale = max(np.abs(m - np.eye(len(m))).max() for m in maps) or 1
    axes = fig.subplots(1, len(maps), squeeze=False)[0]
    for ax, cosines, group in zip(axes, maps, chosen):
        np.fill_diagonal(cosines, np.nan)  # always 1: grey
        image = ax.imshow(cosines, vmin=-scale, vmax=scale, cmap="RdBu_r")
        ax.set_title(group.title(), fontsize=10)
        ax.set(xticks=[], yticks=[], ylabel="expert", facecolor="0.6", xlabel="expert\n"
               f"all layers and seeds: mean {group.mean('router_similarity_signed'):+.3f},\n"
               f"mean |cosine| {group.mean('router_similarity'):.3f} "
               f"(chance: {group.mean('router_similarity_chance'):.3f})")
        ax.xaxis.label.set_fontsize(8)  # captions side by side
    fig.colorbar(image, ax=axes, label="cosine of two router directions", shrink=0.7)


def trained(groups: list[Group]) -> list[Group]:
    """Those that have a log: all but --hf models."""
    return [group for group in groups if group.runs[0]["log"]]


def draw_common_mode(fig, groups) -> None:
    if logged := trained(groups):
        left, right = fig.subplots(1, 2)
        for group in logged:
            draw_curve(left, group, "router_similarity")
            left.axhline(group.mean("router_similarity_chance"), **DOTTED)
        left.set(ylabel="mean |cosine| of router directions\n(dotted: chance)", ylim=0)
        add_legend(fig, left)
    else:
        right = fig.subplots()
    draw_points(right, groups, "common_share", "share of the mean hidden state in a router\n"
                "direction's energy (dotted: chance)", "common_share_chance")


def draw_alignment(fig, groups) -> None:
    # the level by chance is that of router_similarity: |cosine| of any two directions of width C
    chance = {f"{group.mean('router_similarity_chance'):.3f}" for group in groups}
    draw_points(fig.subplots(), groups, "alignment_matched", "|cosine| of router direction and its "
                f"own expert (dotted: and another expert; by chance {', '.join(sorted(chance))})",
                "alignment_mismatched")


def draw_training(fig, groups) -> None:
    groups = trained(groups)
    if not groups:
        return
    left, middle, right = fig.subplots(1, 3)
    for group in groups:
        draw_curve(left, group, "perplexity")
        draw_curve(middle, group, "load_std", factor=group.runs[0]["n_expert"])  # the load CV
        draw_curve(right, group, "coupling_spearman")
    left.set(ylabel="validation perplexity")
    middle.set(ylabel="Std of the load / even load")
    right.set(ylabel="Spearman of score and activation")
    right.axhline(0, **DOTTED)
    # are the evaluations before the last one on different texts?
    other_text = (OTHER_TEXT | {"eval_tokens"}) & differing(groups).keys()
    for ax in (left, middle):
        ax.set_yscale("log")
        plain_numbers(ax.yaxis)
        if other_text:
            ax.set_title("of different texts: do not compare", fontsize=9)
    add_legend(fig, left)


def draw_experts(fig, groups) -> None:
    shown = [group for group in groups if group.runs[0]["text"]]
    if not shown:
        return
    if len(shown) > 4:
        warn(f"experts.png shows the first four of {len(shown)}, the rest by a call of their own.")
    shown = shown[:4]
    grid = fig.add_gridspec(len(shown), 2, width_ratios=(65, 30))
    mono = dict(family="DejaVu Sans Mono", va="center_baseline")
    for i, group in enumerate(shown):
        run = group.runs[0]
        ax = fig.add_subplot(grid[i, 0])
        colors = expert_colors(run["n_expert"])
        ax.set(xlim=(0, WIDTH), ylim=(8, 0))
        ax.set_title(f"{group.title()} of 0 to {run['depth'][-1]}", fontsize=10, loc="left")
        for y, line in enumerate(run["text"]):
            x = 0
            for text, expert in line:
                text = text.replace("\n", "↵")[:WIDTH - x]
                ax.barh(y + 0.5, len(text), 0.92, x, color=colors[expert], edgecolor="white",
                        linewidth=0.4)
                ax.text(x, y + 0.5, text, size=10, **mono)  # WIDTH characters fill the panel
                x += len(text)
    last = shown[-1]
    ax = fig.add_subplot(grid[:, 1])
    colors = expert_colors(last.runs[0]["n_expert"])
    ax.set(xlim=(0, 34), ylim=(len(colors), 0))
    ax.set_title(f"{last.title()}: what\neach expert gets beyond its share",
                 fontsize=10, loc="left")
    for expert, (color, texts) in enumerate(zip(colors, last.runs[0]["favourite_tokens"])):
        ax.barh(expert + 0.5, 3, 0.92, color=color)
        texts = "  ".join(text[:10] for text in texts)
        ax.text(0.5, expert + 0.5, f"{expert:2}  {texts}"[:34], size=min(10, 330 / len(colors)),
                **mono)
    for ax in fig.axes:
        ax.set_axis_off()


FIGURES = {  # file: what draws it, its title, height in inches
    "coupling.png": (draw_coupling, "The line falls if the router ranks first the experts that "
                     "react most", 4.4),
    "load.png": (draw_load, "Balanced: the line is flat, and the point far to the left", 4),
    "similarity.png": (draw_similarity, "Red: two router directions that are alike", 3.2),
    "alignment.png": (draw_alignment, "Aligned: the point lies to the right of the dotted line", 2),
    "common_mode.png": (draw_common_mode, "Alike for a common reason: directions that share the "
                        "mean hidden state", 4),
    "training.png": (draw_training, "What training does (a last evaluation on more text is "
                     "left out)", 3.4),
    "experts.png": (draw_experts, "Colour: the first expert of each token (colours compare within "
                    "one panel only)", 6.6)}


def draw_figures(groups: list[Group], out_dir: Path) -> list[Path]:
    """-> the PNG files, 1350 pixels wide. Raises ImportError without matplotlib."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure  # in place of pyplot: no global state, no display

    rcParams["text.parse_math"] = False  # a $ in a name or a token is a $
    paths = []
    for name, (draw, title, height) in FIGURES.items():
        fig = Figure(figsize=(9, height + 0.1 * len(groups)), layout="compressed")
        draw(fig, groups)
        if fig.axes:
            fig.suptitle(title, fontsize=13)
            fig.savefig(out_dir / name, dpi=150)
            paths.append(out_dir / name)
    return paths


# ---------------------------------------------------------------- observe: a transformers model

class Mixture(NamedTuple):
    """The parts of one SMoE layer of a transformers model; none of them is a copy."""
    depth: int
    experts: torch.nn.Module  # is called with hidden states (N, C), indices (N, K), gates (N, K)
    directions: Tensor        # (E, C) the router's rows
    bias: Tensor              # (E) of its logits
    w_gate: Tensor            # (E, H, C)
    b_gate: Tensor            # (E, H) of the pre-activations


def find_mixtures(model) -> list[Mixture]:
    """The SMoE layers of a transformers model, known by their shapes, not by the model's name: a
    module with gate_up_proj (E, 2H, C) and down_proj (E, C, H), or both transposed, and beside it
    a gate or router with a weight (E, C)."""
    found = []
    for name, experts in model.named_modules():
        own = dict(experts.named_parameters(recurse=False))
        if not {"gate_up_proj", "down_proj"} <= own.keys() or own["down_proj"].ndim != 3:
            continue
        gate_up = own["gate_up_proj"].detach()
        E, P, Q = own["down_proj"].shape  # P = C and Q = H, or transposed P = H and Q = C
        if gate_up.shape == (E, Q, 2 * P):
            gate_up = gate_up.transpose(1, 2)                            # (E, 2H, C)
        elif gate_up.shape != (E, 2 * Q, P):
            continue
        # its rows are first those of w_gate and then those of w_up, or both in turns (gpt_oss)
        first_half, every_second = slice(gate_up.shape[1] // 2), slice(0, None, 2)
        gate_rows = first_half if getattr(experts, "is_concatenated", True) else every_second
        b_gate_up = own.get("gate_up_proj_bias", gate_up.new_zeros(gate_up.shape[:2])).detach()
        beside = dict(model.get_submodule(name.rpartition(".")[0]).named_parameters())
        for key, weight in beside.items():  # many call their router "gate"
            if weight.shape == (E, gate_up.shape[2]) and key.startswith(("gate.", "router.")):
                bias = beside.get(key.removesuffix("weight") + "bias", weight.new_zeros(E))
                depth = re.search(r"\d+", name)
                found.append(Mixture(int(depth[0]) if depth else len(found), experts,
                                     weight.detach(), bias.detach(), gate_up[:, gate_rows],
                                     b_gate_up[:, gate_rows]))
    return found


def router_scores(logits: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
    """logits (N, E), indices and gates (N, K) of the selected experts -> scores (N, E). A layer
    does not tell whether it uses softmax or sigmoid, so both are tried: the right one gives these
    gates, up to a factor per token. Raises ValueError if neither does (mean error above a tenth of
    that of equal gates), or if K = 1: a single gate, normalised, is 1 by any score."""
    K = indices.shape[1]

    def misfit(scores):  # (N, E) -> ()
        expected = F.normalize(scores.gather(1, indices), p=1.0, dim=1)  # (N, K)
        return (F.normalize(gates, p=1.0, dim=1) - expected).abs().mean()

    scores = min(logits.softmax(-1), logits.sigmoid(), key=misfit)       # (N, E)
    if K == 1 or misfit(scores) > 0.1 * misfit(torch.ones_like(scores)):
        raise ValueError("how it routes is not known here: it has one expert a token, or gates "
                         "that are no softmax or sigmoid of hidden states times router rows.")
    return scores


def load_hf(folder: Path, dtype: str) -> tuple:
    """-> (model, tokenizer). Raises ValueError for what cannot be read or is not whole."""
    try:
        import transformers
    except ImportError:
        raise ValueError("it takes transformers to read it: pip install transformers.") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder.as_posix())
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ValueError("there is no vocabulary")  # transformers makes one up in its place
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder.as_posix(), dtype=dtype, use_safetensors=True, output_loading_info=True)
        if loaded["missing_keys"]:  # transformers would draw them at random
            raise ValueError(f"weights are missing, such as {min(loaded['missing_keys'])}")
    except Exception as error:  # a damaged or foreign file can raise nearly anything
        raise ValueError("it is no model and tokenizer that transformers can load ("
                         f"{textwrap.shorten(f'{type(error).__name__}: {error}', 200)}).") from None
    return model.eval(), tokenizer


def read_sequences(tokenizer, path: str | None, n_tokens: int, longest: int) -> Tensor:
    """-> ids (B, T + 1): sequences of one length T, at most `longest`, evenly spaced in a text file
    (None: in the validation documents of the data set stdlib)."""
    if path:
        corpus = "".join(read_text(os.path.expanduser(path)))
    else:
        corpus = "".join(piece for split, piece in open_corpus("stdlib") if split == "val")
    wanted = min(longest, n_tokens)
    cuts = np.linspace(0, len(corpus), -(-n_tokens // wanted) + 1, dtype=int).tolist()
    # a tokenizer encodes all before it truncates, so cut first: 64 characters a token are enough
    rows = [tokenizer(corpus[start:end][:64 * (wanted + 1)], truncation=True,
                      max_length=wanted + 1)["input_ids"] for start, end in zip(cuts, cuts[1:])]
    T = min(map(len, rows)) - 1
    if T < 1:
        raise ValueError(f"the text is too short for {n_tokens} tokens; name another --text.")
    if T < wanted:
        warn(f"The text is short: it is read in sequences of {T} tokens, not of {wanted}.")
    return torch.tensor([row[:T + 1] for row in rows])


@torch.no_grad()
def observe_hf(folder: Path, text: str | None, n_tokens: int, device: str, dtype: str) -> Observed:
    """The transformers model in `folder`, or of that name on the hub, on n_tokens tokens of a text.
    Raises ValueError for what is no mixture of experts."""
    model, tokenizer = load_hf(folder, dtype)
    mixtures = find_mixtures(model.to(device))
    if not mixtures:
        raise ValueError("it has no mixture of experts as transformers 5 lays them out: a module "
                         "with gate_up_proj (E, 2H, C) and down_proj (E, C, H), and beside it a "
                         "gate or router with a weight (E, C).")
    c = model.config.get_text_config()
    longest = min(1024, getattr(c, "max_position_embeddings", None) or 1024)
    ids = read_sequences(tokenizer, text, n_tokens, longest)             # (B, T + 1)
    tokens = ids[:, :-1].flatten().to(device)                            # (N)
    loss = 0.0
    with watch([mixture.experts for mixture in mixtures]) as seen:
        for sequence in tqdm(ids.to(device), folder.name, **BAR):        # (T + 1)
            output = model(sequence[None, :-1], use_cache=False).logits[0]  # (T, V)
            loss += F.cross_entropy(output.float(), sequence[1:], reduction="sum").item()
    if not all(len(call) == 4 for calls in seen for call in calls):
        raise ValueError("its experts are not called with hidden states, selection and gates: how "
                         "it routes is not known here.")
    if not math.isfinite(loss):
        raise ValueError("its loss is not finite; try --dtype=float32.")
    layers = []
    for mixture, calls in zip(mixtures, seen):
        *inputs, _ = zip(*calls)  # the last is what the experts gave
        x, indices, gates = (torch.cat([part.flatten(0, -2) for part in parts])
                             for parts in inputs)                        # (N, C), (N, K), (N, K)
        logits = F.linear(x.float(), mixture.directions.float(), mixture.bias.float())  # (N, E)
        scores = router_scores(logits, indices, gates.float())           # (N, E)
        best = scores.gather(1, indices).argsort(dim=1, descending=True, stable=True)  # (N, K)
        load = torch.bincount(indices.flatten(), minlength=scores.shape[1])  # (E)
        layers.append(Layer(mixture.depth, mixture.directions, mixture.w_gate, None, mixture.b_gate,
                            x, scores, indices.gather(1, best), load, torch.tensor(math.nan)))

    def text_of(token: int) -> str:  # alone, a sentencepiece token loses the space before it
        raw = str(tokenizer.convert_ids_to_tokens(token))
        text = raw.replace("▁", " ") if "▁" in raw else tokenizer.decode([token])
        return visible(text) or f"<{token}>"

    (E, H, C), K = mixtures[0].w_gate.shape, layers[0].indices.shape[1]
    settings = {
        "router": c.model_type, "checkpoint": str(folder), "n_layer": c.num_hidden_layers,
        "dtype": str(model.dtype).removeprefix("torch."), "n_embd": C, "n_expert": E, "top_k": K,
        "d_expert": H, "block_size": ids.shape[1] - 1,
        "val_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:12]}
    about = {"router": c.model_type, "seed": None, "step": None, "settings": settings, "log": [],
             "perplexity": perplexity(loss / len(tokens)), "val_tokens": len(tokens)}
    return Observed(about, tokens, text_of, layers)


# ---------------------------------------------------------------- command line

def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", type=Path, metavar="RUN", help="folder of a run, such as "
                        "out/kmeans, or a metrics.json (default: all runs in out/)")
    parser.add_argument("--out_dir", default="out/analysis", type=Path, metavar="DIR",
                        help="where metrics.json and the figures go (%(default)s)")
    parser.add_argument("--tokens", type=int, metavar="N", help="on how many tokens each model is "
                        "seen at work; perplexity and load of a run are of its last evaluation "
                        "(default: 16384, with --hf 4096)")
    parser.add_argument("--hf", action="append", default=[], type=Path, metavar="DIR",
                        help="folder, or name on the hub, of a model to load with transformers; "
                        "may be given several times, and beside runs")
    parser.add_argument("--text", metavar="FILE", help="what the --hf model reads: a text file "
                        "(default: this Python's own library)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="what the --hf model computes in (default: as it is stored)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    args = parser.parse_args(argv)
    if args.tokens and {run.suffix for run in args.run} == {".json"} and not args.hf:
        parser.error("--tokens goes with a run: what a metrics.json holds has been measured")
    if args.tokens is None:
        args.tokens = 4096 if args.hf else 16384
    if not args.hf and (args.text or args.dtype != "auto"):
        parser.error("--text and --dtype go with --hf: a run has its own validation text")
    if args.tokens < 1:
        parser.error(f"--tokens must be positive, not {args.tokens}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        parser.error(f"--device={args.device} is not a device of this machine")
    return args


def read_metrics(path: Path) -> dict[str, dict]:
    """A metrics.json -> {name of a run: its metrics}."""
    try:
        runs = json.loads(path.read_text())
        for run in runs.values():
            run["settings"]["val_sha256"], run["perplexity"]  # KeyError if one is missing
        return runs
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("it is not a metrics.json that this analyze.py wrote.") from None


def read_or_measure(source: Path, args: argparse.Namespace) -> dict[str, dict]:
    """-> {name: metrics} of what a metrics.json holds, or of one run or --hf model, which is no
    longer in memory when the next one comes."""
    path = Path(os.path.expanduser(source))
    if path.suffix == ".json":
        return read_metrics(path)
    observed = (observe_hf(path, args.text, args.tokens, args.device, args.dtype)
                if source in args.hf else observe_run(path, args.tokens, args.device))
    return {Path(os.path.abspath(path)).name: measure(observed)}


def collect(sources: list[Path], args: argparse.Namespace) -> dict[str, dict]:
    """-> {name: metrics} of all sources, or, on Ctrl-C, of those so far. What cannot be read or
    measured is left out with a sentence, or with its traceback if that is due to a bug, perhaps in
    a router of yours."""
    runs = {}
    for source in sources:
        try:
            measured = read_or_measure(source, args)
            if twice := measured.keys() & runs.keys():
                raise ValueError(f"there is another run called {min(twice)}; rename one.")
            runs |= measured
        except KeyboardInterrupt:
            warn(f"interrupted: {source} and what follows it is left out.")
            break
        except Exception as error:
            warn(f"{source} is left out: {mistake(error) or traceback.format_exc()}")
    return runs


def write_metrics(runs: dict[str, dict], path: Path) -> None:
    """Deletes earlier figures, and renames an earlier metrics.json that differs: it may hold hours
    of measuring."""
    text = json.dumps(runs) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text)  # first of all: the disk may be full
        if path.exists() and path.read_text() != text:
            kept = free_path(path.parent, "metrics.old-", ".json")
            path.rename(kept)
            warn(f"The earlier metrics.json is kept as {kept}.")
        for name in FIGURES:
            (path.parent / name).unlink(missing_ok=True)


def print_table(runs: dict[str, dict], groups: list[Group]) -> None:
    """With the lines on what differs below it."""
    several = [group for group in groups if len(group.runs) > 1]
    print(markdown_table([(name, [run]) for name, run in runs.items()]
                         + [(f"{group.label}, mean ± Std over seeds", group.runs)
                            for group in several]))
    for name, run in runs.items():
        if (history := run["settings"].get("history", "none")) != "none":
            print(f"\n{name} changed on its way: {history}.")
        if run["settings"].get("outdated", "no") != "no":
            print(f"\n{name} is outdated: the code that measured it gives another loss or rank "
                  "correlation than the run noted, so the numbers may be of another router.")
    if len(groups) > 1:
        print("", differing_settings(groups), *paired_differences(groups), sep="\n")


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    sources = [*args.run, *args.hf] or sorted(
        path.parent for path in Path("out").glob("*/ckpt.pt")
        if not re.search(r"\.old\d+$", path.parent.name))  # what train.py --overwrite put aside
    if not sources:
        raise ValueError("there is no run in out/; train one with python train.py.")
    path = Path(os.path.expanduser(args.out_dir), "metrics.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.parent):  # numbers and figures there are of one analysis
        runs = collect(sources, args)
        if not runs:
            raise ValueError("no run is left to analyze.")
        groups = group_runs(runs)
        try:
            print_table(runs, groups)
        finally:  # who reads it may be gone: no reason to lose the numbers
            write_metrics(runs, path)
        try:
            figures = draw_figures(groups, path.parent)
        except ImportError:
            figures = []
            warn("matplotlib is missing: for the figures run pip install matplotlib, then python "
                 f"analyze.py {path}.")
    print(f"\nWrote {', '.join(map(str, [path, *figures]))}.")


if __name__ == "__main__":
    cli(main)
