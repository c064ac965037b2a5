"""The score pass of the streamed backend: exact statistics in bounded memory, on any device.

  tiles of rows x blocks of the vocabulary, one sweep of both heads: 2 head-matmul units
  (one unit = 2 N V D FLOP; selection/stats.py defines the statistics)

Memory of size V is one block at a time. Where ranks share out the vocabulary, each rank sweeps its part.
Not here: reading logits (shared/tiles.py), one model alone (one_model.py), sums of a block (running.py), top-K
(shared/top_k.py, shared/supports.py), the join of all parts of a vocabulary (shared/joined.py), the size of tiles and blocks
(shared/grids.py), the loss (loss.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from opd_ops.backends.shared import joined, pages
from opd_ops.backends.shared.grids import ScoreGrid, score_grid
from opd_ops.backends.shared.joined import Part, Parts
from opd_ops.backends.shared.supports import support_columns
from opd_ops.backends.shared.tiles import TileReader
from opd_ops.backends.shared.top_k import TopKList, extended
from opd_ops.backends.streamed.running import (
    EMPTY_SUMS,
    SQUARES,
    RunningSums,
    block_sums,
    extended_sums,
    joined_sums,
    named_sums,
    row_jsd,
    statistics,
)
from opd_ops.backends.streamed.summed import with_jsd
from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.sources import Source, compute_dtype
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import OPTIONAL_COLUMNS, TokenStats


@torch.no_grad()
def token_stats(
    student: Source,
    teacher: Source,
    rows: Tensor,
    *,
    top_k: int,
    columns: frozenset[str],
    workspace: Workspace,
    score_dtype: torch.dtype | None,
) -> TokenStats:
    """All statistics of the given positions, (n,) each, from one sweep of both heads, always in the compute dtype."""
    dtype, shard = compute_dtype(student, teacher), student.transform.shard
    if shard is not None:
        sent = EMPTY_SUMS | (SQUARES if "ratio_variance" in columns else {})
        parts = Parts(partial(_part, student, teacher, columns), sent, joined_sums)
        whole = joined.token_stats(parts, shard, rows, top_k=top_k, columns=columns, workspace=workspace, dtype=dtype)
        return with_jsd(whole, student, teacher, rows, workspace) if "jsd" in columns else whole
    names = _computed(columns)
    out = torch.empty((len(names), len(rows)), dtype=dtype, device=rows.device)
    for part, grid, sums, jsd, s_list, t_list in _sweep(student, teacher, rows, top_k, columns, workspace):
        whole_row = jsd | statistics(sums, s_list)
        s_lse, t_lse = whole_row["student_logsumexp"], whole_row["teacher_logsumexp"]
        for group in chunks(len(s_lse), grid.list_rows):
            supports = support_columns(s_list.rows(group), t_list.rows(group), s_lse[group], t_lse[group], columns)
            computed = {name: column[group] for name, column in whole_row.items()} | supports
            out[:, part][:, group] = torch.stack([computed[name] for name in names])
    stats = dict(zip(names, out.unbind(), strict=True))
    return TokenStats(valid=torch.isfinite(stats["teacher_logsumexp"]), **stats)


def _computed(columns: frozenset[str]) -> list[str]:
    return [name for name in TokenStats._fields if name != "valid" and (name not in OPTIONAL_COLUMNS or name in columns)]


def _part(student: Source, teacher: Source, columns: frozenset[str], rows: Tensor, top_k: int, workspace: Workspace) -> Part:
    """This rank's sums and lists of the rows."""
    tiles, lists = [], []
    for _, _, sums, _, s_list, t_list in _sweep(student, teacher, rows, top_k, columns - {"jsd"}, workspace):
        tiles.append(named_sums(sums))
        lists.append((s_list, t_list))
    whole = {name: torch.cat([tile[name] for tile in tiles]) for name in tiles[0]}
    student_list, teacher_list = (
        TopKList(*(torch.cat(column) for column in zip(*side, strict=True))) for side in zip(*lists, strict=True)
    )
    return Part(whole, student_list, teacher_list)


def _sweep(
    student: Source, teacher: Source, rows: Tensor, top_k: int, columns: frozenset[str], workspace: Workspace
) -> Iterator[tuple[slice, ScoreGrid, RunningSums, dict[str, Tensor], TopKList, TopKList]]:
    """Per tile: its rows, its grid, their (n,) fp64 sums over the vocabulary, "jsd" if in `columns`, and both models' lists."""
    dtype = compute_dtype(student, teacher)
    grid = score_grid(student, teacher, len(rows), top_k=top_k, whole_rows="jsd" in columns, workspace=workspace)
    buffers = [pages.empty((grid.rows * grid.columns,), dtype, rows.device) for _ in range(2)]
    scratch = torch.empty(3 * grid.chunk * grid.columns, dtype=dtype, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        for part in chunks(len(rows), grid.rows):
            sides = [TileReader(source.detach(), rows[part], dtype, grid.cast_columns) for source in (student, teacher)]
            yield part, grid, *_tile(sides[0], sides[1], grid, top_k, columns, buffers, scratch)


def _tile(
    student: TileReader,
    teacher: TileReader,
    grid: ScoreGrid,
    top_k: int,
    columns: frozenset[str],
    buffers: list[Tensor],
    scratch: Tensor,
) -> tuple[RunningSums, dict[str, Tensor], TopKList, TopKList]:
    """RunningSums, "jsd" and both lists of one tile of rows, from one sweep over the vocabulary."""
    rows, first_id = slice(0, len(student.rows)), student.source.transform.first_id
    sums: RunningSums | None = None
    s_list: TopKList | None = None
    t_list: TopKList | None = None
    jsd: dict[str, Tensor] = {}
    for block in chunks(student.source.transform.vocab_size, grid.columns):
        s, u = student.logits(rows, block, buffers[0]), teacher.logits(rows, block, buffers[1])
        s_list = extended(s_list, s, u, top_k, first_id + block.start, grid.candidates)
        t_list = extended(t_list, u, s, top_k, first_id + block.start, grid.candidates)
        if "jsd" in columns:  # the grid has one block, as wide as the vocabulary
            jsd["jsd"] = torch.cat([row_jsd(s[chunk], u[chunk]) for chunk in chunks(rows, grid.chunk)])
        squares = "ratio_variance" in columns
        sums = extended_sums(sums, block_sums(s, u, s_list, t_list, first_id + block.start, scratch, squares=squares))
    assert sums is not None
    assert s_list is not None
    assert t_list is not None
    return sums, jsd, s_list, t_list
