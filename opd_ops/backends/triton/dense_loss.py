"""Losses of dense logits in autograd, connected to the student's logits.

  reverse and forward KL   columns of the statistics; the gradient kernel runs in the backward and reads only the inputs
  other divergences        computed in the forward; `KernelConstants` (kernel_loss.py), a few numbers a row, are saved

Nothing of size V is saved. The backward of a KL scores the M selected rows again (M / N of the score pass): its gradient needs
the normalisers to more digits than TokenStats keeps. So this backward reads its inputs alone, and a forward without a backward
pays nothing for it.
Not here: the launches (dense.py), heads (heads_loss.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from opd_kernels.zero_rows import zero_rows
from torch import Tensor

from opd_ops.backends.interface import WeightedRows
from opd_ops.backends.shared.gradient_in_backward import GradientPlan, connected
from opd_ops.backends.shared.grids import score_bytes
from opd_ops.backends.shared.overwritten import unchanged
from opd_ops.backends.triton.dense import launch_gradient, table_of
from opd_ops.backends.triton.kernel_loss import KernelConstants, KernelLoss
from opd_ops.backends.triton.launches import on_device
from opd_ops.divergences import Divergence, WholeRow, weighted_sum, without_infinite
from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.sources import Source, Transform
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.inputs.workspace import Workspace


class _ColumnGradient(GradientPlan):
    """The gradient of reverse or forward KL, from the logits; `KernelConstants` follow them if the logits are a part."""

    def __init__(self, divergence: WholeRow, transform: Transform, workspace: Workspace, *, inplace: bool) -> None:
        self.divergence, self.transform, self.workspace, self.inplace = divergence, transform, workspace, inplace
        self.is_spent = False

    def check(self) -> None:
        if self.is_spent:
            raise RuntimeError(
                "inplace_backward: the backward ran a second time, but the first one overwrote the student's logits with "
                "their gradient; pass inplace_backward=False to use retain_graph=True"
            )

    def gradients(self, saved: Sequence[Tensor], dlosses: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        student, teacher, rows, *fields = saved
        if not student.shape[-1]:  # a rank without a part of the vocabulary
            return [torch.zeros_like(student)]
        self.is_spent = self.inplace
        settings = self.divergence.name, self.workspace, self.transform.vocab_size, self.transform.temperature
        constants = KernelConstants(*fields) if fields else None
        return [launch_gradient(student, teacher, rows, dlosses, *settings, inplace=self.inplace, constants=constants)]


def column_loss(
    student: Source,
    teacher: Source,
    rows: Tensor,
    losses: Tensor,
    divergence: WholeRow,
    workspace: Workspace,
    *,
    inplace: bool = False,
    constants: KernelConstants | None = None,
) -> Tensor:
    """The (M,) `losses` of reverse or forward KL, as the score pass computed them, connected to the student's logits.

    `constants`: of the rows over the whole vocabulary, if the logits are a part of it.
    """
    plan = _ColumnGradient(divergence, student.transform, workspace, inplace=inplace)
    total = connected(plan, losses, student.leading, teacher.leading.detach(), rows, *(constants or ()))
    return unchanged(total, rows, student, teacher, workspace=workspace)


class _ComputedGradient(GradientPlan):
    """The gradient of any other divergence, from the logits and the `KernelConstants` of the forward."""

    def __init__(self, loss: KernelLoss) -> None:
        self.loss = loss

    def gradients(self, saved: Sequence[Tensor], dlosses: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        student, teacher, rows, *constants = saved
        layout, student_table = table_of(student)
        tables = student_table, None if teacher is None else table_of(teacher)[1]
        out, gradient = layout.empty(student)
        places = layout.rows(rows)
        with on_device(out.device):
            self.loss.gradient(*tables, places, dlosses.contiguous(), KernelConstants(*constants), out=out)
            zero_rows(out, layout.kept(places, gaps=False))
        return [gradient]


def computed_loss(
    student: Source,
    teacher: Source | TeacherLists,
    selected: WeightedRows,
    divergence: Divergence,
    workspace: Workspace,
) -> tuple[Tensor, Tensor]:
    """The weighted sum and the (M,) losses of a divergence that is no column of the statistics, on dense logits."""
    rows, tokens = selected.rows, selected.tokens
    teacher_logits = teacher.leading.detach() if isinstance(teacher, Source) else None
    listed = None if isinstance(teacher, Source) else teacher.take(rows)
    loss = KernelLoss(divergence, student.transform, teacher.transform if isinstance(teacher, Source) else None)
    layout, student_table = table_of(student.leading)
    tables = student_table, None if teacher_logits is None else table_of(teacher_logits)[1]
    places = layout.rows(rows)
    losses, constants = [], []
    per_row = score_bytes(student.transform.vocab_size) + loss.list_bytes
    with torch.no_grad(), on_device(rows.device):
        for part in chunks(max(1, len(rows)), workspace.count(per_row)):
            part_lists = None if listed is None else listed.take(part)
            part_tokens = None if tokens is None else tokens[part]
            part_losses, part_constants = loss.first(*tables, places[part], tokens=part_tokens, listed=part_lists)
            losses.append(part_losses)
            constants.append(part_constants)
    all_losses, saved = torch.cat(losses), KernelConstants.joined(constants)
    if divergence.whole is None:  # the gradient does not read the teacher
        teacher_logits, saved = None, saved._replace(columns=None)
    total = connected(_ComputedGradient(loss), all_losses, student.leading, teacher_logits, rows, *saved)
    read_again = (student, teacher) if teacher_logits is not None and isinstance(teacher, Source) else (student,)
    total = unchanged(total, rows, *read_again, workspace=workspace)
    return weighted_sum(total, without_infinite(all_losses, selected.weights)), all_losses
