"""The loss of the streamed backend: it reads the selected rows a second time, block by block of the vocabulary.

  forward:  reverse and forward KL are columns of the score pass: no matmul. Other divergences sweep the selected rows:
            `Summed` both models in one sweep (2 rho), `OnSupport` one model at a time (rho each; docs/reference/divergences.md)
  backward: the rows' logits again (2 rho; rho where the gradient does not read the teacher), then dH and dW (2 rho)
  (rho: the share of rows that is selected; costs are in head-matmul units, streamed/backend.py)

The normalisers are known, so the backward is one sweep: each block is finished before the next, and dW is written once, from
one fp32 sum over all rows. The backward rescales no gradient of the forward: with retain_graph it computes them again.
The gradient of a divergence on a list alone (tail "drop") is zero in most columns: only the others are multiplied.
Where ranks share out the vocabulary, each rank computes the gradient of its part. The hidden states' gradients of all ranks
are added up by one all-reduce of (M, D) numbers.
Not here: lists (shared/list_losses.py), sums over the vocabulary (summed.py), the score pass (score.py), the size of blocks
(shared/grids.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.arguments import may_look, number_in
from opd_ops.backends.interface import WeightedRows
from opd_ops.backends.shared import pages
from opd_ops.backends.shared.gradient_in_backward import GradientPlan, connected
from opd_ops.backends.shared.grids import gradient_grid
from opd_ops.backends.shared.list_losses import Terms
from opd_ops.backends.shared.logits_at import merged_logits
from opd_ops.backends.shared.overwritten import unchanged
from opd_ops.backends.shared.tiles import TileReader
from opd_ops.backends.streamed.list_gradients import listed_gradients
from opd_ops.backends.streamed.list_losses import support_terms
from opd_ops.backends.streamed.off_list import places_in, without_ids
from opd_ops.backends.streamed.reference import Reference
from opd_ops.backends.streamed.summed import Sums, summed
from opd_ops.divergences import Divergence, Summed, WholeRow, weighted_sum, without_infinite
from opd_ops.inputs.chunks import chunks, span_of
from opd_ops.inputs.sources import Source, logit_slope, put_rows, take_rows
from opd_ops.inputs.teacher_lists import LAST_ID, TeacherLists
from opd_ops.inputs.workspace import Workspace


class _Constants(NamedTuple):
    """The numbers of each selected row that the gradient reads, (M, ...); None: the divergence has no such part."""

    rows: Tensor
    mean_slope: Tensor | None  # this and the reference: for a divergence over the whole row
    reference_student: Tensor | None
    reference_teacher: Tensor | None
    reference_log_p: Tensor | None
    reference_log_ratio: Tensor | None
    top_log_ratio: Tensor | None
    ids: Tensor | None  # this and the next three: for a divergence on a list, as in `Terms`
    dx: Tensor | None
    off_list: Tensor | None
    d_off_list: Tensor | None

    @property
    def is_list_alone(self) -> bool:
        """Whether the gradient is zero off the lists; `ids` and `dx` then belong to the raw logits."""
        return self.mean_slope is None and self.d_off_list is None

    @property
    def reference(self) -> Reference:
        columns = self[2:7]
        return Reference(*columns)  # type: ignore[arg-type]

    def group(self, name: str, group: slice) -> Tensor:
        """(n, 1) or (n, K): one field at some of the rows."""
        column = span_of(getattr(self, name), group)
        return column.unsqueeze(1) if column.dim() == 1 else column


N_CONSTANTS = len(_Constants._fields)


@dataclass(frozen=True)
class _BlockPlan(GradientPlan):
    """Saved tensors: the constants of the rows, the student's tensors, the teacher's. The sources here are without tensors."""

    student: Source
    teacher: Source | None  # None: the gradient does not read it
    whole: WholeRow | None
    workspace: Workspace
    dtype: torch.dtype  # of the gradient's computation

    def gradients(self, saved: Sequence[Tensor], dlosses: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        split = N_CONSTANTS + len(self.student.tensors)
        constants = _Constants(*saved[:N_CONSTANTS])
        student = self.student.with_tensors(saved[N_CONSTANTS:split])
        teacher = None if self.teacher is None else self.teacher.with_tensors(saved[split:])
        needs = needs[N_CONSTANTS:split]
        gradients: list[Tensor | None]
        if constants.is_list_alone:
            all_rows = slice(0, len(constants.rows))
            ids, dx = constants.group("ids", all_rows), constants.group("dx", all_rows) * dlosses.unsqueeze(1)
            dx = dx.masked_fill_((dlosses == 0).unsqueeze(1), 0)
            gradients = listed_gradients(student, constants.rows, ids, dx, needs, self.workspace)
        else:
            selected = _Selected(student, teacher, constants, dlosses, self)
            gradients = selected.head_gradients(needs) if student.transform.is_head else [selected.logit_gradient()]
        return [None] * N_CONSTANTS + gradients


class _Selected:
    """The selected rows of one backward: their logits, computed again block by block, and the gradients from them."""

    def __init__(
        self, student: Source, teacher: Source | None, constants: _Constants, dlosses: Tensor, plan: _BlockPlan
    ) -> None:
        rows, second = constants.rows, student if teacher is None else teacher
        self.constants, self.whole, self.dtype = constants, plan.whole, plan.dtype
        has_both = plan.whole is not None and constants.ids is not None
        self.grid = gradient_grid(student, second, len(rows), workspace=plan.workspace, two_parts=has_both)
        self.student = TileReader(student, rows, self.dtype, self.grid.columns)
        self.teacher = None if teacher is None else TileReader(teacher, rows, self.dtype, self.grid.columns)
        self.by_column = student.transform.is_head and second.transform.is_head
        self.dlosses = dlosses.unsqueeze(1)
        size = self.grid.rows * self.grid.columns
        self.buffers = [pages.empty((size,), self.dtype, rows.device) for _ in range(1 if teacher is None else 2)]

    def blocks(self) -> Iterator[slice]:
        return chunks(self.student.source.transform.vocab_size, self.grid.columns)

    def groups(self) -> Iterator[slice]:
        return chunks(len(self.constants.rows), self.grid.rows)

    def dlogits(self, group: slice, block: slice) -> Tensor:
        """(n, B) gradient of the weighted losses with respect to the student's raw logits, before scale and soft-cap."""
        # `by_column`: a matmul that writes few rows as columns of its result is up to 1.6 x as fast (benchmarks/LOG.md).
        s = self.student.logits(group, block, self.buffers[0], by_column=self.by_column)
        u = None if self.teacher is None else self.teacher.logits(group, block, self.buffers[1], by_column=self.by_column)
        dlosses = span_of(self.dlosses, group)
        no_gradient = (s == -math.inf).logical_or_(dlosses == 0)
        slope = logit_slope(s, self.student.source.transform)
        first_id = self.student.source.transform.first_id + block.start
        grad = self._d_finished(s, u, group, first_id).mul_(dlosses)
        if isinstance(slope, Tensor) or slope != 1.0:
            grad.mul_(slope)
        grad.masked_fill_(no_gradient, 0.0)  # where p = 0 or the weight is 0: the formula there is 0 * inf
        for i, place in self.student.merged_in(block):
            grad[:, place] = self._d_merged(group)[:, i]
        return grad

    def _d_finished(self, s: Tensor, u: Tensor | None, group: slice, first_id: int) -> Tensor:
        """(n, B) d losses / d finished logits of a block that begins at the id `first_id`; overwrites s and u."""
        total = None
        if self.constants.ids is not None:
            total = self._d_list(s.clone() if self.whole is not None else s, group, first_id)
        if self.whole is not None:
            assert u is not None
            reference = self.constants.reference.rows(group)
            reference_slope = self.whole.slope(reference.log_p, reference.top_log_ratio)
            log_p, log_ratio = reference.log_probabilities(s, u)
            whole_gradient = self.whole.dlogits(log_p, log_ratio, reference_slope, self.constants.group("mean_slope", group))
            total = whole_gradient if total is None else total.add_(whole_gradient)
        assert total is not None
        return total

    def _d_list(self, s: Tensor, group: slice, first_id: int) -> Tensor:
        """(n, B) d_off_list times the softmax off the ids, plus dx at the ids; overwrites s."""
        ids, dx = self.constants.group("ids", group), self.constants.group("dx", group)
        off_list = self.constants.group("off_list", group).to(self.dtype)
        softmax = without_ids(s, ids, first_id).sub_(off_list.masked_fill(off_list == -math.inf, 0)).exp_()
        softmax.mul_(self.constants.group("d_off_list", group))
        places, inside = places_in(ids, first_id, s.shape[1])
        return s.scatter_add_(1, places, dx.masked_fill(~inside, 0))

    def _d_merged(self, group: slice) -> Tensor:
        """(n, E) gradient of the raw logits that were merged: each has its share of the merged logit's gradient."""
        s, parts = self.student.merged(group)
        u = None if self.teacher is None else self.teacher.merged(group)[0].clone()
        first = self.student.source.transform.merged[0]
        no_gradient = (s == -math.inf) | (self.dlosses[group] == 0)
        dmerged = self._d_finished(s.clone(), u, group, first).mul_(self.dlosses[group]).masked_fill_(no_gradient, 0)
        share = torch.exp(parts - s.masked_fill(s == -math.inf, 0))
        return dmerged * share * logit_slope(parts, self.student.source.transform)

    def logit_gradient(self) -> Tensor:
        """Gradient of dense logits: exactly zero outside the selected rows."""
        logits = self.student.source.leading
        dense = torch.zeros_like(logits)  # the same strides, else autograd copies the gradient to a leaf's strides
        for block in self.blocks():
            for group in self.groups():
                columns = dense if block == slice(0, dense.shape[-1]) else dense[..., block]
                put_rows(columns, span_of(self.student.rows, group), self.dlogits(group, block))
        return dense

    def head_gradients(self, needs: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of hidden, weight and bias, in the dtypes of these; None if not needed."""
        source, rows, shard = self.student.source, self.constants.rows, self.student.source.transform.shard
        weight = source.weight
        assert weight is not None
        dleading = torch.zeros_like(source.leading) if needs[0] else None
        sums, places = dleading, rows
        if dleading is not None and (dleading.dtype != self.dtype or shard is not None):
            # 16 bits would round after every block, and the all-reduce sends these rows alone.
            sums = torch.zeros((len(rows), source.leading.shape[-1]), dtype=self.dtype, device=rows.device)
            places = torch.arange(len(rows), device=rows.device)
        dweight = pages.empty(weight.shape, weight.dtype, weight.device, keep=True) if needs[1] else None
        if dweight is not None:  # the blocks below write all other entries
            dweight[source.transform.vocab_size if len(rows) else 0 :].zero_()
        dbias = torch.zeros(len(weight), dtype=self.dtype, device=rows.device) if any(needs[2:]) else None
        for block in self.blocks():
            w = weight[block].to(self.dtype) if sums is not None else None
            accumulated = None if dweight is None else dweight[block].to(self.dtype)  # a view where the dtypes agree
            for group in self.groups():
                dlogits = self.dlogits(group, block)
                if sums is not None and w is not None:
                    dhidden = take_rows(sums, places[group])
                    put_rows(sums, places[group], _add_product(dhidden, dlogits, w))
                if accumulated is not None:
                    beta = 0.0 if group.start == 0 else 1.0
                    torch.addmm(accumulated, dlogits.T, self.student.hidden(group, self.dtype), beta=beta, out=accumulated)
                if dbias is not None:
                    dbias[block] += dlogits.sum(0)
            if dweight is not None and accumulated is not None and accumulated.dtype != dweight.dtype:
                dweight[block] = accumulated.to(dweight.dtype)
        if dleading is not None and sums is not None and sums is not dleading:
            if shard is not None:
                shard.ranks.sum(sums)
            put_rows(dleading, rows, sums)
        if source.bias is None:
            return [dleading, dweight]
        return [dleading, dweight, None if dbias is None else dbias.to(source.bias.dtype)]


# Below this many rows the vendor's matmul splits a long sum badly: 51 rows run 1.4 x as fast split by threads.
FEW_ROWS = 128


def _add_product(total: Tensor, dlogits: Tensor, w: Tensor) -> Tensor:
    """Add dlogits @ w to `total`, in place; (n, D), (n, B), (B, D)."""
    shares = torch.get_num_threads() if w.device.type == "cpu" else 1
    fits = shares * w.shape[1] <= len(w)  # the products take no more than a block of logits, for which there is room
    laid_out = len(w) % shares == 0 and dlogits.T.is_contiguous() and w.is_contiguous()
    if shares > 1 and len(total) <= FEW_ROWS and fits and laid_out:
        return total.add_(torch.bmm(dlogits.T.view(shares, -1, len(total)).mT, w.view(shares, -1, w.shape[1])).sum(0))
    return torch.addmm(total, dlogits, w, out=total)


def selected_loss(
    student: Source,
    teacher: Source | TeacherLists,
    selected: WeightedRows,
    divergence: Divergence,
    workspace: Workspace,
    *,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the losses over the selected positions, connected to the student's tensors, and the (M,) losses.

    `token_stats` computed the rows' statistics from the same tensors.
    """
    assert not inplace
    rows, weights, stats, tokens = selected
    whole, support = divergence.whole, divergence.on_support
    constants = _Constants(rows, *(None,) * (N_CONSTANTS - 1))
    losses: Tensor | None = None
    if whole is not None:
        assert isinstance(teacher, Source)
        reference = Reference.of(stats)
        if isinstance(whole, Summed):
            # A copy: the backward would keep all columns that share its memory.
            reference = reference._replace(top_log_ratio=reference.top_log_ratio.clone())
            sums = summed(whole, student, teacher, rows, reference, workspace)
        else:
            assert whole.column is not None
            assert stats.reverse_kl_excess is not None
            sums = Sums(getattr(stats, whole.column), stats.reverse_kl_excess)
            reference = reference._replace(top_log_ratio=reference.log_ratio)  # the two differ only where a KL is infinite
        losses = sums.losses
        constants = _Constants(rows, sums.mean_slope, *reference, *(None,) * 4)
    if support is not None:
        terms = support_terms(support, student, teacher, rows, tokens, stats, workspace=workspace)
        list_losses = terms.losses.to(terms.dx.dtype)
        losses = list_losses if losses is None else losses + list_losses
        if terms.d_off_list is None and whole is None:
            terms = _raw_terms(student.detach(), rows, terms)
        elif terms.d_off_list is None:
            zeros = torch.zeros_like(list_losses)
            terms = terms._replace(off_list=zeros, d_off_list=zeros)
        constants = constants._replace(ids=terms.ids, dx=terms.dx, off_list=terms.off_list, d_off_list=terms.d_off_list)
    assert losses is not None
    read_teacher = teacher.detach() if isinstance(teacher, Source) and whole is not None else None
    plan = _BlockPlan(
        student.emptied(), None if read_teacher is None else read_teacher.emptied(), whole, workspace, losses.dtype
    )
    tensors = (*constants, *student.tensors, *(() if read_teacher is None else read_teacher.tensors))
    total = connected(plan, losses, *tensors)
    read_again = (student,) if read_teacher is None else (student, read_teacher)
    total = unchanged(total, rows, *read_again, workspace=workspace)
    if may_look(losses) and (not len(losses) or number_in(losses.amax()) < math.inf):  # neither infinite nor NaN
        return (total * weights).sum(), losses
    return weighted_sum(total, without_infinite(losses, weights)), losses


def _raw_terms(student: Source, rows: Tensor, terms: Terms) -> Terms:
    """The terms with `ids` and `dx` of the raw logits: before scale, soft-cap and merging."""
    transform, ids = student.transform, terms.ids
    dx = (terms.dx * logit_slope(terms.x, transform)).masked_fill(terms.x == -math.inf, 0)
    if transform.merged:
        first = transform.merged[0]
        dmerged = terms.dx.masked_fill(ids != first, 0).sum(1, keepdim=True)
        s, parts = merged_logits(student, rows, dx.dtype)
        share = torch.exp(parts - s.masked_fill(s == -math.inf, 0)) * logit_slope(parts, transform)
        ids = torch.cat(
            (ids.masked_fill(ids == first, LAST_ID), *(torch.full_like(ids[:, :1], x) for x in transform.merged)), 1
        )
        dx = torch.cat((dx, dmerged * share), 1)
    return terms._replace(ids=ids, dx=dx)
