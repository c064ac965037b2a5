"""The divergence on the token y that the student sampled: policy gradient of -KL(p || q), and its relatives.

  l = -A log p(y),   dl/ds_v = -A (1[v = y] - p_v);   A is a constant, a = log q(y) - log p(y)
  shape      log: A = a;   soft_log: sign(a) log(1 + |a|), arXiv 2607.13399;   tanh: tanh(a / 5)
             power: q(y)^alpha - p(y)^alpha, PowerOPD, arXiv 2606.17199 eq. 4
  baseline   kl: A = a + KL(p || q), whose mean over y ~ p is 0, arXiv 2605.07865 (vOPD)
  clip       A = clamp(A, -clip, clip), the last step
  Means over y ~ p:  of a's gradient, reverse KL's, with the baseline and without;  of power's, the gradient of Power(alpha).

A KL of whole rows or of lists is no advantage: it is the same for every y, so that its mean gradient is 0.
Not here: the ratio to the probability at sampling time (ratio.py), lists of top-K ids (top_k.py, support.py), computing and
reading a list (backends/shared/list_losses.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops.arguments import check_choice, check_positive, take_plain
from opd_ops.divergences.base import OnSupport, Support
from opd_ops.divergences.equations import power_difference
from opd_ops.divergences.ratio import DEFAULT_BOUNDS, NONE, Ratio, check_ratio, ratio_of

SHAPES = ("log", "soft_log", "tanh", "power")
TANH_SCALE = 5.0  # nats; among the rivals of arXiv 2606.17199


@dataclass(frozen=True)
class SampledToken(OnSupport):
    """Policy gradient on the token that the student sampled, with the log-ratio of the models as its advantage.

    Over tokens drawn from p the mean gradient is the gradient of reverse KL. The value, -A log p(y), is not a KL: watch
    `metrics["kl_sampled"]`, the mean of log p(y) - log q(y).

    Tokens that an older student drew, or another engine: pass their log-probabilities at sampling time, and a ratio:

        selective_opd_loss(student, teacher, tokens=y, old_logprobs=log_mu, divergence=SampledToken(ratio="tis"))

    With "is" the mean gradient over tokens drawn from mu is that of reverse KL again. For the ratio as a weight of another
    divergence: `ImportanceWeighted`.

    Args:
        clip: Bound of |A|, one number per token; None: no bound.
        shape: The advantage as a function of log q(y) - log p(y): "log", "soft_log", "tanh" or "power".
        baseline: "none", or "kl": KL(p || q) is added to the advantage, which keeps the mean gradient and centres the
            advantages. For shape "log", and teachers that give whole rows.
        ratio: "none", "is" (importance sampling), "tis" (truncated), "icepop" (0 outside of the bounds) or "ppo" (no gradient
            where PPO's clipped objective has none).
        bounds: (low, high) of the ratio; None: (0, 2) for "tis" and "icepop", (0.8, 1.28) for "ppo". "is" takes none.
        alpha: Exponent of shape "power", > 0.
    """

    clip: float | None = None
    shape: str = "log"
    baseline: str = NONE
    ratio: str = NONE
    bounds: tuple[float, float] | None = None
    alpha: float = 5.0
    name = "sampled"
    support = "token"
    with_token = True

    def __post_init__(self) -> None:
        take_plain(self, "clip", "alpha")
        if self.clip is not None:
            check_positive("SampledToken.clip", self.clip, ", or None")
        if isinstance(self.shape, str) and ("kl" in self.shape or self.shape == "jsd"):
            raise ValueError(
                f"SampledToken.shape: got {self.shape!r}, which is the same for every token: as a token's advantage its mean "
                f"gradient is 0; expected one of: {', '.join(SHAPES)}, or pass {self.shape!r} as the divergence"
            )
        check_choice("SampledToken.shape", self.shape, SHAPES)
        check_choice("SampledToken.baseline", self.baseline, (NONE, "kl"))
        if self.reads_reverse_kl and self.shape != "log":
            raise ValueError(
                f"SampledToken.baseline: got 'kl' with shape {self.shape!r}, whose mean is not -KL; expected shape 'log'"
            )
        check_positive("SampledToken.alpha", self.alpha)
        object.__setattr__(self, "bounds", check_ratio("SampledToken", self.ratio, self.bounds, (NONE, *DEFAULT_BOUNDS)))

    @property
    def importance(self) -> Ratio | None:
        return ratio_of(self.ratio, self.bounds)

    @property
    def reads_reverse_kl(self) -> bool:
        return self.baseline == "kl"

    def advantage(self, log_p: Tensor, log_q: Tensor, reverse_kl: Tensor | None) -> Tensor:
        """(M,) A before the clip, from log p(y), log q(y) and, if the baseline is "kl", KL(p || q)."""
        log_ratio = log_p - log_q
        if self.shape == "power":
            return -power_difference(log_p, log_ratio, self.alpha)
        if self.shape == "tanh":
            return -torch.tanh(log_ratio / TANH_SCALE)
        if self.shape == "soft_log":
            return -log_ratio.sign() * log_ratio.abs().log1p()
        if self.reads_reverse_kl:
            assert reverse_kl is not None
            return reverse_kl - log_ratio
        return -log_ratio

    def loss(self, at: Support) -> Tensor:
        log_p = at.log_p[:, 0]
        advantage = self.advantage(log_p.detach(), at.teacher[:, 0], at.reverse_kl)
        if self.clip is not None:
            advantage = advantage.clamp(-self.clip, self.clip)
        no_loss = advantage.isinf() | (log_p == -math.inf)
        if self.reads_reverse_kl:  # KL is infinite where the teacher masks the token: the advantage is inf - inf
            no_loss = no_loss | (at.teacher[:, 0] == -math.inf)
        return torch.where(no_loss, math.inf, -advantage * torch.where(no_loss, 0, log_p))
