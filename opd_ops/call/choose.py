"""What a call trains on: the positions that its budget chose, and the losses that a backend finds of them.

  M = the best-scored of the valid positions;  l_t, t in M, the divergence       arXiv 2605.26844 eqs. 6, 13

Not here: scores (scoring.py), budgets and ties (selection/budget.py), what is made of the losses (loss.py, token_losses.py).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_ops.backends.interface import drops_weightless_rows, scores_selected_rows
from opd_ops.call import checks
from opd_ops.call.metrics import loss_metrics, sampled_metrics
from opd_ops.inputs.teacher_lists import Listed
from opd_ops.scoring import Scoring, finite, select_positions
from opd_ops.selection.budget import SHORTLIST, most_selected
from opd_ops.selection.stats import TokenStats


@dataclass(frozen=True)
class Chosen:
    """A scored call and its selected positions, (...) of the positions' shape and (M,) as a list."""

    call: Scoring
    rows: Tensor  # (M,) int64 numbers of flattened positions
    kept: Tensor | None  # (M,) bool: which rows are trained on; None: all
    selected: Tensor  # (...) bool
    scores: Tensor  # (...)
    stats: TokenStats  # columns (...)

    @staticmethod
    def of(call: Scoring, *, fraction: float, threshold: Tensor | float | None, cu_seqlens: Tensor | None) -> Chosen:
        """Score the call's positions and select."""
        group = None if call.ranks is None else call.ranks.group

        def select(scores: Tensor, stats: TokenStats, fraction: float, threshold: Tensor | float | None) -> Tensor:
            return select_positions(
                scores,
                mask=stats.valid,
                fraction=fraction,
                scope=call.scope,
                selection_group=group,
                cu_seqlens=cu_seqlens,
                threshold=threshold,
                **call.selection_options(stats),
            )

        scores, stats = call.run(lambda scores, stats: select(scores, stats, min(1.0, SHORTLIST * fraction), None))
        selected = select(scores, stats, fraction, threshold)
        rows, kept = _rows_of(selected, None if threshold is not None else fraction, call)
        if not _in_graph(selected.device):  # the list of rows has just made the host wait for the statistics
            _warn_of_infinite(stats.valid & ~finite(stats, call.divergence), stats.valid, call.divergence.name)
        if call.known is not None and call.divergence.whole is not None and not scores_selected_rows(call.backend, *call.sides):
            rows, kept, selected, stats = call.with_whole_rows(rows, kept, selected, stats)
        return Chosen(call, rows, kept, selected, scores, stats)

    @property
    def blown_up(self) -> Tensor:
        """(...) bool: valid positions where the student's softmax or the score is not a number, which must not hide."""
        return self.stats.valid & (~torch.isfinite(self.stats.student_logsumexp) | self.scores.isnan())

    def poison(self, dtype: torch.dtype) -> Tensor:
        """What every loss is multiplied by: 1, or NaN after a blow-up."""
        return torch.where(self.blown_up.any(), torch.nan, 1.0).to(dtype)

    def tokens(self) -> Tensor | None:
        """(M,) what the student sampled, if the divergence is on it."""
        return self.call.sampled(self.rows) if checks.reads_tokens(self.call.divergence) else None

    def loss(self, weights: Tensor, tokens: Tensor | None, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
        """sum weights l, connected to the student's tensors, and l; both weights and l are (M,)."""
        return self.call.backend.selected_loss(
            *self.call.sides,
            self.rows,
            weights,
            self.stats.take(self.rows),
            divergence=self.call.divergence,
            tokens=tokens,
            workspace_bytes=self.call.workspace_bytes,
            inplace=inplace,
        )

    def settled(self, losses: Tensor) -> Settled:
        """What is known once the (M,) losses are: those that turn out to be infinite are not trained on."""
        stats, rows, flat = self.stats, self.rows, self.selected.flatten()
        # What is trained on may be known to more digits than what ranked it.
        column = self.call.divergence.column
        if column is not None:
            ranked = getattr(stats, column).flatten()[rows]
            stats = stats.with_column(column, rows, losses if self.kept is None else torch.where(self.kept, losses, ranked))
        # Nor was it known to be finite, if the student's row was not read, or read in 16 bits, or is summed only here.
        trained = losses != torch.inf
        trained = trained if self.kept is None else trained & self.kept
        infinite = (stats.valid & ~finite(stats, self.call.divergence)).flatten()
        infinite = infinite.index_put((rows,), infinite[rows] | (flat[rows] & (losses == torch.inf)))
        selected = flat.index_put((rows,), flat[rows] & trained)
        shape = self.selected.shape
        if rows.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere the host would wait for the losses
            _warn_of_infinite(infinite, stats.valid.flatten(), self.call.divergence.name)
        return Settled(replace(self, selected=selected.view(shape), stats=stats), losses, trained, infinite.view(shape))


@dataclass(frozen=True)
class Settled:
    """The same with the losses known."""

    chosen: Chosen
    losses: Tensor  # (M,)
    trained: Tensor  # (M,) bool
    infinite: Tensor  # (...) bool: valid positions whose divergence is +inf

    def loss_sum(self, weights: Tensor | None) -> Tensor:
        """sum of the weighted losses, without a graph."""
        return torch.where(self.trained, self.losses if weights is None else self.losses * weights, 0).sum()

    def metrics(self, loss: Tensor, loss_sum: Tensor, tokens: Tensor | None) -> dict[str, Tensor]:
        chosen, call = self.chosen, self.chosen.call
        found = loss_metrics(
            loss,
            loss_sum,
            chosen.selected,
            chosen.scores,
            chosen.stats,
            call.given,
            self.infinite,
            is_bound=isinstance(call.teacher, Listed),
        )
        if tokens is None:
            return found
        return found | sampled_metrics(call.log_ratio(chosen.rows, tokens, chosen.stats), self.trained)


_warned_of: set[str] = set()  # Python's own memory of warnings is lost whenever somebody catches some


def _warn_of_infinite(infinite: Tensor, valid: Tensor, divergence: str) -> None:
    """Once a process and divergence: where most positions are infinite, little or nothing is learned."""
    if divergence in _warned_of:
        return
    n_infinite, n_valid = torch.stack((infinite.sum(), valid.sum())).tolist()
    if 2 * n_infinite > n_valid:
        _warned_of.add(divergence)
        warnings.warn(
            f"divergence: {divergence!r} is infinite at {n_infinite} of {n_valid} valid positions, which are not trained on, "
            "because one model masks ids that the other can write; mask the same ids in both, or use 'jsd', which is finite",
            stacklevel=4,
        )


def _rows_of(selected: Tensor, fraction: float | None, call: Scoring) -> tuple[Tensor, Tensor | None]:
    """The selected positions; in a graph as many as may be selected at most, and which of those are selected (None: all).

    Their number depends on the data (NaN or infinite rows leave the budget unfilled), which no graph can hold, torch.compile's
    or CUDA's. There the list is filled up with other rows, whose losses become 0: a weight at which the gradient is exactly
    zero too.
    """
    flat = selected.flatten()
    fixed = call.given is None and call.scope == "batch" and drops_weightless_rows(call.backend)
    if fraction is None or not fixed or not _in_graph(flat.device):
        return flat.nonzero().squeeze(1), None
    most = most_selected(len(flat), fraction)
    if getattr(call.selector, "keep_one_per_sequence", False):  # on top of the budget
        most += call.positions.n_sequences
    rows = torch.sort(flat.to(torch.uint8), descending=True, stable=True).indices[:most]
    return rows, flat[rows]


def _in_graph(device: torch.device) -> bool:
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
