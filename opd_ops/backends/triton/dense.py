"""Launches on dense logits: their statistics, and the gradient of reverse and forward KL with respect to them.

Kernels read the logits in place, in any leading layout (layout.py).
With `inplace` the gradient overwrites the student's logits: no second tensor of their size.
Not here: losses in autograd (dense_loss.py), heads (heads.py), helpers of launches (launches.py), kernels (opd_kernels).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from opd_kernels.argmax import argmax_fwd
from opd_kernels.score import Score, score_fwd
from opd_kernels.support import TopKLists
from opd_kernels.zero_rows import zero_rows
from torch import Tensor

from opd_ops.backends.shared.grids import score_bytes
from opd_ops.backends.triton.kernel_loss import GRADIENTS, KernelConstants
from opd_ops.backends.triton.launches import column_names, launch_options, on_device, write_columns
from opd_ops.backends.triton.layout import Layout
from opd_ops.divergences import DIVERGENCES
from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.sources import Transform
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import Scoring


def _dense(vocab_size: int, temperature: float) -> tuple[Transform, Transform]:
    transform = Transform(False, vocab_size, temperature)
    return transform, transform


def launch_columns(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    scoring: Scoring,
    vocab_size: int,
    temperature: float,
    *,
    keep: Callable[[tuple[Score, TopKLists]], None] | None = None,
) -> Tensor:
    """(columns, n) statistics of the given positions, in the order of `column_names`.

    `keep`: called with the kernels' outputs for each group of consecutive rows.
    """
    top_k, workspace, _, columns, sampled = scoring
    layout, student_table = table_of(student)
    tables = student_table, table_of(teacher)[1]
    places = layout.rows(rows)
    share = workspace.share(1, 2) if columns else workspace  # the other half is the optional columns' scratch
    out = torch.empty((len(column_names(columns)), len(rows)), dtype=torch.float32, device=rows.device)
    with on_device(rows.device):
        for part in chunks(len(rows), share.count(score_bytes(vocab_size, top_k))):
            outputs = write_columns(
                out[:, part],
                tables,
                places[part],
                _dense(vocab_size, temperature),
                columns=columns,
                top_k=top_k,
                workspace=share,
                sampled=None if sampled is None else sampled.take(part),
            )
            if keep is not None:
                keep(outputs)
    return out


def table_of(logits: Tensor) -> tuple[Layout, Tensor]:
    """The layout of dense logits, and the table that kernels read."""
    layout = Layout.of(logits)
    assert layout is not None
    return layout, layout.table(logits.detach())


def launch_gradient(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    weights: Tensor,
    kind: str,
    workspace: Workspace,
    vocab_size: int,
    temperature: float,
    *,
    inplace: bool = False,
    constants: KernelConstants | None = None,
) -> Tensor:
    """The gradient of the weighted losses, of the student's shape: a new tensor, or the student's own.

    `constants`: of the rows over the whole vocabulary, if the logits are a part of it.
    """
    layout, student_table = table_of(student)
    tables = student_table, table_of(teacher)[1]
    out, gradient = (tables[0], student.detach()) if inplace else layout.empty(student)
    places, weights = layout.rows(rows), weights.contiguous()
    options = launch_options(*_dense(vocab_size, temperature))
    with on_device(out.device):
        for part in chunks(len(places), workspace.count(score_bytes(vocab_size))):
            if constants is None:
                score = score_fwd(*tables, places[part], **options)
                top = argmax_fwd(tables[0], places[part], score, vocab_size=vocab_size)
                part_constants = KernelConstants.from_columns(score.columns, top)
            else:
                part_constants = constants.rows(part)
            GRADIENTS[type(DIVERGENCES[kind])](
                *tables,
                places[part],
                weights[part],
                part_constants.columns,
                top=part_constants.top,
                elsewhere=part_constants.elsewhere,
                out=out,
                **options,
            )
        zero_rows(out, layout.kept(places, gaps=inplace))  # rows between positions may hold other numbers of the user
    if inplace:  # autograd did not see the kernels write: another node that saved the logits then raises in its backward
        torch.autograd.graph.increment_version(gradient)
    return gradient
