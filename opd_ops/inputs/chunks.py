"""Ranges cut into consecutive chunks: of rows, or of columns of the vocabulary.

Not here: how large a chunk may be (backends/shared/grids.py).
"""

from __future__ import annotations

from collections.abc import Iterator


def chunks(span: int | slice, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover 0 ... span - 1, or the slice `span`."""
    start, stop = (0, span) if isinstance(span, int) else (span.start, span.stop)
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def groups(n: int, span_size: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Consecutive groups of at most `size` rows that cover 0 ... n - 1, each with its span; a span holds whole groups."""
    for span in chunks(n, span_size):
        for group in chunks(span, size):
            yield group, span
