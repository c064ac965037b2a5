"""The divergence on the token that the student sampled.

  sampled   -A log p(y), A = log q(y) - log p(y), a constant: policy gradient of -KL(p || q) on the rollout token y

Not here: the teacher's top-K (support.py), computing and reading a list (backends/shared/list_losses.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opd_ops.arguments import check_positive, take_plain
from opd_ops.divergences.base import OnSupport, Support


@dataclass(frozen=True)
class SampledToken(OnSupport):
    """Policy gradient on the token that the student sampled, with the log-ratio of the models as its advantage.

    Over tokens drawn from p the mean gradient is the gradient of reverse KL. The value, -A log p(y), is not a KL: watch
    `metrics["kl_sampled"]`, the mean of log p(y) - log q(y).

    Args:
        clip: Bound of |A| in nats, one number per token; None: no bound.
    """

    clip: float | None = None
    name = "sampled"
    of_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        take_plain(self, "clip")
        if self.clip is not None:
            check_positive("SampledToken.clip", self.clip, ", or None")

    def loss(self, at: Support) -> Tensor:
        log_p = at.log_p[:, 0]
        advantage = (at.teacher[:, 0] - log_p).detach()
        if self.clip is not None:
            advantage = advantage.clamp(-self.clip, self.clip)
        no_loss = advantage.isinf() | (log_p == -math.inf)
        return torch.where(no_loss, math.inf, -advantage * torch.where(no_loss, 0, log_p))
