"""Losses of dense logits in autograd, connected to the student's logits.

  a divergence that is a column of the statistics   its gradient kernel runs in the backward, from the inputs alone
  any other that has kernels                        is computed in the forward, with the few numbers a row that its gradient
                                                    needs (kernel_loss.py), and these are saved

Nothing of size V is saved. The backward scores the M selected rows again (M / N of the score pass) for the normalisers that
the gradient needs to more digits than TokenStats keeps; so it depends on nothing but its inputs, and a forward without a
backward pays nothing for it.
Not here: the launches (dense.py), heads (heads_loss.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd_ops.backends.shared.chunks import chunks
from opd_ops.backends.shared.first_order import first_order
from opd_ops.backends.shared.overwritten import unchanged
from opd_ops.backends.triton.dense import launch_gradient, tables_of
from opd_ops.backends.triton.kernel_loss import Found, KernelLoss
from opd_ops.backends.triton.launches import on_device, rows_within
from opd_ops.backends.triton.workspace import score_bytes
from opd_ops.divergences import Divergence, weighted_sum, without_infinite
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import TeacherLists


class ColumnDivergence(torch.autograd.Function):
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


class _ComputedDivergence(torch.autograd.Function):
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
        layout, tables = tables_of(student, teacher)
        out, gradient = layout.zeros(student)
        with on_device(out.device):
            ctx.loss.gradient(*tables, layout.rows(rows), dlosses.contiguous(), Found(*found), out=out)
        return (None,) * 3 + (gradient, None) + (None,) * len(found)


def computed_loss(
    student: Source,
    teacher: Source | TeacherLists,
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
    layout, tables = tables_of(student.leading, beside)
    places = layout.rows(rows)
    losses, found = [], []
    per_row = score_bytes(student.transform.vocab_size) + loss.list_bytes
    with torch.no_grad(), on_device(rows.device):
        for part in chunks(len(rows), rows_within(per_row, workspace_bytes)) if len(rows) else [slice(0, 0)]:
            of_part = None if listed is None else listed.take(part)
            of_tokens = None if tokens is None else tokens[part]
            first = loss.first(*tables, places[part], tokens=of_tokens, listed=of_part)
            losses.append(first[0])
            found.append(first[1])
    joined, kept = torch.cat(losses), Found.joined(found)
    if divergence.whole is None:  # the gradient does not read the teacher
        beside, kept = None, kept._replace(columns=None)
    connected: Tensor = _ComputedDivergence.apply(loss, joined, rows, student.leading, beside, *kept)
    read_again = (student, teacher) if beside is not None and isinstance(teacher, Source) else (student,)
    connected = unchanged(connected, rows, *read_again, workspace_bytes=workspace_bytes)
    return weighted_sum(connected, without_infinite(joined, weights)), joined
