"""The reference of a row: its normalisers, relative to the logits of the student's most likely id a.

  log p_v = (s_v - s_a) + log p_a,   log p_v - log q_v = (s_v - s_a) - (u_v - u_a) + (log p_a - log q_a)

A log-sum-exp rounded to fp32 would lose the digits of small divergences and of rows with p_a near 1.
Not here: the computation of these columns in the score pass (running.py), the divergences (divergences/).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.inputs.chunks import span_of
from opd_ops.selection.stats import TokenStats


class Reference(NamedTuple):
    """The columns of `TokenStats` that gradients read, (M,) each."""

    student: Tensor  # s_a
    teacher: Tensor  # u_a, or another logit of the teacher where it masks a
    log_p: Tensor  # log p_a
    log_ratio: Tensor  # log p_a - log q_a, with that other logit in place of a masked u_a
    top_log_ratio: Tensor  # log p_a - log q_a: +inf where the teacher masks a

    @staticmethod
    def of(stats: TokenStats) -> Reference:
        columns = (
            stats.reference_student,
            stats.reference_teacher,
            stats.reference_log_p,
            stats.reference_log_ratio,
            stats.top_log_ratio,
        )
        assert all(x is not None for x in columns), "statistics of a backend whose gradients have other normalisers"
        return Reference(*columns)  # type: ignore[arg-type]

    def rows(self, group: slice) -> Reference:
        """The reference of some of the rows, (n, 1) each."""
        return Reference(*(span_of(column, group).unsqueeze(1) for column in self))

    def log_probabilities(self, s: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p and log p - log q of a block of (n, B) logits; overwrites s and u. The columns here are (n, 1)."""
        s.sub_(self.student)
        log_ratio = torch.sub(s, u.sub_(self.teacher), out=u).add_(self.log_ratio)
        return s.add_(self.log_p), log_ratio
