"""One model's logits at given positions, read as tiles: some of the rows, some columns of the vocabulary.

  stored   the kernels' input: logits before scale, soft-cap and temperature, which are in `transform`
  logits   finished, with merged ids (inputs/sources.py defines a source's logits)

A tile is a copy of logits, or a matmul (matmul.py). The logits of a mixture are mixed in it, one model after another.
Not here: a few ids of a row (logits_at.py), sizes of tiles (grids.py), the work on a tile (streamed/, triton/).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from opd_ops.backends.shared.grids import padded
from opd_ops.backends.shared.logits_at import merged_logits
from opd_ops.backends.shared.matmul import head_product, operand_dtype
from opd_ops.inputs import float8
from opd_ops.inputs.chunks import span_of
from opd_ops.inputs.float8 import Float8Rows
from opd_ops.inputs.sources import Source, Transform, copy_rows, finish_logits, mix, take_rows


class TileReader:
    """Reads tiles of one model at the given positions.

    `dtype`: of the tiles. `cast_columns`: how many columns of a weight to convert at a time, where the matmul needs another
    dtype. `quantise`: turns rows into 8 bits, for `ranked` to use an 8-bit matmul.
    """

    def __init__(
        self,
        source: Source,
        rows: Tensor,
        dtype: torch.dtype,
        cast_columns: int,
        *,
        quantise: Callable[[Tensor], Float8Rows] | None = None,
    ) -> None:
        if quantise is not None and source.weight is not None and source.float8 is None:
            source = source._replace(float8=quantise(source.weight))
        self.source, self.quantise = source, quantise
        self.rows, self.dtype, self.cast_columns = rows, dtype, cast_columns
        self.others = [TileReader(other, rows, dtype, cast_columns) for other in source.others]
        self._taken: tuple[slice, Tensor] | None = None
        self._hidden: tuple[slice, Tensor] | None = None
        self._merged: tuple[slice, Tensor, Tensor] | None = None

    @property
    def transform(self) -> Transform:
        """The transform from stored to finished logits; mixed logits lack only the temperature."""
        own = self.source.transform
        return own if own.mixing is None else Transform(True, own.vocab_size, own.temperature)

    def take(self, span: slice) -> None:
        """Copy a head's hidden states of the span at once: `hidden` of a group within it is a part of this copy."""
        if self.source.transform.is_head and (self._taken is None or self._taken[0] != span):
            self._taken = self._hidden = None  # freed first: two spans at once would exceed the workspace
            self._taken = span, take_rows(self.source.leading, self.rows[span])
        for reader in self.others:
            reader.take(span)

    def hidden(self, group: slice, dtype: torch.dtype | None = None) -> Tensor:
        """(n, D) hidden states of some of the rows, kept until the next other group. `dtype`: None: their own."""
        dtype = dtype or self.source.leading.dtype
        if self._hidden is not None and self._hidden[0] == group and self._hidden[1].dtype == dtype:
            return self._hidden[1]
        self._hidden = None
        hidden = self._part_of_taken(group)
        if hidden is None:
            hidden = take_rows(self.source.leading, span_of(self.rows, group))
        self._hidden = group, hidden.to(dtype)
        return self._hidden[1]

    def _part_of_taken(self, group: slice) -> Tensor | None:
        if self._taken is None:
            return None
        span, hidden = self._taken
        is_within = span.start <= group.start and group.stop <= span.stop
        return hidden[group.start - span.start : group.stop - span.start] if is_within else None

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
        if self.quantise is None:
            return self.stored(group, slice(0, vocab), out[:, :vocab])
        assert self.source.float8 is not None
        values, scales = (x[: out.shape[1]] for x in self.source.float8)
        float8.product(self.quantise(self.hidden(group)), Float8Rows(values, scales), out)
        return out[:, :vocab] if self.source.bias is None else out[:, :vocab].add_(self.source.bias[:vocab])

    def logits(self, group: slice, columns: slice, buffer: Tensor, *, by_column: bool = False) -> Tensor:
        """(n, B) logits of some of the rows: in `buffer` of this shape, or in a flat one, row by row or column by column."""
        n, width = group.stop - group.start, columns.stop - columns.start
        out = buffer
        if buffer.dim() == 1:
            out = span_of(buffer, slice(0, n * width)).view((width, n) if by_column else (n, width))
            out = out.T if by_column else out
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
            is_whole = (columns.start, columns.stop) == (0, leading.shape[-1])
            return copy_rows(leading if is_whole else leading[..., columns], span_of(self.rows, group), out)
        hidden = self.hidden(group, operand_dtype(leading, out.dtype))
        return head_product(
            hidden,
            span_of(weight, columns),
            None if bias is None else span_of(bias, columns),
            out,
            cast_columns=self.cast_columns,
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
