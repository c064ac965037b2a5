"""The Triton backend's steps as operators of torch: torch.compile cannot trace a launch, but can call an operator.

  opd_ops::token_columns        logits -> statistics of the given rows
  opd_ops::divergence_gradient  logits, weights -> d (weighted sum of the losses) / d the student's logits
  opd_ops::selected_losses      the losses; their backward is divergence_gradient
  opd_ops::placed_scores        statistics -> statistics at their positions, flags, scores
  opd_ops::chosen_positions     scores -> selected positions, their list, counts
  opd_ops::head_columns, opd_ops::head_loss    the same where a model is a head; head_loss also computes the gradients

Not here: the backend that calls them (traced.py), the launches (dense.py, heads.py, heads_loss.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from opd_kernels.choose import COUNTS
from opd_kernels.place import KEEPS, STATS
from torch import Tensor

from opd_ops.backends.interface import WeightedRows
from opd_ops.backends.triton import dense, heads, heads_loss, selection
from opd_ops.backends.triton.launches import column_names, parse_columns
from opd_ops.backends.triton.layout import Layout
from opd_ops.divergences import DIVERGENCES, Divergence, WholeRow
from opd_ops.inputs.sources import Source, Transform
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import Scoring


@torch.library.custom_op("opd_ops::token_columns", mutates_args=())
def token_columns(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    top_k: int,
    optional: str,
    workspace_bytes: int,
    vocab_size: int,
    temperature: float,
) -> Tensor:
    """(columns, n) statistics of the rows, in the order of `column_names`. `optional`: names of optional columns, "a,b"."""
    scoring = Scoring(top_k, Workspace(workspace_bytes), columns=parse_columns(optional))
    return dense.launch_columns(student, teacher, rows, scoring, vocab_size, temperature)


@token_columns.register_fake
def _(student: Tensor, teacher: Tensor, rows: Tensor, top_k: int, optional: str, *_: object) -> Tensor:
    names = column_names(parse_columns(optional))
    return torch.empty((len(names), rows.shape[0]), dtype=torch.float32, device=rows.device)


@torch.library.custom_op("opd_ops::placed_scores", mutates_args=())
def placed_scores(
    table: Tensor, rows: Tensor | None, n: int, unmasked: Tensor | None, selector: str, loss: str | None, optional: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`selection.launch_scores`."""
    columns, flags, scores = selection.launch_scores(table, rows, n, unmasked, selector, loss, optional)
    return columns, flags, scores


@placed_scores.register_fake
def _(
    table: Tensor, rows: Tensor | None, n: int, unmasked: Tensor | None, selector: str, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    flags = torch.empty((2, n), dtype=torch.uint8, device=table.device)
    n_columns = len(STATS) + table.shape[0] - len(column_names(frozenset()))
    return table.new_empty((n_columns, n)), flags, table.new_empty((2 if selector in KEEPS else 1, n))


@torch.library.custom_op("opd_ops::chosen_positions", mutates_args=())
def chosen_positions(
    scores: Tensor,
    valid: Tensor,
    infinite: Tensor,
    numerator: int,
    denominator: int,
    n_rows: int,
    length: int,
    bounds: Tensor | None,
    places: Tensor | None,
    keep_scores: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`selection.launch_choice`."""
    outputs = selection.launch_choice(
        scores, valid, infinite, numerator, denominator, n_rows, length, bounds, places, keep_scores
    )
    selected, rows, counts = outputs
    return selected, rows, counts


@chosen_positions.register_fake
def _(
    scores: Tensor,
    valid: Tensor,
    infinite: Tensor,
    numerator: int,
    denominator: int,
    n_rows: int,
    length: int,
    bounds: Tensor | None,
    places: Tensor | None,
    keep_scores: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.empty(n_rows, dtype=torch.int64, device=scores.device)
    return torch.empty_like(valid), rows, rows.new_empty(len(COUNTS))


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
    return dense.launch_gradient(student, teacher, rows, weights, kind, Workspace(workspace_bytes), vocab_size, temperature)


@divergence_gradient.register_fake
def _(student: Tensor, *_: object) -> Tensor:
    layout = Layout.of(student)
    assert layout is not None
    return layout.empty(student)[1]


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
    """The unchanged losses, connected to the student's logits."""
    return losses.clone()


@selected_losses.register_fake
def _(student: Tensor, teacher: Tensor, rows: Tensor, losses: Tensor, *_: object) -> Tensor:
    return torch.empty_like(losses)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, teacher, rows, _, *ctx.options = inputs
    ctx.save_for_backward(student, teacher, rows)


def _backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
    return (divergence_gradient(*ctx.saved_tensors, dlosses, *ctx.options), *(None,) * 7)


selected_losses.register_autograd(_backward, setup_context=_setup_context)


def head_arguments(student: Source, teacher: Source, workspace: Workspace, *more: float) -> tuple[object, ...]:
    """Both sources as arguments of an operator: six tensors (or None), and a list of numbers.

    The numbers: bytes of the workspace, the numbers of both transforms (no soft-cap: 0), then `more`.
    """
    numbers = [float(workspace.nbytes), float(student.transform.vocab_size), student.transform.temperature]
    for source in (student, teacher):
        numbers += [source.transform.scale, source.transform.softcap or 0.0]
    return (*student[1:4], *teacher[1:4], numbers + [float(x) for x in more])


class _Numbers(NamedTuple):
    """The list of numbers that `head_arguments` made, by name."""

    workspace: Workspace
    vocab_size: int
    temperature: float
    scales: tuple[float, float]  # of the student and of the teacher
    softcaps: tuple[float | None, float | None]
    more: list[float]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> _Numbers:
        nbytes, vocab, temperature, s_scale, s_softcap, t_scale, t_softcap, *more = numbers
        softcaps = s_softcap or None, t_softcap or None
        return cls(Workspace(int(nbytes)), int(vocab), temperature, (s_scale, t_scale), softcaps, more)

    @property
    def flags(self) -> list[bool]:
        return [bool(x) for x in self.more]


def _sources(tensors: Sequence[Tensor | None], named: _Numbers) -> tuple[Source, Source]:
    """The two sources from the six tensors and the numbers of `head_arguments`."""
    sources = []
    for own, scale, softcap in zip((tensors[:3], tensors[3:]), named.scales, named.softcaps, strict=True):
        leading, weight, bias = own
        assert leading is not None
        transform = Transform(weight is not None, named.vocab_size, named.temperature, scale, softcap)
        sources.append(Source(transform, leading, weight, bias))
    return sources[0], sources[1]


@torch.library.custom_op("opd_ops::head_columns", mutates_args=())
def head_columns(
    s_leading: Tensor,
    s_weight: Tensor | None,
    s_bias: Tensor | None,
    t_leading: Tensor,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    numbers: Sequence[float],
    rows: Tensor,
    optional: str,
    score_dtype: torch.dtype | None,
) -> Tensor:
    """(columns, n) statistics of the rows; the last of the numbers is K of the top-K."""
    named = _Numbers.of(numbers)
    sources = _sources((s_leading, s_weight, s_bias, t_leading, t_weight, t_bias), named)
    (top_k,) = named.more
    scoring = Scoring(int(top_k), named.workspace, score_dtype, parse_columns(optional))
    return heads.launch_columns(*sources, rows, scoring)


@head_columns.register_fake
def _(
    s_leading: Tensor,
    s_weight: Tensor | None,
    s_bias: Tensor | None,
    t_leading: Tensor,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    numbers: Sequence[float],
    rows: Tensor,
    optional: str,
    score_dtype: torch.dtype | None,
) -> Tensor:
    names = column_names(parse_columns(optional))
    return torch.empty((len(names), rows.shape[0]), dtype=torch.float32, device=rows.device)


@torch.library.custom_op("opd_ops::head_loss", mutates_args=())
def head_loss(
    s_leading: Tensor,
    s_weight: Tensor | None,
    s_bias: Tensor | None,
    t_leading: Tensor,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    numbers: Sequence[float],
    rows: Tensor,
    weights: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weighted sum, the losses, and the gradients of hidden states, weight and bias; a gradient not needed is empty.

    The last of the numbers are 1 for each gradient needed, else 0.
    """
    named, divergence = _Numbers.of(numbers), DIVERGENCES[kind]
    student, teacher = _sources((s_leading, s_weight, s_bias, t_leading, t_weight, t_bias), named)
    total, losses, gradients = heads_loss.launch_loss(
        student, teacher, rows, weights, divergence, None, named.workspace, named.flags
    )
    outputs = [s_leading.new_empty(0) if gradient is None else gradient for gradient in (*gradients, None, None)[:3]]
    return total, losses, outputs[0], outputs[1], outputs[2]


@head_loss.register_fake
def _(
    s_leading: Tensor,
    s_weight: Tensor | None,
    s_bias: Tensor | None,
    t_leading: Tensor,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    numbers: Sequence[float],
    rows: Tensor,
    weights: Tensor,
    kind: str,
) -> tuple[Tensor, ...]:
    needs, tensors = (*_Numbers.of(numbers).flags, False, False), (s_leading, s_weight, s_bias)
    formats = torch.preserve_format, torch.contiguous_format, torch.contiguous_format
    gradients = [
        torch.empty_like(tensor, memory_format=layout) if need and tensor is not None else s_leading.new_empty(0)
        for tensor, need, layout in zip(tensors, needs, formats, strict=False)
    ]
    return weights.new_empty(()), weights.new_empty(weights.shape), *gradients


def _setup_head_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[8], *output[2:])
    ctx.needs = (*_Numbers.of(inputs[6]).flags, False, False)
    ctx.is_fp16 = heads_loss.has_fp16(inputs[0], inputs[2])


def _head_backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    weights, *gradients = ctx.saved_tensors
    factor = heads_loss.scale_back(dtotal, weights, is_fp16=ctx.is_fp16)
    pairs = zip(gradients, ctx.needs, strict=False)
    return (*((gradient * factor).to(gradient.dtype) if need else None for gradient, need in pairs), *(None,) * 7)


head_loss.register_autograd(_head_backward, setup_context=_setup_head_context)


def column_losses(
    student: Source, teacher: Source, rows: Tensor, losses: Tensor, whole: WholeRow, workspace: Workspace, *, inplace: bool
) -> Tensor:
    """`dense_loss.column_loss`, through the operator."""
    assert not inplace  # call/prepare.py refuses it
    transform = student.transform
    options = whole.name, workspace.nbytes, transform.vocab_size, transform.temperature
    connected: Tensor = selected_losses(student.leading, teacher.leading.detach(), rows, losses, *options)
    return connected


def head_losses(
    student: Source,
    teacher: Source | TeacherLists,
    selected: WeightedRows,
    divergence: Divergence,
    workspace: Workspace,
) -> tuple[Tensor, Tensor]:
    """`heads_loss.selected_loss`, through the operator."""
    assert isinstance(teacher, Source)
    assert selected.tokens is None
    assert divergence.whole is not None
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in student.tensors]
    arguments = head_arguments(student, teacher.detach(), workspace, *needs)
    total, losses, *_ = head_loss(*arguments, selected.rows, selected.weights, divergence.whole.name)
    return total, losses.detach()
