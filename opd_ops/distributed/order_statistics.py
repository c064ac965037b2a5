"""Order statistics over all ranks without gathering a value: the k-th smallest of what they hold together, exactly.

  key(x)   the bits of x as an integer that orders like x: with b = bits as a signed integer, b if x >= 0, else b with all
           but the sign flipped; then shifted, so that no key is negative. 32 bits for fp32, 64 for fp64.
  search   digit by digit from the highest: every rank counts, for each group and each wanted k, the keys that begin with the
           digits found so far, by their next digit; one all-reduce adds the counts; the digit whose running count passes k is
           the next one. After the last digit the key is known, and how many keys equal it.

All groups and all k's are searched in the same passes. A pass's histogram is (groups, k's, 2^width) int32; all k's share the
first, from which they may depend on how many values there are. What is sent follows from sizes alone (`cost`), so that ranks
agree on it whatever their data, and one without a value takes part with zeros. Nothing is read on the host.
Not here: which k's are wanted (selection.py: budgets; selectors.py: quantiles), the collective (ranks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.distributed.ranks import Ranks

WIDEST = 11  # bits: three passes for fp32, and a histogram of 8 KiB
LEAST = 4  # with so many groups that histograms outgrow what is below
HISTOGRAM = 2**14  # numbers of a histogram (64 KiB): beyond, digits become narrower


class OrderStatistics(NamedTuple):
    """Of G groups and T wanted indices each, over all ranks; the same on every rank."""

    values: Tensor  # (G, T) the k-th smallest, fp32 or fp64; +inf where the group has fewer
    places: Tensor  # (G, T) int64, k itself, from 0
    below: Tensor  # (G, T) int64: values smaller than that
    equal: Tensor  # (G, T) int64: values equal to it, over all ranks; 0 where the group has fewer
    total: Tensor  # (G,) int64 values of the group


def widths(dtype: torch.dtype, n_groups: int, n_targets: int) -> list[int]:
    """Bits of each pass's digit, the highest first: as few passes as small histograms allow, of nearly equal width."""
    bits = 64 if dtype == torch.float64 else 32
    room = (HISTOGRAM // (n_groups * n_targets)).bit_length() - 1
    passes = -(-bits // max(LEAST, min(WIDEST, room)))
    return [bits * (i + 1) // passes - bits * i // passes for i in range(passes)]


def cost(dtype: torch.dtype, n_groups: int, n_targets: int) -> tuple[int, int]:
    """How many all-reduces a search makes, and the bytes they add up; `dtype` of the values: 32-bit keys but for fp64."""
    found = widths(dtype, n_groups, n_targets)
    numbers = sum(n_groups * (n_targets if i else 1) * 2**width for i, width in enumerate(found))
    return len(found), 4 * numbers


@torch.no_grad()
def order_statistics(
    values: Tensor,
    among: Tensor,
    wanted: Callable[[Tensor], Tensor],
    n_targets: int,
    ranks: Ranks,
    *,
    groups: Tensor | None = None,
    n_groups: int = 1,
) -> OrderStatistics:
    """The wanted order statistics of each group's values on all ranks.

    Args:
        values: (N,) floating point, this rank's; N may differ between ranks and be 0. No NaN where `among`.
        among: (N,) bool: which of them count.
        wanted: From (G,) counts over all ranks to (G, T) indices into the ascending order, int64, >= 0.
        n_targets: T; T, `n_groups` and the dtype must be the same on all ranks.
        groups: (N,) int64 group of each value, in [0, n_groups); None: one group.
    """
    bits, keys = _keys(values)
    groups = torch.zeros_like(keys) if groups is None else groups
    prefix = keys.new_zeros(n_groups, 1)  # the digits found so far; the first histogram is shared by all targets
    places = left = total = equal = prefix  # found by the first pass
    shift = bits
    for width in widths(values.dtype, n_groups, n_targets):
        begins = among.unsqueeze(1)  # (N, 1), or (N, T) once the targets part
        if shift < bits:
            begins = begins & ((keys >> shift).bitwise_and(2 ** (bits - shift) - 1).unsqueeze(1) == prefix[groups])
        shift -= width
        digits = (keys >> shift).bitwise_and(2**width - 1)
        counts = ranks.sum(_histogram(digits, begins, groups, n_groups, 2**width)).long()  # (G, 1 or T, bins)
        if shift + width == bits:
            total = counts.sum((1, 2))
            places = left = wanted(total)
        upto = counts.cumsum(-1)
        # An index beyond the last value would fall off the end; its result is replaced below.
        digit = (upto <= left.unsqueeze(-1)).sum(-1, keepdim=True).clamp_max(2**width - 1)  # (G, T, 1)
        equal = counts.expand(*places.shape, -1).gather(-1, digit).squeeze(-1)
        left = left - (upto.expand(*places.shape, -1).gather(-1, digit).squeeze(-1) - equal)
        prefix = (prefix << width) | digit.squeeze(-1)
    beyond = places >= total.unsqueeze(1)
    found = _values(prefix, bits).masked_fill(beyond, torch.inf)
    return OrderStatistics(found, places, places - left, equal.masked_fill(beyond, 0), total)


def _histogram(digits: Tensor, begins: Tensor, groups: Tensor, n_groups: int, bins: int) -> Tensor:
    """(G, P, bins) int32: how many of the (N,) digits each group has where the (N, P) flags of a prefix are set."""
    n_prefixes = begins.shape[1]
    places = groups.unsqueeze(1) * n_prefixes + torch.arange(n_prefixes, device=digits.device)
    places = places * bins + digits.unsqueeze(1)
    counts = torch.zeros(n_groups * n_prefixes * bins, dtype=torch.int32, device=digits.device)
    return counts.index_add_(0, places.flatten(), begins.flatten().int()).view(n_groups, n_prefixes, bins)


def _keys(values: Tensor) -> tuple[int, Tensor]:
    """32 or 64, and the values as int64 whose bits, read without a sign, order as they do."""
    wide = values.dtype == torch.float64
    values = (values if wide else values.float()) + 0.0  # -0 becomes +0, which it equals
    if wide:
        found = values.view(torch.int64)
        return 64, found ^ ((found >> 63) & (2**63 - 1)) ^ -(2**63)
    found = values.view(torch.int32)
    return 32, (found ^ ((found >> 31) & (2**31 - 1))).long() + 2**31


def _values(keys: Tensor, bits: int) -> Tensor:
    """`_keys` undone."""
    if bits == 64:
        found = keys ^ -(2**63)
        return (found ^ ((found >> 63) & (2**63 - 1))).view(torch.float64)
    found = (keys - 2**31).int()
    return (found ^ ((found >> 31) & (2**31 - 1))).view(torch.float32)
