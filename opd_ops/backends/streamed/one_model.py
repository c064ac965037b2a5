"""One model alone, swept block by block of the vocabulary: its statistics and top-K, its log-sum-exp off a list of ids.

  log sum e^x,  H = log sum e^x - E[x],  top-K;   rest = log sum_{v not in ids} e^{x_v}                         [nats]

The rest is summed, not taken from the whole: a small tail keeps its digits.
Ids are those of the whole vocabulary, of which a rank may sweep a part: what others find is then joined to it
(shared/joined.py), and their rests are gathered, 8 bytes a row.
Not here: both models in one sweep (backend.py).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from opd_ops.backends.shared import joined as shards
from opd_ops.backends.shared import pages
from opd_ops.backends.shared.top_k import TopK, extended
from opd_ops.backends.streamed.running import RunningSums, block_sums
from opd_ops.backends.streamed.tiles import Rows, slices
from opd_ops.backends.streamed.workspace import gradient_grid, score_grid
from opd_ops.inputs.sources import Source, compute_dtype
from opd_ops.selection.stats import OwnStats


@torch.no_grad()
def own_stats(source: Source, rows: Tensor, *, top_k: int, workspace_bytes: int, score_dtype: torch.dtype | None) -> OwnStats:
    """One model's statistics at the rows, from one sweep of its head."""
    shard = source.transform.shard
    if shard is not None:
        read = partial(_own_part, source, rows, min(top_k, shard.width), workspace_bytes)
        options = {"top_k": top_k, "workspace_bytes": workspace_bytes}
        return shards.own_stats(read, shard, rows, dtype=compute_dtype(source), **options)
    return _own_part(source, rows, top_k, workspace_bytes)


def _own_part(source: Source, rows: Tensor, top_k: int, workspace_bytes: int) -> OwnStats:
    """Of what this process holds of the vocabulary."""
    dtype, first_id = compute_dtype(source), source.transform.first_id
    grid = score_grid(source, source, len(rows), top_k=top_k, whole_rows=False, workspace_bytes=workspace_bytes)
    buffer = pages.empty((grid.rows * grid.columns,), dtype, rows.device)
    scratch = torch.empty(3 * grid.chunk * grid.columns, dtype=dtype, device=rows.device)
    found = []
    with torch.autocast(rows.device.type, enabled=False):
        for part in slices(slice(0, len(rows)), grid.rows):
            side = Rows(source.detach(), rows[part], dtype, grid.cast_columns)
            everyone, sums = slice(0, len(side.rows)), RunningSums(len(side.rows), rows.device)
            best: TopK | None = None
            for block in slices(slice(0, source.transform.vocab_size), grid.columns):
                u = side.read(everyone, block, buffer)
                best = extended(best, u, u, top_k, first_id + block.start, grid.candidates)
                sums.add(block_sums(u, u, best, best, first_id + block.start, scratch))  # as both models, at the price of two
            assert best is not None
            columns = sums.columns()
            found.append(OwnStats(columns["teacher_logsumexp"], columns["teacher_entropy"], best.ids, best.own))
    if not found:
        none = torch.empty(0, dtype=dtype, device=rows.device)
        return OwnStats(none, none, rows.new_empty(0, top_k), none.view(0, 1).expand(0, top_k))
    return OwnStats(*(torch.cat(column) for column in zip(*found, strict=True)))


@torch.no_grad()
def rest(source: Source, rows: Tensor, ids: Tensor, *, workspace_bytes: int) -> Tensor:
    """(n,) fp64 log-sum-exp of the rows' logits off their (n, K) ids."""
    dtype, shard, first_id = compute_dtype(source), source.transform.shard, source.transform.first_id
    grid = gradient_grid(source, source, len(rows), workspace_bytes=workspace_bytes)
    side = Rows(source.detach(), rows, dtype, grid.columns)
    buffer = pages.empty((grid.rows * grid.columns,), dtype, rows.device)
    total = torch.full((len(rows),), -math.inf, dtype=torch.float64, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        for block in slices(slice(0, source.transform.vocab_size), grid.columns):
            for group in slices(slice(0, len(rows)), grid.rows):
                x = without_ids(side.read(group, block, buffer), ids[group], first_id + block.start)
                top = x.amax(1, keepdim=True)
                z = x.sub_(top.masked_fill(top == -math.inf, 0)).exp_().sum(1)  # a block that holds nothing adds nothing
                total[group] = torch.logaddexp(total[group], top.squeeze(1).double() + z.double().log())
    return total if shard is None else torch.logsumexp(shard.ranks.gather(total), 0)


def without_ids(x: Tensor, ids: Tensor, first_id: int) -> Tensor:
    """Set the logits of a block at the (n, K) ids to -inf, in place; the block begins at `first_id`."""
    places, inside = places_in(ids, first_id, x.shape[1])
    # Ids of other blocks point at column 0, where they leave what is there.
    values = torch.full_like(places, 1, dtype=x.dtype).masked_fill_(inside, -1).mul_(math.inf)
    return x.scatter_reduce_(1, places, values, "amin")


def places_in(ids: Tensor, first_id: int, width: int) -> tuple[Tensor, Tensor]:
    """(n, K) columns of the ids in a block, 0 where they are not in it, and whether they are."""
    places = ids - first_id
    inside = (places >= 0) & (places < width)
    return places.masked_fill(~inside, 0), inside
