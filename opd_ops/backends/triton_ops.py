# The Triton backend's two steps as operators of torch, for torch.compile, which cannot look into them.
#
#   opd_ops::token_columns        logits -> statistics of the given rows
#   opd_ops::divergence_gradient  logits, weights -> d (weighted sum of the losses) / d the student's logits
#   opd_ops::selected_losses      the losses, whose backward is divergence_gradient
#
# Eager calls go to the launches themselves: an operator's boundary costs some 60 microseconds a call.
# Not here: the launches (triton.py), what is compiled around them (loss.py).
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd_ops.backends import triton
from opd_ops.backends.launches import column_names
from opd_ops.backends.table import Layout

token_columns = torch.library.custom_op("opd_ops::token_columns", triton.launch_columns, mutates_args=())


@token_columns.register_fake
def _(student: Tensor, teacher: Tensor, rows: Tensor, top_k: int, optional: str, *_: Any) -> Tensor:
    names = column_names(frozenset(filter(None, optional.split(","))))
    return torch.empty((len(names), rows.shape[0]), device=rows.device)


@torch.library.custom_op("opd_ops::divergence_gradient", mutates_args=())
def divergence_gradient(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    weights: Tensor,
    kind: str,
    workspace_bytes: int,
    vocab_size: int,
    temperature: float,
) -> Tensor:
    """A new tensor of the student's shape, zero outside the rows."""
    return triton.launch_gradient(student, teacher, rows, weights, kind, workspace_bytes, vocab_size, temperature)


@divergence_gradient.register_fake
def _(student: Tensor, *_: Any) -> Tensor:
    layout = Layout.of(student)
    assert layout is not None
    return layout.zeros(student)[1]


@torch.library.custom_op("opd_ops::selected_losses", mutates_args=())
def selected_losses(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    losses: Tensor,
    kind: str,
    workspace_bytes: int,
    vocab_size: int,
    temperature: float,
) -> Tensor:
    """The losses as they are, connected to the student's logits."""
    return losses.clone()


@selected_losses.register_fake
def _(student: Tensor, teacher: Tensor, rows: Tensor, losses: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(losses)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, teacher, rows, _, *ctx.options = inputs
    ctx.save_for_backward(student, teacher, rows)


def _backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
    return (divergence_gradient(*ctx.saved_tensors, dlosses, *ctx.options), *(None,) * 7)


selected_losses.register_autograd(_backward, setup_context=_setup_context)
