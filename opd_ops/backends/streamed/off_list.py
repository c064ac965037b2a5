"""One model off a list of ids, block by block of the vocabulary: log sum e^{x_v} over the ids v that are not on the list.

The sum is taken over these ids, not as the whole minus the list: a small tail keeps its digits. Ids count over the whole
vocabulary. If ranks share it out, each sweeps its part, and the results are gathered, 8 bytes a row.
Not here: lists (list_losses.py), tiles of logits (shared/tiles.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ops.backends.shared import pages
from opd_ops.backends.shared.grids import gradient_grid
from opd_ops.backends.shared.tiles import TileReader
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
    with torch.autocast(rows.device.type, enabled=False):
        for block in chunks(source.transform.vocab_size, grid.columns):
            for group in chunks(len(rows), grid.rows):
                x = without_ids(reader.logits(group, block, buffer), ids[group], first_id + block.start)
                top = x.amax(1, keepdim=True)
                z = x.sub_(top.masked_fill(top == -math.inf, 0)).exp_().sum(1)  # 0 where the block has only -inf
                total[group] = torch.logaddexp(total[group], top.squeeze(1).double() + z.double().log())
    return total if shard is None else torch.logsumexp(shard.ranks.gather(total), 0)


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
