"""Positions of one model as tiles of logits for kernels: copied, computed by the vendor's matmul, or mixed with a reference's.

  A tile holds stored logits; what they still have to go through is its `transform`.

Not here: sizes (shared/workspace.py), what kernels do on a tile (heads.py, heads_loss.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from opd_ops.backends.triton.matmul import head_product
from opd_ops.backends.triton.workspace import padded, tile_dtype
from opd_ops.inputs import float8
from opd_ops.inputs.float8 import Float8Rows
from opd_ops.inputs.sources import Source, Transform, finish_logits, mix_logits, take_rows


class Side:
    """Some positions of one model, whose stored logits are copied or computed into a buffer."""

    def __init__(self, source: Source, rows: Tensor, cast_bytes: int, score_dtype: torch.dtype | None = None) -> None:
        self.in_float8 = source.transform.is_head and score_dtype == float8.DTYPE
        self.source = source.in_float8() if self.in_float8 else source
        self.rows, self.cast_bytes = rows, cast_bytes
        self.tile_dtype = tile_dtype(source, score_dtype)
        self.reference = None if source.reference is None else Side(source.reference, rows, cast_bytes)

    @property
    def transform(self) -> Transform:
        """What the stored logits still have to go through: of mixed ones, which are finished but for it, the temperature."""
        found = self.source.transform
        return found if self.reference is None else Transform(True, found.vocab_size, found.temperature)

    def hidden(self, part: slice) -> Tensor:
        return take_rows(self.source.leading, self.rows[part])

    def read(self, part: slice, columns: slice, out: Tensor) -> Tensor:
        """Stored logits (n, B) of a part of the rows, in `out`."""
        if self.reference is None:
            return self._read(part, columns, out)
        mixed, beside = self._read(part, columns, out), self.reference._read(part, columns, torch.empty_like(out))
        for x, side in ((mixed, self), (beside, self.reference)):
            finish_logits(x, replace(side.source.transform, temperature=1.0), side.source.stored_dtype)
        return mix_logits(mixed, beside, self.source.transform.lam)

    def _read(self, part: slice, columns: slice, out: Tensor) -> Tensor:
        leading, weight, bias = self.source.leading, self.source.weight, self.source.bias
        if weight is None:
            return out.copy_(take_rows(leading[..., columns], self.rows[part]))
        of_bias = None if bias is None else bias[columns]
        return head_product(self.hidden(part), weight[columns], of_bias, out, cast_bytes=self.cast_bytes)

    def tile(self, part: slice, out: Tensor) -> Tensor:
        """Stored logits (n, V) of a part of the rows, as positions are ranked by them, in `out` of `_buffer`."""
        vocab = self.source.transform.vocab_size
        if not self.in_float8:
            return self.read(part, slice(0, vocab), out[:, :vocab])
        assert self.source.float8 is not None
        values, scales = (x[: out.shape[1]] for x in self.source.float8)
        float8.product(Float8Rows.of(self.hidden(part)), Float8Rows(values, scales), out)
        return out[:, :vocab] if self.source.bias is None else out[:, :vocab].add_(self.source.bias[:vocab])


def buffer_of(rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, V or a little more), so that every row is aligned."""
    return torch.empty((rows, padded(vocab_size)), dtype=dtype, device=device)
