"""Weights: from statistics to one factor per position's loss, detached. Scores of most selectors serve too.

  loss = sum_t w_t l_t / n,   gradient w_t grad l_t: the step scales with the mean of w over the selected, unless it is made 1
  IW     1 + (w_max - 1) (1 - sum_{k<t} d_k / (sum d + 1e-8)), d = |log q(y) - log p(y)|, per response    arXiv 2606.22600
  FiRe   (1 + alpha c_T) (1 + beta c_S), c_T = 1 - H(q) / max H(q), c_S = H(p) / max H(p)                 arXiv 2606.02684

FiRe's released code takes its maxima over the micro-batch; here they are over all valid positions of the call, of all ranks
that select together. `Reading(rule, needs)` gives a function of one's own the names of the optional columns that it reads.
Not here: weights per prompt, which are the caller's `weights=` (docs/reference/settings.md); the place of weights in the loss
(call/reduce.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opd_ops.arguments import real, shown, take_plain
from opd_ops.distributed.ranks import Ranks
from opd_ops.selection.normalisers import largest
from opd_ops.selection.sampled import LOGPROBS, log_ratio
from opd_ops.selection.selectors import SELECTORS, Selector, check_known, checked_needs, needs_of, why_no_weights
from opd_ops.selection.stats import WHOLE_ROW_COLUMNS, TokenStats

MEANS = ("valid", "selected", "sequence")


@dataclass(frozen=True)
class IW:
    """The weight is w_max at the start of a response. It falls towards 1 as the disagreement of the earlier tokens adds up.

    An infinite disagreement counts as 0.
    """

    w_max: float = 1.5
    sequence_ids: Tensor | None = None  # of the mask's shape, non-decreasing; None: the call's ids, else one sequence
    needs: ClassVar[frozenset[str]] = LOGPROBS

    def __post_init__(self) -> None:
        take_plain(self, "w_max")
        if not 1 <= real(self.w_max) < math.inf:
            raise ValueError(f"IW.w_max: got {shown(self.w_max)}, expected a finite number of at least 1")

    def __call__(self, stats: TokenStats) -> Tensor:
        d = log_ratio(stats).abs().flatten()
        d = torch.where(stats.valid.flatten() & torch.isfinite(d), d, 0)
        ids = torch.zeros_like(d, dtype=torch.long) if self.sequence_ids is None else self.sequence_ids.flatten()
        total = torch.zeros(d.numel() + 1, dtype=d.dtype, device=d.device).index_add(0, ids, d)
        earlier = d.cumsum(0) - d - (total.cumsum(0) - total)[ids]  # of the same sequence: ids do not decrease
        weights: Tensor = 1 + (self.w_max - 1) * (1 - earlier / (total[ids] + 1e-8))
        return weights.view(stats.valid.shape)


@dataclass(frozen=True)
class FiRe:
    """Larger weights where the teacher is sure and the student is not.

    To divide by the mean as the paper's code does, pass `weight_mean="valid"`.
    """

    alpha: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        take_plain(self, "alpha", "beta")
        for name in ("alpha", "beta"):
            if not 0 <= real(getattr(self, name)) < math.inf:
                raise ValueError(f"FiRe.{name}: got {shown(getattr(self, name))}, expected a finite number of at least 0")

    def __call__(self, stats: TokenStats) -> Tensor:
        entropies = torch.stack((stats.student_entropy, stats.teacher_entropy)).double()
        most = largest(entropies, stats.valid)
        student, teacher = (entropies / torch.where(most > 0, most, 1.0)).unbind()
        return (1 + self.alpha * (1 - teacher)) * (1 + self.beta * student)


@dataclass(frozen=True)
class Reading:
    """A selector or weighting of one's own with the names of the optional columns that it reads: `TokenStats` has them.

    Reading(lambda stats: torch.where(stats.teacher_rank <= 5, 1.0, 0.01), {"teacher_rank"})
    """

    rule: Callable[[TokenStats], Tensor]
    needs: Iterable[str] = ()

    def __post_init__(self) -> None:
        if not callable(self.rule):
            raise TypeError(f"Reading.rule: got {type(self.rule).__name__}, expected a callable TokenStats -> tensor")
        object.__setattr__(self, "needs", checked_needs("Reading", self.needs))

    def __call__(self, stats: TokenStats) -> Tensor:
        return self.rule(stats)


WEIGHTINGS: dict[str, Selector] = {"iw": IW(), "fire": FiRe()}


def named_weighting(weighting: str | Selector | None) -> Selector | None:
    """The weighting with this name; a callable, or None, is returned unchanged."""
    if weighting is None:
        return None
    rules = WEIGHTINGS | SELECTORS
    names = f"a callable, or one of: {', '.join(name for name, rule in rules.items() if why_no_weights(rule) is None)}"
    if isinstance(weighting, str) and weighting not in rules:
        raise ValueError(f"weighting: got {weighting!r}, expected None, {names}")
    if isinstance(weighting, type) or not (isinstance(weighting, str) or callable(weighting)):
        raise TypeError(f"weighting: got {shown(weighting)}, expected None, {names}")
    rule = rules[weighting] if isinstance(weighting, str) else weighting
    reason = why_no_weights(rule)
    if reason is not None:
        raise ValueError(f"weighting: got {weighting!r}, whose scores {reason}, expected None, {names}")
    return rule


def check_weighting_known(weighting: Selector, known: str) -> None:
    """Refuse a weighting that reads whole rows which the input `known` does not hold: a key of `selectors.PARTLY_KNOWN`."""
    reads_teacher = isinstance(weighting, FiRe) and known != "student_stats"
    if reads_teacher or needs_of(weighting) & WHOLE_ROW_COLUMNS:
        raise ValueError(
            f"weighting: got {type(weighting).__name__}, which reads statistics of whole rows that {known} does not know; pass "
            "both models' logits or heads"
        )
    if not isinstance(weighting, (IW, FiRe)):
        check_known(weighting, known, "weighting")


def with_mean_one(weights: Tensor, among: Tensor, ids: Tensor, n: int, ranks: Ranks | None) -> Tensor:
    """The weights over their mean, which is taken over the finite weights `among` each of n sets, in fp64.

    Args:
        weights, among, ids: (N,) weights, bool, and the set of each position.
        ranks: Ranks that hold parts of the same sets: a sum of (2, n) fp64 numbers. None: none do.
    """
    finite = among & torch.isfinite(weights)
    columns = torch.stack((torch.where(finite, weights.double(), 0), finite.double()))
    sums = torch.zeros((2, n), dtype=torch.float64, device=weights.device).index_add(1, ids, columns)
    total, count = (sums if ranks is None else ranks.sum(sums)).unbind()
    mean = total / count.clamp_min(1)
    return weights.double() / torch.where(mean == 0, 1.0, mean)[ids]
