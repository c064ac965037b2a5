"""Divergences over the whole vocabulary: value and gradient in closed form, in blocks of columns.

  reverse_kl       l = KL(p || q) = sum p (log p - log q)              dl/ds_v = p_v [(log p_v - log q_v) - l]
  forward_kl       l = KL(q || p) = sum q (log q - log p)              dl/ds_v = p_v - q_v
  jsd(beta)        l = beta KL(q || m) + (1-beta) KL(p || m),          dl/ds_v = (1-beta) p_v [log(p_v/m_v) - sum p log(p/m)]
                   m = beta q + (1-beta) p;  beta = 0: forward_kl, 1: reverse_kl (TRL's convention)
    entry_clip c   l = sum min(f_v, c), f_v an entry's part of it       dl/ds_v = p_v (k_v - sum p k), k_v = f'_v 1[f_v < c]
  total_variation  l = 1/2 sum |p - q|                                 dl/ds_v = 1/2 p_v [sign(p_v - q_v) - sum p sign(p - q)]
  s: student logits after temperature. arXiv 2605.26844 eq. 6; arXiv 2306.13649 (GKD); arXiv 2601.18734 (OPSD, entry_clip).

Not here: skew KL and powers (bounded.py), losses on a short list of ids (support.py), the mean over positions
(opd_ops/call/reduce.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops.arguments import check_positive, real, shown, take_plain
from opd_ops.divergences.base import Divergence, Summed, WholeRow
from opd_ops.divergences.equations import kl, log_mixture, log_over_mixture, log_ratio_terms


@dataclass(frozen=True)
class ReverseKL(WholeRow):
    """KL(student || teacher), mode-seeking; the default."""

    name = "reverse_kl"
    column = "reverse_kl"

    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return kl(log_p, log_q)

    def slope(self, log_p: Tensor, log_ratio: Tensor) -> Tensor:
        return log_ratio


@dataclass(frozen=True)
class ForwardKL(WholeRow):
    """KL(teacher || student), mass-covering."""

    name = "forward_kl"
    column = "forward_kl"

    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return kl(log_q, log_p)

    def slope(self, log_p: Tensor, log_ratio: Tensor) -> Tensor:
        return -torch.exp(-log_ratio)

    def dlogits(self, log_p: Tensor, log_ratio: Tensor, reference_slope: Tensor, mean_slope: Tensor) -> Tensor:
        # p - q = p (1 - e^-ratio) = -p expm1(-ratio) keeps its digits where the models agree. Where q >> p it would overflow
        # or lose digits of p: there p - q is the plain difference.
        q = torch.exp(log_p - log_ratio)
        p = log_p.exp_()
        return torch.where(log_ratio > -1.0, -p * torch.expm1(-log_ratio), p - q)


def is_column(divergence: Divergence) -> bool:
    """Whether it is reverse or forward KL, whose values are columns of the score pass; False for a user's subclass of them."""
    return divergence.on_support is None and type(divergence.whole) in (ReverseKL, ForwardKL)


@dataclass(frozen=True)
class JSD(Summed):
    """Generalised Jensen-Shannon divergence: beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p.

    As in TRL, `beta` is the teacher's share of m. beta = 0 means forward KL, the limit of jsd / beta; beta = 1 means reverse
    KL, the limit of jsd / (1 - beta).

    Args:
        beta: The teacher's share of m, in [0, 1].
        entry_clip: The most that one entry of the vocabulary adds to the loss, in nats; None: no bound. OPSD takes 0.05.
    Warning: with `entry_clip` the loss is no divergence. Large positive terms are cut and negative terms are not, so the sum
        may be negative, and the gradient may push the student away from the teacher (OPSD's issues 2 and 24). An entry at its
        bound has no gradient of its own. The authors of OPSD find that it helps in their runs; compare with None.
    """

    beta: float = 0.5
    entry_clip: float | None = None
    name = "jsd"

    def __post_init__(self) -> None:
        take_plain(self, "beta", "entry_clip")
        if not 0 <= real(self.beta) <= 1:
            raise ValueError(f"JSD.beta: got {shown(self.beta)}, expected a number in [0, 1]")
        if self.entry_clip is not None:
            check_positive("JSD.entry_clip", self.entry_clip, ", or None")
            if self.beta in (0, 1):
                raise ValueError(
                    f"JSD.entry_clip: got {shown(self.entry_clip)} with beta {self.beta:g}, a KL; expected 0 < beta < 1"
                )

    @property
    def whole(self) -> WholeRow:
        return ForwardKL() if self.beta == 0 else ReverseKL() if self.beta == 1 else self

    @property
    def column(self) -> str | None:  # type: ignore[override]
        return None if self.whole is self else self.whole.column

    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = log_mixture(log_p, log_q, self.beta)
        if self.entry_clip is None:
            return self.beta * kl(log_q, log_m) + (1 - self.beta) * kl(log_p, log_m)
        entries = self.beta * log_ratio_terms(log_q, log_m) + (1 - self.beta) * log_ratio_terms(log_p, log_m)
        return entries.clamp_max(self.entry_clip).sum(-1)

    def term(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        p_term = log_over_mixture(log_ratio, 1 - self.beta).mul_(log_p.exp()).mul_(1 - self.beta)
        q_term = log_over_mixture(-log_ratio, self.beta).mul_(log_q.exp()).mul_(self.beta)
        # A logarithm is infinite only where the probability is 0.
        term = p_term.masked_fill_(log_p == -math.inf, 0).add_(q_term.masked_fill_(log_q == -math.inf, 0))
        return term if self.entry_clip is None else term.clamp_max_(self.entry_clip)

    def slope(self, log_p: Tensor, log_ratio: Tensor) -> Tensor:
        slope = log_over_mixture(log_ratio, 1 - self.beta).mul_(1 - self.beta)  # f'_v itself: its constant is 0
        if self.entry_clip is None:
            return slope
        return slope.masked_fill_(self.term(log_p, log_p - log_ratio, log_ratio) >= self.entry_clip, 0)

    @property
    def may_be_negative(self) -> bool:
        return self.entry_clip is not None


@dataclass(frozen=True)
class TotalVariation(Summed):
    """1/2 sum |p - q|: bounded, and its gradient does not grow with disagreement.

    The gradient does not shrink with agreement either: where the models agree up to rounding, it has the signs of the rounding.
    """

    name = "total_variation"

    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2

    def term(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        # |p - q| from the ratio, which has more digits than p and q.
        relative_to_p, relative_to_q = torch.expm1(-log_ratio).abs_(), torch.expm1(log_ratio).abs_()
        return torch.where(log_ratio > 0, relative_to_p.mul_(log_p.exp()), relative_to_q.mul_(log_q.exp())).div_(2)

    def slope(self, log_p: Tensor, log_ratio: Tensor) -> Tensor:
        return log_ratio.sign().div_(2)
