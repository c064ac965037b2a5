"""The second stage of a call: statistics and scores of its positions, without a graph.

  scores = selector(statistics)                                                        arXiv 2605.26844 eq. 12

Not here: computing statistics (backends/), selectors (selection/selectors.py), the choice of positions (choose.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_ops.arguments import may_look, number_in
from opd_ops.backends.ensembles import with_normalisers
from opd_ops.backends.interface import Placed
from opd_ops.backends.shared import two_lists
from opd_ops.backends.shared.candidates import ier
from opd_ops.backends.shared.token_logprobs import sampled_logits, token_logprobs, tokens_at
from opd_ops.call.prepare import Call
from opd_ops.divergences import Divergence
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.selection.normalisers import over_ranks
from opd_ops.selection.selectors import Released, is_deterministic, is_own, own_name
from opd_ops.selection.stats import TOKEN_COLUMNS, SampledLogits, Scoring, TokenStats, all_set, is_finite


@dataclass(frozen=True)
class Scored:
    """A call with the scores and statistics of its positions; (...) is the positions' shape."""

    call: Call
    scores: Tensor  # (...) -inf where not valid, or where the divergence is known to be infinite
    stats: TokenStats  # columns (...)
    infinite: Tensor  # (...) bool: valid positions whose divergence is known to be +inf
    placed: Placed | None = None  # where kernels made `stats`; its scores are `scores`
    keep_scores: Tensor | None = None  # (...) the selector's, where they were computed with its scores


def score(call: Call) -> Scored:
    """Score every valid position, and masked positions of the responses if the selector needs them."""
    with torch.no_grad():  # no decorator: torch.compile cannot trace a function that is passed to it with a decorator
        places = _response_places(call)
        scored_mask = call.unmasked if call.unmasked is None or places is None else places > 0
        # With a mask the CPU waits for the device: the length of the list of rows depends on the mask.
        rows = None if scored_mask is None else scored_mask.flatten().nonzero().squeeze(1)
        if isinstance(call.teacher, Source) and call.teacher.others:
            teacher = with_normalisers(call.backend, call.teacher, _every_row(call, rows), call.workspace)
            call = replace(call, teacher=teacher)
        scoring = _with_sampled(call, rows, call.scoring)
        placed = _placed(call, rows, places, scoring)
        if placed is not None:
            scored = _scored_placed(call, placed)
        else:
            stats = stats_of(call, _every_row(call, rows), scoring).spread(rows, call.shape)
            if places is not None:
                valid = stats.valid if call.unmasked is None else stats.valid & call.unmasked
                stats = stats._replace(valid=valid, response_place=places)
            scored = _scored(call, stats)
    if call.settings.check_finite and not call.settings.in_float8:
        _check_finite(scored)
    return scored


def _every_row(call: Call, rows: Tensor | None) -> Tensor:
    """(n,) numbers of flattened positions: `rows`; None: all."""
    return torch.arange(call.shape.numel(), device=call.student.leading.device) if rows is None else rows


def _placed(call: Call, rows: Tensor | None, places: Tensor | None, scoring: Scoring) -> Placed | None:
    """Statistics of all positions, and maybe scores, by kernels; None where the backend has none for this call."""
    is_plain = call.ranks is None and call.student_stats is None and not call.settings.in_float8
    if not is_plain or not isinstance(call.teacher, Source) or (places is not None and call.needs & TOKEN_COLUMNS):
        return None
    placed = call.backend.placed_stats(
        call.student,
        call.teacher,
        rows,
        scoring,
        unmasked=None if places is None else call.unmasked,
        selector=own_name(call.selector) if _is_fitted_by_kernels(call) else None,
        loss=call.divergence.infinite_column,
    )
    if placed is None:
        return None
    stats = placed.stats._replace(response_place=places)
    if call.needs & TOKEN_COLUMNS:
        logsumexps = {name: getattr(stats, f"{name}_logsumexp").flatten() for name in ("student", "teacher")}
        if rows is not None:
            logsumexps = {name: column[rows] for name, column in logsumexps.items()}
        columns = _token_columns(call, _every_row(call, rows), logsumexps, scoring.sampled)
        values = torch.stack(list(columns.values()))
        if rows is not None:
            values = values.new_zeros((len(columns), call.shape.numel())).index_copy_(1, rows, values)
        every = values.view(-1, *call.shape).masked_fill_(~stats.valid, 0)
        stats = stats._replace(**dict(zip(columns, every.unbind(), strict=True)))
    return placed._replace(stats=stats)


def _with_sampled(call: Call, rows: Tensor | None, scoring: Scoring) -> Scoring:
    """The scoring, with all that the backend's score pass needs for the column "ier", if that pass can make it."""
    is_plain = "ier" in call.needs and call.student_stats is None and not call.settings.in_float8
    if not is_plain or not isinstance(call.teacher, Source) or not call.backend.makes_ier(call.student):
        return scoring
    every_row = _every_row(call, rows)
    tokens = tokens_at(call.positions.tokens, call.student, call.teacher, every_row)
    at_tokens = sampled_logits(call.student, call.teacher, every_row, tokens, call.workspace)
    return scoring._replace(columns=scoring.columns | {"ier"}, sampled=at_tokens)


def _is_fitted_by_kernels(call: Call) -> bool:
    """Whether kernels fit a normaliser as the selector does. They fit to all rows that are scored, masked ones too."""
    return "response_place" not in call.needs or isinstance(call.selector, Released)


def _scored_placed(call: Call, placed: Placed) -> Scored:
    """The call with statistics that kernels placed, and with their scores, where they have the selector."""
    if _is_fitted_by_kernels(call) and call.backend.scores_by_kernels(own_name(call.selector)):
        return Scored(call, placed.scores, placed.stats, placed.infinite, placed, placed.keep_scores)
    scored = _scored(call, placed.stats, placed.infinite)
    return replace(scored, placed=placed._replace(scores=scored.scores))


def score_again(scored: Scored, shortlist: Tensor) -> Scored:
    """Score the (...) bool shortlist of a first ranking in 8 bits again, from fp32 logits; other positions score -inf."""
    call, stats = scored.call, scored.stats
    with torch.no_grad():
        exact = stats_of(call, shortlist.flatten().nonzero().squeeze(1), call.scoring._replace(score_dtype=torch.float32))
        scored = _scored(call, stats.replaced(shortlist, exact))
        scored = replace(scored, scores=torch.where(shortlist, scored.scores, -torch.inf))
    if call.settings.check_finite:
        _check_finite(scored)
    return scored


def whole_stats_of(call: Call, rows: Tensor) -> TokenStats:
    """Statistics of the rows from both models' fp32 logits, without the rollout's; no columns of the sampled token."""
    scoring = call.scoring._replace(score_dtype=torch.float32)
    return _row_stats(replace(call, batch=call.batch._replace(student_stats=None)), rows, scoring)


def stats_of(call: Call, rows: Tensor, scoring: Scoring) -> TokenStats:
    """(n,) columns at the rows."""
    stats = _row_stats(call, rows, scoring)
    if call.needs & TOKEN_COLUMNS:
        logsumexps = {"student": stats.student_logsumexp, "teacher": stats.teacher_logsumexp}
        if call.student_stats is not None and "student_logprob" in call.needs:  # those of the rollout are of an older student
            own = call.backend.own_stats(call.student.detach(), rows, Scoring(1, call.workspace, scoring.score_dtype))
            logsumexps["student"] = own.logsumexp.to(stats.student_logsumexp.dtype)
        stats = stats._replace(**_token_columns(call, rows, logsumexps, scoring.sampled))
    return stats


def _row_stats(call: Call, rows: Tensor, scoring: Scoring) -> TokenStats:
    """`stats_of` without the columns of the sampled token."""
    student, teacher = call.student, call.teacher
    if call.student_stats is not None or isinstance(teacher, TeacherLists):
        stats = two_lists.token_stats(call.backend, student, teacher, rows, call.student_stats, scoring)
    else:
        stats = call.backend.token_stats(student, teacher, rows, scoring)
    if isinstance(teacher, Source) and not all_set(stats.valid):  # a non-finite teacher must not hide a non-finite student
        stats = stats._replace(valid=stats.valid >= is_finite(stats.student_logsumexp))  # valid or not finite
    return stats


def _token_columns(
    call: Call, rows: Tensor, logsumexps: Mapping[str, Tensor], known: SampledLogits | None = None
) -> dict[str, Tensor]:
    """(n,) columns of the sampled tokens at the rows that are asked for. `known`: of the rows, where scoring made "ier"."""
    columns: dict[str, Tensor] = {}
    if known is not None:
        names = [f"{name}_logprob" for name in logsumexps]
        both = (known.logits - torch.stack(list(logsumexps.values()))).clamp_max_(0)
        return dict(zip(names, both.unbind(), strict=True))
    tokens = tokens_at(call.positions.tokens, call.student, call.teacher, rows)
    for name, side in (("student", call.student), ("teacher", call.teacher)):  # in one order on all ranks
        if f"{name}_logprob" in call.needs:
            # A log-sum-exp of 16-bit logits may be below the token's own logit.
            logprobs = token_logprobs(side, rows, tokens, logsumexps[name], call.workspace)
            columns[f"{name}_logprob"] = logprobs.clamp_max(0)
    if "ier" in call.needs:
        in_pair = columns["student_logprob"], columns["teacher_logprob"]
        dtype = torch.float32 if call.settings.in_float8 else call.score_dtype
        scoring = Scoring(call.settings.top_k, call.workspace, dtype)
        columns["ier"] = ier(call.backend, call.student, call.teacher, rows, call.student_stats, tokens, in_pair, scoring)
    return columns


def is_infinite(stats: TokenStats, divergence: Divergence) -> Tensor:
    """Bool: where the divergence is known to be +inf."""
    if divergence.infinite_column is None:
        return torch.zeros_like(stats.valid)
    column: Tensor = getattr(stats, divergence.infinite_column)
    return column == torch.inf


def _response_places(call: Call) -> Tensor | None:
    """The column `response_place`, if the selector needs it; whole responses are then scored."""
    if "response_place" not in call.needs:
        return None
    return call.positions.response_places(call.ranks if call.scope == "sequence" else None)


def _scored(call: Call, stats: TokenStats, infinite: Tensor | None = None) -> Scored:
    """`infinite`: as in `Scored`; None: it is computed."""
    # A user's selector may change its argument in place: the losses must not see that.
    selector_stats = stats if is_own(call.selector) else stats.clone()
    keep_scores = None
    if isinstance(call.selector, Released) and call.ranks is None:
        scores, keep_scores = call.selector.both_scores(stats)
    else:
        with nullcontext() if call.ranks is None else over_ranks(call.ranks):
            scores = call.selector(selector_stats)
    check_scores(scores, call.shape, stats.valid.device)
    if not (is_own(call.selector) or call.reads_whole_rows) and call.ranks is None:
        check_known(scores, stats.valid, stats, "selector")
    infinite = stats.valid & is_infinite(stats, call.divergence) if infinite is None else infinite
    shard = call.student.transform.shard
    if shard is not None and not is_deterministic(call.selector):  # all ranks take the scores that the first rank drew
        scores = shard.ranks.first(scores.clone(memory_format=torch.contiguous_format))
    excluded = stats.valid <= infinite  # not valid or infinite
    scores = scores.to(stats.reverse_kl.dtype).masked_fill(excluded, -torch.inf)
    return Scored(call, scores, stats, infinite, keep_scores=keep_scores)


def check_scores(scores: object, shape: torch.Size, device: torch.device, argument: str = "selector") -> None:
    """Check the scores that a selector returned, or the weights of a weighting: `argument`."""
    expected = f"expected a tensor of {'scores' if argument == 'selector' else 'weights'} of shape {tuple(shape)}"
    if not isinstance(scores, Tensor):
        hint = f"; it reads a column that is not computed: name it in the {argument}'s `needs`" if scores is None else ""
        raise ValueError(f"{argument}: returned {type(scores).__name__}, {expected}{hint}")
    if scores.shape != shape:
        raise ValueError(f"{argument}: returned {tuple(scores.shape)}, {expected}")
    if scores.layout != torch.strided:
        raise ValueError(f"{argument}: returned a tensor of layout {scores.layout}, {expected}")
    if scores.device != device or scores.is_complex():
        raise ValueError(f"{argument}: returned {scores.dtype} scores on {scores.device}, expected real ones on {device}")


def check_known(values: Tensor, among: Tensor, stats: TokenStats, argument: str) -> None:
    """Refuse scores or weights that are NaN because the rule reads a column that the call does not know; a CPU sees them."""
    if may_look(values) and number_in((values.isnan() & among & is_finite(stats.student_logsumexp)).any()):
        place = "selected" if argument == "weighting" else "valid"
        raise ValueError(
            f"{argument}: returned NaN at a {place} position, expected numbers. With student_stats and with lists of a teacher "
            "reverse_kl and forward_kl are NaN, with lists teacher_entropy too: read other statistics, or pass both models' "
            "logits or heads. Where there is no score, return -inf"
        )


def _check_finite(scored: Scored) -> None:
    """Refuse valid positions without a finite softmax. All ranks that select together raise, so that none waits."""
    call, stats = scored.call, scored.stats
    unmasked = torch.ones_like(stats.valid) if call.unmasked is None else call.unmasked
    blown_up = stats.valid & ~torch.isfinite(stats.student_logsumexp)
    nonfinite = {"student": blown_up, "teacher": unmasked & ~stats.valid}
    counts = torch.stack([bad.sum() for bad in nonfinite.values()])
    if call.ranks is not None:
        counts = call.ranks.sum(counts)
    for (name, bad), n in zip(nonfinite.items(), counts.tolist(), strict=True):
        if n and not bad.any():
            raise ValueError(f"{name}: got {n} positions without a finite softmax on other ranks (check_finite=True)")
        if n:
            first = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"{name}: got logits without a finite softmax at position {first} ({int(bad.sum())} such positions), "
                "expected none at a valid position (check_finite=True)"
            )
