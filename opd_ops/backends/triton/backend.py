"""The Triton backend, `backend="triton"`: statistics and gradients from opd_kernels, on a GPU.

  score + support kernels  -> the columns of TokenStats; both models' logits are read once
  gradient kernel          -> d loss / d logits on the selected rows, every other row zero
  (selection/stats.py and divergences/ define the statistics and losses)

Some losses run by torch's own operations on the same device (backends/streamed/): `Triton.hands_over` says which, the log when.

Not here: dense logits (dense.py, dense_loss.py), heads (heads.py, heads_loss.py), ranks that share out the vocabulary
(shards.py), calls that torch.compile traces (traced.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from opd_ops.backends.interface import Backend, Choice, Cut, Needs, Placed, WeightedRows, is_computed
from opd_ops.backends.streamed.backend import STREAMED
from opd_ops.backends.triton import dense, dense_loss, heads, heads_loss, kernel_loss, selection, shards
from opd_ops.backends.triton.launches import column_names
from opd_ops.backends.triton.layout import Layout
from opd_ops.divergences import Divergence, is_column, weighted_sum
from opd_ops.inputs import float8
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import OwnStats, Scoring, TokenStats

_log = logging.getLogger("opd_ops")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TOP_K = 128


class Triton(Backend):
    """`opd_kernels` on one device, or on this rank's part of the vocabulary."""

    name = "triton"
    drops_weightless_rows = True
    totals = staticmethod(selection.totals)
    _launch_scores = staticmethod(selection.launch_scores)
    _launch_choice = staticmethod(selection.launch_choice)
    _head_loss: ClassVar[Callable[..., tuple[Tensor, Tensor]]] = staticmethod(heads_loss.selected_loss)
    _column_loss: ClassVar[Callable[..., Tensor]] = staticmethod(dense_loss.column_loss)

    def refusal(self, student: Source, teacher: Source | TeacherLists, needs: Needs) -> str | None:
        return _refusal(student, teacher, needs)

    def overwrites_logits(self, student: Source, teacher: Source | TeacherLists, divergence: Divergence) -> bool:
        return student.transform.shard is None and not is_computed(student, teacher) and is_column(divergence)

    def hands_over(self, student: Source, teacher: Source | TeacherLists, divergence: Divergence) -> str | None:
        if student.transform.shard is not None:
            has_kernels = isinstance(teacher, Source) and is_column(divergence)
            return None if has_kernels else "ranks share out the vocabulary"
        return kernel_loss.refusal(divergence)

    def float8_refusal(self, student: Source, teacher: Source | TeacherLists) -> str | None:
        return float8.refusal(*[x.weight for x in (student, teacher) if isinstance(x, Source) and x.weight is not None])

    def scores_selected_rows(self, student: Source, teacher: Source | TeacherLists) -> bool:
        return student.transform.shard is not None or is_computed(student, teacher)

    def token_stats(self, student: Source, teacher: Source, rows: Tensor, scoring: Scoring) -> TokenStats:
        with torch.no_grad():  # not a decorator: torch.compile cannot trace a decorated method
            if student.transform.shard is not None:
                return shards.token_stats(student, teacher, student.transform.shard, rows, scoring)
            table = self._columns(student, teacher, rows, scoring)
            named = zip(column_names(scoring.columns), table.unbind(0), strict=True)
            # The score kernel also writes normalisers, which are no statistics.
            out = {name: column for name, column in named if name in TokenStats._fields}
            return TokenStats(valid=torch.isfinite(out["teacher_logsumexp"]), **out)

    def _columns(self, student: Source, teacher: Source, rows: Tensor, scoring: Scoring) -> Tensor:
        """(columns, n) statistics of the rows, in the order of `column_names`."""
        if is_computed(student, teacher):
            return heads.launch_columns(student.detach(), teacher.detach(), rows, scoring)
        vocab, temperature = student.transform.vocab_size, student.transform.temperature
        return dense.launch_columns(student.leading.detach(), teacher.leading.detach(), rows, scoring, vocab, temperature)

    def placed_stats(
        self,
        student: Source,
        teacher: Source,
        rows: Tensor | None,
        scoring: Scoring,
        *,
        unmasked: Tensor | None,
        selector: str | None,
        loss: str | None,
    ) -> Placed | None:
        if student.transform.shard is not None:
            return None
        n = student.shape.numel()
        with torch.no_grad():
            every_row = torch.arange(n, device=student.leading.device) if rows is None else rows
            table = self._columns(student, teacher, every_row, scoring)
            known = selector if selector is not None and self.scores_by_kernels(selector) else "all"
            mask = None if unmasked is None else selection.bytes_of(unmasked)
            optional = sorted(scoring.columns)
            outputs = self._launch_scores(table, rows, n, mask, known, loss, ",".join(optional))
            return selection.placed(outputs, student.shape, optional)

    def scores_by_kernels(self, selector: str | None) -> bool:
        return selector in selection.SELECTORS

    def makes_ier(self, student: Source) -> bool:
        return student.transform.shard is None

    def choose(self, scores: Tensor, valid: Tensor, infinite: Tensor, cut: Cut) -> Choice | None:
        flags = selection.bytes_of(valid), selection.bytes_of(infinite)
        places = None if cut.places is None else cut.places.reshape(-1)
        keep_scores = None if cut.keep_scores is None else cut.keep_scores.reshape(-1).float().contiguous()
        sequences = cut.length or 0, cut.bounds
        columns = scores.reshape(-1), *flags, *cut.budget.ratio, cut.n_rows
        return selection.choice(self._launch_choice(*columns, *sequences, places, keep_scores))

    def own_stats(self, source: Source, rows: Tensor, scoring: Scoring) -> OwnStats:
        if source.transform.shard is None:
            return heads.own_stats(source, rows, scoring)
        return shards.own_stats(source, source.transform.shard, rows, scoring)

    def selected_loss(
        self,
        student: Source,
        teacher: Source | TeacherLists,
        selected: WeightedRows,
        divergence: Divergence,
        workspace: Workspace,
        *,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        reason = self.hands_over(student, teacher, divergence)
        if reason is not None:
            _log.debug("backend 'triton': the loss %r by backend 'torch' (%s)", divergence.name, reason)
            stats = selected.stats
            if divergence.reads_whole_rows and isinstance(teacher, Source):  # `stats` may come from 16-bit logits
                stats = STREAMED.token_stats(student, teacher, selected.rows, Scoring(1, workspace))
            elif divergence.whole is None:
                stats = stats._replace(reference_teacher=None)
            selected = selected._replace(stats=stats)
            return STREAMED.selected_loss(student, teacher, selected, divergence, workspace, inplace=False)
        assert not inplace or self.overwrites_logits(student, teacher, divergence)
        if student.transform.shard is not None:
            assert isinstance(teacher, Source)
            return shards.selected_loss(student, teacher, student.transform.shard, selected, divergence, workspace)
        if is_computed(student, teacher):
            return self._head_loss(student, teacher, selected, divergence, workspace)
        if not (isinstance(teacher, Source) and is_column(divergence)):
            return dense_loss.computed_loss(student, teacher, selected, divergence, workspace)
        whole = divergence.whole
        assert whole is not None
        losses = getattr(selected.stats, whole.name)
        connected = self._column_loss(student, teacher, selected.rows, losses, whole, workspace, inplace=inplace)
        return weighted_sum(connected, selected.weights), losses


TRITON = Triton()


def _refusal(student: Source, teacher: Source | TeacherLists, needs: Needs) -> str | None:
    """Why this backend cannot run the call, and what to do instead; None if it can."""
    sides = [("student", student)] + ([("teacher", teacher)] if isinstance(teacher, Source) else [])
    models = [(name, model) for name, source in sides for model in (source, *source.others)]
    for name, source in models:
        for tensor in (source.leading, source.leading if source.weight is None else source.weight):
            if tensor.dtype not in DTYPES:
                return f"{name} has dtype {tensor.dtype}, expected fp32, bf16 or fp16; 'torch' and 'eager' take it"
        if source.weight is not None and source.weight.dtype != source.leading.dtype:
            return (
                f"{name} has hidden states of {source.leading.dtype} and a weight of {source.weight.dtype}, expected one "
                "dtype; pass hidden.to(weight.dtype) or weight.to(hidden.dtype), or use 'torch'"
            )
        if source.transform.merged:
            return f"{name} has merged ids (eos_ids), which kernels do not read; use 'torch'"
    if needs.top_k > MAX_TOP_K:
        return f"top_k is {needs.top_k}, expected at most {MAX_TOP_K}; use 'torch'"
    if is_computed(*(source for _, source in sides)):
        return None
    layouts = []
    if not student.transform.vocab_size:  # a rank without a part of the vocabulary reads no logits
        return None
    for name, source in sides:
        layout = Layout.of(source.leading)
        if layout is None:
            return (
                f"{name} has strides {source.leading.stride()}, expected stride 1 along the vocabulary and no memory shared "
                "between positions; pass .contiguous() logits, or use 'torch'"
            )
        layouts.append(layout)
    if layouts[0].steps != layouts[-1].steps:
        return (
            f"student and teacher lay their positions out differently (strides {sides[0][1].leading.stride()} and "
            f"{sides[-1][1].leading.stride()}); pass .contiguous() logits on both sides, or use 'torch'"
        )
    return None
