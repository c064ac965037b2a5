"""The loss of the streamed backend: the selected rows once more, block by block of the vocabulary, and the gradients they give.

  forward:  reverse and forward KL: the score pass's own column, no matmul; other divergences sweep the selected rows for what
            they sum: both models once (`Summed`, 2 rho), or one at a time (`OnSupport`, rho each; docs/features.md)
  backward: the rows' logits again (2 rho; rho where the gradient does not read the teacher), then dH and dW (2 rho)

With the normalisers known, the backward is one sweep: every block is finished alone, dW is written once, in one fp32
accumulation over all rows. Nothing is computed in the forward that the backward scales: retain_graph recomputes.
A divergence on a list alone (`local_support`) has a gradient at few columns: only those are multiplied.
Where ranks share out the vocabulary, each makes the gradient of its part; those of the hidden states are added up over the
ranks, one all-reduce of (M, D) numbers.
Not here: lists (shared/list_losses.py), sums over the vocabulary (summed.py), the score pass (backend.py), the size of blocks
(shared/workspace.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_ops.backends.shared import pages
from opd_ops.backends.shared.chunks import chunks
from opd_ops.backends.shared.first_order import first_order
from opd_ops.backends.shared.list_losses import Terms
from opd_ops.backends.shared.logits_at import merged_logits
from opd_ops.backends.shared.overwritten import unchanged
from opd_ops.backends.shared.tiles import Rows
from opd_ops.backends.shared.workspace import gradient_grid
from opd_ops.backends.streamed.list_gradients import listed_gradients
from opd_ops.backends.streamed.list_losses import support_terms
from opd_ops.backends.streamed.off_list import places_in, without_ids
from opd_ops.backends.streamed.reference import Reference
from opd_ops.backends.streamed.summed import Sums, summed
from opd_ops.divergences import Divergence, Summed, WholeRow, weighted_sum, without_infinite
from opd_ops.inputs.sources import Source, logit_slope, put_rows, take_rows
from opd_ops.inputs.teacher_lists import LAST_ID, TeacherLists
from opd_ops.selection.stats import TokenStats


@dataclass(frozen=True)
class _Plan:
    """What the backward needs beside tensors; the sources are without theirs."""

    student: Source
    teacher: Source | None  # None: the gradient does not read it
    whole: WholeRow | None
    workspace_bytes: int
    dtype: torch.dtype  # computed in


class _Constants(NamedTuple):
    """What the gradient needs of each selected row, (M, ...); None: of a part that the divergence does not have."""

    rows: Tensor
    mean_slope: Tensor | None  # for a divergence over the whole row, with the reference
    reference_student: Tensor | None
    reference_teacher: Tensor | None
    reference_log_p: Tensor | None
    reference_log_ratio: Tensor | None
    top_log_ratio: Tensor | None
    ids: Tensor | None  # for one on a list
    dx: Tensor | None
    rest: Tensor | None
    drest: Tensor | None

    @property
    def is_list_alone(self) -> bool:
        """Whether the gradient is zero off the lists; `ids` and `dx` are then those of the raw logits."""
        return self.mean_slope is None and self.drest is None

    @property
    def reference(self) -> Reference:
        columns = self[2:7]
        return Reference(*columns)  # type: ignore[arg-type]

    def group(self, name: str, group: slice) -> Tensor:
        column: Tensor = getattr(self, name)[group]
        return column.unsqueeze(1) if column.dim() == 1 else column


N_CONSTANTS = len(_Constants._fields)


class _SelectedDivergence(torch.autograd.Function):
    """(M,) losses whose gradient with respect to the student's tensors is computed in the backward, from the inputs."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, losses: Tensor, *tensors: Tensor) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(*tensors)
        return losses.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        plan, saved = ctx.plan, ctx.saved_tensors
        split = N_CONSTANTS + len(plan.student.tensors)
        student = plan.student.with_tensors(saved[N_CONSTANTS:split])
        teacher = None if plan.teacher is None else plan.teacher.with_tensors(saved[split:])
        needs, of = ctx.needs_input_grad[2 + N_CONSTANTS : 2 + split], _Constants(*saved[:N_CONSTANTS])
        with torch.autocast(dlosses.device.type, enabled=False):
            gradients: list[Tensor | None]
            if of.is_list_alone:
                everyone = slice(0, len(of.rows))
                ids, dx = of.group("ids", everyone), of.group("dx", everyone) * dlosses.unsqueeze(1)
                dx = dx.masked_fill_((dlosses == 0).unsqueeze(1), 0)
                gradients = listed_gradients(student, of.rows, ids, dx, needs, plan.workspace_bytes)
            else:
                selected = _Selected(student, teacher, of, dlosses, plan)
                gradients = selected.head_gradients(needs) if student.transform.is_head else [selected.logit_gradient()]
        return (None,) * (2 + N_CONSTANTS) + tuple(gradients) + (None,) * (len(saved) - split)


class _Selected:
    """The selected rows of one backward: the logits again, block by block, and the gradients they give."""

    def __init__(self, student: Source, teacher: Source | None, of: _Constants, dlosses: Tensor, plan: _Plan) -> None:
        beside = student if teacher is None else teacher
        self.of, self.whole, self.dtype = of, plan.whole, plan.dtype
        has_both = plan.whole is not None and of.ids is not None
        self.grid = gradient_grid(student, beside, len(of.rows), workspace_bytes=plan.workspace_bytes, two_parts=has_both)
        self.student = Rows(student, of.rows, self.dtype, self.grid.columns)
        self.teacher = None if teacher is None else Rows(teacher, of.rows, self.dtype, self.grid.columns)
        self.by_column = student.transform.is_head and beside.transform.is_head
        self.dlosses = dlosses.unsqueeze(1)
        size = self.grid.rows * self.grid.columns
        self.buffers = [pages.empty((size,), self.dtype, of.rows.device) for _ in range(1 if teacher is None else 2)]

    def blocks(self) -> Iterator[slice]:
        return chunks(self.student.source.transform.vocab_size, self.grid.columns)

    def groups(self) -> Iterator[slice]:
        return chunks(len(self.of.rows), self.grid.rows)

    def dlogits(self, group: slice, block: slice) -> Tensor:
        """(n, B) gradient of the weighted losses with respect to the student's raw logits, before scale and soft-cap."""
        # Few rows: a matmul whose result has them as its columns is up to 1.6 x as fast (benchmarks/LOG.md).
        s = self.student.read(group, block, self.buffers[0], by_column=self.by_column)
        u = None if self.teacher is None else self.teacher.read(group, block, self.buffers[1], by_column=self.by_column)
        nothing = (s == -math.inf).logical_or_(self.dlosses[group] == 0)
        slope = logit_slope(s, self.student.source.transform)
        # p = 0 gives 0, and so does a weight of 0, by a fill: the formula there is 0 * inf.
        first_id = self.student.source.transform.first_id + block.start
        grad = self._of_logits(s, u, group, first_id).mul_(self.dlosses[group]).mul_(slope).masked_fill_(nothing, 0.0)
        for i, place in self.student.merged_in(block):
            grad[:, place] = self._of_merged(group)[:, i]
        return grad

    def _of_logits(self, s: Tensor, u: Tensor | None, group: slice, first_id: int) -> Tensor:
        """(n, B) d losses / d logits of a block whose first column has the id `first_id`; s and u are overwritten."""
        total = None
        if self.of.ids is not None:
            total = self._of_list(s.clone() if self.whole is not None else s, group, first_id)
        if self.whole is not None:
            assert u is not None
            reference = self.of.reference.rows(group)
            reference_slope = self.whole.slope(reference.log_p, reference.top_log_ratio)
            log_p, log_ratio = reference.log_probabilities(s, u)
            of_row = self.whole.dlogits(log_p, log_ratio, reference_slope, self.of.group("mean_slope", group))
            total = of_row if total is None else total.add_(of_row)
        assert total is not None
        return total

    def _of_list(self, s: Tensor, group: slice, first_id: int) -> Tensor:
        """dx at the ids, and drest times the softmax of the rest off them; in place of s."""
        ids, dx = self.of.group("ids", group), self.of.group("dx", group)
        reference = self.of.group("rest", group).to(self.dtype)
        off = without_ids(s, ids, first_id).sub_(reference.masked_fill(reference == -math.inf, 0))
        off.exp_().mul_(self.of.group("drest", group))
        places, inside = places_in(ids, first_id, s.shape[1])
        return s.scatter_add_(1, places, dx.masked_fill(~inside, 0))

    def _of_merged(self, group: slice) -> Tensor:
        """(n, E) gradient of the raw logits that were merged: each has its share of the one's."""
        s, each = self.student.merged(group)
        u = None if self.teacher is None else self.teacher.merged(group)[0].clone()
        first = self.student.source.transform.merged[0]
        nothing = (s == -math.inf) | (self.dlosses[group] == 0)
        of_one = self._of_logits(s.clone(), u, group, first).mul_(self.dlosses[group]).masked_fill_(nothing, 0)
        share = torch.exp(each - s.masked_fill(s == -math.inf, 0))
        return of_one * share * logit_slope(each, self.student.source.transform)

    def logit_gradient(self) -> Tensor:
        """Gradient of dense logits: the selected rows filled in, all others exactly zero."""
        logits = self.student.source.leading
        dense = torch.zeros_like(logits)  # of the same strides, else autograd would copy it to a leaf of other strides
        for block in self.blocks():
            for group in self.groups():
                put_rows(dense[..., block], self.student.rows[group], self.dlogits(group, block))
        return dense

    def head_gradients(self, needs: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of hidden, weight and bias, each only if needed, in the parameters' dtypes."""
        source, rows, shard = self.student.source, self.of.rows, self.student.source.transform.shard
        weight = source.weight
        assert weight is not None
        dleading = torch.zeros_like(source.leading) if needs[0] else None
        sums, places = dleading, rows
        if dleading is not None and (dleading.dtype != self.dtype or shard is not None):
            # 16 bits would round after every block; and other ranks' sums are of these rows alone.
            sums = torch.zeros((len(rows), source.leading.shape[-1]), dtype=self.dtype, device=rows.device)
            places = torch.arange(len(rows), device=rows.device)
        dweight = pages.empty(weight.shape, weight.dtype, weight.device, keep=True) if needs[1] else None
        if dweight is not None:  # each block is written whole; entries beyond the common vocabulary, or with no row, are not
            dweight[source.transform.vocab_size if len(rows) else 0 :].zero_()
        dbias = torch.zeros(len(weight), dtype=self.dtype, device=rows.device) if any(needs[2:]) else None
        for block in self.blocks():
            w = self.student.weight(block) if sums is not None else None
            accumulated = None if dweight is None else dweight[block].to(self.dtype)  # a view where the dtypes agree
            for group in self.groups():
                dlogits = self.dlogits(group, block)
                if sums is not None and w is not None:
                    dhidden = take_rows(sums, places[group])
                    put_rows(sums, places[group], _add_product(dhidden, dlogits, w))
                if accumulated is not None:
                    beta = 0.0 if group.start == 0 else 1.0
                    torch.addmm(accumulated, dlogits.T, self.student.hidden(group), beta=beta, out=accumulated)
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


# Below this many rows the vendor's matmul splits a long sum badly: 51 rows run 1.4 x as fast with a share of it a thread.
FEW_ROWS = 128


def _add_product(total: Tensor, dlogits: Tensor, w: Tensor) -> Tensor:
    """total + dlogits @ w, in place: (n, D) of (n, B) and (B, D)."""
    shares = torch.get_num_threads() if w.device.type == "cpu" else 1
    fits = shares * w.shape[1] <= len(w)  # the shares' products take no more than a block of logits: the workspace has room
    laid_out = len(w) % shares == 0 and dlogits.T.is_contiguous() and w.is_contiguous()
    if shares > 1 and len(total) <= FEW_ROWS and fits and laid_out:
        return total.add_(torch.bmm(dlogits.T.view(shares, -1, len(total)).mT, w.view(shares, -1, w.shape[1])).sum(0))
    return torch.addmm(total, dlogits, w, out=total)


def selected_loss(
    student: Source,
    teacher: Source | TeacherLists,
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
    assert not inplace
    whole, support = divergence.whole, divergence.support
    of = _Constants(rows, *(None,) * (N_CONSTANTS - 1))
    losses: Tensor | None = None
    if whole is not None:
        assert isinstance(teacher, Source)
        reference = Reference.of(stats)
        if isinstance(whole, Summed):
            sums = summed(whole, student, teacher, rows, reference, workspace_bytes)
        else:
            assert whole.column is not None
            assert stats.reverse_kl_excess is not None
            sums = Sums(getattr(stats, whole.column), stats.reverse_kl_excess)
            reference = reference._replace(top_log_ratio=reference.log_ratio)  # where these differ, a KL is infinite
        losses = sums.losses
        of = _Constants(rows, sums.mean_slope, *reference, *(None,) * 4)
    if support is not None:
        terms = support_terms(support, student, teacher, rows, tokens, workspace_bytes=workspace_bytes)
        of_list = terms.losses.to(terms.dx.dtype)
        losses = of_list if losses is None else losses + of_list
        if terms.drest is None:
            nothing = torch.zeros_like(of_list)
            alone = whole is None
            terms = terms._replace(rest=nothing, drest=nothing) if not alone else _of_raw_logits(student.detach(), rows, terms)
        of = of._replace(ids=terms.ids, dx=terms.dx, rest=terms.rest, drest=terms.drest)
    assert losses is not None
    beside = teacher.detach() if isinstance(teacher, Source) and whole is not None else None
    plan = _Plan(student.emptied(), None if beside is None else beside.emptied(), whole, workspace_bytes, losses.dtype)
    tensors = (*of, *student.tensors, *(() if beside is None else beside.tensors))
    connected: Tensor = _SelectedDivergence.apply(plan, losses, *tensors)
    read_again = (student,) if beside is None else (student, beside)
    connected = unchanged(connected, rows, *read_again, workspace_bytes=workspace_bytes)
    return weighted_sum(connected, without_infinite(losses, weights)), losses


def _of_raw_logits(student: Source, rows: Tensor, terms: Terms) -> Terms:
    """The same with ids and gradient of the raw logits, before scale, soft-cap and merging."""
    transform, ids = student.transform, terms.ids
    dx = (terms.dx * logit_slope(terms.x, transform)).masked_fill(terms.x == -math.inf, 0)
    if transform.merged:
        first = transform.merged[0]
        of_one = terms.dx.masked_fill(ids != first, 0).sum(1, keepdim=True)
        s, each = merged_logits(student, rows, dx.dtype)
        share = torch.exp(each - s.masked_fill(s == -math.inf, 0)) * logit_slope(each, transform)
        ids = torch.cat(
            (ids.masked_fill(ids == first, LAST_ID), *(torch.full_like(ids[:, :1], x) for x in transform.merged)), 1
        )
        dx = torch.cat((dx, of_one * share), 1)
    return terms._replace(ids=ids, dx=dx)
