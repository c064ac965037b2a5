"""The Triton backend, `backend="triton"`: statistics and gradients from opd_kernels; here for dense logits.

  score + support kernels  -> the columns of TokenStats; both models' logits are read once
  gradient kernel          -> d loss / d logits on the selected rows, every other row zero
  (statistics and gradients are those of selection/stats.py and divergences/)

Nothing of size V is saved. The backward scores the M selected rows again (M / N of the score pass) for the normalisers that
the gradient needs to more digits than TokenStats keeps; so it depends on nothing but its inputs, and a forward without a
backward pays nothing for it. The reported loss is the score pass's own column. A divergence that is no column of it is found
in the forward, with the few numbers a row that its gradient needs (kernel_loss.py), and these are saved.
With `inplace` the gradient is written over the student's logits: no second tensor of their size.
Logits are read where they lie, in any leading layout (layout.py). Where ranks share out the vocabulary, each runs the kernels
on its part (shards.py).

Not here: heads (heads.py, heads_loss.py), what launches share (launches.py), the kernels (opd_kernels), the
same launches as operators for torch.compile (operators.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from opd_kernels.argmax import argmax_fwd
from opd_kernels.score import Score, score_fwd
from opd_kernels.support import Support
from torch import Tensor

from opd_ops.backends.interface import has_kernel, is_computed
from opd_ops.backends.shared.first_order import first_order
from opd_ops.backends.shared.overwritten import unchanged
from opd_ops.backends.streamed import backend as streamed
from opd_ops.backends.triton import heads as triton_heads
from opd_ops.backends.triton import heads_loss as triton_heads_loss
from opd_ops.backends.triton import kernel_loss
from opd_ops.backends.triton.kernel_loss import GRADIENTS, Found, KernelLoss
from opd_ops.backends.triton.launches import column_names, launch_options, on_device, parse_columns, parts, write_columns
from opd_ops.backends.triton.layout import Layout
from opd_ops.backends.triton.workspace import score_bytes
from opd_ops.divergences import DIVERGENCES, Divergence, weighted_sum, without_infinite
from opd_ops.inputs.sources import Source, Transform
from opd_ops.inputs.teacher_lists import Listed
from opd_ops.selection.stats import OwnStats, TokenStats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TOP_K = 128


def refusal(student: Source, teacher: Source | Listed, *, divergence: Divergence, top_k: int) -> str | None:
    """Why this backend cannot run the call and what to do instead, or None."""
    sides = [("student", student)] + ([("teacher", teacher)] if isinstance(teacher, Source) else [])
    for name, source in sides:
        for tensor in source.tensors[:2]:
            if tensor.dtype not in DTYPES:
                return f"{name} has dtype {tensor.dtype}, expected fp32, bf16 or fp16; 'torch' and 'eager' take it"
        if source.weight is not None and source.weight.dtype != source.leading.dtype:
            return (
                f"{name} has hidden states of {source.leading.dtype} and a weight of {source.weight.dtype}, expected one "
                "dtype; pass hidden.to(weight.dtype) or weight.to(hidden.dtype), or use 'torch'"
            )
        if source.transform.merged:
            return f"{name} has merged ids (eos_ids), which kernels do not read; use 'torch'"
    if torch.compiler.is_compiling() and not (has_kernel(divergence) and isinstance(teacher, Source)):
        return f"divergence is {divergence.name!r}, which torch.compile cannot trace here; call it outside of the graph"
    if top_k > MAX_TOP_K:
        return f"top_k is {top_k}, expected at most {MAX_TOP_K}; use 'torch'"
    if is_computed(*(source for _, source in sides)):
        return None
    layouts = []
    if not student.transform.vocab_size:  # a rank without a part of the vocabulary reads nothing
        return None
    for name, source in sides:
        layout = Layout.of(source.leading)
        if layout is None:
            return (
                f"{name} has strides {source.leading.stride()}, expected stride 1 along the vocabulary and no memory shared "
                "between positions; pass .contiguous() logits, or use 'torch'"
            )
        layouts.append(layout)
    if layouts[0].steps != layouts[-1].steps:
        return (
            f"student and teacher lay their positions out differently (strides {sides[0][1].leading.stride()} and "
            f"{sides[-1][1].leading.stride()}); pass .contiguous() logits on both sides, or use 'torch'"
        )
    return None


def token_stats(
    student: Source,
    teacher: Source,
    rows: Tensor,
    *,
    top_k: int,
    columns: frozenset[str],
    workspace_bytes: int,
    score_dtype: torch.dtype | None,
) -> TokenStats:
    """All statistics of the given positions, (n,) each."""
    with torch.no_grad():  # no decorator: torch.compile cannot trace a decorated function of a module it is handed
        shard = student.transform.shard
        if shard is not None:
            from opd_ops.backends.triton import shards as triton_shards

            options: dict[str, Any] = {"top_k": top_k, "columns": columns, "workspace_bytes": workspace_bytes}
            return triton_shards.token_stats(student, teacher, shard, rows, score_dtype=score_dtype, **options)
        if is_computed(student, teacher):
            table = _head_columns(student.detach(), teacher.detach(), rows, top_k, columns, workspace_bytes, score_dtype)
        else:
            launch = launch_columns
            if torch.compiler.is_compiling():
                from opd_ops.backends.triton.operators import token_columns as launch
            vocab, temperature = student.transform.vocab_size, student.transform.temperature
            tensors = student.leading.detach(), teacher.leading.detach(), rows
            table = launch(*tensors, top_k, ",".join(sorted(columns)), workspace_bytes, vocab, temperature)
        out = dict(zip(column_names(columns), table.unbind(0), strict=True))
        return TokenStats(valid=torch.isfinite(out["teacher_logsumexp"]), **out)


def _head_columns(
    student: Source,
    teacher: Source,
    rows: Tensor,
    top_k: int,
    columns: frozenset[str],
    workspace_bytes: int,
    score_dtype: torch.dtype | None,
) -> Tensor:
    if not torch.compiler.is_compiling():
        return triton_heads.launch_columns(student, teacher, rows, top_k, columns, workspace_bytes, score_dtype)
    from opd_ops.backends.triton.operators import head_arguments, head_columns

    optional = ",".join(sorted(columns))
    table: Tensor = head_columns(*head_arguments(student, teacher), rows, top_k, optional, workspace_bytes, score_dtype)
    return table


def own_stats(source: Source, rows: Tensor, *, top_k: int, workspace_bytes: int, score_dtype: torch.dtype | None) -> OwnStats:
    """One model's statistics at the rows, from its logits alone."""
    options: dict[str, Any] = {"top_k": top_k, "workspace_bytes": workspace_bytes, "score_dtype": score_dtype}
    if source.transform.shard is None:
        return triton_heads.own_stats(source, rows, **options)
    from opd_ops.backends.triton import shards as triton_shards

    return triton_shards.own_stats(source, source.transform.shard, rows, **options)


def _dense(vocab_size: int, temperature: float) -> tuple[Transform, Transform]:
    transform = Transform(False, vocab_size, temperature)
    return transform, transform


def launch_columns(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    top_k: int,
    optional: str,
    workspace_bytes: int,
    vocab_size: int,
    temperature: float,
) -> Tensor:
    """(columns, n) statistics of the given positions, in the order of `column_names`; `optional` ones are named "a,b"."""
    return launch_and_keep(student, teacher, rows, top_k, optional, workspace_bytes, vocab_size, temperature)


def launch_and_keep(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    top_k: int,
    optional: str,
    workspace_bytes: int,
    vocab_size: int,
    temperature: float,
    *,
    keep: Callable[[tuple[Score, Support]], None] | None = None,
) -> Tensor:
    """`launch_columns`; `keep` is given what the kernels found of consecutive rows."""
    layout, tables = _tables(student, teacher)
    places, columns = layout.rows(rows), parse_columns(optional)
    share = workspace_bytes // 2 if columns else workspace_bytes  # the other half is the optional columns' scratch
    out = torch.empty((len(column_names(columns)), len(rows)), dtype=torch.float32, device=rows.device)
    with on_device(rows.device):
        for part in parts(len(rows), score_bytes(vocab_size, top_k), share):
            found = write_columns(
                out[:, part],
                tables,
                places[part],
                _dense(vocab_size, temperature),
                columns=columns,
                top_k=top_k,
                workspace_bytes=share,
            )
            if keep is not None:
                keep(found)
    return out


def _tables(student: Tensor, teacher: Tensor | None) -> tuple[Layout, tuple[Tensor, Any]]:
    layout = Layout.of(student)
    assert layout is not None
    if teacher is None:
        return layout, (layout.table(student.detach()), None)
    other = Layout.of(teacher)
    assert other is not None
    return layout, (layout.table(student.detach()), other.table(teacher.detach()))


def launch_gradient(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    weights: Tensor,
    kind: str,
    workspace_bytes: int,
    vocab_size: int,
    temperature: float,
    *,
    inplace: bool = False,
    columns: Tensor | None = None,
) -> Tensor:
    """The gradient of the losses weighted, of the student's shape: a new tensor, or the student itself.

    `columns`: score.py's of the rows, (12, M), where these are not those of the logits alone.
    """
    layout, tables = _tables(student, teacher)
    out, gradient = (tables[0], student.detach()) if inplace else layout.zeros(student)
    places, weights = layout.rows(rows), weights.contiguous()
    options = launch_options(*_dense(vocab_size, temperature))
    with on_device(out.device):
        for part in parts(len(places), score_bytes(vocab_size), workspace_bytes):
            if columns is None:
                score = score_fwd(*tables, places[part], **options)
                of_part, top = score.columns, argmax_fwd(tables[0], places[part], score, vocab_size=vocab_size)
            else:  # of a part of a shared vocabulary, whose other entries are not here
                of_part, top = columns[:, part].contiguous(), None
            GRADIENTS[type(DIVERGENCES[kind])](*tables, places[part], weights[part], of_part, top=top, out=out, **options)
    if inplace:
        # By index: a mask would have all rows read and written. A stable sort finds the others without a synchronisation.
        selected = torch.zeros(layout.shape.numel(), dtype=torch.bool, device=rows.device).index_fill(0, rows, True)
        others = selected.to(torch.uint8).argsort(stable=True)[: len(selected) - len(rows)]
        # Also tells autograd of the write: whoever else saved these logits for a backward to come gets an error.
        tables[0].index_fill_(0, layout.rows(others), 0.0)
    return gradient


class _SelectedDivergence(torch.autograd.Function):
    """(M,) losses whose gradient with respect to the student's logits is computed in the backward, from the inputs."""

    @staticmethod
    def forward(
        ctx: Any, inplace: bool, options: tuple[Any, ...], rows: Tensor, losses: Tensor, student: Tensor, teacher: Tensor
    ) -> Tensor:
        ctx.inplace, ctx.options, ctx.spent = inplace, options, False
        ctx.save_for_backward(student, teacher, rows)
        return losses.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "inplace_backward: the backward ran a second time, but the first one overwrote the student's logits with "
                "their gradient; pass inplace_backward=False to use retain_graph=True"
            )
        student, teacher, rows = ctx.saved_tensors
        kind, workspace_bytes, vocab_size, temperature = ctx.options
        gradient = launch_gradient(
            student, teacher, rows, dlosses, kind, workspace_bytes, vocab_size, temperature, inplace=ctx.inplace
        )
        ctx.spent = ctx.inplace
        return None, None, None, None, gradient, None


def selected_loss(
    student: Source,
    teacher: Source | Listed,
    rows: Tensor,
    weights: Tensor,
    stats: TokenStats,
    *,
    divergence: Divergence,
    tokens: Tensor | None,
    workspace_bytes: int,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the divergence over the selected positions, connected to the student's tensors, and its (M,) terms.

    `stats` are the selected positions' own, as `token_stats` computed them from the same tensors.
    """
    options: dict[str, Any] = {"divergence": divergence, "tokens": tokens, "workspace_bytes": workspace_bytes}
    if student.transform.shard is not None:
        from opd_ops.backends.triton import shards as triton_shards

        return triton_shards.selected_loss(student, teacher, student.transform.shard, rows, weights, stats, **options)
    if kernel_loss.refusal(divergence):  # the same on the same device, by torch's own operations
        if divergence.whole is not None and isinstance(teacher, Source):  # to more digits than a score in 16 bits has
            score: dict[str, Any] = {"top_k": 1, "columns": frozenset(), "score_dtype": None}
            stats = streamed.token_stats(student, teacher, rows, workspace_bytes=workspace_bytes, **score)
        return streamed.selected_loss(student, teacher, rows, weights, stats, inplace=False, **options)
    if is_computed(student, teacher):
        assert not inplace
        return triton_heads_loss.selected_loss(student, teacher, rows, weights, **options)
    if not isinstance(teacher, Source) or not has_kernel(divergence):
        assert not inplace
        return _found_loss(student, teacher, rows, weights, **options)
    assert divergence.whole is not None
    kind = divergence.whole.name
    settings = kind, workspace_bytes, student.transform.vocab_size, student.transform.temperature
    logits, losses = (student.leading, teacher.leading.detach()), getattr(stats, kind)
    connected: Tensor
    if torch.compiler.is_compiling():
        from opd_ops.backends.triton.operators import selected_losses

        connected = selected_losses(*logits, rows, losses, *settings)
    else:
        connected = _SelectedDivergence.apply(inplace, settings, rows, losses, *logits)
        connected = unchanged(connected, rows, student, teacher, workspace_bytes=workspace_bytes)
    return weighted_sum(connected, weights), losses


class _FoundDivergence(torch.autograd.Function):
    """(M,) losses whose gradient is made in the backward from the logits and what the forward found of each row."""

    @staticmethod
    def forward(
        ctx: Any, loss: KernelLoss, losses: Tensor, rows: Tensor, student: Tensor, teacher: Tensor | None, *found: Tensor
    ) -> Tensor:
        ctx.loss = loss
        ctx.save_for_backward(rows, student, teacher, *found)
        return losses.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        rows, student, teacher, *found = ctx.saved_tensors
        layout, tables = _tables(student, teacher)
        out, gradient = layout.zeros(student)
        with on_device(out.device):
            ctx.loss.gradient(*tables, layout.rows(rows), dlosses.contiguous(), Found(*found), out=out)
        return (None,) * 3 + (gradient, None) + (None,) * len(found)


def _found_loss(
    student: Source,
    teacher: Source | Listed,
    rows: Tensor,
    weights: Tensor,
    *,
    divergence: Divergence,
    tokens: Tensor | None,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Of dense logits, for divergences whose value is no column of the statistics."""
    beside = teacher.leading.detach() if isinstance(teacher, Source) else None
    listed = None if isinstance(teacher, Source) else teacher.take(rows)
    loss = KernelLoss(divergence, student.transform, teacher.transform if isinstance(teacher, Source) else None)
    layout, tables = _tables(student.leading, beside)
    places = layout.rows(rows)
    losses, found = [], []
    per_row = score_bytes(student.transform.vocab_size) + loss.list_bytes
    with torch.no_grad(), on_device(rows.device):
        for part in parts(len(rows), per_row, workspace_bytes) if len(rows) else [slice(0, 0)]:
            of_part = None if listed is None else listed.take(part)
            of_tokens = None if tokens is None else tokens[part]
            first = loss.first(*tables, places[part], tokens=of_tokens, listed=of_part)
            losses.append(first[0])
            found.append(first[1])
    joined, kept = torch.cat(losses), Found.joined(found)
    if divergence.whole is None:  # the gradient does not read the teacher
        beside, kept = None, kept._replace(columns=None)
    connected: Tensor = _FoundDivergence.apply(loss, joined, rows, student.leading, beside, *kept)
    read_again = (student, teacher) if beside is not None and isinstance(teacher, Source) else (student,)
    connected = unchanged(connected, rows, *read_again, workspace_bytes=workspace_bytes)
    return weighted_sum(connected, without_infinite(joined, weights)), joined
