"""One model's logits at a few ids of each position: K dot products instead of a sweep of the vocabulary.

  x[i, k] = logit ids[i, k] of row i, after scale, soft-cap, temperature, mixing and merging (inputs/sources.py); -inf for no id

Where ranks share out the vocabulary, the one that holds an id knows its logit: one all-reduce of (n, K) numbers.
Not here: whole rows (tiles.py, backends/eager.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from opd_ops.backends.shared.chunks import chunks
from opd_ops.inputs.sources import Source, coordinates, finish_logits, mix_logits, take_rows
from opd_ops.inputs.workspace import Workspace


def logits_at(source: Source, rows: Tensor, ids: Tensor, dtype: torch.dtype, workspace: Workspace) -> Tensor:
    """(n, K) logits of the rows at the (n, K) ids; ids outside the vocabulary are missing."""
    shard = source.transform.shard
    if shard is not None:
        alone = source._replace(transform=replace(source.transform, shard=None))
        here = (ids >= shard.first) & (ids < shard.first + shard.width)
        nothing = torch.zeros(ids.shape, dtype=dtype, device=rows.device)
        held = logits_at(alone, rows, ids - shard.first, dtype, workspace) if shard.width else nothing
        found = shard.ranks.sum(torch.where(here, held, 0))
        return found.masked_fill_((ids < 0) | (ids >= shard.total), -torch.inf)
    missing = (ids < 0) | (ids >= source.transform.vocab_size)
    inside = ids.masked_fill(missing, 0)
    size = workspace.count(gathered_bytes(source, ids.shape[1]))
    found = torch.empty(ids.shape, dtype=dtype, device=rows.device)
    for part in chunks(len(rows), size):
        found[part] = _gathered(source, rows[part], inside[part], dtype)
        if source.transform.merged:
            one = merged_logits(source, rows[part], dtype)[0]
            for i, merged in enumerate(source.transform.merged):  # no tensor of them: that would be a copy from the host
                found[part] = torch.where(ids[part] == merged, -torch.inf if i else one, found[part])
    return found.masked_fill_(missing, -torch.inf)


def merged_logits(source: Source, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(n, 1) logit of the merged ids, and (n, E) those they are merged from."""
    each = torch.cat([_column(source, rows, merged, dtype) for merged in source.transform.merged], 1)
    return torch.logsumexp(each, 1, keepdim=True), each


def _gathered(source: Source, rows: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    if source.weight is None:
        places = (x.unsqueeze(1) for x in coordinates(rows, source.leading.shape[:-1]))
        x = source.leading[(*places, ids)].to(dtype, copy=True)
    else:
        taken = take_rows(source.leading, rows)
        with torch.autocast(taken.device.type, enabled=False):  # which would round these logits to 16 bits
            x = torch.bmm(source.weight[ids].to(dtype), taken.to(dtype).unsqueeze(2)).squeeze(2)
        if source.bias is not None:
            x = x + source.bias[ids]
    x = finish_logits(x, source.transform, source.stored_dtype)
    if source.reference is None:
        return x
    return mix_logits(x, _gathered(source.reference, rows, ids, dtype), source.transform.lam)


def _column(source: Source, rows: Tensor, i: int, dtype: torch.dtype) -> Tensor:
    """(n, 1) at the same id in every row, before merging."""
    if source.weight is None:
        x = take_rows(source.leading[..., i : i + 1], rows).to(dtype, copy=True)
    else:
        taken = take_rows(source.leading, rows)
        with torch.autocast(taken.device.type, enabled=False):
            x = taken.to(dtype) @ source.weight[i : i + 1].to(dtype).T
        if source.bias is not None:
            x = x + source.bias[i : i + 1]
    x = finish_logits(x, source.transform, source.stored_dtype)
    if source.reference is None:
        return x
    return mix_logits(x, _column(source.reference, rows, i, dtype), source.transform.lam)


def gathered_bytes(source: Source, k: int) -> int:
    """Scratch of `logits_at` per row: the hidden row, and the weight's rows as they are and in the compute dtype."""
    own = source.leading.shape[-1] * (8 + 12 * k) if source.transform.is_head else 8 * k
    return own if source.reference is None else own + gathered_bytes(source.reference, k)
