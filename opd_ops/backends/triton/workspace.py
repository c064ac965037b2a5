"""Sizes of the tiles in which the Triton backend goes through a head's logits: the only place that divides up its workspace.

  score     15/16 to logits, hidden rows and kernel scratch of a tile (7/16 if optional columns need scratch), 1/16 to casts
  selected  the same for fp32 logits of both models and 16-bit gradients, those of all rows if they fit 5/8 of it

Needs no Triton: estimates/compute.py asks it on any machine.
Not here: what is done on a tile (heads.py, heads_loss.py), the streamed backend's sizes (shared/workspace.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from opd_ops.inputs import float8
from opd_ops.inputs.sources import Source

# Elements: rows of a buffer begin at whole 128-byte lines, so that kernels load 128 bits at a time. An 8-bit weight has as many
# rows, because its product fills the padding too.
ALIGNED = float8.ALIGNED
MIN_COLUMNS = 16  # of a block, however small the workspace
MATMUL_ROWS = 128  # rows of the vendor's own tile: a multiple of it wastes none
GROUP = 128  # logits per group maximum, as in opd_kernels/score.py
LIST_BYTES = 40  # per row and K: both lists' ids, logits and places
ROW_BYTES = 3072  # per row: columns, and the sums of a row split into 64 parts


def padded(vocab_size: int) -> int:
    return -(-vocab_size // ALIGNED) * ALIGNED


def score_bytes(vocab_size: int, top_k: int = 0) -> int:
    """Scratch per row of a score launch: group maxima of both models in fp32 at most, lists, columns."""
    return -(-vocab_size // (16 * GROUP)) * 16 * 8 + LIST_BYTES * top_k + ROW_BYTES  # rows of maxima are padded to 16


def tile_dtype(source: Source, score_dtype: torch.dtype | None) -> torch.dtype:
    """Of the logits in a score tile: a head's own unless told; those of an 8-bit matmul come in bf16."""
    if not source.transform.is_head or score_dtype is None:
        return source.leading.dtype
    return torch.bfloat16 if score_dtype == float8.DTYPE else score_dtype


def row_bytes(source: Source, score_dtype: torch.dtype | None = None) -> int:
    """Beside a row of logits: the hidden row, widened where the device cannot widen sums, or in 8 bits by way of fp32; and a
    reference's."""
    own = source.leading.shape[-1] * (source.leading.element_size() + (12 if score_dtype == float8.DTYPE else 4))
    return own if source.reference is None else own + row_bytes(source.reference)


def copies(*sources: Source) -> int:
    """Rows of logits alive at once: each model's, and a reference's beside that it is mixed into."""
    return sum(1 if source.reference is None else 2 for source in sources)


def rows_at_a_time(n: int, bytes_per_row: int, budget: int) -> int:
    size = max(1, min(n, budget // bytes_per_row))
    return size - size % MATMUL_ROWS if MATMUL_ROWS < size < n else size


def score_rows(
    *sources: Source,
    n: int,
    top_k: int,
    optional: bool,
    workspace_bytes: int,
    score_dtype: torch.dtype | None,
    tiles: int = 1,
) -> int:
    """Rows of a score tile, of which `tiles` are alive at once."""
    vocab = sources[0].transform.vocab_size
    of_logits = sum(tile_dtype(source, score_dtype).itemsize * copies(source) for source in sources) * padded(vocab)
    per_row = of_logits + sum(row_bytes(source, score_dtype) for source in sources) + score_bytes(vocab, top_k)
    return rows_at_a_time(n, per_row, (7 if optional else 15) * (workspace_bytes // 16) // tiles)


def is_narrow(student: Source, needs: Sequence[bool]) -> bool:
    """Whether logit gradients are made in 16 bits, as operands; fp32 ones overwrite the student's fp32 logits."""
    return student.transform.is_head and student.leading.dtype != torch.float32 and any(needs)


class SelectedGrid(NamedTuple):
    """How the selected rows are gone through."""

    rows: int  # at a time
    keep: bool  # the 16-bit logit gradients of all rows, for one weight gradient
    second_look: bool  # the weight gradient recomputes the logits, by blocks of the vocabulary

    @staticmethod
    def of(*sources: Source, n: int, needs: Sequence[bool], workspace_bytes: int, list_bytes: int = 0) -> SelectedGrid:
        """Of n rows; the student is the first of the sources. `list_bytes`: scratch per row of a divergence on a list."""
        student, m = sources[0], n
        vocab, leading = student.transform.vocab_size, student.leading
        narrow = is_narrow(student, needs)
        narrow_bytes = leading.element_size() * padded(vocab) if narrow else 0
        per_row = 4 * copies(*sources) * padded(vocab) + score_bytes(vocab) + sum(map(row_bytes, sources)) + list_bytes
        budget = 15 * (workspace_bytes // 16)
        of_weight = narrow and needs[1]
        kept = m * (narrow_bytes + 2 * leading.element_size() * leading.shape[-1])  # and the hidden rows they go with
        if of_weight and kept <= 5 * budget // 8:
            return SelectedGrid(rows_at_a_time(m, per_row, budget - kept), True, False)
        return SelectedGrid(rows_at_a_time(m, per_row + narrow_bytes, budget), False, of_weight)


class BlockGrid(NamedTuple):
    """The second look: groups of selected rows, blocks of the vocabulary."""

    rows: int
    columns: int

    @staticmethod
    def of(*sources: Source, n: int, workspace_bytes: int) -> BlockGrid:
        vocab, dim = sources[0].transform.vocab_size, sources[0].leading.shape[-1]
        rows = rows_at_a_time(n, sum(map(row_bytes, sources)) + 4 * dim, workspace_bytes // 4)
        # the models' logits, the gradient, its widening; two products
        columns = workspace_bytes // 2 // ((8 + 4 * copies(*sources)) * rows + 8 * dim)
        step = ALIGNED if columns >= ALIGNED else MIN_COLUMNS
        return BlockGrid(rows, min(max(MIN_COLUMNS, columns - columns % step), padded(vocab)))
