# Fresh memory on large pages, for what is new and large in every call: gradients of a head's weight, buffers of logits.
#
#   A fresh tensor on a CPU is mapped page by page at its first write. At 4 KiB a page that took 0.3 s for a gradient of
#   519 MiB, four times the matmul that filled it; at 2 MiB a page 0.1 s (benchmarks/LOG.md). Linux gives large pages to
#   those who ask; elsewhere, and on other devices, this is `torch.empty`. The storage cannot be resized.
#
# Not here: how large the buffers are (tiling.py).
from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 4 << 20  # bytes, two large pages; below, nothing is to be gained


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised contiguous tensor."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or n_bytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without large pages: ordinary ones do
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
