"""Two divergences on a short list of ids that are no `TopK`: a cut forward KL, and the sampled token alone.

  forward_kl_topk   sum_T q (log q - log p), T the teacher's top-K, not renormalised: verl's loss of this name
  sampled           -A log p(y), A = log q(y) - log p(y), a constant: policy gradient of -KL(p || q) on the rollout token y

Not here: the family of losses on top-K ids (top_k.py), computing and reading a list (backends/shared/list_losses.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops.arguments import check_integer, check_positive, take_plain
from opd_ops.divergences.base import OnSupport, Support
from opd_ops.divergences.equations import log_ratio_sum


@dataclass(frozen=True)
class TopKForwardKL(OnSupport):
    """Forward KL cut off after the teacher's top-K: the terms of KL(q || p) at these ids. May be negative."""

    top_k: int = 16
    name = "forward_kl_topk"

    def __post_init__(self) -> None:
        take_plain(self, "top_k")
        check_integer("TopKForwardKL.top_k", self.top_k, least=1)

    def loss(self, at: Support) -> Tensor:
        return log_ratio_sum(at.teacher, at.log_p)


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
    support = "token"
    with_token = True

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
