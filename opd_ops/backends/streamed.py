# The streamed backend, `backend="torch"`: exact statistics and gradients on any device in bounded memory.
#
#   score:    tiles of rows x blocks of the vocabulary, one sweep of both heads          2 head-matmul units
#   backward: the selected rows once more (2 rho), then dH and dW (2 rho), block by block of the vocabulary
#   (one unit = 2 N V D FLOP; statistics and gradients are those of stats.py and divergences.py)
#
# The loss value is the score pass's own column, so the forward does no second matmul. Its normalisers make the backward one
# sweep: every vocabulary block is finished alone, dW is written once, in one fp32 accumulation over all rows, and nothing of
# size V is saved. Nothing is computed in the forward that the backward scales: retain_graph recomputes.
# Not here: sums of a block (running.py), top-K (top_k.py, supports.py), the size of tiles and blocks (tiling.py).
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_ops.backends import pages
from opd_ops.backends.running import RunningSums, block_sums, row_jsd
from opd_ops.backends.supports import support_columns
from opd_ops.backends.tiling import ScoreGrid, gradient_grid, score_grid
from opd_ops.backends.top_k import TopK, extended
from opd_ops.divergences import Divergence, weighted_sum
from opd_ops.sources import Source, Transform, compute_dtype, finish_logits, logit_slope, put_rows, take_rows
from opd_ops.stats import OPTIONAL_COLUMNS, OwnStats, TokenStats


class _Rows:
    """The given positions of one model, read block by block of the vocabulary in the compute dtype."""

    def __init__(self, source: Source, rows: Tensor, dtype: torch.dtype, cast_columns: int) -> None:
        self.source, self.rows, self.dtype, self.cast_columns = source, rows, dtype, cast_columns
        self._group: slice | None = None
        self._hidden: Tensor | None = None

    def hidden(self, group: slice) -> Tensor:
        """(n, D) hidden states of some of the rows, kept until other rows are asked for."""
        if self._hidden is None or group != self._group:
            self._hidden = None  # two groups' at once would exceed the workspace
            self._group, self._hidden = group, take_rows(self.source.leading, self.rows[group]).to(self.dtype)
        return self._hidden

    def weight(self, columns: slice) -> Tensor:
        """(B, D) of the head in the compute dtype; a view where it has that dtype already."""
        assert self.source.weight is not None
        return self.source.weight[columns].to(self.dtype)

    def read(self, group: slice, columns: slice, out: Tensor, *, by_column: bool = False) -> Tensor:
        """(n, B) logits of some of the rows, written into the flat buffer `out`, row by row or column by column."""
        n, width = group.stop - group.start, columns.stop - columns.start
        block = out[: n * width].view(width, n).T if by_column else out[: n * width].view(n, width)
        if not self.source.transform.is_head:
            block.copy_(take_rows(self.source.leading[..., columns], self.rows[group]))
            return finish_logits(block, self.source.transform)
        for part in _slices(columns, self.cast_columns):
            into = block[:, part.start - columns.start : part.stop - columns.start]
            torch.mm(self.hidden(group), self.weight(part).T, out=into)
        if self.source.bias is not None:
            block.add_(self.source.bias[columns])
        return finish_logits(block, self.source.transform)


def _slices(within: slice, size: int) -> Iterator[slice]:
    for start in range(within.start, within.stop, size):
        yield slice(start, min(start + size, within.stop))


@torch.no_grad()
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
    """All statistics of the given positions, (n,) each, from one sweep of both heads; always in the compute dtype."""
    dtype = compute_dtype(student, teacher)
    grid = score_grid(student, teacher, len(rows), top_k=top_k, whole_rows="jsd" in columns, workspace_bytes=workspace_bytes)
    size = grid.rows * grid.columns
    buffers = [pages.empty((size,), dtype, rows.device) for _ in range(2)]
    scratch = torch.empty(3 * grid.chunk * grid.columns, dtype=dtype, device=rows.device)
    out = {name: torch.zeros(len(rows), dtype=dtype, device=rows.device) for name in _computed(columns)}
    with torch.autocast(rows.device.type, enabled=False):
        for part in _slices(slice(0, len(rows)), grid.rows):
            sides = [_Rows(source.detach(), rows[part], dtype, grid.cast_columns) for source in (student, teacher)]
            for name, column in _tile_stats(sides[0], sides[1], grid, top_k, columns, buffers, scratch).items():
                out[name][part] = column
    return TokenStats(valid=torch.isfinite(out["teacher_logsumexp"]), **out)


@torch.no_grad()
def own_stats(source: Source, rows: Tensor, *, top_k: int, workspace_bytes: int, score_dtype: torch.dtype | None) -> OwnStats:
    """One model's statistics at the rows, from one sweep of its head."""
    dtype = compute_dtype(source)
    grid = score_grid(source, source, len(rows), top_k=top_k, whole_rows=False, workspace_bytes=workspace_bytes)
    buffer = pages.empty((grid.rows * grid.columns,), dtype, rows.device)
    scratch = torch.empty(3 * grid.chunk * grid.columns, dtype=dtype, device=rows.device)
    found = []
    with torch.autocast(rows.device.type, enabled=False):
        for part in _slices(slice(0, len(rows)), grid.rows):
            side = _Rows(source.detach(), rows[part], dtype, grid.cast_columns)
            everyone, sums = slice(0, len(side.rows)), RunningSums(len(side.rows), rows.device)
            best: TopK | None = None
            for block in _slices(slice(0, source.transform.vocab_size), grid.columns):
                u = side.read(everyone, block, buffer)
                best = extended(best, u, u, top_k, block.start, grid.candidates)
                top = best.own[:, 0]
                sums.add(block_sums(u, u, top, top, top, scratch))  # as both models: its price is that of two
            assert best is not None
            columns = sums.columns()
            found.append(OwnStats(columns["teacher_logsumexp"], columns["teacher_entropy"], best.ids, best.own))
    if not found:
        none = torch.empty(0, dtype=dtype, device=rows.device)
        return OwnStats(none, none, rows.new_empty(0, top_k), none.view(0, 1).expand(0, top_k))
    return OwnStats(*(torch.cat(column) for column in zip(*found, strict=True)))


def _computed(columns: frozenset[str]) -> list[str]:
    return [name for name in TokenStats._fields if name != "valid" and (name not in OPTIONAL_COLUMNS or name in columns)]


def _tile_stats(
    student: _Rows,
    teacher: _Rows,
    grid: ScoreGrid,
    top_k: int,
    columns: frozenset[str],
    buffers: list[Tensor],
    scratch: Tensor,
) -> dict[str, Tensor]:
    """The columns of one tile of rows, (n,) fp64 each, from one sweep over the vocabulary."""
    rows = slice(0, len(student.rows))
    sums = RunningSums(rows.stop, student.rows.device)
    s_list: TopK | None = None
    t_list: TopK | None = None
    out: dict[str, Tensor] = {}
    for block in _slices(slice(0, student.source.transform.vocab_size), grid.columns):
        s, u = student.read(rows, block, buffers[0]), teacher.read(rows, block, buffers[1])
        s_list = extended(s_list, s, u, top_k, block.start, grid.candidates)
        t_list = extended(t_list, u, s, top_k, block.start, grid.candidates)
        if "jsd" in columns:  # the grid has one block, as wide as the vocabulary
            out["jsd"] = torch.cat([row_jsd(s[chunk], u[chunk]) for chunk in _slices(rows, grid.chunk)])
        best = s_list.own[:, 0], s_list.other[:, 0], t_list.own[:, 0]
        sums.add(block_sums(s, u, *best, scratch))
    assert s_list is not None
    assert t_list is not None
    out |= sums.columns()
    s_lse, t_lse = out["student_logsumexp"], out["teacher_logsumexp"]
    parts = [
        support_columns(s_list.rows(part), t_list.rows(part), s_lse[part], t_lse[part], columns)
        for part in _slices(rows, grid.list_rows)
    ]
    return out | {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class _Plan:
    """What the backward needs beside tensors."""

    student: Transform
    teacher: Transform
    n_student: int  # tensors of the student, before the teacher's
    divergence: Divergence
    workspace_bytes: int


class _SelectedDivergence(torch.autograd.Function):
    """(M,) losses whose gradient with respect to the student's tensors is computed in the backward, from the inputs."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, rows: Tensor, losses: Tensor, lse: Tensor, gap: Tensor, *tensors: Tensor) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(rows, losses, lse, gap, *tensors)
        return losses.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        rows, losses, lse, gap, *tensors = ctx.saved_tensors
        split = plan.n_student
        student, teacher = Source.made(plan.student, tensors[:split]), Source.made(plan.teacher, tensors[split:])
        needs = ctx.needs_input_grad[5 : 5 + split]
        selected = _Selected(student, teacher, rows, losses, lse, gap, dlosses, plan)
        with torch.autocast(rows.device.type, enabled=False):
            gradients = selected.head_gradients(needs) if student.transform.is_head else selected.logit_gradient()
        return (None,) * 5 + tuple(gradients) + (None,) * (len(tensors) - split)


class _Selected:
    """The selected rows of one backward: the logits again, block by block, and the gradients they give."""

    def __init__(
        self,
        student: Source,
        teacher: Source,
        rows: Tensor,
        losses: Tensor,
        lse: Tensor,
        gap: Tensor,
        dlosses: Tensor,
        plan: _Plan,
    ) -> None:
        self.dtype = compute_dtype(student, teacher)
        self.grid = gradient_grid(student, teacher, len(rows), workspace_bytes=plan.workspace_bytes)
        self.student = _Rows(student, rows, self.dtype, self.grid.columns)
        self.teacher = _Rows(teacher, rows, self.dtype, self.grid.columns)
        self.by_column = student.transform.is_head and teacher.transform.is_head
        self.divergence = plan.divergence
        self.losses, self.lse, self.gap, self.dlosses = (x.unsqueeze(1) for x in (losses, lse, gap, dlosses))
        size = self.grid.rows * self.grid.columns
        self.buffers = [pages.empty((size,), self.dtype, rows.device) for _ in range(2)]

    def blocks(self) -> Iterator[slice]:
        return _slices(slice(0, self.student.source.transform.vocab_size), self.grid.columns)

    def groups(self) -> Iterator[slice]:
        return _slices(slice(0, len(self.student.rows)), self.grid.rows)

    def dlogits(self, group: slice, block: slice) -> Tensor:
        """(n, B) gradient of the weighted losses with respect to the student's raw logits, before scale and soft-cap."""
        # Few rows: a matmul whose result has them as its columns is up to 1.6 x as fast (benchmarks/LOG.md).
        s = self.student.read(group, block, self.buffers[0], by_column=self.by_column)
        u = self.teacher.read(group, block, self.buffers[1], by_column=self.by_column)
        absent = s == -math.inf
        slope = logit_slope(s, self.student.source.transform)
        log_ratio = torch.sub(s, u, out=u).sub_(self.gap[group])
        grad = self.divergence.dlogits(s.sub_(self.lse[group]), log_ratio, self.losses[group])
        # p = 0 gives 0, by a fill: the formula there is 0 * inf.
        return grad.mul_(self.dlosses[group]).mul_(slope).masked_fill_(absent, 0.0)

    def logit_gradient(self) -> tuple[Tensor]:
        """Gradient of dense logits: the selected rows filled in, all others exactly zero."""
        logits = self.student.source.leading
        dense = torch.zeros_like(logits)  # of the same strides, else autograd would copy it to a leaf of other strides
        for block in self.blocks():
            for group in self.groups():
                put_rows(dense[..., block], self.student.rows[group], self.dlogits(group, block))
        return (dense,)

    def head_gradients(self, needs: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of hidden, weight and bias, each only if needed, in the parameters' dtypes."""
        source, rows = self.student.source, self.student.rows
        assert source.weight is not None
        dleading = torch.zeros_like(source.leading) if needs[0] else None
        sums, places = dleading, rows
        if dleading is not None and dleading.dtype != self.dtype:  # 16 bits would round after every block
            sums = torch.zeros((len(rows), source.leading.shape[-1]), dtype=self.dtype, device=rows.device)
            places = torch.arange(len(rows), device=rows.device)
        dweight = pages.empty(source.weight.shape, source.weight.dtype, source.weight.device) if needs[1] else None
        if dweight is not None:  # each block is written whole; entries beyond the common vocabulary, or with no row, are not
            dweight[source.transform.vocab_size if len(rows) else 0 :].zero_()
        dbias = torch.zeros(len(source.weight), dtype=self.dtype, device=rows.device) if any(needs[2:]) else None
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
    teacher: Source,
    rows: Tensor,
    weights: Tensor,
    stats: TokenStats,
    *,
    divergence: Divergence,
    workspace_bytes: int,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the divergence over the selected positions, connected to the student's tensors, and its (M,) terms.

    `stats` are the selected positions' own, as `token_stats` computed them from the same tensors.
    """
    assert not inplace
    teacher = teacher.detach()
    plan = _Plan(student.transform, teacher.transform, len(student.tensors), divergence, workspace_bytes)
    losses = getattr(stats, divergence.column)
    constants = losses, stats.student_logsumexp, stats.logsumexp_gap
    connected: Tensor = _SelectedDivergence.apply(plan, rows, *constants, *student.tensors, *teacher.tensors)
    return weighted_sum(connected, weights), losses
