"""A decoder-only transformer in which every feed-forward is a sparse mixture of SwiGLU experts
(SMoE).

    from model import Config, SMoETransformer
    model = SMoETransformer(Config(router="kmeans"))
    logits, loss, aux_loss = model(idx, targets)     # training minimises loss + aux_loss

Shapes: B batch, T sequence, N = B*T tokens, C = n_embd, D = C / n_head, V = vocab_size,
        E = n_expert, K = top_k, H = d_expert (expert width).

The architecture is that of Qwen3-MoE without grouped-query attention: pre-norm, RMSNorm, RoPE,
RMSNorm on each head of q and k, no biases, no dropout, an untied head. Unlike in some mixtures, no
expert has a capacity above which it drops tokens: every token reaches its K experts."""
import colorsys
import hashlib
import math
import os
import sys
import textwrap
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import grouped_mm

from routers import ROUTERS, Router


@dataclass
class Config:
    """Model and router, one field per choice; train.py --help prints the comments. Raises
    ValueError with the name of a bad field."""
    vocab_size: int = 320            # 256 bytes and end of text, rounded up to a multiple of 64
    block_size: int = 256            # longest sequence, in tokens
    n_layer: int = 4                 # blocks of attention and SMoE
    n_head: int = 4                  # attention heads
    n_embd: int = 256                # C, width of the hidden states
    n_expert: int = 16               # E, experts in a layer
    top_k: int = 2                   # K, experts that a token goes to
    d_expert: int = 128              # H, width of an expert
    router: str = "kmeans"           # aux, lossfree, kmeans, none, or a module of your own
    score_fn: str = "softmax"        # softmax or sigmoid: the scores of the learned routers
    aux_loss_coef: float = 0.01      # aux: weight of the load-balancing loss
    z_loss_coef: float = 0.0         # learned routers: weight of the z-loss; OLMoE takes 0.001
    bias_update_rate: float = 1e-3   # lossfree, kmeans: step of the selection bias
    ema_decay: float = 0.999         # kmeans: share of a centroid that is kept at each step
    gate_temperature: float = 0.1    # kmeans: temperature of the softmax over cosines in the gates

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_expert",
                     "d_expert"):
            self.check(getattr(self, name) > 0, name, "positive")
        self.check(self.n_embd % (2 * self.n_head) == 0, "n_embd",
                   f"a multiple of 2 * n_head = {2 * self.n_head} (RoPE turns pairs within a head)")
        for name in ("n_embd", "d_expert"):
            self.check(getattr(self, name) % 8 == 0, name,
                       "a multiple of 8 (grouped_mm wants rows of n * 16 bytes, in bfloat16 too)")
        self.check(1 <= self.top_k <= self.n_expert, "top_k",
                   f"from 1 to n_expert = {self.n_expert}")
        self.check(isinstance(router_class(self.router), type), "router",
                   f"one of {', '.join(ROUTERS)}, or the name of a Python module beside model.py "
                   "that registers a class under this name")
        self.check(self.score_fn in ("softmax", "sigmoid"), "score_fn", "softmax or sigmoid")
        self.check(0 <= self.ema_decay < 1, "ema_decay", "from 0 to below 1")
        self.check(self.gate_temperature > 0, "gate_temperature", "positive")

    def check(self, ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {rule}, not {getattr(self, name)!r}.")


def config_of(settings: dict) -> Config:
    """The fields of Config among the settings of a run; one that they lack has its default."""
    names = {field.name for field in fields(Config)}
    return Config(**{name: value for name, value in settings.items() if name in names})


# ---------------------------------------------------------------- the idea: one SMoE layer

def experts_by_definition(x, indices, gates, w_gate, w_up, w_down) -> Tensor:
    """What the experts compute, by a loop over them: slow, and the whole idea. (Training calls the
    fast one below, which the tests hold against this.)

        y_t = sum over the K experts i of token t of
              gate_ti * W_down_i (silu(W_gate_i x_t) * (W_up_i x_t))

    x (N, C), indices and gates (N, K), w_gate and w_up (E, H, C), w_down (E, C, H) -> y (N, C)."""
    y = torch.zeros_like(x)
    for i in range(len(w_gate)):
        token, slot = (indices == i).nonzero(as_tuple=True)             # (n) each: who comes to i
        a, b = x[token] @ w_gate[i].t(), x[token] @ w_up[i].t()         # (n, H) each
        out = (F.silu(a) * b) @ w_down[i].t()                           # (n, C)
        y = y.index_add(0, token, gates[token, slot, None] * out)
    return y


def sort_by_expert(indices: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """The fast experts work on a table with a row for each of the N*K assignments of a token to an
    expert, sorted so that the rows of an expert are one block. Assignment number t * K + k is that
    of token t to its k-th expert (both from 0). indices (N, K) -> order (N*K), inverse (N, K),
    ends (E) int32:

        indices [[2, 0], [0, 1]]    E = 3; the assignments 0, 1, 2, 3 are to the experts 2, 0, 0, 1
        order   [1, 2, 3, 0]        row -> assignment: the rows are of the experts 0, 0, 1, 2
        inverse [[3, 0], [1, 2]]    (t, k) -> row
        ends    [2, 3, 4]           expert -> where its block of rows ends"""
    sorted_experts, order = indices.flatten().sort(stable=True)         # (N*K), (N*K)
    place = torch.arange(len(order), device=order.device)               # (N*K)
    # inverse[order[r]] = r
    inverse = torch.empty_like(order).scatter_(0, order, place).view_as(indices)  # (N, K)
    ids = torch.arange(E, device=order.device)                          # (E)
    # how many of the sorted experts are <= i: where the rows of i end
    return order, inverse, torch.searchsorted(sorted_experts, ids, right=True, out_int32=True)


class Experts(torch.autograd.Function):
    """The definition without the loop, and with its backward pass written out, for two reasons: it
    shows the coupling, and of the large activations it saves x, a and b alone, where autograd would
    also save xs (a copy of x for each of the K experts), silu(a), h = silu(a) * b and gate * h.

    Arguments and result are those of the definition; x and the weights share one dtype, gates are
    float32.

    grouped_mm(A, B, offs=ends) is a matrix product for each expert i on its block of the table,
    rows = ends[i - 1] (or 0) : ends[i]. The shapes of A and B decide which product:

        rows times weights:   A (N*K, P), B (E, P, Q):   out[rows] = A[rows] @ B[i]      (N*K, Q)
        weight gradients:     A (P, N*K), B (N*K, Q):    out[i] = A[:, rows] @ B[rows]   (E, P, Q)

    The gate multiplies h (H wide) and not the expert's output (C wide): the same result, and less
    work where H < C, as by default."""

    @staticmethod
    def forward(ctx, x, indices, gates, w_gate, w_up, w_down):
        order, inverse, ends = sort_by_expert(indices, len(w_gate))      # (N*K), (N, K), (E)
        token = order // gates.shape[1]                                  # (N*K) t of t * K + k
        xs = x.index_select(0, token)                                    # (N*K, C) dispatch
        gate = gates.flatten()[order, None].to(x.dtype)                  # (N*K, 1)
        a = grouped_mm(xs, w_gate.transpose(1, 2), offs=ends)            # (N*K, H) experts
        b = grouped_mm(xs, w_up.transpose(1, 2), offs=ends)              # (N*K, H)
        h = F.silu(a) * b                                                # (N*K, H)
        ys = grouped_mm(gate * h, w_down.transpose(1, 2), offs=ends)     # (N*K, C)
        ctx.save_for_backward(x, gate, w_gate, w_up, w_down, token, inverse, ends, a, b)
        return combine(ys, inverse)                                      # (N, C)

    @staticmethod
    def backward(ctx, dy):
        x, gate, w_gate, w_up, w_down, token, inverse, ends, a, b = ctx.saved_tensors
        # gathered again, not saved: K copies of x (the idea of SonicMoE, arXiv 2512.14080)
        xs = x.index_select(0, token)                                    # (N*K, C)
        silu = F.silu(a)                                                 # (N*K, H)
        h = silu * b                                                     # (N*K, H)

        dys = dy.to(x.dtype).index_select(0, token)                      # (N*K, C)
        # forward: y = W_down u with u = gate * h, so the gradient at u is W_down^T dy
        du = grouped_mm(dys, w_down, offs=ends)                          # (N*K, H)
        # u = gate * h: so the gradient at the gate, d_i of the README, is du . h = dy . (W_down h).
        # From the gates autograd goes on to the logits and, times x_t, to the router rows
        dgates = (du * h).sum(1, dtype=torch.float32)[inverse]           # (N, K)
        dh = gate * du                                                   # (N*K, H)
        da = torch.ops.aten.silu_backward(dh * b, a)                     # (N*K, H) dh b silu'(a)
        db = dh * silu                                                   # (N*K, H)

        # the geometric coupling: sums over the tokens t of expert i of (scalar) * x_t
        #     row n of dW_gate_i      sum of da_tn x_t
        #     row n of dW_up_i        sum of db_tn x_t
        #     router row r_i          sum of dz_ti x_t      dz by autograd, from dgates
        # (an auxiliary loss adds to dz_ti for all t and i: then r_i sums over every token)
        dw_gate = weight_gradient(da, xs, ends)                          # (E, H, C)
        dw_up = weight_gradient(db, xs, ends)                            # (E, H, C)
        dw_down = weight_gradient(dys, gate * h, ends)                   # (E, C, H)
        dx = combine(grouped_mm(da, w_gate, offs=ends), inverse)         # (N, C)
        dx = dx + combine(grouped_mm(db, w_up, offs=ends), inverse)
        return dx, None, dgates, dw_gate, dw_up, dw_down  # indices have no gradient


def combine(rows: Tensor, inverse: Tensor) -> Tensor:
    """rows (N*K, C), inverse (N, K) -> (N, C): the sum of the K rows of each token, gathered. (If
    many threads added into one place, as index_add does on a GPU, the order of the sums would vary,
    and the bits with it.) The same as rows[inverse].sum(1), but faster (docs/speed.md)."""
    y = rows.index_select(0, inverse[:, 0])                              # (N, C)
    for row in inverse.t()[1:]:                                          # (N)
        y = y + rows.index_select(0, row)
    return y


def weight_gradient(d_out: Tensor, inputs: Tensor, ends: Tensor) -> Tensor:
    """d_out (N*K, P), inputs (N*K, Q) -> (E, P, Q): for each expert, d_out^T inputs on its rows."""
    gradient = grouped_mm(d_out.t(), inputs, offs=ends)
    # an expert without rows is ordinary here, and grouped_mm may leave its gradient uninitialised:
    # reported in bfloat16 on B200 (pytorch issue 172439)
    empty = ends.diff(prepend=ends.new_zeros(1)) == 0                    # (E)
    return gradient.masked_fill_(empty[:, None, None], 0.0)


class SMoE(nn.Module):
    """Sparse mixture of SwiGLU experts: route; then, in Experts, copy each x to the rows of its
    experts (dispatch), run the experts, sum the rows of each token (combine)."""

    def __init__(self, config: Config):
        super().__init__()
        E, C, H = config.n_expert, config.n_embd, config.d_expert
        self.router = ROUTERS[config.router](config)
        self.w_gate = nn.Parameter(torch.empty(E, H, C))
        self.w_up = nn.Parameter(torch.empty(E, H, C))
        self.w_down = nn.Parameter(torch.empty(E, C, H))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, C) -> y (B, T, C), aux_loss scalar."""
        B, T, C = x.shape
        x = x.reshape(B * T, C)                                          # (N, C)
        indices, gates, aux_loss, *_ = self.router(x)                    # (N, K), (N, K), ()
        # autocast does not know grouped_mm, so its inputs are cast by hand
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        y = Experts.apply(x.to(dtype), indices, gates, self.w_gate.to(dtype), self.w_up.to(dtype),
                          self.w_down.to(dtype))
        return y.view(B, T, C), aux_loss


# ---------------------------------------------------------------- the transformer around it

class Attention(nn.Module):
    """Causal multi-head attention with RMSNorm on q and k per head, and RoPE."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.q_norm = nn.RMSNorm(config.n_embd // config.n_head, eps=1e-6)
        self.k_norm = nn.RMSNorm(config.n_embd // config.n_head, eps=1e-6)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, C), cos and sin (T, D/2) -> (B, T, C)."""
        B, T, C = x.shape
        # split() and not three slices: the backward pass of each slice would write all 3C columns
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2)     # (B, heads, T, D) each
                   for part in self.qkv_proj(x).split(C, dim=-1))
        # to(): under autocast the float32 cos and sin make q and k float32
        q = rotate(self.q_norm(q), cos, sin).to(v.dtype)                # (B, heads, T, D)
        k = rotate(self.k_norm(k), cos, sin).to(v.dtype)                # (B, heads, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)     # (B, heads, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, half-split: turns each pair (x_j, x_{j + D/2}) of x (..., T, D) by its position's
    angle, of which cos and sin (T, D/2) are given:

        (a, b) -> (a cos - b sin, b cos + a sin)"""
    a, b = x.chunk(2, dim=-1)                                       # (..., T, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.moe = SMoE(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attn(self.norm1(x), cos, sin)
        y, aux_loss = self.moe(self.norm2(x))
        return x + y, aux_loss


class SMoETransformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        half = config.n_embd // config.n_head // 2
        frequency = 10000.0 ** (-torch.arange(half) / half)                             # (D/2)
        angle = torch.arange(config.block_size)[:, None] * frequency                    # (T, D/2)
        self.register_buffer("cos", angle.cos(), persistent=False)                      # (T, D/2)
        self.register_buffer("sin", angle.sin(), persistent=False)                      # (T, D/2)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """How each tensor starts, from torch's global random generator:

        embed, head, qkv_proj, w_gate, w_up, router.weight    normal, std 0.02, as any other matrix
        o_proj, w_down (they write to the residual stream)    normal, std 0.02 / sqrt(2 n_layer)
        centroids                                             KMeansRouter.start()
        norm weights   1 (by nn.RMSNorm)
        biases         0 (selection biases, the only ones)"""
        for name, p in self.named_parameters():
            if p.ndim > 1:
                residual = name.endswith(("o_proj.weight", "w_down"))
                scale = (2 * self.config.n_layer) ** -0.5 if residual else 1.0
                nn.init.normal_(p, std=0.02 * scale)
        for router in self.routers():
            router.start()

    def routers(self) -> list[Router]:
        """The routers, one a layer, from the first block to the last."""
        return [block.moe.router for block in self.blocks]

    def forward(self, idx: Tensor, targets: Tensor | None = None):
        """idx, targets (B, T) int64 -> logits, loss, aux_loss.

        With targets: logits (B, T, V), loss = mean cross-entropy in nats, aux_loss = sum of the
        routers' losses over the layers. Without: logits (B, 1, V) of the last position, loss
        None."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size = "
                             f"{self.config.block_size}; cut it.")
        cos, sin = self.cos[:T], self.sin[:T]                            # (T, D/2) each
        x = self.embed(idx)                                              # (B, T, C)
        aux_losses = []
        for block in self.blocks:
            x, aux_loss = block(x, cos, sin)
            aux_losses.append(aux_loss)
        x = self.norm(x if targets is not None else x[:, -1:])
        logits = self.head(x)                                            # (B, T or 1, V)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, loss, torch.stack(aux_losses).sum()

    @torch.no_grad()
    def generate(self, idx: Tensor, n: int, temperature: float = 1.0,
                 top_k: int | None = None) -> Tensor:
        """Appends n sampled tokens to idx (B, T) -> (B, T + n). temperature 0: the likeliest token;
        top_k (of tokens, not of experts): sample from the top_k likeliest only. The context is the
        last block_size tokens."""
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, not {temperature}.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be 1 or more, not {top_k}.")
        training = self.training
        self.eval()  # a sample must not count in the routers' load
        try:
            for _ in range(n):
                logits, _, _ = self(idx[:, -self.config.block_size:])
                logits = logits[:, -1].float()                           # (B, V)
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -torch.inf)
                p = (logits / max(temperature, 1e-6)).softmax(-1)        # (B, V)
                idx = torch.cat([idx, torch.multinomial(p, 1)], dim=1)
        finally:
            self.train(training)
        return idx

    def num_params(self) -> tuple[int, int]:
        """-> the number of all parameters, and of those that one token uses: without the E - K
        experts of each layer that it does not visit."""
        c = self.config
        total = sum(p.numel() for p in self.parameters())
        return total, total - c.n_layer * (c.n_expert - c.top_k) * 3 * c.n_embd * c.d_expert

    def flops_per_token(self) -> int:
        """FLOPs per token of forward and backward at full block_size: 6 for each weight of an
        active matrix (PaLM, arXiv 2204.02311, appendix B), and attention, which is causal and so
        takes half of the T x T products."""
        c = self.config
        layer = 4 * c.n_embd**2 + 3 * c.top_k * c.n_embd * c.d_expert + c.n_expert * c.n_embd
        attention = 6 * c.n_layer * c.block_size * c.n_embd
        return 6 * (c.n_layer * layer + c.n_embd * c.vocab_size) + attention


# ---------------------------------------------------------------- what train and analyze measure

@contextmanager
def watch(modules):
    """Yields a list for each of the modules, to which its every call adds inputs and output: for a
    router (x (N, C), Routing)."""
    seen = [[] for _ in modules]
    with ExitStack() as hooks:  # it removes them
        for module, calls in zip(modules, seen):
            hooks.enter_context(module.register_forward_hook(
                lambda module, args, output, calls=calls: calls.append((*args, output))))
        yield seen


def perplexity(loss: float) -> float:
    """loss in nats -> exp(loss), capped, as JSON has no infinity."""
    return math.exp(min(loss, 700.0))


@torch.no_grad()
def probe(model: SMoETransformer, batches) -> tuple[Tensor, float]:
    """batches of idx and targets (B, T) -> agreement, objective. agreement (n_layer): in each layer
    the rank correlation over tokens of router score and activation ||W_gate x||, mean over experts
    (coupling_spearman). objective: the mean of loss + aux_loss. A checkpoint notes the objective
    and the mean of agreement over layers; analyze.py computes both again, to see whether the code
    still does what it did. Call it in eval mode."""
    torch.manual_seed(0)  # a router of your own that draws random numbers draws the same again
    with watch(model.routers()) as seen:
        losses = [sum(model(idx, targets)[1:]).item() for idx, targets in batches]
    agreement = []
    # the model may run in bfloat16, but the norms are measured in float32, as in analyze.py
    with torch.autocast(model.head.weight.device.type, enabled=False):
        for block, calls in zip(model.blocks, seen):
            x = torch.cat([x for x, _ in calls]).float()                 # (N, C)
            scores = torch.cat([routing.scores for _, routing in calls])  # (N, E)
            activation = expert_activations(x, block.moe.w_gate)[0]      # (N, E)
            agreement.append(spearman(scores, activation).nanmean())
    return torch.stack(agreement), sum(losses) / len(losses)


def load_balance(load: Tensor) -> tuple[Tensor, Tensor]:
    """load (..., E) tokens per expert -> (...), (...), both 0 at perfect balance: the population
    standard deviation of the shares f_i = load_i / sum of load, and the max violation,
    E * max f_i - 1."""
    f = load / load.sum(-1, keepdim=True)
    return f.std(-1, correction=0), f.shape[-1] * f.amax(-1) - 1


def router_cosines(directions: Tensor) -> Tensor:
    """directions r (E, C) -> cos(r_i, r_j) (E, E), without gradient."""
    unit = F.normalize(directions.detach().float(), dim=-1)              # (E, C)
    return unit @ unit.t()


def router_similarity(directions: Tensor) -> Tensor:
    """directions (E, C) -> (2): mean |cos| and mean cos over the pairs i < j; nan for one expert.
    By chance sqrt(2 / (pi C)) and 0."""
    i, j = torch.triu_indices(len(directions), len(directions), offset=1)
    pairs = router_cosines(directions)[i, j]                             # (E (E - 1) / 2)
    return torch.stack([pairs.abs().mean(), pairs.mean()])


def expert_activations(x: Tensor, w_gate: Tensor, w_up: Tensor | None = None,
                       b_gate: Tensor | None = None) -> Tensor:
    """How strongly every expert reacts to every token, chosen or not: norms over the H neurons of

        ||W_gate_i x_t||,   ||silu(W_gate_i x_t)||,   ||silu(W_gate_i x_t) * (W_up_i x_t)||

    x (N, C), w_gate, w_up (E, H, C) -> (3, N, E); without w_up the first alone, (1, N, E).
    b_gate (E, H), if any, adds to W_gate x. One expert at a time, as all would be N * E * H
    numbers."""
    columns = []
    for i, w in enumerate(w_gate):
        a = F.linear(x, w.float(), None if b_gate is None else b_gate[i].float())  # (N, H)
        values = [a] if w_up is None else [
            a, F.silu(a), F.silu(a) * F.linear(x, w_up[i].float())]      # (N, H) each
        columns.append(torch.stack([v.norm(dim=-1) for v in values]))    # (1 or 3, N)
    return torch.stack(columns, dim=-1)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """a, b (N, E) -> (E): for each column the Pearson correlation over N of the ranks of a and b;
    nan for a constant. Equal values share the mean of their ranks."""
    def centred_ranks(values):
        columns = values.t().contiguous()                                # (E, N)
        ordered = columns.sort(dim=-1).values
        smaller = torch.searchsorted(ordered, columns)                   # (E, N)
        not_larger = torch.searchsorted(ordered, columns, right=True)    # (E, N)
        ranks = (smaller + not_larger).double() / 2
        return ranks - ranks.mean(-1, keepdim=True)

    a, b = centred_ranks(a), centred_ranks(b)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


# ---------------------------------------------------------------- the files of a run

# settings that change no number but by rounding: --resume may change them, and runs that differ in
# these alone are one experiment
INCIDENTAL = {"out_dir", "device", "compile", "resume", "overwrite", "eval_interval",
              "log_interval"}


def source(name: str) -> bytes:
    """The code of the module NAME.py beside this file; empty if there is none."""
    path = Path(__file__).parent / f"{name}.py"
    return path.read_bytes() if name.isidentifier() and path.exists() else b""


# for code_hash; read now, as they are imported: a file may be edited while a process runs
SOURCES = {name: source(name) for name in ("model", "routers", "prepare_data", "train", "analyze")}


def router_class(name: str) -> type | None:
    """The class of that name in ROUTERS, built in or your own: the module NAME.py beside this file
    registers it. None if there is none."""
    if code := source(name):
        SOURCES.setdefault(name, code)
        import_module(name)
    return ROUTERS.get(name)


def code_hash(*names: str) -> str:
    """-> 12 digits that tell whether the source of these modules is the same."""
    code = b"".join(SOURCES.get(name, b"") for name in names)
    return hashlib.sha256(code).hexdigest()[:12]


def code_of(router: str) -> dict[str, str]:
    """Hashes of the code that gives a run its numbers: this project's, and that of your own
    router's file (not of what it imports)."""
    return {"code": code_hash("model", "routers", "prepare_data", "train"),
            "router_code": code_hash(router)}


def unfit(path, error: Exception) -> ValueError:
    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 240)
    return ValueError(f"{path} is damaged, or no checkpoint of the code as it is now ({reason}).")


def read_checkpoint(path) -> dict:
    """-> what train.save wrote. The file is mapped: what you do not touch, as the optimizer's
    state, costs no memory. Raises ValueError for a missing, damaged or foreign file."""
    if not Path(path).exists():
        raise ValueError(f"{path} is not there; name the folder of a run that has saved one.")
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        for key in ("model", "optimizer", "step", "config", "log", "evaluation",
                    "rng", "history", "sha256", "code", "router_code", "tokenizer"):
            checkpoint[key]  # KeyError if it is missing
    except Exception as error:  # a damaged file can raise nearly anything
        raise unfit(path, error) from None
    return checkpoint


def load_checkpoint(path) -> tuple[SMoETransformer, dict]:
    """-> (the trained model, on the CPU; what read_checkpoint gives). Raises ValueError as that."""
    checkpoint = read_checkpoint(path)
    # outside of any try: an error in a router of your own is no damaged file
    model = SMoETransformer(config_of(checkpoint["config"]))
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise unfit(path, error) from None
    return model, checkpoint


# ---------------------------------------------------------------- a sample: python model.py RUN

def expert_colors(E: int) -> list[tuple[float, float, float]]:
    """-> E light colours (r, g, b) for black text: hues a golden angle apart, so that neighbours
    differ, in three shades that greyscale tells apart too."""
    shades = ((0.5, 1.0), (0.35, 0.85), (0.15, 1.0))                     # saturation, value
    return [colorsys.hsv_to_rgb(i * 0.381966 % 1, *shades[i % 3]) for i in range(E)]


def main(argv: list[str]) -> None:
    from prepare_data import Parser, encode, get_tokenizer, printable  # which the model never needs
    parser = Parser(description="The model of a run writes. On a terminal each token stands on the "
                                "colour of the expert that it goes to first, in the middle layer.",
                    allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, as out/kmeans")
    parser.add_argument("--start", default="def ", help="what to go on with (default: 'def ')")
    parser.add_argument("--tokens", type=int, default=400, help="how many (default: 400)")
    parser.add_argument("--temperature", type=float, default=0.8,
                        help="0: always the likeliest token (default: 0.8)")
    args = parser.parse_args(argv)
    if args.tokens < 0:
        parser.error(f"--tokens must be 0 or more, not {args.tokens}")
    model, checkpoint = load_checkpoint(Path(os.path.expanduser(args.run), "ckpt.pt"))
    tokenizer = get_tokenizer(checkpoint["tokenizer"])
    # what a terminal sends need not be UTF-8
    text = args.start.encode(errors="surrogateescape").decode(errors="replace")
    start = encode(tokenizer, text).tolist() or [tokenizer.eot_token]
    idx = model.generate(torch.tensor([start]), args.tokens, args.temperature)      # (1, n)
    ids = idx[0].tolist()
    if not sys.stdout.isatty():
        return print(text, printable(tokenizer, ids[len(start):]), sep=" | ")
    with torch.no_grad(), watch(model.eval().routers()) as seen:
        # read again for the colours, in windows of block_size: the first tokens of a later window
        # have less context here than when they were written
        for window in idx.split(model.config.block_size, dim=1):
            model(window)
    middle = seen[model.config.n_layer // 2]
    experts = torch.cat([routing.indices[:, 0] for _, routing in middle])           # (n)
    colors, texts = expert_colors(model.config.n_expert), []
    for token, expert in zip(ids, experts.tolist()):
        r, g, b = (int(255 * value) for value in colors[expert])
        texts.append(f"\033[30;48;2;{r};{g};{b}m{printable(tokenizer, [token])}\033[0m")
    print(*texts[:len(start)], " | ", *texts[len(start):], sep="")


if __name__ == "__main__":
    from prepare_data import cli
    cli(main)
