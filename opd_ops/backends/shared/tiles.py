"""Rows of one model, read block by block of the vocabulary: stored or computed, mixed with a reference, with ids merged.

  (what a source stands for: inputs/sources.py)

Not here: a few ids of a row (shared/logits_at.py), what is made of the logits (backend.py, loss.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_ops.backends.shared.chunks import chunks
from opd_ops.backends.shared.logits_at import merged_logits
from opd_ops.inputs.sources import Source, finish_logits, mix_logits, take_rows


class Rows:
    """The given positions of one model, read block by block of the vocabulary in the compute dtype."""

    def __init__(self, source: Source, rows: Tensor, dtype: torch.dtype, cast_columns: int) -> None:
        self.source, self.rows, self.dtype, self.cast_columns = source, rows, dtype, cast_columns
        self.reference = None if source.reference is None else Rows(source.reference, rows, dtype, cast_columns)
        self._group: slice | None = None
        self._hidden: Tensor | None = None
        self._merged: tuple[slice, Tensor, Tensor] | None = None

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
        self._fill(group, columns, block)
        if self.reference is not None:
            beside = self.reference.read(group, columns, torch.empty_like(out[: n * width]), by_column=by_column)
            mix_logits(block, beside, self.source.transform.lam)
        for i, place in self.merged_in(columns):
            if i:
                block[:, place].fill_(-torch.inf)
            else:
                block[:, place].copy_(self.merged(group)[0].squeeze(1))
        return block

    def _fill(self, group: slice, columns: slice, block: Tensor) -> None:
        if not self.source.transform.is_head:
            block.copy_(take_rows(self.source.leading[..., columns], self.rows[group]))
        else:
            for part in chunks(columns, self.cast_columns):
                into = block[:, part.start - columns.start : part.stop - columns.start]
                torch.mm(self.hidden(group), self.weight(part).T, out=into)
            if self.source.bias is not None:
                block.add_(self.source.bias[columns])
        finish_logits(block, self.source.transform, self.source.stored_dtype)

    def merged_in(self, columns: slice) -> list[tuple[int, int]]:
        """Which merged ids (their number in the list) are in the block, and at which of its columns."""
        merged = self.source.transform.merged
        return [(i, v - columns.start) for i, v in enumerate(merged) if columns.start <= v < columns.stop]

    def merged(self, group: slice) -> tuple[Tensor, Tensor]:
        """(n, 1) logit of the merged ids and (n, E) of each, kept until other rows are asked for."""
        if self._merged is None or self._merged[0] != group:
            self._merged = (group, *merged_logits(self.source, self.rows[group], self.dtype))
        return self._merged[1:]
