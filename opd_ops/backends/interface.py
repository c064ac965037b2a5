"""What a backend is: three methods on rows of two sources, and attributes that say what else it can do.

All policy (checks, selection, reduction) is outside of the backends.
Not here: the backends: eager.py (the specification), streamed/ (any device), triton/ (GPUs); which one a call uses
(resolve.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from opd_ops.divergences import Divergence
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import OwnStats, TokenStats


class Needs(NamedTuple):
    """What a call asks of its backend beside its sources."""

    divergence: Divergence
    top_k: int
    inplace: bool = False
    float8: bool = False


class Backend(ABC):
    """What a backend does with rows (int64 numbers of flattened positions) of two sources."""

    name: ClassVar[str]
    drops_weightless_rows: ClassVar[bool] = False
    """A row whose loss gets weight 0 has a gradient of exactly zero whatever it holds, NaN included."""

    def refusal(self, student: Source, teacher: Source | TeacherLists, needs: Needs) -> str | None:
        """Why this backend cannot run the call and what to do instead, or None."""
        return None

    def overwrites_logits(self, student: Source, teacher: Source | TeacherLists, divergence: Divergence) -> bool:
        """Whether the gradient can be written over the student's logits (`inplace_backward`)."""
        return False

    def float8_refusal(self, student: Source, teacher: Source | TeacherLists) -> str | None:
        """Why it cannot rank positions in 8 bits, or None."""
        return "only backend 'triton' does"

    def scores_selected_rows(self, student: Source, teacher: Source | TeacherLists) -> bool:
        """Whether `selected_loss` computes the rows' statistics itself, and needs none that are known of them."""
        return False

    @abstractmethod
    def token_stats(
        self,
        student: Source,
        teacher: Source,
        rows: Tensor,
        *,
        top_k: int,
        columns: frozenset[str],
        workspace: Workspace,
        score_dtype: torch.dtype | None,
    ) -> TokenStats:
        """(n,) columns for the rows, without a graph; optional columns only if named in `columns`.

        `score_dtype`: of a head's logits, where a backend would otherwise keep them in the head's own 16 bits.
        """

    @abstractmethod
    def own_stats(
        self, source: Source, rows: Tensor, *, top_k: int, workspace: Workspace, score_dtype: torch.dtype | None
    ) -> OwnStats:
        """One model's statistics at the rows, without a graph."""

    @abstractmethod
    def selected_loss(
        self,
        student: Source,
        teacher: Source | TeacherLists,
        rows: Tensor,
        weights: Tensor,
        stats: TokenStats,
        *,
        divergence: Divergence,
        tokens: Tensor | None,
        workspace: Workspace,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        """sum weights l over the rows, differentiable in the student's tensors, and l, (M,); `stats` are those rows' own.

        Rows whose loss is infinite are left out of the sum. `tokens`: what the student sampled at the rows, (M,), if the
        divergence is on it.
        `inplace`: the gradient overwrites the student's logits; True only where `overwrites_logits` is.
        """


def is_computed(*sides: Source | TeacherLists) -> bool:
    """Whether some logits are not stored: those of a head, and mixed ones."""
    return any(isinstance(side, Source) and (side.transform.is_head or side.reference is not None) for side in sides)
