"""The third stage of a call: its budget or threshold selects positions, as a mask and as the rows that a backend reads.

A budget of one process is cut by the backend's kernels, if it has them (`Backend.choose`); all else by selection/budget.py.

  M = the best-scored of the valid positions;  l_t, t in M, the divergence       arXiv 2605.26844 eqs. 6, 13

Not here: scores (score.py), budgets and ties (selection/budget.py), losses of the selected positions (losses.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops.arguments import warn_user
from opd_ops.backends.interface import Choice, Cut, Placed
from opd_ops.call.prepare import Call
from opd_ops.call.score import Scored, check_known, check_scores, is_infinite, whole_stats_of
from opd_ops.distributed.ranks import Ranks
from opd_ops.inputs.sequences import numbered_sequences
from opd_ops.selection.budget import Budget, SelectionOptions, select, select_over_ranks
from opd_ops.selection.normalisers import over_ranks
from opd_ops.selection.selectors import is_own, selection_options
from opd_ops.selection.stats import TokenStats
from opd_ops.selection.weighting import with_mean_one


@dataclass(frozen=True)
class Chosen:
    """A scored call with its selected positions; (...) is the positions' shape, (M,) a list of positions."""

    call: Call
    rows: Tensor  # (M,) int64 numbers of flattened positions
    trained: Tensor | None  # (M,) bool: which rows are trained on, before losses are known; None: all
    selected: Tensor  # (...) bool
    scores: Tensor  # (...)
    stats: TokenStats  # columns (...)
    infinite: Tensor  # (...) bool: valid positions whose divergence is known to be +inf
    placed: Placed | None = None  # where kernels made `stats`
    weights: Tensor | None = None  # (...) the weighting's factors of the losses, detached; None: no weighting
    counts: tuple[int, int] | None = None  # of selected and valid positions, where the CPU knows them

    @property
    def is_summed_by_kernels(self) -> bool:
        """Whether a kernel takes the sums of the mean loss, so that `Backend.totals` may run."""
        by_response = self.call.settings.denominator == "sequence"
        return self.placed is not None and self.counts is not None and not self.call.divergence.reads_tokens and not by_response


def shortlist(scored: Scored) -> Tensor:
    """(...) bool: the best positions of a first ranking in 8 bits, twice the budget. They are scored again."""
    return _selected(scored, scored.call.settings.shortlist_budget, _selection_options(scored))


def choose(scored: Scored) -> Chosen:
    """Select positions by the call's budget or threshold."""
    call, stats, counts = scored.call, scored.stats, None
    options = _selection_options(scored)
    choice = _chosen_by_kernels(scored, options)
    if choice is None:
        selected = _selected(scored, call.settings.budget, options)
        rows, trained = _rows_of(selected, call)
        if not call.in_graph:  # the CPU has just waited for the device, to list the rows
            n_valid, n_infinite = _counts(stats.valid, scored.infinite)
            counts = len(rows), n_valid
    else:
        selected, rows, trained = choice.selected.view(call.shape), choice.rows, None
        if call.in_graph:
            trained = choice.selected[rows]
        else:  # the CPU waits for the device
            n_selected, n_valid, n_infinite = choice.counts.tolist()
            rows, counts = rows[:n_selected], (n_selected, n_valid)
    if counts is not None:
        warn_of_infinite_counts(n_infinite, n_valid, "valid", call.divergence.name)
    weights = _weights(scored, selected)
    scores_again = call.backend.scores_selected_rows(call.student, call.teacher) and call.divergence.whole is not None
    if call.student_stats is not None and call.divergence.reads_whole_rows and not scores_again:
        rows, trained, selected, stats = _with_whole_rows(call, rows, trained, selected, stats)
        infinite = stats.valid & is_infinite(stats, call.divergence)
        return Chosen(call, rows, trained, selected, scored.scores, stats, infinite, weights=weights)
    return Chosen(call, rows, trained, selected, scored.scores, stats, scored.infinite, scored.placed, weights, counts)


def _weights(scored: Scored, selected: Tensor) -> Tensor | None:
    """(...) factors of the losses from the call's weighting, without a graph; None: it has none."""
    call, stats = scored.call, scored.stats
    share = call.settings.weighting_share
    if call.weighting is None or share == 0:
        return None
    with torch.no_grad(), nullcontext() if call.ranks is None else over_ranks(call.ranks):
        weights = call.weighting(stats.clone())  # a user's weighting may change its argument in place
        check_scores(weights, call.shape, stats.valid.device, "weighting")
        weights = weights.to(stats.reverse_kl.dtype) if weights.dtype == torch.bool else weights
        if not call.reads_whole_rows and call.ranks is None:
            check_known(weights, selected, stats, "weighting")
        shard, kind = call.student.transform.shard, call.settings.weight_mean
        if shard is not None:  # to the bit the same on all ranks, whatever the callable does
            weights = shard.ranks.first(weights.clone(memory_format=torch.contiguous_format))
        if kind is not None:
            among = selected if kind == "selected" else stats.valid
            ids, n, ranks = torch.zeros_like(among, dtype=torch.long).flatten(), 1, call.ranks
            if kind == "sequence":
                ids, n = numbered_sequences(call.shape, call.batch.cu_seqlens, stats.valid.device)
                ranks = ranks if call.scope == "sequence" else None
            weights = with_mean_one(weights.flatten(), among.flatten(), ids, n, ranks).view(call.shape)
        return weights if share == 1 else 1 + share * (weights - 1)


def _chosen_by_kernels(scored: Scored, options: SelectionOptions) -> Choice | None:
    """The selected positions, where the backend's kernels can select them: by a budget, on this process alone."""
    call, budget = scored.call, scored.call.settings.budget
    if call.ranks is not None or budget.threshold is not None or options["both_ends"]:
        return None
    if call.in_graph and not _has_fixed_list(call):
        return None
    n, length, bounds, keep_scores = call.shape.numel(), None, None, None
    n_rows, n_sequences = budget.most(n), call.positions.n_sequences
    if call.scope == "sequence":  # a budget selects one of each sequence at least, so that it leaves none to keep
        n_rows = n_rows + n_sequences if budget.count is None else n_rows * n_sequences
    elif options["keep_one_per_sequence"]:
        n_rows += n_sequences
        keep_scores = scored.scores if options["keep_scores"] is None else options["keep_scores"]
    if call.scope == "sequence" or keep_scores is not None:
        bounds = call.batch.cu_seqlens
        if bounds is None:
            length = call.shape[-1] if len(call.shape) else 1
        else:
            bounds = bounds.to(scored.scores.device)
    with torch.no_grad():
        cut = Cut(budget, min(n, n_rows), length, bounds, options["places"], keep_scores)
        return call.backend.choose(scored.scores, scored.stats.valid, scored.infinite, cut)


def _selected(scored: Scored, budget: Budget, options: SelectionOptions) -> Tensor:
    """(...) bool: the best-scored share of the valid positions."""
    call = scored.call
    with torch.no_grad():
        return select_in_scope(
            scored.scores,
            scored.stats.valid,
            budget,
            scope=call.scope,
            sequences=call.positions.sequences,
            ranks=call.ranks,
            cu_seqlens=call.batch.cu_seqlens,
            options=options,
        )


def select_in_scope(
    scores: Tensor,
    valid: Tensor,
    budget: Budget,
    *,
    scope: str,
    sequences: Callable[[], Tensor],
    ranks: Ranks | None,
    cu_seqlens: Tensor | None,
    options: SelectionOptions,
) -> Tensor:
    """(...) bool: the best-scored share of the valid positions of this process, or of all `ranks` together.

    Args:
        scores, valid: (...) of the positions' shape.
        scores: -inf where not valid.
        sequences: Computes the sequence number of each position.
    """
    flat = scores.flatten(), valid.flatten()
    is_sequence, keeps_one = scope == "sequence", options["keep_one_per_sequence"]
    ids = sequences().flatten() if keeps_one or (is_sequence and ranks is None) else None
    keep_one_in = ids if keeps_one else None
    keep_scores, places = (None if x is None else x.flatten() for x in (options["keep_scores"], options["places"]))
    both_ends = options["both_ends"]
    if ranks is None:
        ids = ids if is_sequence else None
        selected = select(
            *flat, budget, ids, keep_one_in=keep_one_in, keep_scores=keep_scores, places=places, both_ends=both_ends
        )
        return selected.view(scores.shape)
    numbered = numbered_sequences(scores.shape, cu_seqlens, scores.device) if is_sequence else None
    selected = select_over_ranks(
        *flat, budget, ranks, numbered, keep_one_in=keep_one_in, keep_scores=keep_scores, places=places, both_ends=both_ends
    )
    return selected.view(scores.shape)


def _selection_options(scored: Scored) -> SelectionOptions:
    """The options that the selector sets for the selection."""
    call, stats = scored.call, scored.stats
    with torch.no_grad(), nullcontext() if call.ranks is None else over_ranks(call.ranks):
        is_read = hasattr(call.selector, "keep_scores") and not is_own(call.selector)  # a user's may change its argument
        options = selection_options(call.selector, stats.clone() if is_read else stats, scored.keep_scores)
    if options["keep_scores"] is not None:
        check_scores(options["keep_scores"], call.shape, stats.valid.device)
    if call.scope == "sequence":  # in one sequence the smaller place is the earlier position anyway, also over ranks
        options["places"] = None
    return options


def _with_whole_rows(
    call: Call, rows: Tensor, trained: Tensor | None, selected: Tensor, stats: TokenStats
) -> tuple[Tensor, Tensor | None, Tensor, TokenStats]:
    """Score the selected rows again from both models, and drop rows with an infinite divergence.

    Statistics from the rollout do not hold the divergence. A backend that drops rows of weight 0 gets all rows, with `trained`
    False at infinite ones. For other backends infinite rows leave the list, and the CPU waits for the device.
    """
    with torch.no_grad():
        exact = whole_stats_of(call, rows)
        finite = ~is_infinite(exact, call.divergence)
        stats = stats.replaced(selected, exact)
        if call.backend.drops_weightless_rows:
            return rows, finite if trained is None else trained & finite, selected, stats
        return rows[finite], None, selected.masked_scatter(selected, finite), stats


def _rows_of(selected: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """The rows of the selected positions, and which of these rows are selected (None: all).

    The number of selected positions depends on the data: NaN or infinite rows leave the budget unfilled. A graph of
    torch.compile or CUDA cannot hold such a number. In a graph the list has a fixed length, the number of positions that can be
    selected at most. Other rows fill it up, with weight 0: their losses and gradients are exactly zero.
    """
    flat = selected.flatten()
    if call.settings.threshold is not None or not _has_fixed_list(call) or not call.in_graph:
        return flat.nonzero().squeeze(1), None
    n_rows = call.settings.budget.most(len(flat))
    if getattr(call.selector, "keep_one_per_sequence", False):  # these positions come on top of the budget
        n_rows += call.positions.n_sequences
    rows = torch.sort(flat.to(torch.uint8), descending=True, stable=True).indices[:n_rows]
    return rows, flat[rows]


def _has_fixed_list(call: Call) -> bool:
    return call.unmasked is None and call.scope == "batch" and call.backend.drops_weightless_rows


_warned_of: set[str] = set()  # Python forgets which warnings it has shown when code catches warnings


def warn_of_infinite(infinite: Tensor, among: Tensor, kind: str, divergence: str) -> None:
    """`warn_of_infinite_counts`, of two tensors of bools."""
    n_infinite, n_all = _counts(infinite, among)
    warn_of_infinite_counts(n_infinite, n_all, kind, divergence)


def _counts(*flags: Tensor) -> list[int]:
    """How many flags of each tensor are set. The CPU waits for the device."""
    counts: list[int] = torch.stack(flags).view(len(flags), -1).sum(1).tolist()
    return counts


def warn_of_infinite_counts(n_infinite: int, n_all: int, kind: str, divergence: str) -> None:
    """Warn once per process and divergence: if more than half of the positions are infinite, little or nothing is learned."""
    if 2 * n_infinite > n_all and divergence not in _warned_of:
        _warned_of.add(divergence)
        warn_user(
            f"divergence: {divergence!r} is infinite at {n_infinite} of {n_all} {kind} positions, which are not trained on, "
            "because one model masks ids that the other can write; mask the same ids in both, or use 'jsd', which is finite"
        )
