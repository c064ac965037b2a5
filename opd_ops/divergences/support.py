"""A divergence on a short list of ids that is no `TopK`: a cut forward KL.

  forward_kl_topk   sum_T q (log q - log p), T the teacher's top-K, not renormalised: verl's loss of this name

Not here: the family of losses on top-K ids (top_k.py), the sampled token (sampled.py), computing and reading a list
(backends/shared/list_losses.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from opd_ops.arguments import check_integer, take_plain
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
