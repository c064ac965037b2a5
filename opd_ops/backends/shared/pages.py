"""Memory on large pages, for what is large in every call: gradients of a head's weight, buffers of logits.

  A fresh tensor on a CPU is mapped page by page at its first write. At 4 KiB a page that took 0.3 s for a gradient of
  519 MiB, four times the matmul that filled it; at 2 MiB a page 0.1 s, but 0.6 s in a virtual machine whose host takes free
  large pages back (benchmarks/LOG.md). So pages are large, and those of a freed gradient wait for the next call.
  While they wait they are the kernel's to take (MADV_FREE): what others need is theirs, though the resident size counts it
  until then. The last `MOST_KEPT` blocks wait; `release` drops them.
  Linux has both; elsewhere, and on other devices, this is `torch.empty`. The storage cannot be resized.

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

LARGE = 4 << 20  # bytes, two large pages; below, nothing is to be gained
MOST_KEPT = 2  # the last freed: a step's own, and those of one more head
MOST_LARGER = 2  # a block may serve a tensor of half its size, not less: a small tensor must not hold a large block

_kept: list[mmap.mmap] = []


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, keep: bool = False) -> Tensor:
    """Uninitialised contiguous tensor; `keep`: its memory waits for the next such tensor once nobody holds this one."""
    numel = math.prod(shape)
    n_bytes = numel * dtype.itemsize
    if device.type != "cpu" or n_bytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    block = (_taken(n_bytes) if keep else None) or _mapped(n_bytes)
    lent = memoryview(block)  # the storage holds this view, which goes when the storage goes
    if keep:
        weakref.finalize(lent, _keep, block).atexit = False
    return torch.frombuffer(lent, dtype=dtype, count=numel).view(shape)


def release() -> None:
    """Give back all memory that waits for a next call."""
    _kept.clear()


def _mapped(n_bytes: int) -> mmap.mmap:
    block = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(block, mmap.MADV_HUGEPAGE)
    return block


def _advise(block: mmap.mmap, advice: int) -> bool:
    """Whether the kernel took it: one may be built without large pages, and then ordinary ones do."""
    with contextlib.suppress(OSError):
        block.madvise(advice)
        return True
    return False


# Tensors are freed by any thread, at any moment: each step on the list is one that no other thread can divide.
def _taken(n_bytes: int) -> mmap.mmap | None:
    """The smallest block that waits and fits."""
    for block in sorted(_kept, key=len):  # a copy
        if n_bytes <= len(block) <= MOST_LARGER * n_bytes:
            with contextlib.suppress(ValueError):  # another thread took it
                _kept.remove(block)
                return block
    return None


def _keep(block: mmap.mmap) -> None:
    """Let the block of a freed tensor wait, unless the kernel cannot be told that it may take it."""
    if hasattr(mmap, "MADV_FREE") and _advise(block, mmap.MADV_FREE):
        _kept.append(block)
        if len(_kept) > MOST_KEPT:
            with contextlib.suppress(IndexError):
                _kept.pop(0)
