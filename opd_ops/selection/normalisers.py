"""Normalisers: a statistic scaled to 0 ... 1 over the valid positions of the whole batch, and its largest value.

  quantile_norm   clip((z - Q.05) / (Q.95 - Q.05 + eps), 0, 1)                   arXiv 2605.26844 (TA) eq. 11
  minmax_norm     (z - min) / (max - min) after z <- min(z, Q.98)                arXiv 2604.14084 (TIP) section 6
  released_norm   as TA's released code: no epsilon, a range below 1e-12 gives 0
  rank_norm       the place in the ascending order, 0 ... n - 1, over n - 1          IER, arXiv 2609.24432

Over ranks (`over_ranks`) they use the valid positions of all ranks, as one process with all positions would.
Everything is computed in fp64 on the device. Infinite statistics (student or teacher logits of -inf) are left out of the fit
of a normaliser and get its largest value, 1; `released_norm` takes them as 0, as that code does.
Not here: the scores that are made of them (selectors.py), quantiles over ranks (distributed/order_statistics.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

from opd_ops.arguments import is_traced, may_look
from opd_ops.distributed.order_statistics import order_statistics
from opd_ops.distributed.ranks import Ranks
from opd_ops.selection.stats import is_finite

EPSILON = 1e-8
ROUNDING_ULPS = 8
LARGEST = torch.finfo(torch.float64).max
RELEASED_RANGE = 1e-12  # TA's released normaliser has no epsilon: a range below this gives 0

Number = TypeVar("Number", float, Tensor)

_ranks: ContextVar[Ranks | None] = ContextVar("ranks", default=None)  # a selector's signature has no argument for ranks


@contextmanager
def over_ranks(ranks: Ranks) -> Iterator[None]:
    """Normalisers called inside this context use the positions of all ranks. All ranks must call them, in the same order.

    A normaliser makes one search for two quantiles, with two targets each (distributed/order_statistics.py); `rank_norm`
    gathers all values.
    """
    token = _ranks.set(ranks)
    try:
        yield
    finally:
        _ranks.reset(token)


def _quantiles(z: Tensor, among: Tensor, levels: Sequence[tuple[float, float]], dtype: torch.dtype) -> Tensor:
    """Linearly interpolated quantiles of z[among]: two levels for each column. Where `among` is empty, the largest number.

    Args:
        z: fp64; its first dimension holds columns with quantiles of their own.
        among: Of the shape of z.
        levels: For each column.
        dtype: Of z before it became fp64.
    Returns: (columns, 2, 1, ...); each of the two broadcasts with z.
    """
    ranks = None if is_traced() else _ranks.get()  # dynamo cannot trace a ContextVar
    columns, flags = z.reshape(len(z), -1), among.reshape(len(z), -1)
    if ranks is not None:
        each = zip(columns, flags, levels, strict=True)
        quantiles = torch.stack([_quantiles_over_ranks(x, flag, pair, dtype, ranks) for x, flag, pair in each])
    elif columns.shape[1] and may_look(columns):
        quantiles = columns.new_tensor(_looked_up(columns, flags, levels))
    elif columns.shape[1]:
        places = _places(flags.sum(1, dtype=torch.float64), levels)
        ordered = columns.masked_fill(flags.logical_not(), LARGEST).sort(1).values
        below = places.long()
        beyond = places - below
        low, high = ordered.gather(1, below), ordered.gather(1, below + (beyond > 0))
        quantiles = _between(low, high, beyond)
    else:
        quantiles = columns.new_full((len(columns), 2), LARGEST)
    return quantiles.view(-1, 2, *(1,) * (z.dim() - 1))


def _looked_up(columns: Tensor, flags: Tensor, levels: Sequence[tuple[float, float]]) -> list[list[float]]:
    """The quantiles of (columns, N) on a CPU, where Python's fp64 arithmetic costs less than operators of torch."""
    counts: list[int] = flags.sum(1).tolist()
    if min(counts) < columns.shape[1]:
        columns = columns.masked_fill(flags.logical_not(), LARGEST)
    places = [[level * max(n - 1, 0) for level in pair] for n, pair in zip(counts, levels, strict=True)]
    index = [[around(place) for around in (math.floor, math.ceil) for place in pair] for pair in places]
    ends: list[list[float]] = columns.sort(1).values.gather(1, torch.tensor(index)).tolist()
    return [
        [_between(low, high, place - math.floor(place)) for low, high, place in zip(four[:2], four[2:], pair, strict=True)]
        for four, pair in zip(ends, places, strict=True)
    ]


def _quantiles_over_ranks(z: Tensor, among: Tensor, levels: tuple[float, float], dtype: torch.dtype, ranks: Ranks) -> Tensor:
    """(2,) quantiles of one column, from the values of all ranks."""

    def ends(n: Tensor) -> Tensor:  # (1,) -> (1, 4): the two places around each quantile
        places = _places(n.double(), [levels])
        return torch.cat((places.floor(), places.ceil()), 1).long()

    key_dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float64
    statistics = order_statistics(z.to(key_dtype), among, ends, 4, ranks)
    low, high = statistics.values.double().clamp_max(LARGEST).chunk(2, 1)  # +inf where `among` is empty
    places = _places(statistics.total.double(), [levels])
    return _between(low, high, places - places.floor()).squeeze(0)


def _places(n: Tensor, levels: Sequence[tuple[float, float]]) -> Tensor:
    """(columns, 2) places of the quantiles in the ascending order of the (columns,) n values, fp64."""
    last = (n - 1).clamp_min(0)
    if len(set(levels)) == 1:
        return torch.stack([level * last for level in levels[0]], 1)
    return torch.stack([level * x for pair, x in zip(levels, last, strict=True) for level in pair]).view(-1, 2)


def _between(low: Number, high: Number, beyond: Number) -> Number:
    """The quantiles that lie the share `beyond` of the way from low to high.

    Not by torch.lerp: whether it fuses the product and the sum depends on the device.
    """
    return low + beyond * (high - low)


def _fitted(z: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """z in fp64, with columns on its first dimension, and the positions of the fit: the finite valid ones."""
    z = (z if z.dim() > valid.dim() else z.unsqueeze(0)).double()
    return z, is_finite(z).logical_and_(valid)


def _rounding(quantiles: Tensor, dtype: torch.dtype) -> Tensor:
    """The range of a constant after rounding in `dtype`. A normaliser would turn such a range into a ranking."""
    return quantiles.abs().amax(1).mul_(ROUNDING_ULPS * torch.finfo(dtype).eps)


def _may_be_constant(quantiles: Tensor, dtype: torch.dtype) -> bool:
    """Whether the range of a column may be within its rounding; only a CPU looks."""
    eps = ROUNDING_ULPS * torch.finfo(dtype).eps
    pairs = quantiles.flatten(1).tolist() if may_look(quantiles) else [(0.0, 0.0)]
    return any(high - low <= eps * max(abs(low), abs(high)) for low, high in pairs)


def quantile_norm(z: Tensor, valid: Tensor) -> Tensor:
    """TA eq. 11: clip((z - Q.05) / (Q.95 - Q.05 + eps), 0, 1), eps = 1e-8; a constant z gives 0.

    `z`: Of the shape of `valid`, or several such columns on a first dimension, each with quantiles of its own.
    """
    dtype, shape = z.dtype, z.shape
    z, fitted = _fitted(z, valid)
    quantiles = _quantiles(z, fitted, [(0.05, 0.95)] * len(z), dtype)
    low, high = quantiles.unbind(1)
    height, width = z - low, high - low
    scaled = height / (width + EPSILON)
    if _may_be_constant(quantiles, dtype):
        constant = torch.maximum(height.abs(), width) <= _rounding(quantiles, dtype)  # False where z is NaN or infinite
        scaled.masked_fill_(constant, 0.0)
    return scaled.clamp(0, 1).view(shape)


def released_norm(z: Tensor, among: Tensor) -> Tensor:
    """The normaliser of TA's released code: no epsilon; 0 if the range is below 1e-12; non-finite values count as 0.

    `z`: The same as for `quantile_norm`.
    """
    dtype, shape = z.dtype, z.shape
    z = (z if z.dim() > among.dim() else z.unsqueeze(0)).double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    low, high = _quantiles(z, among.expand_as(z), [(0.05, 0.95)] * len(z), dtype).unbind(1)
    width = high - low
    flat = width < RELEASED_RANGE
    return ((z - low) / width.masked_fill(flat, 1.0)).masked_fill(flat, 0.0).clamp(0, 1).view(shape)


def minmax_norm(z: Tensor, valid: Tensor, *, clip: float | Sequence[float | None] | None = None) -> Tensor:
    """TIP section 6: (z - min) / (max - min) after z <- min(z, its `clip` quantile); a constant z gives 0.

    `z`: The same as for `quantile_norm`. `clip`: None: no clip; a sequence: one for each column.
    """
    dtype, shape = z.dtype, z.shape
    z, fitted = _fitted(z, valid)
    clips = [clip] * len(z) if clip is None or isinstance(clip, float) else clip
    # The largest of the clipped values is their limit, because a quantile is at most the maximum.
    quantiles = _quantiles(z, fitted, [(0.0, 1.0 if x is None else x) for x in clips], dtype)
    low, high = quantiles.unbind(1)
    if any(x is not None for x in clips):
        limited = [
            column if x is None else torch.minimum(column, limit) for column, limit, x in zip(z, high, clips, strict=True)
        ]
        z = torch.stack(limited)
    width = high - low
    scaled = (z - low).div_(width)
    if _may_be_constant(quantiles, dtype):
        scaled.masked_fill_((width <= _rounding(quantiles, dtype)) & (z < math.inf), 0.0)  # not where z is NaN
    return scaled.clamp(0, 1).view(shape)


def rank_norm(z: Tensor, valid: Tensor) -> Tensor:
    """The place of z in the ascending order of the valid positions, divided by the last place; equal: the earlier is lower.

    Over ranks each sends its number of positions and its values; the positions of lower ranks are the earlier ones.
    """
    own = torch.where(valid, z.double(), math.inf).flatten()
    ranks = None if is_traced() else _ranks.get()
    if ranks is None:
        values, first = own, 0
    else:
        longest = int(ranks.gather(torch.tensor([len(own)], device=own.device)).max())
        values = ranks.gather(torch.nn.functional.pad(own, (0, longest - len(own)), value=math.inf)).flatten()
        first = ranks.rank * longest
    order = values.sort(stable=True).indices
    places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    last = ((values < math.inf).sum() - 1).clamp_min(1)
    return (places[first : first + len(own)] / last).double().clamp_max(1).view(z.shape)


def largest(z: Tensor, valid: Tensor) -> Tensor:
    """(columns, 1, ...) largest finite value of each column over the valid positions of all ranks; if none, LARGEST."""
    columns, fitted = _fitted(z, valid)
    return _quantiles(columns, fitted, [(1.0, 1.0)] * len(columns), z.dtype)[:, 1]
