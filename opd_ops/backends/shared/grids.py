"""Sizes of the tiles in which backends go through logits, from the workspace. `estimate` asks here too.

  A tile is `rows` positions. The vocabulary is cut into blocks of `columns`. Element-wise work takes `chunk` rows of a block.

  "torch", score     9/16 to the logits of a block, and the unused part of 1/4 for hidden states and cast weights; 1/16 each to
                     scratch, top-K candidates and top-K lists
  "torch", backward  1/2 to blocks of logits, 1/4 to hidden states and their gradient, 1/8 to cast weights
  "triton", score    15/16 to logits, hidden rows and kernel scratch of a tile (7/16 if optional columns need scratch), 1/16 to
                     casts
  "triton", loss     the same for both models' fp32 logits and 16-bit gradients; at most 5/8 of it to gradients that are kept

Needs no Triton.
Not here: how a workspace is divided (inputs/workspace.py), the work on a tile (streamed/, triton/).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from opd_ops.backends.shared.matmul import operand_dtype
from opd_ops.backends.shared.top_k import PRUNED_GROUP, ranked_per_row
from opd_ops.inputs import float8
from opd_ops.inputs.sources import Source, compute_dtype
from opd_ops.inputs.workspace import Workspace

# A matmul of fewer rows is slower: 256 rows run at 0.75 x the speed of 768 or 1024, 55 at half of it (benchmarks/LOG.md).
HEAD_ROWS = 1024
MIN_COLUMNS = 256  # the smallest block, and one row of it the smallest tile, even if the workspace is smaller
# Small enough that a CPU's cache holds a chunk between element-wise passes, large enough to outweigh the cost of a torch call.
CHUNK_ELEMENTS = 1 << 18
CANDIDATE_BYTES = 64  # ids, logits, keys and their temporaries, per number that the top-K ranks
LIST_BYTES = 128  # per row and K: both models' lists, and one list's copy while a block's newcomers are merged into it
UNION_BYTES = 160  # per row and K: the union as fp64 logits and probabilities, or sorted ids of both lists
GRADIENT_BUFFERS = 7  # blocks of logits alive at once in the backward: both logits, mask, slope and temporaries


class ScoreGrid(NamedTuple):
    """The tile of the score pass: rows, and columns of the vocabulary."""

    rows: int
    columns: int
    chunk: int  # rows of element-wise work at a time
    candidates: int  # logits that the top-K may rank at a time
    list_rows: int  # rows of top-K lists to compare at a time
    cast_columns: int  # columns of a weight to convert at a time, where its dtype is not the compute dtype


class GradientGrid(NamedTuple):
    """The tile of the backward."""

    rows: int
    columns: int  # of the vocabulary, and of a weight to convert at a time


def score_grid(student: Source, teacher: Source, n: int, *, top_k: int, whole_rows: bool, workspace: Workspace) -> ScoreGrid:
    """Tile of the score pass over n rows. `whole_rows`: every block is as wide as the vocabulary."""
    size, vocab = compute_dtype(student, teacher).itemsize, student.transform.vocab_size
    has_head = student.transform.is_head or teacher.transform.is_head
    copies = (2 if has_head else 3) + _mixed(student, teacher)  # dense logits: one copy more, before the cast
    elements = max(MIN_COLUMNS, workspace.share(9, 16).count(copies * size))
    quarter, sixteenth = workspace.share(1, 4), workspace.share(1, 16)
    cast_columns = _cast_columns(student, teacher, quarter.share(1, 2), size)
    hidden_share = quarter if cast_columns == vocab else quarter.share(1, 2)
    rows = elements // vocab
    if has_head and not whole_rows:
        rows = max(rows, min(HEAD_ROWS, elements // MIN_COLUMNS))
    hidden_rows = _rows_of_hidden(student, teacher, workspace=hidden_share, size=size)
    rows = _even(max(n, 1), min(rows, hidden_rows, sixteenth.count(LIST_BYTES * top_k)))
    if has_head and not whole_rows:  # memory that the hidden states leave makes the blocks wider
        elements += hidden_share.less(rows * _hidden_width(student, teacher) * size).count(copies * size, least=0)
    columns = vocab if whole_rows else _even(vocab, elements // rows, multiple=PRUNED_GROUP)
    scratch = sixteenth.count(5 * size)
    if student.leading.device.type == "cpu":
        scratch = min(scratch, CHUNK_ELEMENTS)
    chunk = max(1, min(rows, scratch // columns))
    candidates = max(ranked_per_row(columns, min(top_k, columns)), sixteenth.count(CANDIDATE_BYTES))
    list_rows = min(rows, sixteenth.count(UNION_BYTES * top_k))
    return ScoreGrid(rows, columns, chunk, candidates, list_rows, cast_columns)


def gradient_grid(student: Source, teacher: Source, m: int, *, workspace: Workspace, two_parts: bool = False) -> GradientGrid:
    """Groups of selected rows and blocks of the vocabulary, for a sweep over m rows.

    `two_parts`: the divergence has a part over the whole row and a part on a list.
    """
    size, vocab = compute_dtype(student, teacher).itemsize, student.transform.vocab_size
    buffers = GRADIENT_BUFFERS + (2 if two_parts else 0) + _mixed(student, teacher)
    elements = max(MIN_COLUMNS, workspace.share(1, 2).count(buffers * size))
    # A group at a time: both models' hidden states, and the gradient of the student's.
    hidden_rows = _rows_of_hidden(student, student, teacher, workspace=workspace.share(1, 4), size=size)
    rows = max(1, min(m, elements // MIN_COLUMNS, hidden_rows))
    cast_columns = _cast_columns(student, teacher, workspace.share(1, 8), size)
    columns = _even(vocab, min(elements // rows, cast_columns), multiple=PRUNED_GROUP)
    return GradientGrid(rows, columns)


def _mixed(*sources: Source) -> int:
    """Blocks alive for the logits of one more model before they are mixed in: 1, or 0 without a mixture."""
    return int(any(source.others for source in sources))


def _even(total: int, most: int, multiple: int = 1) -> int:
    """The smallest width that cuts `total` into as few blocks as width `most` does, so that the last block is not thin.

    Rounded up to a multiple of `multiple` if that stays within `most`.
    """
    if not total:
        return 1  # a rank without a part of the vocabulary
    most = max(1, min(most, total))
    width = -(-total // -(-total // most))
    rounded = -(-width // multiple) * multiple
    return rounded if rounded <= most else width


def _rows_of_hidden(*sources: Source, workspace: Workspace, size: int) -> int:
    width = _hidden_width(*sources)
    return workspace.count(width * size) if width else torch.iinfo(torch.int64).max


def _hidden_width(*sources: Source) -> int:
    models = [model for source in sources for model in (source, *source.others)]
    return sum(model.leading.shape[-1] for model in models if model.transform.is_head)


def _cast_columns(student: Source, teacher: Source, workspace: Workspace, size: int) -> int:
    dtype = compute_dtype(student, teacher)
    models = (student, teacher, *student.others, *teacher.others)
    weights = [model.weight for model in models if model.weight is not None]
    width = max((2 * weight.shape[1] for weight in weights if weight.dtype != dtype), default=0)
    return workspace.count(width * size) if width else student.transform.vocab_size


# --- backend "triton" ----------------------------------------------------------------------------------------------

# Elements: a multiple of it as row stride lets every row begin at a 128-byte line, so that kernels load 128 bits at a time. An
# 8-bit weight is padded to as many rows, because its product fills the padding too.
ALIGNED = float8.ALIGNED
MIN_BLOCK = 16  # columns, however small the workspace
# Rows of a tile, the largest that fits: 128 is the matmul's own tile, 256 its wider one. The kernels run one program a row, and
# Hopper (132 multiprocessors of four programs, in bf16 of five) 528 or 660 at a time: 512 rows are one wave in any dtype.
TILE_ROWS = (512, 256, 128)
MOST_SPANS = 8  # of rows whose gradients are kept: each further one rounds the 16-bit weight gradient once more
GROUP = 128  # logits per group maximum, as in opd_kernels/score.py
KERNEL_LIST_BYTES = 40  # per row and K: both lists' ids, logits and places
KERNEL_ROW_BYTES = 3072  # per row: columns, and the sums of a row split into 64 parts


def padded(vocab_size: int) -> int:
    return -(-vocab_size // ALIGNED) * ALIGNED


def score_bytes(vocab_size: int, top_k: int = 0) -> int:
    """Scratch per row of a score launch: group maxima of both models (at most fp32), lists, columns."""
    maxima = -(-vocab_size // (16 * GROUP)) * 16  # padded
    return 8 * maxima + KERNEL_LIST_BYTES * top_k + KERNEL_ROW_BYTES


def tile_dtype(source: Source, score_dtype: torch.dtype | None) -> torch.dtype:
    """Dtype of the logits in a score tile: the model's own unless `score_dtype` is given; an 8-bit matmul returns bf16.

    A tile of one model's dense logits is a copy, exact in their own dtype.
    """
    is_copy = not source.transform.is_head and source.transform.mixing is None
    if is_copy or score_dtype is None:
        return source.leading.dtype
    return torch.bfloat16 if score_dtype == float8.DTYPE else score_dtype


def ranks_in_float8(source: Source, score_dtype: torch.dtype | None) -> bool:
    """Whether an 8-bit matmul makes the logits that rank positions; a mixture ranks by its models' own dtypes."""
    return source.transform.is_head and source.transform.mixing is None and score_dtype == float8.DTYPE


def hidden_bytes(source: Source) -> int:
    """Bytes of a row's hidden states, of all models of a mixture; 0: dense logits."""
    own = source.leading.shape[-1] * source.leading.element_size() if source.transform.is_head else 0
    return own + sum(map(hidden_bytes, source.others))


def row_bytes(source: Source, dtype: torch.dtype, *, in_float8: bool = False) -> int:
    """Scratch per row beyond its logits, which have this dtype; of all models of a mixture.

    The hidden row and its copy for the matmul, if that takes 8 bits or another dtype; of dense logits a copy of the row.
    """
    leading, copied = source.leading, int(in_float8)
    operand = operand_dtype(leading, dtype)
    if source.transform.is_head and not in_float8 and operand != leading.dtype:
        copied = operand.itemsize
    own = leading.shape[-1] * (leading.element_size() + copied)
    return own + sum(row_bytes(other, dtype) for other in source.others)


def weight_casts(source: Source, workspace: Workspace) -> int:
    """Columns of a weight to convert to fp32 at a time, where the matmul needs fp32."""
    if not source.transform.is_head:  # no weight to convert; of dense logits the last size may be 0 on a rank
        return 1
    return workspace.share(1, 16).count(4 * source.leading.shape[-1])


def copies(*sources: Source) -> int:
    """Rows of logits alive at once: one per source, and in a mixture that of one more model before it is mixed in."""
    return sum(2 if source.others else 1 for source in sources)


def mask_bytes(*sources: Source) -> int:
    """Bytes for each logit of a row for the masks of geometric mixtures (inputs/sources.py): all models' and one more's."""
    return sum(2 for source in sources if source.transform.mixing is not None and source.transform.mixing.kind == "geometric")


def _whole_tiles(n: int, bytes_per_row: int, workspace: Workspace) -> int:
    """How many of n rows to take at a time: all, or a multiple of the largest of `TILE_ROWS` that fits."""
    size = max(1, min(n, workspace.count(bytes_per_row)))
    step = next((step for step in TILE_ROWS if step <= size), 1)
    return size if size == n else size - size % step


class ScoreTile(NamedTuple):
    """Rows whose whole logits are in memory at once, for kernels that read a head."""

    rows: int
    span: int  # rows whose hidden states are copied at once: whole tiles, as many as the tile leaves room for


def score_tile(
    *sources: Source,
    n: int,
    top_k: int,
    optional: bool,
    workspace: Workspace,
    score_dtype: torch.dtype | None,
) -> ScoreTile:
    """The tile of a score pass over n rows."""
    vocab = sources[0].transform.vocab_size
    dtypes = [tile_dtype(source, score_dtype) for source in sources]
    per_row = score_bytes(vocab, top_k)
    for source, dtype in zip(sources, dtypes, strict=True):
        per_row += (dtype.itemsize * copies(source) + mask_bytes(source)) * padded(vocab)
        per_row += row_bytes(source, dtype, in_float8=ranks_in_float8(source, score_dtype))
    budget = workspace.share(7 if optional else 15, 16)
    rows = _whole_tiles(n, per_row, budget)
    further = budget.less(rows * per_row).nbytes
    return ScoreTile(rows, rows * (1 + max(0, further) // max(1, rows * sum(map(hidden_bytes, sources)))))


def is_narrow(student: Source, needs: Sequence[bool]) -> bool:
    """Whether logit gradients are 16-bit matmul operands; fp32 gradients overwrite the student's fp32 logits."""
    return student.transform.is_head and student.leading.dtype != torch.float32 and any(needs)


class SelectedGrid(NamedTuple):
    """How a loss goes through the selected rows."""

    rows: int  # at a time
    kept: int  # rows whose 16-bit logit gradients are kept, for one product of them all with the hidden states; 0: none
    second_look: bool  # whether the weight gradient recomputes the logits, by blocks of the vocabulary

    @staticmethod
    def of(*sources: Source, n: int, needs: Sequence[bool], workspace: Workspace, list_bytes: int = 0) -> SelectedGrid:
        """The grid of n rows; the student is the first source. `list_bytes`: scratch per row of a divergence on a list."""
        student, m = sources[0], n
        vocab, leading = student.transform.vocab_size, student.leading
        narrow = is_narrow(student, needs)
        narrow_bytes = leading.element_size() * padded(vocab) if narrow else 0
        per_row = (4 * copies(*sources) + mask_bytes(*sources)) * padded(vocab) + score_bytes(vocab) + list_bytes
        per_row += sum(row_bytes(source, torch.float32) for source in sources)
        budget = workspace.share(15, 16)
        weight_needed, wide = narrow and needs[1], TILE_ROWS[1]
        if weight_needed:
            # With two copies of the hidden row and its gradient in fp32; over ranks that gradient may need the row in fp32.
            kept_row = narrow_bytes + (2 * leading.element_size() + 4) * leading.shape[-1]
            kept_row += 0 if student.transform.shard is None else 4 * padded(vocab)
            kept = min(m, budget.share(5, 8).count(kept_row))
            if kept > wide:  # fewer, if groups would be narrow otherwise
                kept = min(kept, max(wide, budget.less(wide * per_row).count(kept_row)))
            kept = kept if kept == m else kept - kept % wide
            if min(m, wide) <= kept and m <= MOST_SPANS * kept:
                return SelectedGrid(_whole_tiles(kept, per_row, budget.less(kept * kept_row)), kept, False)
        return SelectedGrid(_whole_tiles(m, per_row + narrow_bytes, budget), 0, weight_needed)


class BlockGrid(NamedTuple):
    """The second look (see `SelectedGrid`): groups of selected rows, blocks of the vocabulary."""

    rows: int
    columns: int

    @staticmethod
    def of(*sources: Source, n: int, workspace: Workspace) -> BlockGrid:
        vocab, dim = sources[0].transform.vocab_size, sources[0].leading.shape[-1]
        per_row = sum(row_bytes(source, torch.float32) for source in sources) + 4 * dim
        rows = _whole_tiles(n, per_row, workspace.share(1, 4))
        # per column: the models' logits, the 16-bit gradient and its fp32 copy for each row; two products
        columns = workspace.share(1, 2).count((8 + 4 * copies(*sources) + mask_bytes(*sources)) * rows + 8 * dim)
        step = ALIGNED if columns >= ALIGNED else MIN_BLOCK
        return BlockGrid(rows, min(max(MIN_BLOCK, columns - columns % step), padded(vocab)))
