"""One model's logits at a few ids of each position: K dot products instead of a sweep of the vocabulary.

  x[i, k] = logit ids[i, k] of row i, after scale, soft-cap, temperature, mixing and merging (inputs/sources.py); missing: -inf

Where ranks share out the vocabulary, each rank computes the logits of its ids: one all-reduce of (n, K) numbers joins them.
Not here: whole rows (tiles.py, backends/eager.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from opd_ops.backends.shared.matmul import without_autocast
from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.sources import Source, coordinates, finish_logits, mix, take_rows
from opd_ops.inputs.workspace import Workspace


def logits_at(source: Source, rows: Tensor, ids: Tensor, dtype: torch.dtype, workspace: Workspace) -> Tensor:
    """(n, K) logits of the rows at the (n, K) ids; ids outside the vocabulary are missing."""
    shard = source.transform.shard
    if shard is not None:
        own_part = source._replace(transform=replace(source.transform, shard=None))
        in_part = (ids >= shard.first) & (ids < shard.first + shard.width)
        zeros = torch.zeros(ids.shape, dtype=dtype, device=rows.device)
        x = logits_at(own_part, rows, ids - shard.first, dtype, workspace) if shard.width else zeros
        return shard.ranks.sum(torch.where(in_part, x, 0)).masked_fill_((ids < 0) | (ids >= shard.total), -torch.inf)
    inside = ids.clamp(0, max(0, source.transform.vocab_size - 1))
    size = workspace.count(gathered_bytes(source, ids.shape[1]))
    if len(rows) <= size:
        x = _gathered_and_merged(source, rows, inside, dtype)
    else:
        x = torch.empty(ids.shape, dtype=dtype, device=rows.device)
        for part in chunks(len(rows), size):
            x[part] = _gathered_and_merged(source, rows[part], inside[part], dtype)
    return x.masked_fill_(inside != ids, -torch.inf)


def _gathered_and_merged(source: Source, rows: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, K) logits."""
    x = _gathered(source, rows, ids, dtype)
    if source.transform.merged:
        merged_logit = merged_logits(source, rows, dtype)[0]
        for i, merged in enumerate(source.transform.merged):  # a loop: a tensor of these ids would be a copy from the host
            x = torch.where(ids == merged, -torch.inf if i else merged_logit, x)
    return x


def merged_logits(source: Source, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(n, 1) logit of the merged ids, and the (n, E) logits before merging."""
    parts = torch.cat([_column(source, rows, merged, dtype) for merged in source.transform.merged], 1)
    return torch.logsumexp(parts, 1, keepdim=True), parts


def _gathered(source: Source, rows: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, K) logits before merging."""

    def read(model: Source) -> Tensor:
        if model.weight is None:
            places = (x.unsqueeze(1) for x in coordinates(rows, model.leading.shape[:-1]))
            return model.leading[(*places, ids)].to(dtype)  # indexing copies
        hidden = take_rows(model.leading, rows)
        with without_autocast(hidden.device):  # autocast would round these logits to 16 bits
            x = torch.bmm(model.weight[ids].to(dtype), hidden.to(dtype).unsqueeze(2)).squeeze(2)
        return x if model.bias is None else x + model.bias[ids]

    return _finished(source, rows, read)


def _column(source: Source, rows: Tensor, i: int, dtype: torch.dtype) -> Tensor:
    """(n, 1) logits at one id `i` of every row, before merging."""

    def read(model: Source) -> Tensor:
        if model.weight is None:
            return take_rows(model.leading[..., i : i + 1], rows).to(dtype, copy=True)
        hidden = take_rows(model.leading, rows)
        with without_autocast(hidden.device):
            x = hidden.to(dtype) @ model.weight[i : i + 1].to(dtype).T
        return x if model.bias is None else x + model.bias[i : i + 1]

    return _finished(source, rows, read)


def _finished(source: Source, rows: Tensor, read: Callable[[Source], Tensor]) -> Tensor:
    """(n, K) logits before merging, of several models mixed or each at its rows; `read` returns a model's stored logits."""
    if source.routes is not None:
        routes, (x, *others) = source.routes[rows].unsqueeze(1), (_finished(other, rows, read) for other in source.others)
        for i, other in enumerate(others, 1):
            x = torch.where(routes == i, other, x)
        return x
    x = finish_logits(read(source), source.transform, source.stored_dtype)
    x = x if source.logsumexp is None else x.sub_(source.logsumexp[rows].unsqueeze(1))
    mixing = source.transform.mixing
    return x if mixing is None else mix(x, (_finished(other, rows, read) for other in source.others), mixing)


def gathered_bytes(source: Source, k: int) -> int:
    """Scratch of `logits_at` per row: the hidden row, and K rows of the weight in their own and in the compute dtype."""
    own = source.leading.shape[-1] * (8 + 12 * k) if source.transform.is_head else 8 * k
    return own + sum(gathered_bytes(other, k) for other in source.others)
