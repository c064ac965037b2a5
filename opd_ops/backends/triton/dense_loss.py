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

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_ops.backends.shared.chunks import chunks
from opd_ops.backends.shared.gradient_in_backward import GradientPlan, connected
from opd_ops.backends.shared.grids import score_bytes
from opd_ops.backends.shared.overwritten import unchanged
from opd_ops.backends.triton.dense import launch_gradient, tables_of
from opd_ops.backends.triton.kernel_loss import Found, KernelLoss
from opd_ops.backends.triton.launches import on_device
from opd_ops.divergences import Divergence, WholeRow, weighted_sum, without_infinite
from opd_ops.inputs.sources import Source, Transform
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.inputs.workspace import Workspace


class _ColumnGradient(GradientPlan):
    """Of reverse or forward KL, from the logits alone."""

    def __init__(self, divergence: WholeRow, transform: Transform, workspace: Workspace, *, inplace: bool) -> None:
        self.divergence, self.transform, self.workspace, self.inplace = divergence, transform, workspace, inplace
        self.is_spent = False

    def gradients(self, saved: Sequence[Tensor], dlosses: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        if self.is_spent:
            raise RuntimeError(
                "inplace_backward: the backward ran a second time, but the first one overwrote the student's logits with "
                "their gradient; pass inplace_backward=False to use retain_graph=True"
            )
        student, teacher, rows = saved
        self.is_spent = self.inplace
        vocab, temperature = self.transform.vocab_size, self.transform.temperature
        return [
            launch_gradient(
                student, teacher, rows, dlosses, self.divergence.name, self.workspace, vocab, temperature, inplace=self.inplace
            )
        ]


def column_loss(
    student: Source,
    teacher: Source,
    rows: Tensor,
    losses: Tensor,
    divergence: WholeRow,
    workspace: Workspace,
    *,
    inplace: bool,
) -> Tensor:
    """The (M,) losses of reverse or forward KL, which the score pass knows, connected to the student's logits."""
    plan = _ColumnGradient(divergence, student.transform, workspace, inplace=inplace)
    total = connected(plan, losses, student.leading, teacher.leading.detach(), rows)
    return unchanged(total, rows, student, teacher, workspace=workspace)


class _ComputedGradient(GradientPlan):
    """Of any other divergence, from the logits and the constants of each row that the forward found."""

    def __init__(self, loss: KernelLoss) -> None:
        self.loss = loss

    def gradients(self, saved: Sequence[Tensor], dlosses: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        student, teacher, rows, *constants = saved
        layout, tables = tables_of(student, teacher)
        out, gradient = layout.zeros(student)
        with on_device(out.device):
            self.loss.gradient(*tables, layout.rows(rows), dlosses.contiguous(), Found(*constants), out=out)
        return [gradient]


def computed_loss(
    student: Source,
    teacher: Source | TeacherLists,
    rows: Tensor,
    weights: Tensor,
    *,
    divergence: Divergence,
    tokens: Tensor | None,
    workspace: Workspace,
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
        for part in chunks(len(rows), workspace.count(per_row)) if len(rows) else [slice(0, 0)]:
            of_part = None if listed is None else listed.take(part)
            of_tokens = None if tokens is None else tokens[part]
            first = loss.first(*tables, places[part], tokens=of_tokens, listed=of_part)
            losses.append(first[0])
            found.append(first[1])
    joined, kept = torch.cat(losses), Found.joined(found)
    if divergence.whole is None:  # the gradient does not read the teacher
        beside, kept = None, kept._replace(columns=None)
    total = connected(_ComputedGradient(loss), joined, student.leading, beside, rows, *kept)
    read_again = (student, teacher) if beside is not None and isinstance(teacher, Source) else (student,)
    total = unchanged(total, rows, *read_again, workspace=workspace)
    return weighted_sum(total, without_infinite(joined, weights)), joined
