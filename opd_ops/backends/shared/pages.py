"""Memory on large pages, for tensors that are large in every call: gradients of a head's weight, buffers of logits.

  A CPU maps a fresh tensor page by page at its first write. With pages of 4 KiB, a gradient of 519 MiB took 0.3 s, four times
  the matmul that filled it. With pages of 2 MiB it took 0.1 s, but 0.6 s in a virtual machine whose host takes free large pages
  back (benchmarks/LOG.md). So pages are large, and the pages of a freed gradient are kept for the next call.
  The OS takes kept pages back when it needs them (MADV_FREE); until then they count as resident. The last `MOST_KEPT` blocks
  are kept; `release` drops them.
  Only Linux has large pages and MADV_FREE; on other systems and devices `empty` is `torch.empty`. The storage of a tensor from
  `empty` cannot be resized.

Not here: how large the buffers are (grids.py).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 4 << 20  # bytes, two large pages: smaller tensors would gain nothing
MOST_KEPT = 2  # blocks, the last freed: one of a step's head, one of another head
MOST_LARGER = 2  # a block serves a tensor of at least half its size: a small tensor must not hold a large block

_kept: list[mmap.mmap] = []


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, keep: bool = False) -> Tensor:
    """Uninitialised contiguous tensor. `keep`: once the tensor is freed, its memory is kept for the next such tensor."""
    numel = math.prod(shape)
    n_bytes = numel * dtype.itemsize
    if device.type != "cpu" or n_bytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    block = (_taken(n_bytes) if keep else None) or _mapped(n_bytes)
    lent = memoryview(block)  # the tensor's storage holds this view, and frees it
    if keep:
        weakref.finalize(lent, _keep, block).atexit = False
    return torch.frombuffer(lent, dtype=dtype, count=numel).view(shape)


def release() -> None:
    """Give all kept memory back to the OS."""
    _kept.clear()


def _mapped(n_bytes: int) -> mmap.mmap:
    block = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(block, mmap.MADV_HUGEPAGE)
    return block


def _advise(block: mmap.mmap, advice: int) -> bool:
    """Whether the OS accepted the advice. A Linux built without large pages refuses it, and ordinary pages are used."""
    with contextlib.suppress(OSError):
        block.madvise(advice)
        return True
    return False


# Any thread may free a tensor at any moment: each operation on `_kept` is atomic.
def _taken(n_bytes: int) -> mmap.mmap | None:
    """The smallest kept block that fits; None if there is none."""
    for block in sorted(_kept, key=len):  # sorted copies the list
        if n_bytes <= len(block) <= MOST_LARGER * n_bytes:
            with contextlib.suppress(ValueError):  # another thread took it
                _kept.remove(block)
                return block
    return None


def _keep(block: mmap.mmap) -> None:
    """Keep the block of a freed tensor, if the OS accepts that it may take the pages back."""
    if hasattr(mmap, "MADV_FREE") and _advise(block, mmap.MADV_FREE):
        _kept.append(block)
        if len(_kept) > MOST_KEPT:
            with contextlib.suppress(IndexError):
                _kept.pop(0)
