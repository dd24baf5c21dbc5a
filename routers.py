"""Three routers for a sparse mixture of experts and a control, side by side.

A router looks at the (normalised) hidden state of a token and sends the token to the top_k best of
n_expert experts. Every router here is the same four verbs in the same order:

    score     how well does each expert fit each token?            (N, C) -> logits, scores (N, E)
    select    which K experts does the token go to?                scores (N, E) -> (N, K)
    gate      how much does each of the K count? (sums to 1)       logits (N, K) -> (N, K)
    update    once after each optimizer step: move bias and centroids by what was counted

The first three are called for every batch, and so is aux_loss, a term of the training loss. Beside
them, count and statistics feed update, and start draws first values. gate starts from the logits;
select ranks the scores, which are the logits themselves, or their softmax or sigmoid.

They differ in where the scores come from and in what keeps the load even:

    router    scores of expert i from      balanced by
    aux       a learned row r_i            a loss on uneven load, whose gradient reaches every row
    lossfree  a learned row r_i            a bias b_i that takes part in the selection only
    kmeans    a centroid c_i, not learned  the same bias
    none      a learned row r_i            nothing: the control that shows collapse

Shapes: N tokens, C = n_embd, E = n_expert, K = top_k.
Source: "Routers Learn the Geometry of Their Experts", arXiv 2605.12476; what its summaries leave
open is this project's choice (docs/results.md)."""
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Routing(NamedTuple):
    indices: Tensor   # (N, K) int64: the experts of each token, best (with its bias) first
    gates: Tensor     # (N, K) float32: their weights; each row sums to 1
    aux_loss: Tensor  # scalar float32: what the router adds to the training loss: balance, z-loss
    logits: Tensor    # (N, E) float32: x R^T, or cosines (kmeans); gate() starts from these
    scores: Tensor    # (N, E) float32: after softmax or sigmoid, or the same cosines; for select()


class Router(nn.Module):
    """The order of the four verbs, and the count of what went where. A router of your own defines
    score(), gate() and `directions` (E, C), which the metrics read; the rest as needed.

    `load` (E): tokens sent to each expert since the last update; eval mode does not count."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.register_buffer("load", torch.zeros(config.n_expert), persistent=False)  # (E)

    def forward(self, x: Tensor) -> Routing:
        """x (N, C), any float dtype -> Routing. In float32 even under autocast: a score rounded to
        bfloat16 sends tokens to other experts (arXiv 2101.03961, 2.4)."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            logits, scores = self.score(x)                   # (N, E), (N, E)
            with torch.no_grad():                            # a selection has no gradient
                indices = self.select(scores)                # (N, K)
                # (N, E): K ones in each row, at the token's experts
                assigned = torch.zeros_like(logits).scatter_(1, indices, 1.0)
                if self.training:
                    self.count(x, assigned)
            gates = self.gate(logits.gather(1, indices))     # (N, K)
            aux_loss = self.aux_loss(logits, scores, assigned)
            return Routing(indices, gates, aux_loss, logits, scores)

    def start(self) -> None:
        """Called once, after the model has drawn all parameters of two or more dimensions from
        normal(0, 0.02). Override it to set other values, of parameters or of buffers."""

    def score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, C) -> logits (N, E), scores (N, E)."""
        raise NotImplementedError

    def select(self, scores: Tensor) -> Tensor:
        """scores (N, E) -> indices (N, K), best first."""
        return scores.topk(self.config.top_k, dim=-1).indices

    def gate(self, chosen_logits: Tensor) -> Tensor:
        """Logits of the chosen experts (N, K) -> gates (N, K)."""
        raise NotImplementedError

    def update(self) -> None:
        """Moves what no gradient moves, by what the whole step counted: here nothing."""

    def aux_loss(self, logits: Tensor, scores: Tensor, assigned: Tensor) -> Tensor:
        """What the router adds to the training loss: here nothing."""
        return logits.new_zeros(())

    def count(self, x: Tensor, assigned: Tensor) -> None:
        """Adds up what update() needs, on the tokens of one micro-batch and one process."""
        self.load += assigned.sum(0)

    def statistics(self) -> list[Tensor]:
        """The buffers that count() fills: update() sees them summed over micro-batches and
        processes, then they are set to 0. (Other buffers may change in update() only:
        processes see different tokens, and nothing would make their copies equal again.)"""
        return [self.load]


@torch.no_grad()
def update_routers(routers: list[Router]) -> None:
    """Call once after every optimizer step: sums the statistics of all routers over all processes
    in one all-reduce, updates the routers, clears the statistics. In eval mode nothing moves."""
    routers = [router for router in routers if router.training]
    statistics = [buffer for router in routers for buffer in router.statistics()]
    if dist.is_initialized() and statistics:
        flat = torch.cat([buffer.flatten() for buffer in statistics])
        dist.all_reduce(flat)
        for buffer, total in zip(statistics, flat.split([b.numel() for b in statistics])):
            buffer.copy_(total.view_as(buffer))
    for router in routers:
        router.update()
    for buffer in statistics:
        buffer.zero_()


def bias_step(bias: Tensor, load: Tensor, rate: float) -> None:
    """b_i += rate * sign(mean(load) - load_i)                      (arXiv 2408.15664, algorithm 1)

    Only the sign of the error, so the step does not depend on the size of the batch; `rate` must
    suit the scale of the scores. An expert that got too few tokens becomes easier to select."""
    bias += rate * (load.mean() - load).sign()  # (E)


class LearnedRouter(Router):
    """Linear logits and no balancing at all; the base of the other two learned routers.

        z = x R^T                                    R (E, C) learned; z the logits
        s = softmax(z), or sigmoid(z)
        S = top-K of s
        gate_i = s_i / sum over S of s        computed from the chosen logits alone: see gate()
        aux_loss = z_loss_coef * mean over tokens of logsumexp(z)^2     the z-loss; 0 by default

    The gates are normalised over S, so the language-model loss has a gradient on the selected rows
    only. For one token that gradient is (scalar) * x, and so are those of the rows of the selected
    expert's W_gate and W_up: router row and expert move along the same tokens. The coupling.
    With K = 1 the gate is always 1 and that gradient 0: language modelling never moves such a row.

    The z-loss (ST-MoE, arXiv 2202.08906, eq. 5) keeps logits small, and has nothing to do with
    balance. It can make all rows alike (docs/results.md, "What makes directions alike")."""

    def __init__(self, config):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))  # (E, C)

    @property
    def directions(self) -> Tensor:
        return self.weight  # (E, C)

    def score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ self.weight.float().t()  # (N, E)
        if self.config.score_fn == "softmax":
            return logits, logits.softmax(-1)
        return logits, logits.sigmoid()

    def gate(self, chosen_logits: Tensor) -> Tensor:
        # the same numbers as scores / sum over S, but from the chosen logits alone: through a
        # softmax over all E the gradient on the others would be rounding errors, and not exactly 0
        if self.config.score_fn == "softmax":
            return chosen_logits.softmax(-1)  # (N, K)
        return F.normalize(chosen_logits.sigmoid(), p=1.0, dim=-1)

    def aux_loss(self, logits: Tensor, scores: Tensor, assigned: Tensor) -> Tensor:
        return self.config.z_loss_coef * logits.logsumexp(-1).square().mean()


class AuxLossRouter(LearnedRouter):
    """Linear logits, balanced by a loss (Switch Transformers, arXiv 2101.03961, eq. 4).

        z, s, S, gates                   as LearnedRouter
        aux_loss = aux_loss_coef * E * sum over i of f_i P_i, plus the z-loss
            f_i = share of the N * K assignments that went to expert i      (no gradient)
            P_i = mean over tokens of s_i / sum over j of s_j               (softmax: sum is 1)

    f is that of one micro-batch on one process (before accumulation, without the other GPUs). If
    all f_i are equal, the first term is aux_loss_coef and its gradient 0. Else, with softmax
    scores, its gradient at z_ti, token t and expert i, is
        aux_loss_coef * E / N * s_ti (f_i - sum over j of s_tj f_j),
    so descent lowers a logit if f_i is above the mean of all f_j, each weighted by this token's
    score s_tj, and raises it if below. Every token sends that, along its x, to every row: it mixes
    into r_i tokens that expert i never saw."""

    def aux_loss(self, logits: Tensor, scores: Tensor, assigned: Tensor) -> Tensor:
        f = assigned.mean(0) / self.config.top_k                          # (E)
        P = F.normalize(scores, p=1.0, dim=-1).mean(0)                    # (E)
        balance = self.config.aux_loss_coef * self.config.n_expert * (f * P).sum()
        return balance + super().aux_loss(logits, scores, assigned)


class LossFreeRouter(LearnedRouter):
    """Linear logits, balanced by a bias and not by a loss (arXiv 2408.15664).

        z, s, gates                      as LearnedRouter
        aux_loss                         as LearnedRouter: the z-loss, if any
        S = top-K of s + b               b never enters the gates
        b_i += bias_update_rate * sign(mean(load) - load_i)      after each step"""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("bias", torch.zeros(config.n_expert))  # (E)

    def select(self, scores: Tensor) -> Tensor:
        return super().select(scores + self.bias)

    def update(self) -> None:
        bias_step(self.bias, self.load, self.config.bias_update_rate)


class KMeansRouter(Router):
    """Online K-Means: how near is the token to those that went there before? (arXiv 2605.12476).
    No parameters: the gradient of the gates goes on to x alone. Cosines differ little: without the
    temperature all gates would be near 1/K.

        s_i = cos(x, c_i)                                        c (E, C) centroids, no gradient
        S = top-K of s + b
        gates = softmax over S of s / gate_temperature
        after each step:
            c_i = ema_decay * c_i + (1 - ema_decay) * mean of the x routed to i      if load_i > 0
            b_i += bias_update_rate * sign(mean(load) - load_i)"""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("centroids", torch.zeros(config.n_expert, config.n_embd))  # (E, C)
        self.register_buffer("bias", torch.zeros(config.n_expert))                      # (E)
        self.register_buffer("total", torch.zeros_like(self.centroids), persistent=False)  # (E, C)

    @property
    def directions(self) -> Tensor:
        return self.centroids  # (E, C)

    def start(self) -> None:
        """Random directions of length sqrt(C), that of the RMSNorm outputs that they will average.
        ema_decay^n of this start is left after n steps in which the expert got tokens."""
        directions = F.normalize(torch.randn_like(self.centroids), dim=-1)  # (E, C)
        self.centroids.copy_(directions * self.config.n_embd ** 0.5)

    def score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # dividing the (N, E) products by |x| is cheaper than normalising the (N, C) hidden states
        products = x @ F.normalize(self.centroids.float(), dim=-1).t()    # (N, E)
        cosines = products / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return cosines, cosines

    def select(self, scores: Tensor) -> Tensor:
        return super().select(scores + self.bias)

    def gate(self, chosen_logits: Tensor) -> Tensor:
        return (chosen_logits / self.config.gate_temperature).softmax(-1)  # (N, K)

    def count(self, x: Tensor, assigned: Tensor) -> None:
        super().count(x, assigned)
        self.total += assigned.t() @ x  # (E, C): sum of the hidden states routed to each expert

    def statistics(self) -> list[Tensor]:
        return [self.load, self.total]

    def update(self) -> None:
        mean = self.total / self.load.clamp(min=1)[:, None]  # (E, C)
        decay = self.config.ema_decay
        moved = decay * self.centroids + (1 - decay) * mean
        # an expert that got no token has no mean: it keeps its centroid
        self.centroids.copy_(torch.where(self.load[:, None] > 0, moved, self.centroids))
        bias_step(self.bias, self.load, self.config.bias_update_rate)


ROUTERS = {
    "aux": AuxLossRouter, "lossfree": LossFreeRouter, "kmeans": KMeansRouter, "none": LearnedRouter}
