"""Divergences on a short list of ids: the teacher's top-K T.

  local_support     sum_T p^ (log p^ - log q^), p^ and q^ renormalised on T                      arXiv 2603.25562 eqs. 6-8
  tail_aware        sum_T p (log p - log q) + p_tail (log p_tail - log q_tail), p_tail = 1 - p(T)       arXiv 2608.14728
  forward_kl_topk   sum_T q (log q - log p), not renormalised: verl's loss of this name

`tail_aware` is a KL of two distributions of K + 1 outcomes. Its tails are sums over the ids off the list; only the tail of a
sparse teacher is 1 - q(T).
Reverse KL on T without renormalisation does not exist here: it may be negative, and is unstable.
Not here: the sampled token (sampled.py), computing and reading a list (backends/shared/list_losses.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opd_ops.arguments import check_integer, take_plain
from opd_ops.divergences.base import OnSupport, Support
from opd_ops.divergences.equations import kl, log_ratio_sum


@dataclass(frozen=True)
class LocalSupport(OnSupport):
    """Reverse KL on the teacher's top-K, both models renormalised on it. Reads no other logit of the student."""

    top_k: int = 32
    name = "local_support"
    reads_off_list: ClassVar[bool] = False

    def __post_init__(self) -> None:
        take_plain(self, "top_k")
        check_integer("LocalSupport.top_k", self.top_k, least=1)

    def loss(self, at: Support) -> Tensor:
        none_possible = (at.student == -math.inf).all(1)  # the student can write no id of T
        student = at.student.masked_fill(none_possible.unsqueeze(1), 0)
        losses = kl(torch.log_softmax(student, 1), torch.log_softmax(at.teacher, 1))
        return torch.where(none_possible, math.inf, losses)


@dataclass(frozen=True)
class TailAware(OnSupport):
    """Reverse KL on the teacher's top-K and one more outcome, the tail: all other entries together."""

    top_k: int = 16
    name = "tail_aware"
    reads_teacher_off_list: ClassVar[bool] = True

    def __post_init__(self) -> None:
        take_plain(self, "top_k")
        check_integer("TailAware.top_k", self.top_k, least=1)

    def loss(self, at: Support) -> Tensor:
        log_p = torch.log_softmax(torch.cat((at.student, at.student_off_list.unsqueeze(1)), 1), 1)
        return kl(log_p, torch.cat((at.teacher, at.teacher_off_list.unsqueeze(1)), 1))


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
