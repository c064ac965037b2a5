"""Order statistics over all ranks without gathering values: the exact k-th smallest of the values of all ranks together.

  key(x)   the bits of x as an integer that orders like x: with b = bits as a signed integer, b if x >= 0, else b with all
           but the sign flipped; then shifted, so that no key is negative. 32 bits for fp32, 64 for fp64.
  search   one pass per digit of the key, the highest first. For each group and each target k every rank takes the keys that
           begin with the digits known so far, and counts them by their next digit, in a histogram. One all-reduce adds the
           histograms. The next digit is the digit whose running count passes k. After the last pass the key is known, and
           the number of keys that equal it.

All groups and targets are searched in the same passes. A histogram is (groups, targets, 2^width) int32. The targets share the
first histogram: they may be computed from its count of values. The bytes sent follow from sizes alone (`cost`), so that all
ranks send the same number. A rank without a value takes part with zeros. The CPU reads no value.
Not here: the choice of k (selection/budget.py: budgets; selection/selectors.py: quantiles), the collective (ranks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.distributed.ranks import Ranks

WIDEST = 11  # bits of a digit: three passes for fp32, and a histogram of 8 KiB
LEAST = 4  # bits of a digit, also with so many groups that a histogram exceeds HISTOGRAM
HISTOGRAM = 2**14  # most numbers in a histogram (64 KiB); digits become narrower to stay below


class OrderStatistics(NamedTuple):
    """Order statistics of G groups with T targets each, over all ranks; the same on every rank."""

    values: Tensor  # (G, T) the k-th smallest, fp32 or fp64; +inf where the group has fewer
    places: Tensor  # (G, T) int64: k, counted from 0
    below: Tensor  # (G, T) int64: number of values smaller than the k-th smallest
    equal: Tensor  # (G, T) int64: number of values equal to it; 0 where the group has fewer
    total: Tensor  # (G,) int64: number of values of the group


def widths(dtype: torch.dtype, n_groups: int, n_targets: int) -> list[int]:
    """Bits of the digit of each pass, the highest first: as few passes as HISTOGRAM allows, with nearly equal widths."""
    bits = 64 if dtype == torch.float64 else 32
    most_bits = (HISTOGRAM // (n_groups * n_targets)).bit_length() - 1
    passes = -(-bits // max(LEAST, min(WIDEST, most_bits)))
    return [bits * (i + 1) // passes - bits * i // passes for i in range(passes)]


def cost(dtype: torch.dtype, n_groups: int, n_targets: int) -> tuple[int, int]:
    """The number of all-reduces of a search, and their bytes. `dtype`: of the values; fp64 has 64-bit keys, others 32-bit."""
    pass_widths = widths(dtype, n_groups, n_targets)
    numbers = sum(n_groups * (n_targets if i else 1) * 2**width for i, width in enumerate(pass_widths))
    return len(pass_widths), 4 * numbers


@torch.no_grad()
def order_statistics(
    values: Tensor,
    among: Tensor,
    targets: Callable[[Tensor], Tensor],
    n_targets: int,
    ranks: Ranks,
    *,
    groups: Tensor | None = None,
    n_groups: int = 1,
) -> OrderStatistics:
    """The k-th smallest values of each group over all ranks, for the targets k.

    Args:
        values: (N,) floating point, of this rank; N may differ between ranks and be 0. No NaN where `among`.
        among: (N,) bool: which values count.
        targets: Maps (G,) counts over all ranks to (G, T) targets k: indices into the ascending order, int64, >= 0.
        n_targets: T; T, `n_groups` and the dtype must be the same on all ranks.
        groups: (N,) int64 group of each value, in [0, n_groups); None: one group.
    """
    bits, keys = _keys(values)
    groups = torch.zeros_like(keys) if groups is None else groups
    prefix = keys.new_zeros(n_groups, 1)  # the digits known so far; all targets share the first histogram
    places = index_in_prefix = total = equal = prefix  # set in the first pass; the index counts keys that begin with the prefix
    shift = bits
    for width in widths(values.dtype, n_groups, n_targets):
        begins = among.unsqueeze(1)  # (N, 1); (N, T) after the first pass
        if shift < bits:
            begins = begins & ((keys >> shift).bitwise_and(2 ** (bits - shift) - 1).unsqueeze(1) == prefix[groups])
        shift -= width
        digits = (keys >> shift).bitwise_and(2**width - 1)
        counts = ranks.sum(_histogram(digits, begins, groups, n_groups, 2**width)).long()  # (G, 1 or T, bins)
        if shift + width == bits:
            total = counts.sum((1, 2))
            places = index_in_prefix = targets(total)
        running = counts.cumsum(-1)
        # A target beyond the last value has no digit: it takes the last digit here, and +inf below.
        digit = (running <= index_in_prefix.unsqueeze(-1)).sum(-1, keepdim=True).clamp_max(2**width - 1)  # (G, T, 1)
        equal = counts.expand(*places.shape, -1).gather(-1, digit).squeeze(-1)
        index_in_prefix = index_in_prefix - (running.expand(*places.shape, -1).gather(-1, digit).squeeze(-1) - equal)
        prefix = (prefix << width) | digit.squeeze(-1)
    beyond = places >= total.unsqueeze(1)
    kth_values = _values(prefix, bits).masked_fill(beyond, torch.inf)
    return OrderStatistics(kth_values, places, places - index_in_prefix, equal.masked_fill(beyond, 0), total)


def _histogram(digits: Tensor, begins: Tensor, groups: Tensor, n_groups: int, bins: int) -> Tensor:
    """(G, P, bins) int32: the count of each digit in each group, of the keys that the (N, P) flags of a prefix select."""
    n_prefixes = begins.shape[1]
    places = groups.unsqueeze(1) * n_prefixes + torch.arange(n_prefixes, device=digits.device)
    places = places * bins + digits.unsqueeze(1)
    counts = torch.zeros(n_groups * n_prefixes * bins, dtype=torch.int32, device=digits.device)
    return counts.index_add_(0, places.flatten(), begins.flatten().int()).view(n_groups, n_prefixes, bins)


def _keys(values: Tensor) -> tuple[int, Tensor]:
    """The key's width, 32 or 64 bits, and the keys as int64; as unsigned numbers they order like the values."""
    wide = values.dtype == torch.float64
    values = (values if wide else values.float()) + 0.0  # -0 becomes +0, which it equals
    if wide:
        pattern = values.view(torch.int64)
        return 64, pattern ^ ((pattern >> 63) & (2**63 - 1)) ^ -(2**63)
    pattern = values.view(torch.int32)
    return 32, (pattern ^ ((pattern >> 31) & (2**31 - 1))).long() + 2**31


def _values(keys: Tensor, bits: int) -> Tensor:
    """The inverse of `_keys`."""
    if bits == 64:
        floats = keys ^ -(2**63)
        return (floats ^ ((floats >> 63) & (2**63 - 1))).view(torch.float64)
    floats = (keys - 2**31).int()
    return (floats ^ ((floats >> 31) & (2**31 - 1))).view(torch.float32)
