"""Sizes of the streamed backend's tiles and blocks: the only place that divides up `workspace_bytes`.

  A tile is `rows` positions; the vocabulary is cut into blocks of `columns`; element-wise work runs on `chunk` rows of it.
  Shares of the workspace in the score pass: 9/16 to the logits of a block, and what is left of 1/4 for hidden states and cast
  weights; 1/16 each to scratch, top-K candidates and top-K lists. In the backward: 1/2 to blocks of logits, 1/4 to hidden
  states and their gradient, 1/8 to cast weights.

Not here: what is done on a tile (backend.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from opd_ops.backends.shared.top_k import PRUNED_GROUP, ranked_per_row
from opd_ops.inputs.sources import Source, compute_dtype

# The fewer rows, the slower the matmul: 256 rows run at 0.75 x the speed of 768 or 1024, 55 at half of it (benchmarks/LOG.md).
HEAD_ROWS = 1024
MIN_COLUMNS = 256  # the least a block may be, and one row of it the least a tile may be, however small the workspace
# Element-wise passes over one chunk should find it in a CPU's cache; a chunk must still outweigh the cost of a torch call.
CHUNK_ELEMENTS = 1 << 18
CANDIDATE_BYTES = 64  # ids, logits, keys and their temporaries, per number that the top-K ranks
LIST_BYTES = 128  # of both models' lists per row and K, and of one while a block's newcomers are merged into it
UNION_BYTES = 160  # per row and K: the union as fp64 logits and probabilities, or sorted ids of both lists
GRADIENT_BUFFERS = 7  # blocks of logits alive at once in the backward: both logits, mask, slope and temporaries


class ScoreGrid(NamedTuple):
    rows: int
    columns: int
    chunk: int  # rows of element-wise work at a time
    candidates: int  # logits that the top-K may rank at a time
    list_rows: int  # rows of top-K lists to compare at a time
    cast_columns: int  # columns of a weight to convert at a time, where its dtype is not the compute dtype


class GradientGrid(NamedTuple):
    rows: int
    columns: int  # of the vocabulary, and of a weight to convert at a time


def score_grid(student: Source, teacher: Source, n: int, *, top_k: int, whole_rows: bool, workspace_bytes: int) -> ScoreGrid:
    """Tile of the score pass over n rows; `whole_rows` keeps every block as wide as the vocabulary."""
    size, vocab = compute_dtype(student, teacher).itemsize, student.transform.vocab_size
    has_head = student.transform.is_head or teacher.transform.is_head
    copies = (2 if has_head else 3) + _mixed(student, teacher)  # dense logits: one more, uncast
    elements = max(MIN_COLUMNS, 9 * (workspace_bytes // 16) // (copies * size))
    quarter, sixteenth = workspace_bytes // 4, workspace_bytes // 16
    cast_columns = _cast_columns(student, teacher, quarter // 2, size)
    hidden_share = quarter if cast_columns == vocab else quarter // 2
    rows = elements // vocab
    if has_head and not whole_rows:
        rows = max(rows, min(HEAD_ROWS, elements // MIN_COLUMNS))
    of_hidden = _rows_of_hidden(student, teacher, byte_budget=hidden_share, size=size)
    rows = _even(max(n, 1), min(rows, of_hidden, sixteenth // (LIST_BYTES * top_k)))
    if has_head and not whole_rows:  # what the hidden states leave makes the blocks wider
        elements += max(0, hidden_share - rows * _hidden_width(student, teacher) * size) // (copies * size)
    columns = vocab if whole_rows else _even(vocab, elements // rows, multiple=PRUNED_GROUP)
    scratch = sixteenth // (3 * size)
    if student.leading.device.type == "cpu":
        scratch = min(scratch, CHUNK_ELEMENTS)
    chunk = max(1, min(rows, scratch // columns))
    candidates = max(ranked_per_row(columns, min(top_k, columns)), sixteenth // CANDIDATE_BYTES)
    list_rows = max(1, min(rows, sixteenth // (UNION_BYTES * top_k)))
    return ScoreGrid(rows, columns, chunk, candidates, list_rows, cast_columns)


def gradient_grid(student: Source, teacher: Source, m: int, *, workspace_bytes: int, two_parts: bool = False) -> GradientGrid:
    """Groups of selected rows and blocks of the vocabulary for a sweep over m rows; `two_parts`: of a loss that has both."""
    size, vocab = compute_dtype(student, teacher).itemsize, student.transform.vocab_size
    buffers = GRADIENT_BUFFERS + (2 if two_parts else 0) + _mixed(student, teacher)
    elements = max(MIN_COLUMNS, workspace_bytes // 2 // (buffers * size))
    # Both models' hidden states and the student's gradient of them: a group at a time.
    of_hidden = _rows_of_hidden(student, student, teacher, byte_budget=workspace_bytes // 4, size=size)
    rows = max(1, min(m, elements // MIN_COLUMNS, of_hidden))
    cast_columns = _cast_columns(student, teacher, workspace_bytes // 8, size)
    columns = _even(vocab, min(elements // rows, cast_columns), multiple=PRUNED_GROUP)
    return GradientGrid(rows, columns)


def _mixed(*sources: Source) -> int:
    """Blocks of a reference's logits that are alive beside those they are mixed into."""
    return int(any(source.reference is not None for source in sources))


def _even(total: int, most: int, multiple: int = 1) -> int:
    """The smallest width that cuts `total` into as few blocks as `most` allows, so that the last is not thin; rounded up to a
    multiple where that stays within `most`."""
    if not total:
        return 1  # a rank without a part of the vocabulary
    most = max(1, min(most, total))
    width = -(-total // -(-total // most))
    rounded = -(-width // multiple) * multiple
    return rounded if rounded <= most else width


def _rows_of_hidden(*sources: Source, byte_budget: int, size: int) -> int:
    width = _hidden_width(*sources)
    return max(1, byte_budget // (width * size)) if width else torch.iinfo(torch.int64).max


def _hidden_width(*sources: Source) -> int:
    return sum(source.leading.shape[-1] for source in sources if source.transform.is_head)


def _cast_columns(student: Source, teacher: Source, byte_budget: int, size: int) -> int:
    dtype = compute_dtype(student, teacher)
    weights = [source.weight for source in (student, teacher) if source.weight is not None]
    width = max((2 * weight.shape[1] for weight in weights if weight.dtype != dtype), default=0)
    return max(1, byte_budget // (width * size)) if width else student.transform.vocab_size
