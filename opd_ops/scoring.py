# The two halves of the loss on their own: statistics to scores, scores to selected positions.
#
#   scores = selector(statistics);  selected = the budget's best                 arXiv 2605.26844 eqs. 12, 13
#
# For users who bring their own loss; `selective_opd_loss` (loss.py) is made of the same functions.
# Not here: selectors (selectors.py), budget and ties (selection.py), how statistics are computed (backends/).
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops import checks
from opd_ops.backends import Backend, check_backend, resolve_backend
from opd_ops.divergences import Divergence, resolve_divergence
from opd_ops.inputs import LinearHead
from opd_ops.selection import select, sequence_ids
from opd_ops.selectors import Selector, resolve_selector
from opd_ops.sources import Source
from opd_ops.stats import OPTIONAL_COLUMNS, TokenStats

DEFAULT_WORKSPACE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Scoring:
    """A checked call, up to the scores: what `score_positions` and `selective_opd_loss` share."""

    student: Source
    teacher: Source
    given: Tensor | None  # bool mask of the positions' shape; None: all
    selector: Selector
    divergence: Divergence
    top_k: int
    backend: Backend
    workspace_bytes: int
    check_finite: bool

    @property
    def shape(self) -> torch.Size:
        return self.student.leading.shape[:-1]

    def run(self) -> tuple[Tensor, TokenStats]:
        """Scores and statistics, both of the positions' shape, without a graph."""
        with torch.no_grad():  # no decorator: torch.compile cannot trace a decorated method
            return self._run()

    def _run(self) -> tuple[Tensor, TokenStats]:
        device = self.student.leading.device
        everything = torch.arange(self.shape.numel(), device=device)
        # One of the two host synchronisations of a call: the list of valid rows has a length.
        rows = everything if self.given is None else self.given.flatten().nonzero().squeeze(1)
        needs = frozenset(getattr(self.selector, "needs", ())) & OPTIONAL_COLUMNS
        stats = self.backend.token_stats(
            self.student, self.teacher, rows, top_k=self.top_k, columns=needs, workspace_bytes=self.workspace_bytes
        ).spread(None if self.given is None else rows, self.shape)
        if self.check_finite:
            self._refuse_nonfinite(stats)
        scores = self.selector(stats)
        if not isinstance(scores, Tensor) or scores.shape != self.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"selector: returned {got}, expected a tensor of scores of shape {tuple(self.shape)}")
        trainable = stats.valid & (getattr(stats, self.divergence.column) != torch.inf)
        return torch.where(trainable, scores.to(stats.reverse_kl.dtype), -torch.inf), stats

    def _refuse_nonfinite(self, stats: TokenStats) -> None:
        given = torch.ones_like(stats.valid) if self.given is None else self.given
        blown_up = stats.valid & ~torch.isfinite(stats.student_logsumexp)
        for name, bad in (("student", blown_up), ("teacher", given & ~stats.valid)):
            if bad.any():
                first = tuple(bad.nonzero()[0].tolist())
                raise ValueError(
                    f"{name}: got logits without a finite softmax at position {first} ({int(bad.sum())} such positions), "
                    "expected none at a valid position (check_finite=True)"
                )


def prepare(
    student: object,
    teacher: object,
    *,
    mask: Tensor | None,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    selector: str | Selector,
    divergence: str | Divergence,
    top_k: int,
    temperature: float,
    cu_seqlens: Tensor | None,
    vocab_size: int | None,
    process_group: object,
    generator: torch.Generator | None,
    backend: str,
    workspace_bytes: int,
    check_finite: bool,
    inplace_backward: bool = False,
) -> Scoring:
    """Check all that scoring depends on; raises before any work."""
    check_backend(backend)
    found_divergence = resolve_divergence(divergence)
    sources = checks.check_sources(student, teacher, vocab_size, temperature, process_group)
    shape, device = sources[0].leading.shape[:-1], sources[0].leading.device
    checks.check_top_k(top_k, sources[0].transform.vocab_size)
    checks.check_integer("workspace_bytes", workspace_bytes, least=1)
    checks.check_cu_seqlens(cu_seqlens, shape)
    ids = sequence_ids(shape, cu_seqlens, device).view(shape)
    valid = checks.valid_positions(shape, device, mask, labels, shift_labels, ignore_index, None if cu_seqlens is None else ids)
    checks.check_generator(generator)
    found_backend = resolve_backend(backend, *sources, divergence=found_divergence, top_k=top_k, inplace=inplace_backward)
    found_selector = resolve_selector(selector, generator=generator, sequence_ids=ids)
    return Scoring(*sources, valid, found_selector, found_divergence, top_k, found_backend, workspace_bytes, bool(check_finite))


def score_positions(
    student: Tensor | LinearHead,
    teacher: Tensor | LinearHead,
    *,
    mask: Tensor | None = None,
    selector: str | Selector = "teachability",
    divergence: str | Divergence = "reverse_kl",
    top_k: int = 16,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    vocab_size: int | None = None,
    process_group: object = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    check_finite: bool = False,
) -> tuple[Tensor, TokenStats]:
    """How much each position is worth training on, without a graph: the first half of `selective_opd_loss`.

    Arguments are those of `selective_opd_loss`. `divergence` is the loss that will be applied: a position where it is
    infinite scores -inf, so that it is never selected; `stats` keep the true value.

    Returns: `scores` (...) fp32, -inf where not valid; `stats`, `TokenStats` of the same shape.
    """
    return prepare(
        student,
        teacher,
        mask=mask,
        selector=selector,
        divergence=divergence,
        top_k=top_k,
        temperature=temperature,
        cu_seqlens=cu_seqlens,
        vocab_size=vocab_size,
        process_group=process_group,
        generator=generator,
        backend=backend,
        workspace_bytes=workspace_bytes,
        check_finite=check_finite,
    ).run()


@torch.no_grad()
def select_positions(
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    fraction: float = 0.05,
    scope: str = "batch",
    cu_seqlens: Tensor | None = None,
    keep_one_per_sequence: bool = False,
) -> Tensor:
    """The best-scored share of the valid positions: the second half of `selective_opd_loss`.

    n = max(1, ceil(fraction * n_valid)) positions of the batch, or of each sequence (arXiv 2605.26844 eq. 13, arXiv
    2604.14084 eq. 8). Equal scores go to the earlier position; a score of -inf or NaN is never selected.

    Args:
        scores: (...) floating point.
        mask: (...), any dtype, non-zero = valid; None = all.
        fraction: rho in (0, 1], exact as written: 0.1 of 30 is 3.
        scope: "batch": one budget; "sequence": one per sequence, that is per row of the last dimension or per span of
            `cu_seqlens` (n_sequences + 1,) over the flattened positions.
        keep_one_per_sequence: Add the best position of every sequence that the budget left without one.
    Returns: `selected` (...) bool.
    Raises: ValueError, TypeError: an argument that does not fit, by name.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores: got {got}, expected a floating-point tensor")
    checks.check_fraction(fraction)
    checks.check_choice("scope", scope, checks.SCOPES)
    checks.check_cu_seqlens(cu_seqlens, scores.shape)
    valid = checks.valid_positions(scores.shape, scores.device, mask)
    flat = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    ids = sequence_ids(scores.shape, cu_seqlens, scores.device)
    return select(
        scores.flatten(),
        flat.flatten(),
        fraction,
        ids if scope == "sequence" else None,
        keep_one_in=ids if keep_one_per_sequence else None,
    ).view(scores.shape)
