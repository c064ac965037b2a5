"""The score pass of the streamed backend: exact statistics in bounded memory, on any device.

  tiles of rows x blocks of the vocabulary, one sweep of both heads: 2 head-matmul units
  (one unit = 2 N V D FLOP; selection/stats.py defines the statistics)

Memory of size V is one block at a time. Where ranks share out the vocabulary, each rank sweeps its part.
Not here: reading logits (shared/tiles.py), one model alone (one_model.py), sums of a block (running.py), top-K
(shared/top_k.py, shared/supports.py), the join of all parts of a vocabulary (shared/joined.py), the size of tiles and blocks
(shared/grids.py), the loss (loss.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.backends.shared import joined, pages
from opd_ops.backends.shared.candidates import ier_of_lists
from opd_ops.backends.shared.grids import ScoreGrid, score_grid
from opd_ops.backends.shared.joined import Part, Parts
from opd_ops.backends.shared.matmul import without_autocast
from opd_ops.backends.shared.supports import support_columns
from opd_ops.backends.shared.tiles import TileReader
from opd_ops.backends.shared.top_k import TopKList, extended
from opd_ops.backends.streamed.running import (
    EMPTY_SUMS,
    SQUARES,
    RunningSums,
    Tops,
    block_sums,
    extended_sums,
    joined_sums,
    named_sums,
    row_jsd,
    statistics,
)
from opd_ops.backends.streamed.summed import with_jsd
from opd_ops.inputs.chunks import chunks, span_of
from opd_ops.inputs.sources import Source, compute_dtype
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import OPTIONAL_COLUMNS, Scoring, TokenStats, is_finite


@torch.no_grad()
def token_stats(student: Source, teacher: Source, rows: Tensor, scoring: Scoring) -> TokenStats:
    """All statistics of the given positions, (n,) each, from one sweep of both heads, always in the compute dtype."""
    dtype, shard, columns = compute_dtype(student, teacher), student.transform.shard, scoring.columns
    if shard is not None:
        sent = EMPTY_SUMS | (SQUARES if "ratio_variance" in columns else {})
        parts = Parts(partial(_part, student, teacher, columns), sent, joined_sums)
        whole = joined.token_stats(parts, shard, rows, scoring, dtype)
        return with_jsd(whole, student, teacher, rows, scoring.workspace) if "jsd" in columns else whole
    names = _computed(columns)
    tiles: list[Tensor] = []
    for part, grid, tile in _sweep(student, teacher, rows, scoring):
        (whole_row, lse), (s_list, t_list) = statistics(tile.sums, tile.tops), tile.lists.halves()
        groups = [
            support_columns(s_list.rows(group), t_list.rows(group), lse[:, group], columns)
            for group in chunks(lse.shape[1], grid.list_rows)
        ]
        supports = groups[0] if len(groups) == 1 else {x: torch.cat([group[x] for group in groups]) for x in groups[0]}
        computed = tile.jsd | whole_row | supports
        if scoring.sampled is not None:
            computed["ier"] = torch.cat(
                [
                    ier_of_lists(s_list.rows(group), t_list.rows(group), lse[:, group], scoring.sampled.take(part).take(group))
                    for group in chunks(lse.shape[1], grid.list_rows)
                ]
            )
        tiles.append(torch.stack([computed[name] for name in names]).to(dtype))
    out = tiles[0] if len(tiles) == 1 else torch.cat([torch.empty(len(names), 0, dtype=dtype, device=rows.device), *tiles], 1)
    stats = dict(zip(names, out.unbind(), strict=True))
    return TokenStats(valid=is_finite(stats["teacher_logsumexp"]), **stats)


def _computed(columns: frozenset[str]) -> list[str]:
    return [name for name in TokenStats._fields if name != "valid" and (name not in OPTIONAL_COLUMNS or name in columns)]


def _part(student: Source, teacher: Source, columns: frozenset[str], rows: Tensor, top_k: int, workspace: Workspace) -> Part:
    """This rank's sums and lists of the rows."""
    tiles, lists = [], []
    for _, _, tile in _sweep(student, teacher, rows, Scoring(top_k, workspace, columns=columns - {"jsd"})):
        tiles.append(named_sums(tile.sums))
        lists.append(tile.lists.halves())
    whole = {name: torch.cat([tile[name] for tile in tiles]) for name in tiles[0]}
    student_list, teacher_list = (
        TopKList(*(torch.cat(column) for column in zip(*side, strict=True))) for side in zip(*lists, strict=True)
    )
    return Part(whole, student_list, teacher_list)


class _Tile(NamedTuple):
    """What one sweep over the vocabulary computes of a tile of n rows."""

    sums: RunningSums  # over the vocabulary
    tops: Tops
    lists: TopKList  # of both models, (2 n, K)
    jsd: dict[str, Tensor]  # the column "jsd", if it is asked for


def _sweep(student: Source, teacher: Source, rows: Tensor, scoring: Scoring) -> Iterator[tuple[slice, ScoreGrid, _Tile]]:
    """Each tile, with its part of the rows and the grid of all."""
    dtype = compute_dtype(student, teacher)
    top_k, workspace, _, columns, _ = scoring
    grid = score_grid(student, teacher, len(rows), top_k=top_k, whole_rows="jsd" in columns, workspace=workspace)
    buffer = pages.empty((2 * grid.rows * grid.columns,), dtype, rows.device)
    scratch = torch.empty(5 * grid.chunk * grid.columns, dtype=dtype, device=rows.device)
    with without_autocast(rows.device):
        for part in chunks(len(rows), grid.rows):
            own_rows = span_of(rows, part)
            sides = [TileReader(source.detach(), own_rows, dtype, grid.cast_columns) for source in (student, teacher)]
            yield part, grid, _tile(sides, grid, top_k, columns, buffer, scratch)


def _tile(
    sides: Sequence[TileReader], grid: ScoreGrid, top_k: int, columns: frozenset[str], buffer: Tensor, scratch: Tensor
) -> _Tile:
    """One sweep over the vocabulary."""
    n, transform = len(sides[0].rows), sides[0].source.transform
    rows = slice(0, n)
    sums: RunningSums | None = None
    lists: TopKList | None = None
    tops: Tops | None = None
    jsd: dict[str, Tensor] = {}
    for block in chunks(transform.vocab_size, grid.columns):
        x = buffer[: 2 * n * (block.stop - block.start)].view(2, n, -1)
        for side, out in zip(sides, x.unbind(), strict=True):
            side.logits(rows, block, out)
        first_id, is_first = transform.first_id + block.start, lists is None
        lists = extended(lists, x, top_k, first_id, grid.candidates)
        if "jsd" in columns:  # the grid has one block, as wide as the vocabulary
            jsd["jsd"] = torch.cat([row_jsd(x[0, chunk], x[1, chunk]) for chunk in chunks(rows, grid.chunk)])
        tops, squares = Tops.from_both(lists), "ratio_variance" in columns
        sums = extended_sums(sums, block_sums(x, tops, first_id, scratch, is_first=is_first, squares=squares))
    assert sums is not None
    assert lists is not None
    assert tops is not None
    return _Tile(sums, tops, lists, jsd)
