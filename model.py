"""A decoder-only transformer in which every feed-forward is a sparse mixture of SwiGLU experts
(SMoE).

    from model import Config, SMoETransformer
    model = SMoETransformer(Config(router="kmeans"))
    logits, loss, aux_loss = model(idx, targets)     # training minimises loss + aux_loss

Shapes: B batch, T sequence, N = B*T tokens, C = n_embd, D = C / n_head, V = vocab_size,
        E = n_expert, K = top_k, H = d_expert (expert width).

The block is that of Qwen3-MoE without grouped-query attention: pre-norm, RMSNorm, RoPE, RMSNorm on
each head of q and k, no biases, no dropout, an untied head. There is no capacity limit: every token
reaches its K experts."""
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import grouped_mm

from routers import ROUTERS, KMeansRouter, Router


@dataclass
class Config:
    """Model and router, one field a choice. Raises ValueError with the name of a bad field."""
    vocab_size: int = 320            # token ids; 257 for bytes, up to the next multiple of 64
    block_size: int = 256            # longest sequence, in tokens
    n_layer: int = 4                 # blocks of attention and SMoE
    n_head: int = 4                  # attention heads
    n_embd: int = 256                # C, width of the hidden states
    n_expert: int = 16               # E, experts in a layer
    top_k: int = 2                   # K, experts that a token goes to
    d_expert: int = 128              # H, width of an expert
    router: str = "kmeans"           # aux, lossfree, kmeans or none
    score_fn: str = "softmax"        # softmax or sigmoid: the scores of the learned routers
    aux_loss_coef: float = 0.01      # aux: weight of the load-balancing loss
    bias_update_rate: float = 1e-3   # lossfree, kmeans: step of the selection bias
    ema_decay: float = 0.999         # kmeans: share of a centroid kept a step; 0.99 adds 0.03 nats
    gate_temperature: float = 0.1    # kmeans: temperature of the softmax over cosines in the gates

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_expert",
                     "d_expert"):
            self.check(getattr(self, name) > 0, name, "positive")
        self.check(self.n_embd % (2 * self.n_head) == 0, "n_embd",
                   f"a multiple of 2 * n_head = {2 * self.n_head} (RoPE turns pairs within a head)")
        for name in ("n_embd", "d_expert"):
            self.check(getattr(self, name) % 4 == 0, name,
                       "a multiple of 4 (grouped_mm wants rows of 16 bytes)")
        self.check(1 <= self.top_k <= self.n_expert, "top_k",
                   f"from 1 to n_expert = {self.n_expert}")
        self.check(self.router in ROUTERS, "router", f"one of {', '.join(ROUTERS)}")
        self.check(self.score_fn in ("softmax", "sigmoid"), "score_fn", "softmax or sigmoid")
        self.check(0 <= self.aux_loss_coef < float("inf"), "aux_loss_coef", "0 or more")
        self.check(0 <= self.bias_update_rate < float("inf"), "bias_update_rate", "0 or more")
        self.check(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)")
        self.check(0 < self.gate_temperature < float("inf"), "gate_temperature", "positive")

    def check(self, ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {rule}, not {getattr(self, name)!r}.")


class Attention(nn.Module):
    """Causal multi-head attention with RMSNorm on q and k per head, and RoPE."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        # only the weights of these two are used: forward() norms q and k together
        self.q_norm = nn.RMSNorm(config.n_embd // config.n_head, eps=1e-6)
        self.k_norm = nn.RMSNorm(config.n_embd // config.n_head, eps=1e-6)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, C), cos and sin (T, D) -> (B, T, C)."""
        B, T, C = x.shape
        # split(): the backward of indexing would fill a gradient of all of q, k and v with zeros
        qk, v = self.qkv_proj(x).split([2 * C, C], dim=-1)              # (B, T, 2C), (B, T, C)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)               # (B, heads, T, D)
        qk = qk.view(B, T, 2, self.n_head, -1).permute(2, 0, 3, 1, 4)   # (2, B, heads, T, D)
        # q and k take the same steps, so they take them together: half the kernels
        weight = torch.stack([self.q_norm.weight, self.k_norm.weight])  # (2, D)
        qk = F.rms_norm(qk, weight.shape[1:], eps=self.q_norm.eps)
        qk = qk * weight[:, None, None, None]                           # (2, B, heads, T, D)
        q, k = rotate(qk, cos, sin).to(v.dtype)                         # (B, heads, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)     # (B, heads, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, half-split: turns each pair (x_j, x_{j + D/2}) of x (..., T, D) by its position's
    angle.

        (a, b) -> (a cos - b sin, b cos + a sin);   the minus sign is in the first half of `sin`."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class SMoE(nn.Module):
    """Sparse mixture of SwiGLU experts in four steps: route, dispatch, experts, combine.

        y_t = sum over the K experts i of token t of
              gate_ti * W_down_i (silu(W_gate_i x_t) * W_up_i x_t)"""

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
        indices, gates, aux_loss = self.router(x)                        # (N, K), (N, K), ()

        # one sort puts the N*K assignments in expert order; `inverse` leads each one back
        expert, order = indices.flatten().sort(stable=True)              # (N*K), (N*K)
        place = torch.arange(len(order), device=x.device)                # (N*K)
        inverse = torch.empty_like(order).scatter_(0, order, place).view_as(indices)  # (N, K)
        ids = torch.arange(len(self.w_gate), device=x.device)            # (E)
        ends = torch.searchsorted(expert, ids, right=True, out_int32=True)  # (E)

        # autocast does not know grouped_mm, so its inputs are cast by hand; not on a CPU without
        # the compiler: oneDNN would compile a bfloat16 kernel, in 1 ms, for each number of rows
        # that an expert gets, which made `fine` (README.md) twice as slow as float32
        device = x.device.type
        cast = torch.is_autocast_enabled(device) and (
            device == "cuda" or torch.compiler.is_compiling())
        dtype = torch.get_autocast_dtype(device) if cast else x.dtype
        y = Experts.apply(x.to(dtype), gates, self.w_gate.to(dtype), self.w_up.to(dtype),
                          self.w_down.to(dtype), order, inverse, ends)
        return y.view(B, T, C), aux_loss


class Experts(torch.autograd.Function):
    """Dispatch, experts and combine as one operation with its own backward pass.

    Saved for the backward pass are the inputs and the experts' pre-activations; the cheap rest is
    computed again, so activation memory does not grow with K copies of the hidden states (the idea
    of SonicMoE, arXiv 2512.14080; torch.compile sees that `xs` and `act` are computed twice and
    keeps them after all, 0.34 GB a layer of `1b` at 16k tokens). The gate scales the narrow
    activation in front of W_down, not the wide result behind it: a row scale commutes with the
    product. Rows move by the sorting permutation and its inverse in both directions, as gathers:
    nothing is added atomically, so two runs agree to the last bit.

    x (N, C) and the weights w_gate, w_up (E, H, C), w_down (E, C, H) share one dtype; gates (N, K)
    float32; order (N*K): the assignments t * K + k in expert order; inverse (N, K): the place of
    each assignment in `order`; ends (E) int32: where each expert's rows end. Returns y (N, C)."""

    @staticmethod
    def forward(ctx, x, gates, w_gate, w_up, w_down, order, inverse, ends):
        token = order // gates.shape[1]                                  # (N*K)
        g = gates.flatten()[order, None].to(x.dtype)                     # (N*K, 1)
        xs = x.index_select(0, token)                                    # (N*K, C) dispatch
        gate = grouped_mm(xs, w_gate.transpose(1, 2), offs=ends)         # (N*K, H)
        up = grouped_mm(xs, w_up.transpose(1, 2), offs=ends)             # (N*K, H)
        act = F.silu(gate).mul_(up).mul_(g)                              # (N*K, H)
        ys = grouped_mm(act, w_down.transpose(1, 2), offs=ends)          # (N*K, C)
        ctx.save_for_backward(x, gates, w_gate, w_up, w_down, order, inverse, ends, gate, up)
        return gather_sum(ys, inverse)                                   # (N, C) combine

    @staticmethod
    def backward(ctx, dy):
        x, gates, w_gate, w_up, w_down, order, inverse, ends, gate, up = ctx.saved_tensors
        token = order // gates.shape[1]                                  # (N*K)
        g = gates.flatten()[order, None].to(x.dtype)                     # (N*K, 1)
        silu = F.silu(gate)                                              # (N*K, H)
        act = silu * up                                                  # (N*K, H), without g

        dys = dy.to(x.dtype).index_select(0, token)                      # (N*K, C)
        dact = grouped_mm(dys, w_down, offs=ends)                        # (N*K, H), without g
        dgates = (dact * act).sum(1, dtype=gates.dtype)[inverse]         # (N, K)
        dw_down = grouped_mm(dys.t(), act.mul_(g), offs=ends)            # (E, C, H)

        dact.mul_(g)
        dup = silu.mul_(dact)                                            # (N*K, H)
        dgate = torch.ops.aten.silu_backward(dact.mul_(up), gate)        # (N*K, H)
        xs = x.index_select(0, token)                                    # (N*K, C)
        # each row of dW_gate_i and dW_up_i is a sum of (scalar) * x_t over the tokens of expert i,
        # and so is the gradient of the router row r_i: the geometric coupling
        dw_gate = grouped_mm(dgate.t(), xs, offs=ends)                   # (E, H, C)
        dw_up = grouped_mm(dup.t(), xs, offs=ends)                       # (E, H, C)
        dx = gather_sum(grouped_mm(dgate, w_gate, offs=ends), inverse)   # (N, C)
        dx = dx + gather_sum(grouped_mm(dup, w_up, offs=ends), inverse)
        return dx, dgates, dw_gate, dw_up, dw_down, None, None, None


def gather_sum(rows: Tensor, inverse: Tensor) -> Tensor:
    """rows (N*K, C), inverse (N, K) -> (N, C): to each token the sum of its K rows."""
    if torch.compiler.is_compiling():
        # the compiler fuses the gather into the sum; dtype, or autocast on CUDA makes it float32
        return rows[inverse].sum(1, dtype=rows.dtype)
    return F.embedding_bag(inverse, rows, mode="sum")  # the same, without a second (N*K, C)


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
        cos, sin = angle.cos(), angle.sin()
        self.register_buffer("cos", torch.cat([cos, cos], dim=1), persistent=False)     # (T, D)
        self.register_buffer("sin", torch.cat([-sin, sin], dim=1), persistent=False)    # (T, D)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every scheme there is, from torch's global random generator:

        embed, head, qkv_proj, w_gate, w_up, router.weight    normal, std 0.02
        o_proj, w_down (they write to the residual stream)    normal, std 0.02 / sqrt(2 n_layer)
        centroids      random directions of norm sqrt(C), that of the RMSNorm outputs they average
        norm weights   1 (by nn.RMSNorm)
        biases         0 (selection biases, the only ones)"""
        for name, p in self.named_parameters():
            if p.ndim > 1:
                residual = name.endswith(("o_proj.weight", "w_down"))
                scale = (2 * self.config.n_layer) ** -0.5 if residual else 1.0
                nn.init.normal_(p, std=0.02 * scale)
        for router in self.routers():
            if isinstance(router, KMeansRouter):
                direction = F.normalize(torch.randn_like(router.centroids), dim=-1)        # (E, C)
                router.centroids.copy_(direction * self.config.n_embd ** 0.5)

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
        cos, sin = self.cos[:T], self.sin[:T]                            # (T, D) each
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
        """Appends n sampled tokens to idx (B, T) -> (B, T + n). temperature > 0; top_k: sample from
        the top_k likeliest tokens only (1: the likeliest). The context is the last block_size
        tokens."""
        training = self.training
        self.eval()  # a sample must not count in the routers' load
        for _ in range(n):
            logits, _, _ = self(idx[:, -self.config.block_size:])
            logits = logits[:, -1].float() / temperature                 # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -torch.inf)
            idx = torch.cat([idx, torch.multinomial(logits.softmax(-1), 1)], dim=1)
        self.train(training)
        return idx

    def num_params(self) -> tuple[int, int]:
        """(all parameters, those that one token uses: all but the E - K experts it does not
        visit)."""
        c = self.config
        total = sum(p.numel() for p in self.parameters())
        return total, total - c.n_layer * (c.n_expert - c.top_k) * 3 * c.n_embd * c.d_expert

    def flops_per_token(self) -> int:
        """FLOPs a token of forward and backward at full block_size: 6 for each weight of an active
        matrix (PaLM, arXiv 2204.02311, appendix B), and causal attention, half of the square."""
        c = self.config
        layer = 4 * c.n_embd**2 + 3 * c.top_k * c.n_embd * c.d_expert + c.n_expert * c.n_embd
        attention = 6 * c.n_layer * c.block_size * c.n_embd
        return 6 * (c.n_layer * layer + c.n_embd * c.vocab_size) + attention


def load_balance(load: Tensor) -> tuple[Tensor, Tensor]:
    """load (..., E) tokens an expert -> Std and max violation (...) of the load shares f_i: their
    population standard deviation over experts, and E * max f_i - 1. Both 0 at perfect balance."""
    f = load / load.sum(-1, keepdim=True)
    return f.std(-1, correction=0), f.shape[-1] * f.amax(-1) - 1


def router_cosines(directions: Tensor) -> Tensor:
    """directions r (E, C) -> cos(r_i, r_j) (E, E), without gradient."""
    unit = F.normalize(directions.detach().float(), dim=-1)              # (E, C)
    return unit @ unit.t()


def router_similarity(directions: Tensor) -> Tensor:
    """directions (E, C) -> mean |cos| over the pairs i < j. Chance level: sqrt(2 / (pi C))."""
    E = len(directions)
    return router_cosines(directions).abs().triu(diagonal=1).sum() / max(1, E * (E - 1) // 2)


def read_checkpoint(path) -> dict:
    """What train.save_checkpoint wrote. The file is mapped, not read: what the caller does not
    touch (the optimizer's state is twice the model) costs no memory. Raises ValueError for a
    missing, damaged or foreign file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        for key in ("model", "optimizer", "step", "config", "best_loss", "data_sha256", "rng"):
            checkpoint[key]
    except FileNotFoundError:
        raise ValueError(f"{path} is not there; train a model first.") from None
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path} is damaged or not a checkpoint of this project "
                         f"({type(error).__name__}); name another or train again.") from None
    return checkpoint


def load_checkpoint(path) -> tuple[SMoETransformer, dict]:
    """-> (the trained model, on the CPU; the checkpoint). Raises ValueError as read_checkpoint."""
    checkpoint = read_checkpoint(path)
    names = {field.name for field in fields(Config)}
    try:
        config = Config(**{k: v for k, v in checkpoint["config"].items() if k in names})
        model = SMoETransformer(config)
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not hold a model of this project ({reason}).") from None
    return model, checkpoint
