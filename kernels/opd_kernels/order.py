"""The K-th largest of any number of integer keys, found by one program: by counting, without a sort.

  key      device.py's `_order_key` of an fp32 number: an int32 of its order; ABSENT stands for no number
  search   one count for each binary digit of the range of the keys that is left

A program that can hold all keys (WHOLE) keeps them in registers. Otherwise it wrote them to memory, and each count reads them
again, BLOCK at a time: as many bytes from the L2 cache as all keys have, 32 times.
Sums of integers have no order: results do not depend on the launch.
Not here: which keys and which K (quantiles.py, choose.py).
"""

import triton
import triton.language as tl

from .device import _kth_key

ABSENT = tl.constexpr(-(2**31))  # below the key of -inf
LARGEST = tl.constexpr(2**31 - 1)


@triton.jit
def _value_of_key(key):
    # the fp32 number with this key
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _count_at_least(keys_ptr, n, least, BLOCK: tl.constexpr):
    count = 0
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        keys = tl.load(keys_ptr + i, mask=i < n, other=ABSENT)
        count += tl.sum((keys >= least).to(tl.int32))
    return count


@triton.jit
def _kth_largest(keys, keys_ptr, n, K, low, high, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    # The K-th largest key, K >= 1; [low, high] contains it, and low > ABSENT. WHOLE: `keys` are all of them; otherwise n keys
    # at keys_ptr are, which this program wrote.
    if WHOLE:
        low = _kth_key(keys, K, low, high)
    else:
        while low < high:
            middle = ((low.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)
            enough = _count_at_least(keys_ptr, n, middle, BLOCK) >= K
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
    return low
