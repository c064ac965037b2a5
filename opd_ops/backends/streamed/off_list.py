"""One model off a list of ids, block by block of the vocabulary: log sum e^{x_v} over the ids v that are not on the list.

The sum is taken over these ids, not as the whole minus the list: a small tail keeps its digits. Ids count over the whole
vocabulary. If ranks share it out, each sweeps its part, and the results are gathered, 8 bytes a row. One sweep can find a
model's list and the sum off it: ids that leave the list join the sum.
Not here: lists (list_losses.py), tiles of logits (shared/tiles.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ops.backends.shared import pages
from opd_ops.backends.shared.grids import gradient_grid, score_grid
from opd_ops.backends.shared.matmul import without_autocast
from opd_ops.backends.shared.supports import matches
from opd_ops.backends.shared.tiles import TileReader
from opd_ops.backends.shared.top_k import TopKList, extended
from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.sources import Source, compute_dtype
from opd_ops.inputs.workspace import Workspace


@torch.no_grad()
def off_list_logsumexp(source: Source, rows: Tensor, ids: Tensor, *, workspace: Workspace) -> Tensor:
    """(n,) fp64 log-sum-exp of the rows' logits off their (n, K) ids."""
    dtype, shard, first_id = compute_dtype(source), source.transform.shard, source.transform.first_id
    grid = gradient_grid(source, source, len(rows), workspace=workspace)
    reader = TileReader(source.detach(), rows, dtype, grid.columns)
    buffer = pages.empty((grid.rows * grid.columns,), dtype, rows.device)
    total = torch.full((len(rows),), -math.inf, dtype=torch.float64, device=rows.device)
    with without_autocast(rows.device):
        for block in chunks(source.transform.vocab_size, grid.columns):
            for group in chunks(len(rows), grid.rows):
                x = without_ids(reader.logits(group, block, buffer), ids[group], first_id + block.start)
                total[group] = torch.logaddexp(total[group], _logsumexp(x))
    return total if shard is None else torch.logsumexp(shard.ranks.gather(total), 0)


def _logsumexp(x: Tensor) -> Tensor:
    """(n,) fp64 log-sum-exp of a block; overwrites it."""
    top = x.amax(1, keepdim=True)
    z = x.sub_(top.masked_fill(top == -math.inf, 0)).exp_().sum(1)  # 0 where the block has only -inf
    return top.squeeze(1).double() + z.double().log()


@torch.no_grad()
def top_k_off_list(
    source: Source, rows: Tensor, tokens: Tensor | None, *, top_k: int, workspace: Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, K) ids and logits of the rows' list, and the (n,) fp64 log-sum-exp off the list and the (n,) tokens, by one sweep."""
    assert source.transform.shard is None
    dtype = compute_dtype(source)
    grid = score_grid(source, source, len(rows), top_k=top_k, whole_rows=False, workspace=workspace)
    buffer = pages.empty((grid.rows * grid.columns,), dtype, rows.device)
    ids = torch.empty((len(rows), top_k), dtype=torch.long, device=rows.device)
    logits = torch.empty((len(rows), top_k), dtype=dtype, device=rows.device)
    total = torch.full((len(rows),), -math.inf, dtype=torch.float64, device=rows.device)
    with without_autocast(rows.device):
        for part in chunks(len(rows), grid.rows):
            reader = TileReader(source.detach(), rows[part], dtype, grid.cast_columns)
            best: TopKList | None = None
            token = rows.new_empty(len(reader.rows), 0) if tokens is None else tokens[part].unsqueeze(1)
            for block in chunks(source.transform.vocab_size, grid.columns):
                x = reader.logits(slice(0, len(reader.rows)), block, buffer)
                before, best = best, extended(best, x.unsqueeze(0), top_k, block.start, grid.candidates)
                not_off_list = torch.cat((best.ids, token), 1)
                off_list = _logsumexp(without_ids(x, not_off_list, block.start))
                if before is not None:
                    stays = matches(before.ids, not_off_list)[0]
                    left = torch.logsumexp(before.own.double().masked_fill(stays, -math.inf), 1)
                    off_list = torch.logaddexp(off_list, left)
                total[part] = torch.logaddexp(total[part], off_list)
            assert best is not None
            ids[part], logits[part] = best.ids, best.own
    return ids, logits, total


def without_ids(x: Tensor, ids: Tensor, first_id: int) -> Tensor:
    """Set the logits of a block at the (n, K) ids to -inf, in place. The block begins at the id `first_id`."""
    places, inside = places_in(ids, first_id, x.shape[1])
    # Ids of other blocks point at column 0; their value +inf leaves its minimum unchanged.
    values = torch.full_like(places, 1, dtype=x.dtype).masked_fill_(inside, -1).mul_(math.inf)
    return x.scatter_reduce_(1, places, values, "amin")


def places_in(ids: Tensor, first_id: int, width: int) -> tuple[Tensor, Tensor]:
    """(n, K) columns of the ids in a block (0 for an id outside it), and whether each id is in the block."""
    places = ids - first_id
    inside = (places >= 0) & (places < width)
    return places.masked_fill(~inside, 0), inside
