"""Dense logits of any leading dimensions as a table that kernels read: row r starts r * stride elements after row 0.

  position (i, j, ...) -> row  i a + j b + ...,  with a, b, ... the leading strides over their greatest common divisor

So kernels read logits[:, :-1] of contiguous logits, or a transpose, in place: nothing of size N V is copied.
Not here: the kernels (opd_kernels), the check that logits have a layout (backend.py: `_refusal`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNED = 16  # elements, row stride of a table of one row: whole 128-bit loads in every dtype


class Layout(NamedTuple):
    """Where the positions of (..., V) logits are in their table."""

    shape: torch.Size  # the leading dimensions
    steps: tuple[int, ...]  # rows from one index to the next, per leading dimension; 0 in a dimension of size 1
    n_rows: int  # of the table, including rows that are no position
    stride: int  # elements from row to row

    @staticmethod
    def of(logits: Tensor) -> Layout | None:
        """The layout of the logits; None if the vocabulary is not contiguous or two rows share memory."""
        shape, vocab = logits.shape[:-1], logits.shape[-1]
        if vocab > 1 and logits.stride(-1) != 1:
            return None
        strides = [stride if size > 1 else 0 for size, stride in zip(shape, logits.stride(), strict=False)]
        if shape.numel() <= 1:
            return Layout(shape, (0,) * len(shape), shape.numel(), ALIGNED)
        reach = vocab  # elements that the dimensions so far span
        for dim in sorted(range(len(shape)), key=lambda dim: strides[dim]):
            stride, size = strides[dim], shape[dim]
            if size > 1 and stride < reach:
                return None
            reach = max(reach, stride * (size - 1) + reach)
        width = math.gcd(*strides)
        if width < vocab:
            return None
        steps = tuple(stride // width for stride in strides)
        n_rows = 1 + sum(step * (size - 1) for step, size in zip(steps, shape, strict=True))
        return Layout(shape, steps, n_rows, width)

    def table(self, logits: Tensor) -> Tensor:
        """(n_rows, V) view of the logits."""
        return logits.as_strided((self.n_rows, logits.shape[-1]), (self.stride, 1))

    def rows(self, positions: Tensor) -> Tensor:
        """The table's rows of flattened positions; `positions` itself where row i is position i."""
        if self._in_order():
            return positions
        rows = torch.zeros_like(positions)
        for size, step in zip(reversed(self.shape), reversed(self.steps), strict=True):
            rows += positions % size * step
            positions = positions // size
        return rows

    def kept(self, rows: Tensor, *, gaps: bool) -> Tensor:
        """(n_rows,) uint8, 1 in the given rows of the table; `gaps`: also in rows that are no position."""
        keep = torch.zeros(self.n_rows, dtype=torch.uint8, device=rows.device)
        if gaps and not self._in_order():
            positions = self.rows(torch.arange(self.shape.numel(), device=rows.device))
            keep.fill_(1).index_fill_(0, positions, 0)
        return keep.index_fill_(0, rows, 1)

    def _in_order(self) -> bool:
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.steps), strict=True):
            if size > 1 and step != expected:
                return False
            expected *= size
        return True

    def empty(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A new table for gradients, (n_rows, V) contiguous and uninitialised, and its view of the shape of the logits.

        It has the same rows between positions as the logits' table: for a slice, autograd would allocate these rows anyway.
        """
        width = logits.shape[-1]
        table = torch.empty((self.n_rows, width), dtype=logits.dtype, device=logits.device)
        return table, table.as_strided(logits.shape, (*(max(1, step) * width for step in self.steps), 1))
