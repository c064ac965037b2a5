"""The loss of the Triton backend where a model is a LinearHead: the selected rows' logits in fp32, one group of rows at a time.

  logits 2 rho units, losses and the logits' gradient by kernels, then the gradients of hidden states and head weight 2 rho
  (one unit = 2 N V D FLOP, rho = M / N; divergences/ defines the losses)

Losses and gradients come from fp32 logits, whatever the head's dtype: 16 bits would put an error of several per cent into the
gradient. The forward computes the gradient next to the loss, because both read these logits: a backward that recomputed them
would pay 2 rho more. With fp16 heads the forward weights rows by at most 1 and the backward scales the result, so that the
gradients keep their digits. A second backward computes the gradients again.
Memory: the 16-bit logit gradients of a span of rows are kept, for one product with the hidden states and one with the head
weight. The head weight's gradient is rounded once for each span: once if all rows fit, at most eight times. With spans of
fewer than 256 rows, or more than eight spans, the forward computes the logits a second time (2 rho), by blocks of the
vocabulary, and rounds that gradient once.
Deterministic: no atomics, sums in a fixed order. No host synchronisation, no copy from the host.
Where ranks share out the vocabulary, shards.py passes the rows' normalisers and losses, the logits are those of this rank's
part, and the hidden states' gradients of all ranks are added up in fp32.

Not here: statistics (heads.py), the kernels' work on a tile (kernel_loss.py), heads on any device (streamed/loss.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from opd_kernels.scale import scale
from opd_kernels.score import COLUMNS
from torch import Tensor

from opd_ops.backends.interface import WeightedRows
from opd_ops.backends.shared.first_order import first_order
from opd_ops.backends.shared.grids import BlockGrid, SelectedGrid, is_narrow, weight_casts
from opd_ops.backends.shared.matmul import fp32_product, long_product, without_autocast
from opd_ops.backends.shared.overwritten import digests, verified
from opd_ops.backends.shared.tiles import TileReader, aligned_buffer
from opd_ops.backends.triton.kernel_loss import KernelConstants, KernelLoss
from opd_ops.backends.triton.launches import on_device
from opd_ops.divergences import Divergence, weighted_sum, without_infinite
from opd_ops.inputs.chunks import chunks, groups
from opd_ops.inputs.sources import Source, put_rows
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.inputs.workspace import Workspace


class _TilePlan(NamedTuple):
    """All that forward and backward read besides tensors. Tensors: the student's, the teacher's, constants, tokens."""

    student: Source  # without its tensors
    teacher: Source | TeacherLists  # without its tensors
    divergence: Divergence
    has_tokens: bool
    n_constants: int  # fields of `KernelConstants` if these sources are a part of the vocabulary, else 0
    workspace: Workspace
    differentiable: bool
    before: Tensor | None  # digests of the tensors of inference mode (overwritten.py)

    def verified(self, rows: Tensor, tensors: Sequence[Tensor]) -> Tensor | float:
        """Factor of the gradients of one more `run`: 1, or NaN if an input was overwritten unseen by autograd."""
        if self.before is None:
            return 1.0
        split = len(self.student.tensors)
        sources: tuple[Source, ...] = (self.student.with_tensors(tensors[:split]),)
        if isinstance(self.teacher, Source):
            sources += (self.teacher.with_tensors(tensors[split:]),)
        return verified(self.before, sources, rows, self.workspace)

    def run(
        self, rows: Tensor, weights: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """`launch_loss` of these tensors."""
        split = len(self.student.tensors)
        student, others = self.student.with_tensors(tensors[:split]), tensors[split:]
        tokens, others = (others[-1], others[:-1]) if self.has_tokens else (None, others)
        split = len(others) - self.n_constants
        others, fields = others[:split], others[split:]
        constants = KernelConstants(*fields) if fields else None
        teacher: Source | TeacherLists
        if isinstance(self.teacher, TeacherLists):
            teacher = self.teacher._replace(ids=others[0], logprobs=others[1])
        else:
            teacher = self.teacher.with_tensors(others)
        return launch_loss(student, teacher, rows, weights, self.divergence, tokens, self.workspace, needs, constants)


class _SelectedLoss(torch.autograd.Function):
    """sum of weights l, and the (M,) losses l; the forward also computes the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, plan: _TilePlan, rows: Tensor, weights: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.gradients = plan, None
        ctx.save_for_backward(rows, weights, *tensors)
        ctx.needs = [plan.differentiable and need for need in ctx.needs_input_grad[3 : 3 + len(plan.student.tensors)]]
        total, losses, ctx.gradients = plan.run(rows, weights, tensors, ctx.needs)
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @first_order
    def backward(ctx: Any, dtotal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, *tensors = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        student = ctx.plan.student.with_tensors(tensors[: len(ctx.plan.student.tensors)])
        factor = scale_back(dtotal, weights, is_fp16=has_fp16(student.leading, student.bias))
        if gradients is None:  # an earlier backward returned them, and they may be overwritten
            factor = factor * ctx.plan.verified(rows, tensors)
            gradients = ctx.plan.run(rows, weights, tensors, ctx.needs)[2]
        for gradient in gradients:
            if gradient is not None:
                with on_device(gradient.device):
                    scale(gradient, factor)
        return (None,) * 3 + tuple(gradients) + (None,) * (len(tensors) - len(gradients))


def has_fp16(leading: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient is fp16, which holds no numbers as small as the weights of many rows."""
    return torch.float16 in (leading.dtype, leading.dtype if bias is None else bias.dtype)


def _scale(weights: Tensor, *, is_fp16: bool) -> Tensor | float:
    """With fp16, the power of two above the largest magnitude of the weights, 0-dim; 1 where there is none. Else 1.

    A power of two, because scaling a gradient back by it adds no rounding.
    """
    if not is_fp16:
        return 1.0
    largest = torch.cat((weights.abs(), weights.new_zeros(1))).amax()
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent), 1.0)


def scale_back(dtotal: Tensor, weights: Tensor, *, is_fp16: bool) -> Tensor:
    """(1,) factor of the gradients of `launch_loss`. Not 0-dim: torch would round a 0-dim factor to 16 bits first."""
    return (dtotal * _scale(weights, is_fp16=is_fp16)).view(1)


def launch_loss(
    student: Source,
    teacher: Source | TeacherLists,
    rows: Tensor,
    weights: Tensor,
    divergence: Divergence,
    tokens: Tensor | None,
    workspace: Workspace,
    needs: Sequence[bool],
    constants: KernelConstants | None = None,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """sum of weights l, l itself, (M,), and the gradients of that sum, to be scaled by `scale_back`, where needed.

    `constants`: of the rows over the whole vocabulary; these sources then hold a part of it.
    `teacher`: if lists, of these rows. The sum leaves out an infinite loss that the score pass could not see (its logits had 16
    bits, or it did not read the student's row).
    """
    teacher = teacher.detach() if isinstance(teacher, Source) else teacher
    selected = _SelectedRows(student.detach(), teacher, rows, weights, divergence, tokens, workspace, constants)
    losses, gradients = selected.run(needs)
    return weighted_sum(losses, without_infinite(losses, weights)), losses, gradients


class _SelectedRows:
    """The selected rows' fp32 logits, a group at a time, and the losses and gradients from them."""

    def __init__(
        self,
        student: Source,
        teacher: Source | TeacherLists,
        rows: Tensor,
        weights: Tensor,
        divergence: Divergence,
        tokens: Tensor | None,
        workspace: Workspace,
        constants: KernelConstants | None,
    ) -> None:
        self.student, self.rows, self.tokens, self.constants = student, rows, tokens, constants
        self.sources = (student, teacher) if isinstance(teacher, Source) else (student,)
        self.listed = None if isinstance(teacher, Source) else teacher
        self.row_weights = (weights / _scale(weights, is_fp16=has_fp16(student.leading, student.bias))).float().clone()
        self.workspace, self.vocab = workspace, student.transform.vocab_size
        self.sides = [TileReader(x, rows, torch.float32, weight_casts(x, workspace)) for x in self.sources]
        transforms = [side.transform for side in self.sides]
        self.loss = KernelLoss(divergence, transforms[0], transforms[1] if len(transforms) > 1 else None)

    def run(self, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """(M,) losses, and the gradients of their weighted sum before `scale_back`; None for a tensor without need."""
        with on_device(self.rows.device), without_autocast(self.rows.device):
            return self._run(needs)

    def _run(self, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        m, device, vocab = len(self.rows), self.rows.device, slice(0, self.vocab)
        grid = SelectedGrid.of(*self.sources, n=m, needs=needs, list_bytes=self.loss.list_bytes, workspace=self.workspace)
        buffers = [aligned_buffer(grid.rows, self.vocab, torch.float32, device)[:, vocab] for _ in self.sides]
        narrowed = None
        if is_narrow(self.student, needs):
            narrowed = aligned_buffer(grid.kept or grid.rows, self.vocab, self.student.leading.dtype, device)[:, vocab]
        out = _Gradients.of(self.student, needs, m)
        losses = torch.empty(m, dtype=torch.float32, device=device)
        if self.constants is not None and self.constants.columns is not None:
            losses.copy_(self.constants.columns[COLUMNS.index(str(self.loss.divergence.column))])
        parts = []
        for group, span in groups(m, grid.kept or grid.rows, grid.rows) if self.vocab else ():
            n, in_span = group.stop - group.start, slice(group.start - span.start, group.stop - span.start)
            self.sides[0].take(span)
            tiles = [x.stored(group, vocab, b[:n]) for x, b in zip(self.sides, buffers, strict=True)]
            s, u = tiles[0], tiles[1] if len(tiles) > 1 else None
            if self.constants is None:
                losses[group], constants = self.loss.first(s, u, None, tokens=self._tokens(group), listed=self._lists(group))
            else:
                constants = self.constants.rows(group)
            # `launch_loss` leaves an infinite loss out of the sum; here its gradient is left out.
            self.row_weights[group].masked_fill_(losses[group] == torch.inf, 0)
            if any(needs):
                overwritten = s if self.loss.overwrites_student else tiles[-1]
                dlogits = overwritten if narrowed is None else narrowed[in_span]
                self.loss.gradient(s, u, None, self.row_weights[group], constants, out=dlogits)
                if grid.second_look:
                    if constants.top is not None:
                        constants = constants._replace(at_top=dlogits.gather(1, constants.top.clamp_min(0).long().unsqueeze(1)))
                    parts.append(constants)
                if group.stop == span.stop:
                    dlogits = dlogits if narrowed is None else narrowed[: span.stop - span.start]
                    out.add(self.student, self.rows, span, dlogits)
                    if out.weight is not None and not grid.second_look:
                        out.add_weight(dlogits, self._weighted_hidden(span), first=span.start == 0)
        if self.vocab and grid.second_look and m:
            del buffers, narrowed, tiles, s, u, dlogits, overwritten
            self._second_look(KernelConstants.joined(parts), out)
        out.add_up(self.student, self.rows)
        return losses, out.in_order(self.student)

    def _tokens(self, group: slice) -> Tensor | None:
        return None if self.tokens is None else self.tokens[group]

    def _lists(self, group: slice) -> TeacherLists | None:
        return None if self.listed is None else self.listed.take(group)

    def _weighted_hidden(self, group: slice) -> Tensor:
        """(n, D) hidden rows of the student; 0 where the weight is 0: the product with a gradient of 0 may be NaN."""
        return self.sides[0].hidden(group).masked_fill((self.row_weights[group] == 0).unsqueeze(1), 0)

    def _second_look(self, constants: KernelConstants, out: _Gradients) -> None:
        """The weight gradient by blocks of the vocabulary, each rounded once; `constants` are of the whole rows."""
        m, device, dtype = len(self.rows), self.rows.device, self.student.leading.dtype
        size, width = BlockGrid.of(*self.sources, n=m, workspace=self.workspace)
        assert out.weight is not None
        buffers = [torch.empty(size * width, dtype=torch.float32, device=device) for _ in self.sides]
        narrowed = torch.empty(size * width, dtype=dtype, device=device)
        for block in chunks(self.vocab, width):
            total = None
            for group in chunks(m, size):
                places = slice(0, group.stop - group.start), slice(0, block.stop - block.start)
                tiles = [x.view(size, width)[places] for x in buffers]
                for side, tile in zip(self.sides, tiles, strict=True):
                    side.stored(group, block, tile)
                u, dlogits = tiles[1] if len(tiles) > 1 else None, narrowed.view(size, width)[places]
                block_options = {"first_id": block.start, "vocab_size": block.stop - block.start}
                self.loss.gradient(
                    tiles[0], u, None, self.row_weights[group], constants.rows(group), out=dlogits, **block_options
                )
                product = fp32_product(dlogits.T, self._weighted_hidden(group))
                total = product if total is None else total.add_(product)
            assert total is not None
            out.weight[block] = total.to(dtype)


class _Gradients(NamedTuple):
    """The gradients of the student's tensors while they are summed, in their shapes and dtypes; None: not needed."""

    leading: Tensor | None
    weight: Tensor | None
    bias: Tensor | None  # fp32 until it is complete
    hidden: Tensor | None  # (M, D) fp32, of the rows' hidden states, where ranks share out the vocabulary
    vocab: int

    @staticmethod
    def of(student: Source, needs: Sequence[bool], m: int) -> _Gradients:
        vocab, weight, dweight = student.transform.vocab_size, student.weight, None
        if weight is not None and needs[1]:
            dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            dweight[vocab if m else 0 :].zero_()  # entries beyond the common vocabulary, or all if no row writes them
        dbias = None
        if student.bias is not None and needs[2]:
            dbias = torch.zeros(len(student.bias), dtype=torch.float32, device=student.bias.device)
        hidden = None
        if student.transform.shard is not None and student.weight is not None and needs[0]:
            hidden = torch.zeros((m, student.leading.shape[-1]), dtype=torch.float32, device=student.leading.device)
        return _Gradients(torch.zeros_like(student.leading) if needs[0] else None, dweight, dbias, hidden, vocab)

    def add(self, student: Source, rows: Tensor, group: slice, dlogits: Tensor) -> None:
        """Add some of the rows to all gradients but the weight's; no position comes twice."""
        if self.leading is not None:
            if student.weight is None:
                put_rows(self.leading[..., : self.vocab], rows[group], dlogits)
            elif self.hidden is not None:
                self.hidden[group] = fp32_product(dlogits, student.weight[: self.vocab])
            else:
                put_rows(self.leading, rows[group], long_product(dlogits, student.weight[: self.vocab]))
        if self.bias is not None:
            self.bias[: self.vocab] += dlogits.sum(0, dtype=torch.float32)

    def add_up(self, student: Source, rows: Tensor) -> None:
        """Add up the hidden states' gradient over the ranks."""
        if self.hidden is not None and self.leading is not None and student.transform.shard is not None:
            put_rows(self.leading, rows, student.transform.shard.ranks.sum(self.hidden))

    def add_weight(self, dlogits: Tensor, hidden: Tensor, *, first: bool) -> None:
        assert self.weight is not None
        out = self.weight[: self.vocab]
        torch.addmm(out, dlogits.T, hidden, beta=0.0 if first else 1.0, out=out)

    def in_order(self, student: Source) -> list[Tensor | None]:
        """One entry per student tensor."""
        if student.weight is None:
            return [self.leading]
        if student.bias is None:
            return [self.leading, self.weight]
        return [self.leading, self.weight, None if self.bias is None else self.bias.to(student.bias.dtype)]


def selected_loss(
    student: Source,
    teacher: Source | TeacherLists,
    selected: WeightedRows,
    divergence: Divergence,
    workspace: Workspace,
    constants: KernelConstants | None = None,
) -> tuple[Tensor, Tensor]:
    """sum of weights l over the selected positions, connected to the student's tensors, and l, (M,).

    `constants`: as in `launch_loss`.
    """
    rows, weights, tokens = selected.rows, selected.weights, selected.tokens
    differentiable = torch.is_grad_enabled()  # read here: within an autograd function's forward it is False
    teacher_tensors: tuple[Tensor, ...]
    template: Source | TeacherLists
    inputs: tuple[Source, ...] = (student,)
    if isinstance(teacher, Source):
        teacher_tensors, template, inputs = teacher.detach().tensors, teacher.emptied(), (student, teacher)
    else:
        template = teacher.take(rows)
        teacher_tensors = template.ids, template.logprobs
        template = template.take(slice(0))
    has_tokens = tokens is not None and isinstance(teacher, Source)
    needed = differentiable and any(tensor.requires_grad for tensor in student.tensors)
    plan = _TilePlan(
        student.emptied(),
        template,
        divergence,
        has_tokens,
        len(constants or ()),
        workspace,
        differentiable,
        digests(inputs, rows, workspace) if needed else None,
    )
    optional = (*(constants or ()), *((tokens,) if has_tokens else ()))
    tensors = (*student.tensors, *teacher_tensors, *optional)
    total, losses = _SelectedLoss.apply(plan, rows, weights, *tensors)
    return total, losses
