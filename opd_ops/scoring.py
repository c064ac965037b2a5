"""The two halves of the loss on their own: statistics to scores, scores to selected positions.

  scores = selector(statistics);  selected = the budget's best                 arXiv 2605.26844 eqs. 12, 13

For users who bring their own loss; `selective_opd_loss` (loss.py) is made of the same functions.
Not here: selectors (selection/selectors.py), budget and ties (selection/budget.py), how statistics are computed (backends/).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_ops.arguments import check_ids, check_integer, check_layout
from opd_ops.backends.interface import Backend, Needs, check_backend, drops_weightless_rows, resolve_backend
from opd_ops.backends.shared import two_lists
from opd_ops.backends.shared.logits_at import logits_at
from opd_ops.call import checks
from opd_ops.distributed.ranks import Ranks
from opd_ops.divergences import Divergence, ReverseKL, SampledToken, TailAware, resolve_divergence
from opd_ops.inputs import float8
from opd_ops.inputs.linear_head import LinearHead
from opd_ops.inputs.pair import check_sources
from opd_ops.inputs.positions import Positions, of_positions, positions
from opd_ops.inputs.rollout import StudentStats
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import Listed, SampledLogprobs, SparseTeacher, TopKLogprobs
from opd_ops.selection.budget import numbered_sequences, select, select_over_ranks, sequence_ids
from opd_ops.selection.selectors import (
    Selector,
    check_known,
    check_ranks_twice,
    check_whole_sequences,
    is_deterministic,
    is_own,
    over_ranks,
    resolve_selector,
    selection_options,
)
from opd_ops.selection.stats import BACKEND_COLUMNS, TokenStats

DEFAULT_WORKSPACE_BYTES = 512 * 2**20
SCORE_DTYPES = {"float32": torch.float32, "float8": float8.DTYPE}


@dataclass(frozen=True)
class Scoring:
    """A checked call, up to the scores: what `score_positions` and `selective_opd_loss` share."""

    student: Source
    teacher: Source | Listed
    positions: Positions
    known: StudentStats | None  # the student's statistics, from the rollout
    selector: Selector
    divergence: Divergence
    top_k: int
    backend: Backend
    workspace_bytes: int
    score_dtype: torch.dtype | None
    check_finite: bool
    scope: str
    ranks: Ranks | None  # which processes select together; None: this one alone

    @property
    def shape(self) -> torch.Size:
        return self.student.leading.shape[:-1]

    @property
    def given(self) -> Tensor | None:
        """Bool mask of the positions' shape; None: all."""
        return self.positions.valid

    @property
    def sides(self) -> tuple[Source, Source | Listed]:
        return self.student, self.teacher

    def sampled(self, rows: Tensor) -> Tensor:
        """(M,) the token that each row predicts; merged ids as their first."""
        if isinstance(self.teacher, Listed):
            return self.teacher.ids[rows, 0]
        assert self.positions.tokens is not None
        tokens, merged = self.positions.tokens.flatten()[rows].long(), self.student.transform.merged
        for x in merged[1:]:
            tokens = tokens.masked_fill(tokens == x, merged[0])
        return tokens

    def log_ratio(self, rows: Tensor, tokens: Tensor, stats: TokenStats) -> Tensor:
        """(M,) log p(y) - log q(y) of the tokens y."""
        ids, found = tokens.unsqueeze(1), []
        for source, lse in ((self.student, stats.student_logsumexp), (self.teacher, stats.teacher_logsumexp)):
            if isinstance(source, Listed):
                found.append(source.logprobs[rows, 0])
            else:
                logits = logits_at(source.detach(), rows, ids, stats.student_logsumexp.dtype, self.workspace_bytes)
                found.append(logits.squeeze(1) - lse.flatten()[rows])
        return found[0] - found[1]

    def run(self, shortlist: Callable[[Tensor, TokenStats], Tensor] | None = None) -> tuple[Tensor, TokenStats]:
        """Scores and statistics, both of the positions' shape, without a graph.

        `shortlist`: which positions to score again exactly, of a first ranking in 8 bits; all others then score -inf.
        """
        with torch.no_grad():  # no decorator: torch.compile cannot trace a decorated method
            # A host synchronisation, if there is a mask: the list of valid rows has a length.
            everything = torch.arange(self.shape.numel(), device=self.student.leading.device)
            places = self._response_places()
            read = self.given if self.given is None or places is None else places > 0
            rows = everything if read is None else read.flatten().nonzero().squeeze(1)
            stats = self._stats(rows).spread(None if read is None else rows, self.shape)
            if places is not None:
                valid = stats.valid if self.given is None else stats.valid & self.given
                stats = stats._replace(valid=valid, response_place=places)
            if self.score_dtype == float8.DTYPE and shortlist is not None:
                best = shortlist(self._scores(stats), stats)
                exact = self._exactly()._stats(best.flatten().nonzero().squeeze(1))
                stats = stats.replaced(best, exact)
                scores = torch.where(best, self._scores(stats), -torch.inf)
            else:
                scores = self._scores(stats)
            if self.check_finite:
                self._refuse_nonfinite(stats)
            return scores, stats

    def selection_options(self, stats: TokenStats) -> dict[str, Any]:
        """Of `select_positions`, as the selector asks for them."""
        with torch.no_grad(), nullcontext() if self.ranks is None else over_ranks(self.ranks):
            found = selection_options(self.selector, stats if is_own(self.selector) else stats.clone())
        if found["keep_scores"] is not None:
            checks.check_scores(found["keep_scores"], self.shape, stats.valid.device)
        if self.scope == "sequence":  # in a sequence the smaller place is the earlier position, on any rank
            found["places"] = None
        return found

    def _response_places(self) -> Tensor | None:
        """The column, if the selector asks for it: then whole responses are scored."""
        if "response_place" not in getattr(self.selector, "needs", ()):
            return None
        return self.positions.response_places(self.ranks if self.scope == "sequence" else None)

    def _exactly(self) -> Scoring:
        """The same call with fp32 logits."""
        return replace(self, score_dtype=torch.float32)

    def with_whole_rows(
        self, rows: Tensor, kept: Tensor | None, selected: Tensor, stats: TokenStats
    ) -> tuple[Tensor, Tensor | None, Tensor, TokenStats]:
        """The selected rows scored again from both models, less those whose divergence turns out to be infinite.

        Statistics from the rollout do not hold the divergence. Infinite rows are no longer `kept` where the backend drops what
        is not; elsewhere they leave the list, at the price of a host synchronisation.
        """
        with torch.no_grad():
            exact = replace(self._exactly(), known=None)._stats(rows)
            is_finite = finite(exact, self.divergence)
            stats = stats.replaced(selected, exact)
            if drops_weightless_rows(self.backend):
                return rows, is_finite if kept is None else kept & is_finite, selected, stats
            return rows[is_finite], None, selected.masked_scatter(selected, is_finite), stats

    def _stats(self, rows: Tensor) -> TokenStats:
        stats = self._of_backend(rows)
        if isinstance(self.teacher, Source):  # a student that has blown up is not hidden by a teacher that has, too
            stats = stats._replace(valid=stats.valid | ~torch.isfinite(stats.student_logsumexp))
        return stats

    def _of_backend(self, rows: Tensor) -> TokenStats:
        student, teacher = self.student, self.teacher
        if self.score_dtype == float8.DTYPE:
            student = student if self.known else student.in_float8()
            teacher = teacher.in_float8() if isinstance(teacher, Source) else teacher
        needs = frozenset(getattr(self.selector, "needs", ())) & BACKEND_COLUMNS
        if self.known is not None or isinstance(teacher, Listed):
            return two_lists.token_stats(
                self.backend,
                student,
                teacher,
                rows,
                self.known,
                top_k=self.top_k,
                columns=needs,
                workspace_bytes=self.workspace_bytes,
                score_dtype=self.score_dtype,
            )
        return self.backend.token_stats(
            student,
            teacher,
            rows,
            top_k=self.top_k,
            columns=needs,
            workspace_bytes=self.workspace_bytes,
            score_dtype=self.score_dtype,
        )

    def _scores(self, stats: TokenStats) -> Tensor:
        # What a user's own selector does to its argument in place must not reach the losses.
        given = stats if is_own(self.selector) else stats.clone()
        with nullcontext() if self.ranks is None else over_ranks(self.ranks):
            scores = self.selector(given)
        checks.check_scores(scores, self.shape, stats.valid.device)
        trainable = stats.valid & finite(stats, self.divergence)
        shard = self.student.transform.shard
        if shard is not None and not is_deterministic(self.selector):  # what one rank drew counts for all
            scores = shard.ranks.first(scores.clone(memory_format=torch.contiguous_format))
        return torch.where(trainable, scores.to(stats.reverse_kl.dtype), -torch.inf)

    def _refuse_nonfinite(self, stats: TokenStats) -> None:
        given = torch.ones_like(stats.valid) if self.given is None else self.given
        blown_up = stats.valid & ~torch.isfinite(stats.student_logsumexp)
        nonfinite = {"student": blown_up, "teacher": given & ~stats.valid}
        everywhere = torch.stack([bad.sum() for bad in nonfinite.values()])
        if self.ranks is not None:  # so that all raise, and none waits for one that has
            everywhere = self.ranks.sum(everywhere)
        for (name, bad), n in zip(nonfinite.items(), everywhere.tolist(), strict=True):
            if n and not bad.any():
                raise ValueError(f"{name}: got {n} positions without a finite softmax on other ranks (check_finite=True)")
            if n:
                first = tuple(bad.nonzero()[0].tolist())
                raise ValueError(
                    f"{name}: got logits without a finite softmax at position {first} ({int(bad.sum())} such positions), "
                    "expected none at a valid position (check_finite=True)"
                )


def finite(stats: TokenStats, divergence: Divergence) -> Tensor:
    """Where the divergence is not known to be infinite, bool."""
    if divergence.whole is None or divergence.whole.column is None:
        return torch.ones_like(stats.valid)
    found: Tensor = getattr(stats, divergence.whole.column) != torch.inf
    return found


def prepare(
    student: object,
    teacher: object,
    *,
    mask: Tensor | None,
    weights: Tensor | None,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    tokens: Tensor | None,
    special_ids: Sequence[int],
    eos_ids: Sequence[int],
    selector: str | Selector,
    divergence: str | Divergence | None,
    top_k: int,
    temperature: float,
    cu_seqlens: Tensor | None,
    vocab_size: int | None,
    process_group: dist.ProcessGroup | None,
    generator: torch.Generator | None,
    backend: str,
    workspace_bytes: int,
    score_dtype: str | None,
    student_stats: StudentStats | None,
    check_finite: bool,
    scope: str | None = None,
    selection_group: dist.ProcessGroup | None,
    inplace_backward: bool = False,
) -> Scoring:
    """Check all that scoring depends on; raises before any work. `scope`: None where no selection follows."""
    check_backend(backend)
    top_k = check_integer("top_k", top_k, least=1)
    workspace_bytes = check_integer("workspace_bytes", workspace_bytes, least=1)
    special_ids, eos_ids = check_ids("special_ids", special_ids), check_ids("eos_ids", eos_ids)
    ranks = checks.check_selection_group(scope, selection_group)
    found_divergence = _scored_for(teacher) if divergence is None else resolve_divergence(divergence)
    sources = check_sources(
        student,
        teacher,
        found_divergence,
        vocab_size=vocab_size,
        temperature=temperature,
        eos_ids=eos_ids,
        process_group=process_group,
        top_k=top_k,
        workspace_bytes=workspace_bytes,
    )
    shape, device = sources[0].leading.shape[:-1], sources[0].leading.device
    shard = sources[0].transform.shard
    if shard is not None:
        checks.check_other_positions(scope, selection_group, shard.ranks.group)
    vocab = sources[0].transform.whole_vocab_size
    top_k = checks.check_top_k(top_k, vocab)
    checks.check_divergence_top_k(found_divergence, vocab)
    if score_dtype is not None:
        checks.check_choice("score_dtype", score_dtype, tuple(SCORE_DTYPES))
    checks.check_cu_seqlens(cu_seqlens, shape)
    found_positions = positions(
        shape,
        device,
        mask=mask,
        weights=weights,
        labels=labels,
        shift_labels=shift_labels,
        ignore_index=ignore_index,
        cu_seqlens=cu_seqlens,
        tokens=teacher.ids if tokens is None and isinstance(teacher, SampledLogprobs) else tokens,
        special_ids=special_ids,
        among=vocab if checks.reads_tokens(found_divergence) else None,
    )
    checks.check_generator(generator)
    found_dtype = None if score_dtype is None else SCORE_DTYPES[score_dtype]
    needs = Needs(divergence=found_divergence, top_k=top_k, inplace=inplace_backward, float8=found_dtype == float8.DTYPE)
    found_backend = resolve_backend(backend, *sources, needs)
    found_selector = resolve_selector(selector, generator=generator, sequence_ids=found_positions.sequences)
    if scope == "sequence" and ranks is not None:
        checks.check_parts_of_sequences(special_ids, labels if shift_labels is None else None)
        check_whole_sequences(found_selector)
    if found_dtype == float8.DTYPE:
        check_ranks_twice(found_selector)
    if student_stats is not None:
        if sources[0].transform.merged:
            raise ValueError("eos_ids: student_stats are of the ids apart; pass no student_stats")
        checks.check_student_stats(student_stats, sources[0], top_k, found_positions.valid)
        check_known(found_selector, "student_stats")
    if isinstance(sources[1], Listed):
        assert isinstance(teacher, (TopKLogprobs, SampledLogprobs))
        checks.check_lists(teacher, sources[1], found_positions.valid)
        check_known(found_selector, type(teacher).__name__)
    return Scoring(
        *sources,
        positions=found_positions,
        known=student_stats,
        selector=found_selector,
        divergence=found_divergence,
        top_k=top_k,
        backend=found_backend,
        workspace_bytes=workspace_bytes,
        score_dtype=found_dtype,
        check_finite=bool(check_finite),
        scope="batch" if scope is None or (scope == "global" and ranks is None) else scope,
        ranks=ranks,
    )


def _scored_for(teacher: object) -> Divergence:
    """A divergence that the teacher allows, for scores that no loss follows."""
    if isinstance(teacher, SampledLogprobs):
        return SampledToken()
    return TailAware(top_k=1) if isinstance(teacher, TopKLogprobs) else ReverseKL()


def score_positions(
    student: Tensor | LinearHead,
    teacher: Tensor | LinearHead | SparseTeacher,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    tokens: Tensor | None = None,
    special_ids: Sequence[int] = (),
    eos_ids: Sequence[int] = (),
    selector: str | Selector = "teachability",
    selection_group: dist.ProcessGroup | None = None,
    divergence: str | Divergence | None = None,
    top_k: int = 16,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    vocab_size: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    score_dtype: str | None = None,
    student_stats: StudentStats | None = None,
    check_finite: bool = False,
) -> tuple[Tensor, TokenStats]:
    """How much each position is worth training on, without a graph: the first half of `selective_opd_loss`.

    Arguments are those of `selective_opd_loss`. `divergence` is the loss that will be applied, None: "reverse_kl", or any that
    a sparse teacher allows. A position where it is known to be infinite scores -inf, so that it is never selected; `stats` keep
    the true value. With `score_dtype="float8"` all scores are those of the first ranking, in 8 bits; `selective_opd_loss`
    scores its shortlist again. With a `selection_group` selectors normalise over the positions of all its ranks, which must all
    call; "prefix", `special_ids` and "teachability-released" look at the sequences that this rank holds.
    torch.func's transforms are an error, but with backend "eager".

    Returns: `scores` (...) fp32, -inf where not valid; `stats`, `TokenStats` of the same shape.
    """
    checks.check_transforms(backend, has_vmap=True, has_gradient=True)
    return prepare(
        student,
        teacher,
        mask=mask,
        weights=weights,
        tokens=tokens,
        special_ids=special_ids,
        eos_ids=eos_ids,
        selector=selector,
        selection_group=selection_group,
        divergence=divergence,
        top_k=top_k,
        temperature=temperature,
        cu_seqlens=cu_seqlens,
        vocab_size=vocab_size,
        process_group=process_group,
        generator=generator,
        backend=backend,
        workspace_bytes=workspace_bytes,
        score_dtype=score_dtype,
        student_stats=student_stats,
        check_finite=check_finite,
    ).run()


@torch.no_grad()
def select_positions(
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    fraction: float = 0.05,
    scope: str = "batch",
    selection_group: dist.ProcessGroup | None = None,
    cu_seqlens: Tensor | None = None,
    keep_one_per_sequence: bool = False,
    keep_scores: Tensor | None = None,
    places: Tensor | None = None,
    threshold: Tensor | float | None = None,
) -> Tensor:
    """The best-scored share of the valid positions: the second half of `selective_opd_loss`.

    n = max(1, ceil(fraction * n_valid)) positions of the batch, or of each sequence (arXiv 2605.26844 eq. 13, arXiv
    2604.14084 eq. 8). Equal scores go to the earlier position; a score of -inf or NaN is never selected. What a selector asks
    for beside its scores, `selectors.selection_options(selector, stats)` gives as arguments of this function.

    Args:
        scores: (...) floating point.
        mask: (...), any dtype, non-zero = valid; None = all.
        fraction: rho in (0, 1], exact as written: 0.1 of 30 is 3.
        scope: "batch": one budget; "sequence": one per sequence, that is per row of the last dimension or per span of
            `cu_seqlens` (n_sequences + 1,) over the flattened positions; "global": one over the ranks of `selection_group`.
        selection_group: The processes that select together, as one would that holds their positions in the order of ranks: with
            "global" (None: all there are), or with "sequence" where each rank holds a part of every sequence, maybe an empty
            one; their number must agree. All ranks must call, also with no position.
        keep_one_per_sequence: Add the best position of every sequence that the budget left without one.
        keep_scores: (...) floating point: what is best there, of the positions with a score; None: the scores.
        places: (...) int64, below 2**24: equal scores go to the smaller place, across sequences, before the earlier position.
        threshold: In the place of a budget: keep the valid positions that score at least this, however many they are.
    Returns: `selected` (...) bool.
    Raises: ValueError, TypeError: an argument that does not fit, by name.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores: got {got}, expected a floating-point tensor")
    check_layout("scores", scores)
    fraction = checks.check_fraction(fraction)
    ranks = checks.check_selection_group(scope, selection_group)
    checks.check_cu_seqlens(cu_seqlens, scores.shape)
    threshold = checks.check_threshold(threshold)
    if keep_scores is not None and not keep_one_per_sequence:
        raise ValueError("keep_scores: got scores, but keep_one_per_sequence=False keeps nothing by them; pass True")
    if keep_scores is not None:
        of_positions("keep_scores", keep_scores, scores.shape, scores.device)
    if places is not None and of_positions("places", places, scores.shape, scores.device).dtype != torch.int64:
        raise TypeError(f"places: got dtype {places.dtype}, expected int64")
    ids = sequence_ids(scores.shape, cu_seqlens, scores.device)
    options: dict[str, Any] = {
        "keep_one_in": ids if keep_one_per_sequence else None,
        "keep_scores": None if keep_scores is None else keep_scores.flatten(),
        "places": None if places is None else places.flatten(),
        "threshold": threshold,
    }
    valid = positions(scores.shape, scores.device, mask=mask).valid
    flat = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    if ranks is not None:
        return select_over_ranks(
            scores.flatten(),
            flat.flatten(),
            fraction,
            ranks,
            numbered_sequences(scores.shape, cu_seqlens, scores.device) if scope == "sequence" else None,
            **options,
        ).view(scores.shape)
    return select(
        scores.flatten(),
        flat.flatten(),
        fraction,
        ids if scope == "sequence" else None,
        **options,
    ).view(scores.shape)
