# The streamed backend, `backend="torch"`: exact statistics and gradients on any device in bounded memory.
#
#   score:    tiles of rows x blocks of the vocabulary, one sweep of both heads          2 head-matmul units
#   loss:     the selected rows alone (streamed_loss.py)
#   (one unit = 2 N V D FLOP; statistics and gradients are those of stats.py and divergences/)
#
# Nothing of size V is kept beyond a block.
# Not here: reading logits (reading.py), one model alone (one_model.py), sums of a block (running.py), top-K (top_k.py,
# supports.py), the size of tiles and blocks (tiling.py).
from __future__ import annotations

import torch
from torch import Tensor

from opd_ops.backends import pages
from opd_ops.backends.one_model import own_stats as own_stats
from opd_ops.backends.reading import Rows, slices
from opd_ops.backends.running import RunningSums, block_sums, row_jsd
from opd_ops.backends.streamed_loss import selected_loss as selected_loss
from opd_ops.backends.supports import support_columns
from opd_ops.backends.tiling import ScoreGrid, score_grid
from opd_ops.backends.top_k import TopK, extended
from opd_ops.sources import Source, compute_dtype
from opd_ops.stats import OPTIONAL_COLUMNS, TokenStats


@torch.no_grad()
def token_stats(
    student: Source,
    teacher: Source,
    rows: Tensor,
    *,
    top_k: int,
    columns: frozenset[str],
    workspace_bytes: int,
    score_dtype: torch.dtype | None,
) -> TokenStats:
    """All statistics of the given positions, (n,) each, from one sweep of both heads; always in the compute dtype."""
    dtype = compute_dtype(student, teacher)
    grid = score_grid(student, teacher, len(rows), top_k=top_k, whole_rows="jsd" in columns, workspace_bytes=workspace_bytes)
    size = grid.rows * grid.columns
    buffers = [pages.empty((size,), dtype, rows.device) for _ in range(2)]
    scratch = torch.empty(3 * grid.chunk * grid.columns, dtype=dtype, device=rows.device)
    out = {name: torch.zeros(len(rows), dtype=dtype, device=rows.device) for name in _computed(columns)}
    with torch.autocast(rows.device.type, enabled=False):
        for part in slices(slice(0, len(rows)), grid.rows):
            sides = [Rows(source.detach(), rows[part], dtype, grid.cast_columns) for source in (student, teacher)]
            for name, column in _tile_stats(sides[0], sides[1], grid, top_k, columns, buffers, scratch).items():
                out[name][part] = column
    return TokenStats(valid=torch.isfinite(out["teacher_logsumexp"]), **out)


def _computed(columns: frozenset[str]) -> list[str]:
    return [name for name in TokenStats._fields if name != "valid" and (name not in OPTIONAL_COLUMNS or name in columns)]


def _tile_stats(
    student: Rows,
    teacher: Rows,
    grid: ScoreGrid,
    top_k: int,
    columns: frozenset[str],
    buffers: list[Tensor],
    scratch: Tensor,
) -> dict[str, Tensor]:
    """The columns of one tile of rows, (n,) fp64 each, from one sweep over the vocabulary."""
    rows = slice(0, len(student.rows))
    sums = RunningSums(rows.stop, student.rows.device)
    s_list: TopK | None = None
    t_list: TopK | None = None
    out: dict[str, Tensor] = {}
    for block in slices(slice(0, student.source.transform.vocab_size), grid.columns):
        s, u = student.read(rows, block, buffers[0]), teacher.read(rows, block, buffers[1])
        s_list = extended(s_list, s, u, top_k, block.start, grid.candidates)
        t_list = extended(t_list, u, s, top_k, block.start, grid.candidates)
        if "jsd" in columns:  # the grid has one block, as wide as the vocabulary
            out["jsd"] = torch.cat([row_jsd(s[chunk], u[chunk]) for chunk in slices(rows, grid.chunk)])
        best = s_list.own[:, 0], s_list.other[:, 0], t_list.own[:, 0]
        sums.add(block_sums(s, u, *best, scratch))
    assert s_list is not None
    assert t_list is not None
    out |= sums.columns()
    s_lse, t_lse = out["student_logsumexp"], out["teacher_logsumexp"]
    parts = [
        support_columns(s_list.rows(part), t_list.rows(part), s_lse[part], t_lse[part], columns)
        for part in slices(rows, grid.list_rows)
    ]
    return out | {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
