"""One model's logits at given positions, read as tiles: some of the rows, some columns of the vocabulary.

  stored   the kernels' input: logits before scale, soft-cap and temperature, which are in `transform`
  logits   finished, with merged ids (inputs/sources.py defines a source's logits)

A tile is a copy of logits, or a matmul (matmul.py). The logits of a mixture are mixed in it, one model after another.
Not here: a few ids of a row (logits_at.py), sizes of tiles (grids.py), the work on a tile (streamed/, triton/).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from opd_ops.backends.shared.grids import padded
from opd_ops.backends.shared.logits_at import merged_logits
from opd_ops.backends.shared.matmul import head_product, operand_dtype
from opd_ops.inputs import float8
from opd_ops.inputs.float8 import Float8Rows
from opd_ops.inputs.sources import Source, Transform, finish_logits, mix, take_rows


class TileReader:
    """Reads tiles of one model at the given positions.

    `dtype`: of the tiles. `cast_columns`: how many columns of a weight to convert at a time, where the matmul needs another
    dtype. `in_float8`: `ranked` uses an 8-bit matmul.
    """

    def __init__(self, source: Source, rows: Tensor, dtype: torch.dtype, cast_columns: int, *, in_float8: bool = False) -> None:
        self.in_float8 = in_float8 and source.transform.mixing is None  # a mixture ranks by the models' own dtypes
        self.source = source.in_float8() if self.in_float8 else source
        self.rows, self.dtype, self.cast_columns = rows, dtype, cast_columns
        self.others = [TileReader(other, rows, dtype, cast_columns) for other in source.others]
        self._hidden: tuple[slice, torch.dtype, Tensor] | None = None
        self._merged: tuple[slice, Tensor, Tensor] | None = None

    @property
    def transform(self) -> Transform:
        """The transform from stored to finished logits; mixed logits lack only the temperature."""
        own = self.source.transform
        return own if own.mixing is None else Transform(True, own.vocab_size, own.temperature)

    def hidden(self, group: slice, dtype: torch.dtype | None = None) -> Tensor:
        """(n, D) hidden states of some of the rows, kept until the next other group. `dtype`: None: their own."""
        dtype = dtype or self.source.leading.dtype
        if self._hidden is None or self._hidden[:2] != (group, dtype):
            self._hidden = None  # freed first: two groups at once would exceed the workspace
            self._hidden = group, dtype, take_rows(self.source.leading, self.rows[group]).to(dtype)
        return self._hidden[2]

    def stored(self, group: slice, columns: slice, out: Tensor) -> Tensor:
        """Stored logits of some of the rows, in `out`, (n, B)."""
        self._read(group, columns, out)
        mixing = self.source.transform.mixing
        if mixing is None:
            return out
        scratch = torch.empty_like(out)
        others = (reader._mixable(group, reader._read(group, columns, scratch)) for reader in self.others)
        mix(self._mixable(group, out), others, mixing)
        return out if mixing.kind == "geometric" else out.mul_(self.source.transform.temperature)

    def _mixable(self, group: slice, x: Tensor) -> Tensor:
        """Logits without the temperature, or log-probabilities at the temperature, in place of this source's stored logits."""
        source = self.source
        if source.logsumexp is None:
            return finish_logits(x, replace(source.transform, temperature=1.0), source.stored_dtype)
        return finish_logits(x, source.transform, source.stored_dtype).sub_(source.logsumexp[self.rows[group]].unsqueeze(1))

    def ranked(self, group: slice, out: Tensor) -> Tensor:
        """(n, V) stored logits that rank positions, in `out` from `aligned_buffer`."""
        vocab = self.source.transform.vocab_size
        if not self.in_float8:
            return self.stored(group, slice(0, vocab), out[:, :vocab])
        assert self.source.float8 is not None
        values, scales = (x[: out.shape[1]] for x in self.source.float8)
        float8.product(Float8Rows.of(self.hidden(group)), Float8Rows(values, scales), out)
        return out[:, :vocab] if self.source.bias is None else out[:, :vocab].add_(self.source.bias[:vocab])

    def logits(self, group: slice, columns: slice, buffer: Tensor, *, by_column: bool = False) -> Tensor:
        """(n, B) logits of some of the rows, in the flat `buffer`, row by row or column by column."""
        n, width = group.stop - group.start, columns.stop - columns.start
        out = buffer[: n * width].view(width, n).T if by_column else buffer[: n * width].view(n, width)
        stored_dtype = self.source.stored_dtype if self.source.transform.mixing is None else None
        finish_logits(self.stored(group, columns, out), self.transform, stored_dtype)
        for i, place in self.merged_in(columns):
            if i:
                out[:, place].fill_(-torch.inf)
            else:
                out[:, place].copy_(self.merged(group)[0].squeeze(1))
        return out

    def _read(self, group: slice, columns: slice, out: Tensor) -> Tensor:
        """(n, B) logits of this source alone, before its transform."""
        leading, weight, bias = self.source.leading, self.source.weight, self.source.bias
        if weight is None:
            return out.copy_(take_rows(leading[..., columns], self.rows[group]))
        hidden = self.hidden(group, operand_dtype(leading, out))
        return head_product(
            hidden, weight[columns], None if bias is None else bias[columns], out, cast_columns=self.cast_columns
        )

    def merged_in(self, columns: slice) -> list[tuple[int, int]]:
        """For each merged id in the block: its index in `merged`, and its column in the block."""
        merged = self.source.transform.merged
        return [(i, v - columns.start) for i, v in enumerate(merged) if columns.start <= v < columns.stop]

    def merged(self, group: slice) -> tuple[Tensor, Tensor]:
        """(n, 1) logit of the merged ids and (n, E) logits before merging, kept until the next other group."""
        if self._merged is None or self._merged[0] != group:
            self._merged = (group, *merged_logits(self.source, self.rows[group], self.dtype))
        return self._merged[1:]


def aligned_buffer(rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, V or a little more): the padding aligns every row."""
    return torch.empty((rows, padded(vocab_size)), dtype=dtype, device=device)
