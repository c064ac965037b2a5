"""One model alone, swept block by block of the vocabulary: its statistics and its top-K.

  log sum e^x,  H = log sum e^x - E[x],  top-K                                                                  [nats]

Ids count over the whole vocabulary. If ranks share it out, each sweeps its part, and the parts are joined (shared/joined.py).
Not here: both models in one sweep (score.py), one model off a list of ids (off_list.py).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from opd_ops.backends.shared import joined, pages
from opd_ops.backends.shared.grids import score_grid
from opd_ops.backends.shared.matmul import without_autocast
from opd_ops.backends.shared.tiles import TileReader
from opd_ops.backends.shared.top_k import TopKList, extended
from opd_ops.backends.streamed.running import RunningSums, Tops, block_sums, extended_sums, statistics
from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.sources import Source, compute_dtype
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import OwnStats, Scoring


@torch.no_grad()
def own_stats(source: Source, rows: Tensor, scoring: Scoring) -> OwnStats:
    """One model's statistics at the rows, from one sweep of its head, always in the compute dtype."""
    shard = source.transform.shard
    if shard is not None:
        read = partial(_own_part, source, rows, min(scoring.top_k, shard.width), scoring.workspace)
        return joined.own_stats(read, shard, rows, scoring, compute_dtype(source))
    return _own_part(source, rows, scoring.top_k, scoring.workspace)


def _own_part(source: Source, rows: Tensor, top_k: int, workspace: Workspace) -> OwnStats:
    """Statistics of this process's part of the vocabulary."""
    dtype, first_id = compute_dtype(source), source.transform.first_id
    grid = score_grid(source, source, len(rows), top_k=top_k, whole_rows=False, workspace=workspace)
    buffer = pages.empty((grid.rows * grid.columns,), dtype, rows.device)
    scratch = torch.empty(5 * grid.chunk * grid.columns, dtype=dtype, device=rows.device)
    tiles = []
    with without_autocast(rows.device):
        for part in chunks(len(rows), grid.rows):
            reader = TileReader(source.detach(), rows[part], dtype, grid.cast_columns)
            all_rows = slice(0, len(reader.rows))
            sums: RunningSums | None = None
            best: TopKList | None = None
            for block in chunks(source.transform.vocab_size, grid.columns):
                u = reader.logits(all_rows, block, buffer)
                first, is_first = first_id + block.start, best is None
                best = extended(best, u.unsqueeze(0), top_k, first, grid.candidates)
                both, tops = u.expand(2, -1, -1), Tops.from_one(best)  # the model is passed twice
                sums = extended_sums(sums, block_sums(both, tops, first, scratch, is_first=is_first))
            assert best is not None
            assert sums is not None
            columns, _ = statistics(sums, tops)
            tiles.append(OwnStats(columns["teacher_logsumexp"], columns["teacher_entropy"], best.ids, best.own))
    if not tiles:
        empty = torch.empty(0, dtype=dtype, device=rows.device)
        return OwnStats(empty, empty, rows.new_empty(0, top_k), empty.view(0, 1).expand(0, top_k))
    return OwnStats(*(torch.cat(column) for column in zip(*tiles, strict=True)))
