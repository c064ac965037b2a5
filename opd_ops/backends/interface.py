"""What a backend is: statistics and losses at given rows of two sources, and questions about what else it can do.

A backend with kernels may also score, select and sum by them (`placed_stats`, `choose`, `totals`), with the same results as the
stages of a call (call/), which do so for every other backend. Checks are outside of the backends.
Not here: the backends: eager.py (the specification), streamed/ (any device), triton/ (GPUs); the choice of a backend for a call
(resolve.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from opd_ops.divergences import Divergence
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.budget import Budget
from opd_ops.selection.stats import OwnStats, Scoring, TokenStats


class Needs(NamedTuple):
    """The settings of a call that its backend must support."""

    divergence: Divergence
    top_k: int
    inplace: bool = False
    float8: bool = False
    traced: bool = False  # by torch.compile


class Placed(NamedTuple):
    """Statistics and scores of all positions, from kernels. (...) is the positions' shape, N their number."""

    scores: Tensor  # (...) fp32, -inf where not valid or infinite
    stats: TokenStats  # columns (...), 0 where not valid
    infinite: Tensor  # (...) bool: valid positions whose divergence is known to be +inf
    columns: Tensor  # (columns, N) the memory of the fp32 columns of `stats`
    keep_scores: Tensor | None = None  # (...) fp32, the selector's, where kernels scored and it has any


class Choice(NamedTuple):
    """Positions selected by kernels; N positions."""

    selected: Tensor  # (N,) bool
    rows: Tensor  # (R,) int64: the selected positions in order, then others up to R
    counts: Tensor  # (3,) int64: selected, valid, infinite positions


class Cut(NamedTuple):
    """Where a budget cuts the positions' scores."""

    budget: Budget
    n_rows: int  # the most positions that can be selected
    length: int | None = None  # each sequence has a budget; all are of this length
    bounds: Tensor | None = None  # (sequences + 1,) boundaries of packed sequences, each with a budget
    places: Tensor | None = None  # (...) int64: of equal scores the smaller place wins; with one budget
    keep_scores: Tensor | None = None  # (...) there is one budget; a sequence without a selected position gets its best


class WeightedRows(NamedTuple):
    """The M rows of a loss."""

    rows: Tensor  # (M,) int64
    weights: Tensor  # (M,)
    stats: TokenStats  # (M,) columns
    tokens: Tensor | None = None  # (M,) the student's sampled tokens, if the divergence reads them

    def take(self, places: Tensor) -> WeightedRows:
        """Some of the rows."""
        tokens = None if self.tokens is None else self.tokens[places]
        return WeightedRows(self.rows[places], self.weights[places], self.stats.take(places), tokens)


class Backend(ABC):
    """Computes statistics and losses. `rows` are int64 numbers of flattened positions."""

    name: ClassVar[str]
    drops_weightless_rows: ClassVar[bool] = False
    """Whether a row with weight 0 has a gradient of exactly zero even if its logits are NaN."""
    takes_transforms: ClassVar[bool] = False
    """Whether it is plain differentiable torch, which the transforms of torch.func go through."""

    def refusal(self, student: Source, teacher: Source | TeacherLists, needs: Needs) -> str | None:
        """Why this backend cannot run the call, and what to do instead; None if it can."""
        return None

    def overwrites_logits(self, student: Source, teacher: Source | TeacherLists, divergence: Divergence) -> bool:
        """Whether the gradient can be written over the student's logits (`inplace_backward`)."""
        return False

    def hands_over(self, student: Source, teacher: Source | TeacherLists, divergence: Divergence) -> str | None:
        """Why another backend computes this loss on the same device (docs/reference/backends.md); None: none does."""
        return None

    def float8_refusal(self, student: Source, teacher: Source | TeacherLists) -> str | None:
        """Why this backend cannot rank positions in 8 bits; None if it can."""
        return "it does not rank in 8 bits"

    def scores_selected_rows(self, student: Source, teacher: Source | TeacherLists) -> bool:
        """Whether `selected_loss` computes the rows' statistics itself and does not read `stats`."""
        return False

    def placed_stats(
        self,
        student: Source,
        teacher: Source,
        rows: Tensor | None,
        scoring: Scoring,
        *,
        unmasked: Tensor | None,
        selector: str | None,
        loss: str | None,
    ) -> Placed | None:
        """Statistics of all positions by kernels, and a selector's scores; None: this backend cannot.

        `rows`: ascending positions that have statistics; None: all. `unmasked`: bool of the positions' shape, which of them are
        valid; None: all that have statistics. `selector`: a name; None, or a name that kernels do not
        know: scores of 0. `loss`: the column that holds the divergence; None: no column does.
        """
        return None

    def scores_by_kernels(self, selector: str | None) -> bool:
        """Whether `placed_stats` knows the selector."""
        return False

    def makes_ier(self, student: Source) -> bool:
        """Whether statistics of both models hold the column "ier", if `scoring` names it and has the sampled tokens."""
        return False

    def choose(self, scores: Tensor, valid: Tensor, infinite: Tensor, cut: Cut) -> Choice | None:
        """The budget's cut by kernels, on positions of any shape; None: this backend has no such kernel."""
        return None

    def totals(
        self,
        placed: Placed,
        selected: Tensor,
        rows: Tensor,
        losses: Tensor,
        row_weights: Tensor | None,
        unmasked: Tensor | None,
        *,
        loss: str | None,
        by_selected: bool,
    ) -> dict[str, Tensor]:
        """Sums and counts of a call, by name (opd_kernels/totals.py), where `placed_stats` and `choose` ran.

        In place: rows with an infinite loss are no longer `selected` and become `placed.infinite`; the column `loss` takes the
        losses.
        """
        raise NotImplementedError(f"backend {self.name!r} takes no totals: its `placed_stats` returns None")

    @abstractmethod
    def token_stats(self, student: Source, teacher: Source, rows: Tensor, scoring: Scoring) -> TokenStats:
        """(n,) columns at the rows, without a graph."""

    @abstractmethod
    def own_stats(self, source: Source, rows: Tensor, scoring: Scoring) -> OwnStats:
        """One model's statistics at the rows, without a graph."""

    @abstractmethod
    def selected_loss(
        self,
        student: Source,
        teacher: Source | TeacherLists,
        selected: WeightedRows,
        divergence: Divergence,
        workspace: Workspace,
        *,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        """The sum of weights l over the rows, differentiable in the student's tensors, and l, the (M,) losses.

        Rows with an infinite loss are left out of the sum.
        `inplace`: the gradient overwrites the student's logits; True only where `overwrites_logits` is.
        """


def is_computed(*sides: Source | TeacherLists) -> bool:
    """Whether the logits of some side are computed: a head, or a mixture."""
    return any(isinstance(side, Source) and (side.transform.is_head or side.transform.mixing is not None) for side in sides)
