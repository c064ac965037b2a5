"""Scoring and selection as functions, for users who bring their own loss.

  scores = selector(statistics);  selected = the best-scored positions of the budget       arXiv 2605.26844 eqs. 12, 13

Not here: the stages of a call (call/), selectors (selection/selectors.py), budget and ties (selection/budget.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from opd_ops.arguments import check_layout, per_position
from opd_ops.call.choose import select_in_scope
from opd_ops.call.prepare import check_transforms, divergence_of, prepare, selecting_ranks
from opd_ops.call.score import score
from opd_ops.inputs.batch import Batch
from opd_ops.inputs.ensembles import AnyTeacher
from opd_ops.inputs.linear_head import LinearHead
from opd_ops.inputs.rollout import StudentStats
from opd_ops.inputs.sequences import check_cu_seqlens, sequence_ids
from opd_ops.selection.stats import TokenStats
from opd_ops.settings import DEFAULTS, ScoringOptions, Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack


def score_positions(
    student: Tensor | LinearHead,
    teacher: AnyTeacher,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    tokens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    student_stats: StudentStats | None = None,
    **options: Unpack[ScoringOptions],
) -> tuple[Tensor, TokenStats]:
    """How much each position is worth training on, without a graph: the first half of `selective_opd_loss`.

    Arguments are the same as for `selective_opd_loss`; `options` are the settings that scores depend on. `divergence` is the
    loss that will be applied; by default "reverse_kl", or a divergence that a sparse teacher allows. A position with an
    infinite divergence scores -inf, so that it is never selected; `stats` keep the true value. With `score_dtype="float8"` all
    scores are from the first ranking, in 8 bits; `selective_opd_loss` scores its shortlist again. With a `selection_group`
    selectors normalise over the positions of all its ranks, and all its ranks must call. "prefix", `special_ids` and
    "teachability-released" use only the sequences of this rank. torch.func's transforms need backend "eager".

    Returns: `scores` (...) fp32, -inf where not valid; `stats`, `TokenStats` of the same shape.
    """
    settings = Settings.of({"divergence": divergence_of(teacher), **options}, of=ScoringOptions)
    check_transforms(settings.backend, has_vmap=True, has_gradient=True)
    batch = Batch(mask=mask, weights=weights, tokens=tokens, cu_seqlens=cu_seqlens, student_stats=student_stats)
    scored = score(prepare(student, teacher, batch, settings, selects=False))
    return scored.scores, scored.stats


@torch.no_grad()
def select_positions(
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    fraction: float = DEFAULTS.fraction,
    count: int | None = None,
    scope: str = DEFAULTS.scope,
    selection_group: dist.ProcessGroup | None = None,
    cu_seqlens: Tensor | None = None,
    keep_one_per_sequence: bool = False,
    keep_scores: Tensor | None = None,
    places: Tensor | None = None,
    both_ends: bool = False,
    threshold: Tensor | float | None = None,
) -> Tensor:
    """The best-scored share of the valid positions: the second half of `selective_opd_loss`.

    n = max(1, ceil(fraction * n_valid)) positions of the batch, or of each sequence (arXiv 2605.26844 eq. 13, arXiv
    2604.14084 eq. 8). Of equal scores the earlier position wins; a score of -inf or NaN is never selected. A selector may need
    `keep_one_per_sequence`, `keep_scores`, `places` and `both_ends`: `selectors.selection_options(selector, stats)` returns
    them.

    Args:
        scores: (...) floating point.
        mask: (...) any dtype, non-zero: valid; None: all.
        fraction: rho in (0, 1], exact as written: 0.1 of 30 is 3.
        count: Instead of a share: so many positions of each scope, or all where there are fewer.
        scope: "batch": one budget; "sequence": a budget per sequence, which is a row of the last dimension or a span of
            `cu_seqlens` (n_sequences + 1,) over the flattened positions; "global": one over the ranks of `selection_group`.
        selection_group: The ranks that select together, as one process with the positions of all ranks in rank order would.
            With "global" (None: all ranks), or with "sequence" if each rank holds a part of every sequence, maybe an empty
            part: all ranks must have the same number of sequences. All ranks must call, also ranks without a position.
        keep_one_per_sequence: A sequence without a selected position gets its best position.
        keep_scores: (...) floating point scores that define this best position; None: `scores`.
        places: (...) int64, below 2**24: of equal scores the smaller place wins, across sequences, then the earlier position.
        both_ends: Half of the budget, rounded up, takes the highest scores, the other half the lowest of the others.
        threshold: Select all valid positions that score at least this, without a budget.
    Returns: `selected` (...) bool.
    Raises: ValueError, TypeError: an argument that does not fit, by name.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores: got {got}, expected a floating-point tensor")
    check_layout("scores", scores)
    settings = Settings(fraction=fraction, count=count, threshold=threshold, scope=scope, selection_group=selection_group)
    check_cu_seqlens(cu_seqlens, scores.shape)
    if both_ends and threshold is not None:
        raise ValueError("threshold: got one with both_ends=True, which divides a budget; pass fraction or count")
    if keep_scores is not None and not keep_one_per_sequence:
        raise ValueError("keep_scores: got scores, but keep_one_per_sequence=False keeps nothing by them; pass True")
    if keep_scores is not None:
        per_position("keep_scores", keep_scores, scores.shape, scores.device)
    if places is not None and per_position("places", places, scores.shape, scores.device).dtype != torch.int64:
        raise TypeError(f"places: got dtype {places.dtype}, expected int64")
    valid = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        valid = per_position("mask", mask, scores.shape, scores.device) != 0
        scores = scores.masked_fill(~valid, -torch.inf)
    return select_in_scope(
        scores,
        valid,
        settings.budget,
        scope=scope,
        sequences=lambda: sequence_ids(scores.shape, cu_seqlens, scores.device),
        ranks=selecting_ranks(settings, selects=True),
        cu_seqlens=cu_seqlens,
        options={
            "keep_one_per_sequence": keep_one_per_sequence,
            "keep_scores": keep_scores,
            "places": places,
            "both_ends": both_ends,
        },
    )
