"""The third stage of a call: the positions that its budget chooses, and the rows of them that a backend reads.

  M = the best-scored of the valid positions;  l_t, t in M, the divergence       arXiv 2605.26844 eqs. 6, 13

Not here: scores (score.py), budgets and ties (selection/budget.py), their losses (losses.py).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops.arguments import is_traced, warn_user
from opd_ops.call.prepare import Call
from opd_ops.call.score import Scored, check_scores, is_finite, whole_stats_of
from opd_ops.distributed.ranks import Ranks
from opd_ops.inputs.sequences import numbered_sequences
from opd_ops.selection.budget import SHORTLIST, SelectionOptions, most_selected, select, select_over_ranks
from opd_ops.selection.selectors import is_own, over_ranks, selection_options
from opd_ops.selection.stats import TokenStats


@dataclass(frozen=True)
class Chosen:
    """A scored call and its selected positions, (...) of the positions' shape and (M,) as a list."""

    call: Call
    rows: Tensor  # (M,) int64 numbers of flattened positions
    kept: Tensor | None  # (M,) bool: which rows are trained on; None: all
    selected: Tensor  # (...) bool
    scores: Tensor  # (...)
    stats: TokenStats  # columns (...)


def shortlist(scored: Scored) -> Tensor:
    """(...) bool: the best of a first ranking in 8 bits, which are to be scored again: twice the budget."""
    return _selected(scored, min(1.0, SHORTLIST * scored.call.settings.fraction))


def choose(scored: Scored) -> Chosen:
    """Select by the call's budget, or its threshold."""
    call = scored.call
    selected, stats = _selected(scored, call.settings.fraction), scored.stats
    rows, kept = _rows_of(selected, call)
    if not is_in_graph(selected.device):  # the list of rows has just made the host wait for the statistics
        warn_of_infinite(scored.infinite, stats.valid, "valid", call.divergence.name)
    if (
        call.known is not None
        and call.divergence.whole is not None
        and not call.backend.scores_selected_rows(call.student, call.teacher)
    ):
        rows, kept, selected, stats = _with_whole_rows(call, rows, kept, selected, stats)
    return Chosen(call, rows, kept, selected, scored.scores, stats)


def _selected(scored: Scored, fraction: float) -> Tensor:
    """(...) bool: the best-scored share of the valid positions."""
    call, options = scored.call, _selection_options(scored)
    with torch.no_grad():
        return select_in_scope(
            scored.scores,
            scored.stats.valid,
            fraction,
            scope=call.scope,
            sequences=call.positions.sequences.flatten(),
            ranks=call.ranks,
            cu_seqlens=call.batch.cu_seqlens,
            options=options,
            threshold=call.settings.threshold,
        )


def select_in_scope(
    scores: Tensor,
    valid: Tensor,
    fraction: float,
    *,
    scope: str,
    sequences: Tensor,
    ranks: Ranks | None,
    cu_seqlens: Tensor | None,
    options: SelectionOptions,
    threshold: Tensor | float | None,
) -> Tensor:
    """(...) bool: the best-scored share of the valid positions of this process, or of all `ranks`.

    Args:
        scores, valid: (...) of the positions' shape.
        sequences: (N,) `sequence_ids` of the positions.
    """
    flat = scores.flatten(), valid.flatten()
    keep_one_in = sequences if options["keep_one_per_sequence"] else None
    keep_scores, places = (None if x is None else x.flatten() for x in (options["keep_scores"], options["places"]))
    is_sequence = scope == "sequence"
    if ranks is None:
        ids = sequences if is_sequence else None
        kept = select(
            *flat, fraction, ids, keep_one_in=keep_one_in, keep_scores=keep_scores, places=places, threshold=threshold
        )
        return kept.view(scores.shape)
    shared = numbered_sequences(scores.shape, cu_seqlens, scores.device) if is_sequence else None
    kept = select_over_ranks(
        *flat, fraction, ranks, shared, keep_one_in=keep_one_in, keep_scores=keep_scores, places=places, threshold=threshold
    )
    return kept.view(scores.shape)


def _selection_options(scored: Scored) -> SelectionOptions:
    """What the selector asks of the budget."""
    call, stats = scored.call, scored.stats
    with torch.no_grad(), nullcontext() if call.ranks is None else over_ranks(call.ranks):
        options = selection_options(call.selector, stats if is_own(call.selector) else stats.clone())
    if options["keep_scores"] is not None:
        check_scores(options["keep_scores"], call.shape, stats.valid.device)
    if call.scope == "sequence":  # in a sequence the smaller place is the earlier position, on any rank
        options["places"] = None
    return options


def _with_whole_rows(
    call: Call, rows: Tensor, kept: Tensor | None, selected: Tensor, stats: TokenStats
) -> tuple[Tensor, Tensor | None, Tensor, TokenStats]:
    """The selected rows scored again from both models, less those whose divergence turns out to be infinite.

    Statistics from the rollout do not hold the divergence. Infinite rows are no longer `kept` where the backend drops what is
    not; elsewhere they leave the list, at the price of a host synchronisation.
    """
    with torch.no_grad():
        exact = whole_stats_of(call, rows)
        finite = is_finite(exact, call.divergence)
        stats = stats.replaced(selected, exact)
        if call.backend.drops_weightless_rows:
            return rows, finite if kept is None else kept & finite, selected, stats
        return rows[finite], None, selected.masked_scatter(selected, finite), stats


def _rows_of(selected: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """The selected positions; in a graph as many as may be selected at most, and which of those are selected (None: all).

    Their number depends on the data (NaN or infinite rows leave the budget unfilled), which no graph can hold, torch.compile's
    or CUDA's. There the list is filled up with other rows, whose losses become 0: a weight at which the gradient is exactly
    zero too.
    """
    flat = selected.flatten()
    is_fixed = call.given is None and call.scope == "batch" and call.backend.drops_weightless_rows
    if call.settings.threshold is not None or not is_fixed or not is_in_graph(flat.device):
        return flat.nonzero().squeeze(1), None
    most = most_selected(len(flat), call.settings.fraction)
    if getattr(call.selector, "keep_one_per_sequence", False):  # on top of the budget
        most += call.positions.n_sequences
    rows = torch.sort(flat.to(torch.uint8), descending=True, stable=True).indices[:most]
    return rows, flat[rows]


def is_in_graph(device: torch.device) -> bool:
    """Whether the call becomes a graph, torch.compile's or CUDA's."""
    return is_traced() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


_warned_of: set[str] = set()  # Python's own memory of warnings is lost whenever somebody catches some


def warn_of_infinite(infinite: Tensor, among: Tensor, kind: str, divergence: str) -> None:
    """Once a process and divergence: where most positions are infinite, little or nothing is learned."""
    if divergence in _warned_of:
        return
    n_infinite, n_all = torch.stack((infinite.sum(), among.sum())).tolist()
    if 2 * n_infinite > n_all:
        _warned_of.add(divergence)
        warn_user(
            f"divergence: {divergence!r} is infinite at {n_infinite} of {n_all} {kind} positions, which are not trained on, "
            "because one model masks ids that the other can write; mask the same ids in both, or use 'jsd', which is finite"
        )
