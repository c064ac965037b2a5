"""Ranges cut into consecutive chunks: of rows, or of columns of the vocabulary; and tensors cut by them.

A view costs a small call as much as the work on its numbers: a cut that is the whole makes none.

Not here: how large a chunk may be (backends/shared/grids.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor


def chunks(span: int | slice, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover 0 ... span - 1, or the slice `span`."""
    start, stop = (0, span) if isinstance(span, int) else (span.start, span.stop)
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def span_of(x: Tensor, span: slice) -> Tensor:
    """`x[span]`, and x itself where it has no other row."""
    return x if (span.start, span.stop) == (0, x.shape[0]) else x[span]


def parts(x: Tensor, size: int, dim: int) -> Sequence[Tensor]:
    """`x.split(size, dim)`, and x itself where it is one part."""
    return (x,) if x.shape[dim] <= size else x.split(size, dim)


def groups(n: int, span_size: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Consecutive groups of at most `size` rows that cover 0 ... n - 1, each with its span; a span holds whole groups."""
    for span in chunks(n, span_size):
        for group in chunks(span, size):
            yield group, span
