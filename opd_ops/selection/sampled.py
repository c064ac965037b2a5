"""Selectors of the sampled token and of the log-ratio at one position.

  A = log q(y) - log p(y), y the sampled token;  r = log p - log q at every id                                     [nats]
  Dial            |A|^(1 - beta) |q(y) - p(y)|^beta = |A| L^beta, L = (q(y) - p(y)) / A        DIAL, arXiv 2610.11659
  LogRatio        A ("high"), -A ("low"), or half of the budget from either end ("both")       sparse OPD, arXiv 2609.04565
  RatioVariance   Var_p[r] = sum_v p_v (r_v - KL(p || q))^2 = sum_v g_v^2 / p_v, g the gradient of reverse KL

Not here: the columns (call/score.py, backends/), the other selectors (selectors.py), weights (weighting.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opd_ops.arguments import check_choice, real, shown, take_plain
from opd_ops.selection.stats import TokenStats

LOGPROBS = frozenset({"student_logprob", "teacher_logprob"})


def log_ratio(stats: TokenStats) -> Tensor:
    """A, fp64; 0 where both models mask y."""
    log_p, log_q = logprobs(stats)
    return (log_q - log_p).masked_fill_(log_p == log_q, 0)


def logprobs(stats: TokenStats) -> tuple[Tensor, Tensor]:
    """log p(y) and log q(y), fp64."""
    assert stats.student_logprob is not None
    assert stats.teacher_logprob is not None
    return stats.student_logprob.double(), stats.teacher_logprob.double()


@dataclass(frozen=True)
class Dial:
    """|A| L^beta: the disagreement |A|, damped where both models find the token rare. L is the logarithmic mean of p(y), q(y).

    beta 0: |A|; beta 1: |q(y) - p(y)|, the gap; 1.2 is the paper's other choice.
    """

    beta: float = 1.0
    needs: ClassVar[frozenset[str]] = LOGPROBS

    def __post_init__(self) -> None:
        take_plain(self, "beta")
        if not 0 <= real(self.beta) < math.inf:
            raise ValueError(f"Dial.beta: got {shown(self.beta)}, expected a finite number of at least 0")

    def __call__(self, stats: TokenStats) -> Tensor:
        log_p, log_q = logprobs(stats)
        log_larger = torch.maximum(log_p, log_q)
        minus_size = torch.minimum(log_p, log_q).sub_(log_larger).masked_fill_(log_p == log_q, 0)  # 0 where both mask y
        # |q(y) - p(y)| = larger (1 - e^-|A|): no difference of nearly equal probabilities
        larger = log_larger.exp_()
        gap = torch.expm1(minus_size).mul_(larger).neg_()
        if self.beta == 1:
            return gap
        size = minus_size.neg_()
        mean = torch.where(size == 0, larger, gap / size.masked_fill(size == 0, 1))  # L
        return torch.where(size == math.inf, size.pow(1 - self.beta) * gap.pow(self.beta), mean.pow(self.beta).mul_(size))


@dataclass(frozen=True)
class LogRatio:
    """A of the sampled token: how much more likely the teacher finds it than the student does.

    `side`: "high" selects tokens that the teacher finds much more likely than the student does; "low" those that it finds much
    less likely; "both" takes half of the budget from each. With "both" a budget of n positions takes the ceil(n / 2) highest,
    then the lowest of the others; a threshold is refused.
    """

    side: str = "high"
    needs: ClassVar[frozenset[str]] = LOGPROBS

    def __post_init__(self) -> None:
        check_choice("LogRatio.side", self.side, ("high", "low", "both"))

    @property
    def both_ends(self) -> bool:
        """Whether a budget takes the positions of lowest score too."""
        return self.side == "both"

    def __call__(self, stats: TokenStats) -> Tensor:
        return -log_ratio(stats) if self.side == "low" else log_ratio(stats)


@dataclass(frozen=True)
class RatioVariance:
    """Var_p[log p - log q]: 0 where the gradient of reverse KL is 0."""

    needs: ClassVar[frozenset[str]] = frozenset({"ratio_variance"})

    def __call__(self, stats: TokenStats) -> Tensor:
        assert stats.ratio_variance is not None
        return stats.ratio_variance
