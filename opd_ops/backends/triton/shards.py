"""The Triton backend where ranks share out the vocabulary: kernels on each rank's part, with the normalisers of the whole.

  score     score.py and support.py on the part; parts joined (shared/joined.py)
  loss      of reverse and forward KL: the selected rows' normalisers joined to more digits, then the gradient kernels with
            them in the place of the part's own; others by torch's own operations on the same device (streamed/loss.py)

What gradient kernels read of a row is a reference, the log-normaliser relative to it, and the gap: any reference near the
log-sum-exp will do, so it is the log-sum-exp itself as a stored logit, rounded to fp32.
Not here: parts joined (shared/joined.py), kernels' launches (dense.py, heads.py, heads_loss.py).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from opd_kernels.score import COLUMNS, Score
from opd_kernels.support import Support
from torch import Tensor

from opd_ops.backends.interface import is_computed
from opd_ops.backends.shared import joined as shards
from opd_ops.backends.shared.first_order import first_order
from opd_ops.backends.shared.joined import Part
from opd_ops.backends.shared.overwritten import unchanged
from opd_ops.backends.streamed.backend import STREAMED
from opd_ops.backends.streamed.summed import with_jsd
from opd_ops.backends.triton import dense, heads, heads_loss
from opd_ops.backends.triton.kernel_loss import logsumexp, multiplier
from opd_ops.backends.triton.launches import top_k_lists
from opd_ops.backends.triton.tiles import Side
from opd_ops.divergences import Divergence, is_column, weighted_sum, without_infinite
from opd_ops.inputs.sources import Shard, Source, Transform
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.selection.stats import SWEPT_COLUMNS, OwnStats, TokenStats


def token_stats(
    student: Source,
    teacher: Source,
    shard: Shard,
    rows: Tensor,
    *,
    top_k: int,
    columns: frozenset[str],
    workspace_bytes: int,
    score_dtype: torch.dtype | None,
    dtype: torch.dtype = torch.float32,
) -> TokenStats:
    """All statistics of the given positions over the whole vocabulary, (n,) each."""
    read = partial(_part, student.detach(), teacher.detach(), score_dtype)
    options: dict[str, Any] = {"top_k": top_k, "workspace_bytes": workspace_bytes, "dtype": dtype}
    stats = shards.token_stats(read, shard, rows, columns=columns, **options)
    return with_jsd(stats, student, teacher, rows, workspace_bytes) if "jsd" in columns else stats


def _part(
    student: Source, teacher: Source, score_dtype: torch.dtype | None, rows: Tensor, top_k: int, workspace_bytes: int
) -> Part:
    """What this rank's part of the vocabulary says of the rows."""
    found: list[tuple[Score, Support]] = []
    if is_computed(student, teacher):
        none: frozenset[str] = frozenset()
        heads.launch_columns(student, teacher, rows, top_k, none, workspace_bytes, score_dtype, keep=found.append)
    else:
        stored = student.leading, teacher.leading
        width, temperature = student.transform.vocab_size, student.transform.temperature
        dense.launch_and_keep(*stored, rows, top_k, "", workspace_bytes, width, temperature, keep=found.append)
    columns = {name: torch.cat([getattr(score, name) for score, _ in found]) for name in SWEPT_COLUMNS}
    for name, source, of in (("student_logsumexp", student, "s"), ("teacher_logsumexp", teacher, "t")):
        normalisers = (torch.cat([getattr(score, f"{of}_{part}") for score, _ in found]) for part in ("ref", "log2z"))
        columns[name] = logsumexp(_stored(source), *normalisers)
    lists = Support(torch.cat([x.ids for _, x in found]), torch.cat([x.logits for _, x in found]), found[0][1].columns)
    return Part(columns, *top_k_lists(lists, student.transform.first_id))


def own_stats(
    source: Source, shard: Shard, rows: Tensor, *, top_k: int, workspace_bytes: int, score_dtype: torch.dtype | None
) -> OwnStats:
    """One model's statistics at the rows over the whole vocabulary."""

    def read() -> OwnStats:
        options: dict[str, Any] = {"workspace_bytes": workspace_bytes, "score_dtype": score_dtype}
        mine = heads.own_stats(source, rows, top_k=min(top_k, shard.width), **options)
        return mine._replace(ids=mine.ids + shard.first)

    return shards.own_stats(read, shard, rows, top_k=top_k, workspace_bytes=workspace_bytes, dtype=torch.float32)


def selected_loss(
    student: Source,
    teacher: Source | TeacherLists,
    shard: Shard,
    rows: Tensor,
    weights: Tensor,
    stats: TokenStats,
    *,
    divergence: Divergence,
    tokens: Tensor | None,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the divergence over the positions, connected to this rank's part of the student, and its terms."""
    options: dict[str, Any] = {"divergence": divergence, "tokens": tokens, "workspace_bytes": workspace_bytes}
    if divergence.whole is None or not isinstance(teacher, Source):
        return STREAMED.selected_loss(student, teacher, rows, weights, stats, inplace=False, **options)
    with torch.no_grad():  # to more digits than `stats`, which may be of 16-bit logits
        score: dict[str, Any] = {"top_k": 1, "columns": frozenset(), "workspace_bytes": workspace_bytes}
        exact = token_stats(student, teacher, shard, rows, score_dtype=torch.float32, dtype=torch.float64, **score)
    if not is_column(divergence):
        known = {name: x if name == "valid" else x.float() for name, x in exact._asdict().items() if x is not None}
        exact = TokenStats(**known)
        return STREAMED.selected_loss(student, teacher, rows, weights, exact, inplace=False, **options)
    columns = _columns(student, teacher, exact)
    if is_computed(student, teacher):
        return heads_loss.selected_loss(student, teacher, rows, weights, columns=columns, **options)
    losses = columns[COLUMNS.index(divergence.whole.name)]
    settings = divergence.whole.name, workspace_bytes, student.transform.vocab_size, student.transform.temperature
    connected: Tensor = _SelectedDivergence.apply(settings, rows, losses, columns, student.leading, teacher.leading.detach())
    connected = unchanged(connected, rows, student, teacher, workspace_bytes=workspace_bytes)
    return weighted_sum(connected, without_infinite(losses, weights)), losses


def _columns(student: Source, teacher: Source, exact: TokenStats) -> Tensor:
    """(12, M) fp32, the columns of score.py over the whole vocabulary, from fp64 statistics."""
    bits = 1 / math.log(2)
    found = {name: getattr(exact, name) for name in SWEPT_COLUMNS}
    scaled = []
    for of, source, lse in (("s", student, exact.student_logsumexp), ("t", teacher, exact.teacher_logsumexp)):
        k = multiplier(_stored(source))
        reference = (lse * bits / k).float()
        found[f"{of}_ref"], found[f"{of}_log2z"] = reference, lse * bits - k * reference.double()
        scaled.append(k * reference.double())
    # The gap in bits, less what the references account for.
    found["log2z_gap"] = exact.logsumexp_gap * bits - (scaled[0] - scaled[1])
    return torch.stack([found[name].float() for name in COLUMNS])


def _stored(source: Source) -> Transform:
    """What the logits that kernels read still have to go through."""
    return Side(source, torch.empty(0, dtype=torch.long), 1).transform


class _SelectedDivergence(torch.autograd.Function):
    """(M,) losses of dense logits, whose gradient is made in the backward from this rank's part and the columns."""

    @staticmethod
    def forward(
        ctx: Any, options: tuple[Any, ...], rows: Tensor, losses: Tensor, columns: Tensor, student: Tensor, teacher: Tensor
    ) -> Tensor:
        ctx.options = options
        ctx.save_for_backward(student, teacher, rows, columns)
        return losses.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, rows, columns = ctx.saved_tensors
        if not student.shape[-1]:
            return None, None, None, None, torch.zeros_like(student), None
        gradient = dense.launch_gradient(student, teacher, rows, dlosses, *ctx.options, columns=columns)
        return None, None, None, None, gradient, None
