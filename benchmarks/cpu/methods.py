"""The methods that are compared, one function each: heads in, loss and gradients of the student's head out.

  selecting methods:  L = 1/|M| sum_{t in M} KL(p_t || q_t),  |M| = ceil(rho N)       arXiv 2605.26844 eqs. 6, 13
  M: the best by teachability = Norm(D) Norm(C) (eqs. 9 to 12), or by KL(p || q) for the peer that has no top-K statistic
  dense methods:      the mean over all N positions

Each function runs forward and backward whole, as a training step would, and leaves the gradients in `.grad`.
Plain-torch methods are written as a user would write them, with the library used for nothing.
Not here: inputs (heads.py), clock and meter (measure.py), the oracle they are checked against (check.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cpu.heads import Heads

TOP_K = 16
NORM_EPSILON = 1e-8


@dataclass(frozen=True)
class Settings:
    fraction: float = 0.05
    workspace_mib: int = 64


@dataclass(frozen=True)
class Outcome:
    loss: Tensor | None  # None: computes no loss
    selected: Tensor | None = None  # row numbers; None: all positions
    stats: dict[str, Tensor] | None = None  # per-position columns, where the method returns them


@dataclass(frozen=True)
class Method:
    title: str
    computes: str
    run: Callable[[Heads, Settings], Outcome]
    selector: str | None  # what the oracle must select by; None: no loss to check
    requires: tuple[str, ...] = ()  # modules of the peer
    distribution: str | None = None  # where to get them
    counted_by: str | None = None  # method whose FLOPs stand for this one's, which cannot be counted


def floor(heads: Heads, settings: Settings) -> Outcome:
    """The two score matmuls and nothing else, in tiles that stay in a reused buffer."""
    tile = torch.empty(FLOOR_ROWS * FLOOR_COLUMNS)
    with torch.no_grad():
        for hidden, weight in ((heads.student_hidden, heads.student_weight), (heads.teacher_hidden, heads.teacher_weight)):
            for columns in weight.split(FLOOR_COLUMNS):
                for rows in hidden.split(FLOOR_ROWS):
                    torch.mm(rows, columns.T, out=tile[: len(rows) * len(columns)].view(len(rows), -1))
    return Outcome(None)


# Within 15 % of the fastest tile tried, and within noise of it at the larger hidden size (LOG.md).
FLOOR_ROWS, FLOOR_COLUMNS = 1024, 8192


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden @ weight.T


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def statistics(s: Tensor, u: Tensor) -> dict[str, Tensor]:
    """D and C on the top-K supports, and what a training log shows: entropy and reverse KL of every position."""
    log_p, log_q = s.log_softmax(-1), u.log_softmax(-1)
    s_ids, t_ids = s.topk(TOP_K).indices, u.topk(TOP_K).indices
    repeated = (t_ids.unsqueeze(2) == s_ids.unsqueeze(1)).any(2)  # the teacher's ids that S already has
    union = torch.cat((s_ids, t_ids), 1)
    twice = torch.cat((torch.zeros_like(repeated), repeated), 1)
    p_union = s.gather(1, union).masked_fill(twice, -torch.inf).log_softmax(-1)
    q_union = u.gather(1, union).masked_fill(twice, -torch.inf).log_softmax(-1)
    difference = torch.where(twice, 0, q_union - p_union)
    return {
        "student_entropy": -(log_p.exp() * log_p).sum(-1),
        "reverse_kl": reverse_kl(log_p, log_q),
        "support_mass": log_q.gather(1, s_ids).exp().sum(-1),
        "union_kl": (q_union.exp() * difference).sum(-1),
    }


def normalised(z: Tensor) -> Tensor:
    z = z.float()  # quantiles take no 16 bits
    low, high = torch.quantile(z, 0.05), torch.quantile(z, 0.95)
    return ((z - low) / (high - low + NORM_EPSILON)).clamp(0, 1)


def best(scores: Tensor, fraction: float) -> Tensor:
    n = max(1, math.ceil(fraction * len(scores) - 1e-9))  # 0.1 * 30 is a little more than 3
    return torch.sort(scores, descending=True, stable=True).indices[:n].sort().values


def _by_teachability(stats: dict[str, Tensor], settings: Settings) -> Tensor:
    return best(normalised(stats["union_kl"]) * normalised(stats["support_mass"]), settings.fraction)


def eager(heads: Heads, settings: Settings) -> Outcome:
    """Both models' logits whole, the student's with a graph; statistics without; the loss on the selected rows."""
    s = _logits(heads.student_hidden, heads.student_weight)
    with torch.no_grad():
        u = _logits(heads.teacher_hidden, heads.teacher_weight)
        stats = statistics(s, u)
        rows = _by_teachability(stats, settings)
    loss = reverse_kl(s[rows].log_softmax(-1), u[rows].log_softmax(-1)).mean()
    loss.backward()
    return Outcome(loss.detach(), rows, stats)


def eager_twice(heads: Heads, settings: Settings) -> Outcome:
    """As `eager`, but all logits without a graph; then the selected rows' hidden states once more, with one."""
    with torch.no_grad():
        s = _logits(heads.student_hidden, heads.student_weight)
        u = _logits(heads.teacher_hidden, heads.teacher_weight)
        stats = statistics(s, u)
        rows = _by_teachability(stats, settings)
        log_q = u[rows].log_softmax(-1)
    del s, u
    loss = reverse_kl(_logits(heads.student_hidden[rows], heads.student_weight).log_softmax(-1), log_q).mean()
    loss.backward()
    return Outcome(loss.detach(), rows, stats)


CHUNK = 512


def chunked_autograd(heads: Heads, settings: Settings) -> Outcome:
    """Chunks of 512 tokens: each one's loss per token stays in the graph until the selection is known."""
    losses: list[Tensor] = []
    columns: list[dict[str, Tensor]] = []
    for s_hidden, t_hidden in zip(heads.student_hidden.split(CHUNK), heads.teacher_hidden.split(CHUNK), strict=True):
        s = _logits(s_hidden, heads.student_weight)
        with torch.no_grad():
            u = _logits(t_hidden, heads.teacher_weight)
            columns.append(statistics(s, u))
            log_q = u.log_softmax(-1)
        losses.append(reverse_kl(s.log_softmax(-1), log_q))
    stats = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
    rows = _by_teachability(stats, settings)
    loss = torch.cat(losses)[rows].mean()
    loss.backward()
    return Outcome(loss.detach(), rows, stats)


def trl_dense(heads: Heads, settings: Settings) -> Outcome:
    """TRL's fused divergence on all rows, with a graph: distillation that selects nothing."""
    loss = _trl_divergence(heads, heads.student_hidden, heads.teacher_hidden)[0].mean()
    loss.backward()
    return Outcome(loss.detach())


def _trl_divergence(heads: Heads, s_hidden: Tensor, t_hidden: Tensor) -> tuple[Tensor, Tensor]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = 1.0  # reverse KL in TRL's convention
    return ChunkedDivergenceFunction.apply(s_hidden, heads.student_weight, None, t_hidden, heads.teacher_weight, None, beta)


def trl_twice(heads: Heads, settings: Settings) -> Outcome:
    """TRL's fused divergence on all rows without a graph, then on the rows of largest reverse KL with one."""
    with torch.no_grad():
        kl, entropy = _trl_divergence(heads, heads.student_hidden, heads.teacher_hidden)
        rows = best(kl, settings.fraction)
    loss = _trl_divergence(heads, heads.student_hidden[rows], heads.teacher_hidden[rows])[0].mean()
    loss.backward()
    return Outcome(loss.detach(), rows, {"student_entropy": entropy, "reverse_kl": kl})


def _liger(heads: Heads, *, compiled: bool) -> Outcome:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_function = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=1.0,  # reverse KL in Liger's convention
        compiled=compiled,
    )
    # Anything but the ignored index: all are valid.
    labels = torch.zeros(len(heads.student_hidden), dtype=torch.long, device=heads.student_hidden.device)
    loss = loss_function(heads.student_hidden, heads.student_weight, heads.teacher_hidden, heads.teacher_weight, labels)
    loss.backward()
    return Outcome(loss.detach())


def liger_eager(heads: Heads, settings: Settings) -> Outcome:
    """Liger's chunked fused linear JSD at beta = 1, not compiled."""
    return _liger(heads, compiled=False)


def liger_compiled(heads: Heads, settings: Settings) -> Outcome:
    """The same through torch.compile, its default."""
    return _liger(heads, compiled=True)


def ours(heads: Heads, settings: Settings) -> Outcome:
    """`selective_opd_loss` on the streamed backend."""
    from opd_ops import LinearHead, selective_opd_loss

    out = selective_opd_loss(
        LinearHead(heads.student_hidden, heads.student_weight),
        LinearHead(heads.teacher_hidden, heads.teacher_weight),
        fraction=settings.fraction,
        top_k=TOP_K,
        backend="torch",
        workspace_bytes=settings.workspace_mib * 2**20,
    )
    out.loss.backward()
    stats = {name: column for name, column in out.stats._asdict().items() if column is not None and name != "valid"}
    return Outcome(out.loss.detach(), out.selected.nonzero().squeeze(1), stats)


_SELECTS = "share by teachability"
METHODS: dict[str, Method] = {
    "floor": Method("two score matmuls (floor)", "nothing else: no loss, no gradient", floor, None),
    "eager": Method("eager", f"{_SELECTS}; logits whole, graph over all rows", eager, "teachability"),
    "eager-twice": Method("eager, selected rows again", f"{_SELECTS}; logits whole, no graph", eager_twice, "teachability"),
    "chunked-autograd": Method(
        "chunked autograd", f"{_SELECTS}; {CHUNK}-token chunks in the graph", chunked_autograd, "teachability"
    ),
    "trl-twice": Method(
        "TRL, called twice",
        "share by reverse KL; no top-K statistic",
        trl_twice,
        "divergence-reverse-kl",
        requires=("trl", "transformers"),
        distribution="trl==1.16.0",
    ),
    "liger": Method(
        "Liger chunked, eager",
        "selects nothing: trains on all positions",
        liger_eager,
        "all",
        requires=("liger_kernel", "triton"),
        distribution="liger-kernel==0.8.5",
    ),
    "liger-compiled": Method(
        "Liger chunked, compiled",
        "selects nothing: trains on all positions",
        liger_compiled,
        "all",
        requires=("liger_kernel", "triton"),
        distribution="liger-kernel==0.8.5",
        counted_by="liger",
    ),
    "ours": Method("ours, streamed", f"{_SELECTS}; all statistics of TokenStats", ours, "teachability"),
}
