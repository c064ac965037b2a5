"""Divergences over the whole vocabulary that are finite for any two models, also where one of them is 0.

  skew_kl   reverse: l = KL(p || m), m = (1-alpha) q + alpha p, f' = log(p/m) - alpha p/m
            forward: l = KL(q || m), m = alpha q + (1-alpha) p, f' = -(1-alpha) q/m      arXiv 2402.03898 (DistiLLM)
  power     l = sum [p^(1+alpha) / (1+alpha) - p q^alpha + alpha q^(1+alpha) / (1+alpha)], f' = p^alpha - q^alpha
            the gradient is the mean gradient of PowerOPD, arXiv 2606.17199 eq. 4, over the tokens
  dl/ds_v = p_v (f'_v - sum p f'), s: student logits after temperature

Not here: the other divergences over whole rows (whole.py), PowerOPD on sampled tokens (sampled.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops.arguments import check_choice, check_positive, real, shown, take_plain
from opd_ops.divergences.base import Summed
from opd_ops.divergences.equations import kl, log_mixture, log_over_mixture, power_difference


@dataclass(frozen=True)
class SkewKL(Summed):
    """A KL to a mixture of both models, so that an entry of probability 0 costs at most -log alpha.

    Args:
        alpha: In (0, 1): the share of the mixture that is the model on the left of the KL. Near 0 it is a KL of the two models.
        direction: "reverse": KL(p || (1 - alpha) q + alpha p); "forward": KL(q || alpha q + (1 - alpha) p). p: the student.
    """

    alpha: float = 0.1
    direction: str = "reverse"
    name = "skew_kl"

    def __post_init__(self) -> None:
        take_plain(self, "alpha")
        if not 0 < real(self.alpha) < 1:
            raise ValueError(
                f"SkewKL.alpha: got {shown(self.alpha)}, expected a number in (0, 1); at 0 it is ReverseKL() or ForwardKL()"
            )
        check_choice("SkewKL.direction", self.direction, ("reverse", "forward"))

    @property
    def _is_reverse(self) -> bool:
        return self.direction == "reverse"

    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = log_mixture(log_p, log_q, 1 - self.alpha if self._is_reverse else self.alpha)
        return kl(log_p if self._is_reverse else log_q, log_m)

    def term(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        left, ratio = (log_p, log_ratio) if self._is_reverse else (log_q, -log_ratio)
        # The logarithm is infinite only where the probability is 0.
        return log_over_mixture(ratio, self.alpha).mul_(left.exp()).masked_fill_(left == -math.inf, 0)

    def slope(self, log_p: Tensor, log_ratio: Tensor) -> Tensor:
        # p/m or q/m minus 1 by expm1: the slope is exactly 0 where the models agree.
        if self._is_reverse:
            log_share = log_over_mixture(log_ratio, self.alpha)
            return log_share.sub_(torch.expm1(log_share).mul_(self.alpha))
        return torch.expm1_(log_over_mixture(-log_ratio, self.alpha)).mul_(self.alpha - 1)


@dataclass(frozen=True)
class Power(Summed):
    """A distance between powers of the probabilities: PowerOPD over the whole vocabulary instead of on the sampled token.

    Unlikely entries count less, the more so the larger alpha is. alpha = 1: half the squared distance of p and q. Near 0 it is
    alpha times reverse KL. Where both models put p near 1 on one token, "eager", which is differentiated as written, has few
    digits of the gradient in fp32; it is below 1e-10 there.

    Args:
        alpha: Exponent, > 0; 5 in the script of the paper, which tries 0.1 to 500.
    """

    alpha: float = 5.0
    name = "power"

    def __post_init__(self) -> None:
        take_plain(self, "alpha")
        check_positive("Power.alpha", self.alpha)

    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        a, own = self.alpha, 1 / (1 + self.alpha)
        return (own * ((1 + a) * log_p).exp() - (log_p + a * log_q).exp() + a * own * ((1 + a) * log_q).exp()).sum(-1)

    def term(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        # Relative to the larger of p and q, whose power is taken out: neither factor overflows, and where the models agree
        # the powers of p, q and both, which agree too, are never subtracted.
        a, own = self.alpha, 1 / (1 + self.alpha)
        above, below = log_ratio.clamp_min(0), log_ratio.clamp_max(0)
        over_p = torch.expm1(-(1 + a) * above).mul_(a * own).sub_(torch.expm1(-a * above))
        over_q = torch.expm1((1 + a) * below).mul_(own).sub_(torch.expm1(below))
        over_p.mul_(((1 + a) * log_p).exp_())
        return torch.where(log_ratio > 0, over_p, over_q.mul_(((1 + a) * log_q).exp_()))

    def slope(self, log_p: Tensor, log_ratio: Tensor) -> Tensor:
        return power_difference(log_p, log_ratio, self.alpha)
