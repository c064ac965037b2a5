"""The memory of a launch: the tensors it was given, and what its programs share or keep to themselves.

  An access is of `count` elements of `size` bytes at each thread's address. One that lies in no tensor of the launch, or is
  not aligned to its whole width, is refused: what a GPU does in silence, or dies of.

Not here: instructions (steps.py).
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SECTOR = 32  # bytes that a GPU fetches at once
LOCAL = 1 << 30  # where the addresses of a thread's own memory begin: they may be held in 32 bits


class Traffic:
    """What the warps asked of global memory."""

    def __init__(self):
        self.read_bytes = self.written_bytes = 0  # what threads took, or gave
        self.read_sectors = self.written_sectors = 0  # those that a warp's request touches, counted for each request

    def count(self, addresses, active, width, *, store):
        warps = np.where(active, addresses, np.uint64(0)).reshape(-1, 32)
        sectors = np.concatenate([warps + np.uint64(i) for i in range(0, width, SECTOR)], axis=1) // np.uint64(SECTOR)
        sectors.sort(axis=1)
        first = sectors[:, 0] != 0
        distinct = int(((sectors[:, 1:] != sectors[:, :-1]) & (sectors[:, 1:] != 0)).sum() + first.sum())
        taken = int(active.sum()) * width
        if store:
            self.written_sectors += distinct
            self.written_bytes += taken
        else:
            self.read_sectors += distinct
            self.read_bytes += taken


class Buffers:
    """Global memory: whole storages, at their own addresses. `traffic`: counted where one is given, because it takes time."""

    def __init__(self, tensors, traffic: Traffic | None = None):
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        storages.pop(0, None)  # of no byte
        self.bases = sorted(storages)
        self.sizes = [storages[base].nbytes() for base in self.bases]
        self.bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
            for base, size in zip(self.bases, self.sizes, strict=True)
        ]
        self.traffic = traffic

    def _part(self, i, places, size):
        """Of buffer i: its elements, and the index of those at the places."""
        offset = places - np.uint64(self.bases[i])
        return self.bytes[i][: self.sizes[i] // size * size].view(UNSIGNED[size]), (offset // np.uint64(size)).view(np.int64)

    def _places(self, addresses, active, size, count, is_whole):
        """(elements, index of the first, threads) for each buffer that an active thread's access is in."""
        width = size * count
        at = slice(None) if is_whole else np.flatnonzero(active)
        places = addresses[at]
        if int(np.bitwise_or.reduce(places)) & (width - 1):
            bad = places[places % np.uint64(width) != 0][0]
            raise RuntimeError(f"misaligned: an access of {width} bytes at {int(bad):#x}")
        first, last = int(places.min()), int(places.max())
        i = bisect_right(self.bases, first) - 1
        if i >= 0 and last + width <= self.bases[i] + self.sizes[i]:
            yield *self._part(i, places, size), at
            return
        at = np.flatnonzero(active)
        buffer = np.searchsorted(np.array(self.bases, np.uint64), places, side="right").astype(np.int64) - 1
        ends = (np.array(self.bases, np.uint64) + np.array(self.sizes, np.uint64))[buffer]
        outside = (buffer < 0) | (places + np.uint64(width) > ends)
        if outside.any():
            thread = at[outside][0]
            raise RuntimeError(f"out of bounds: thread {thread} accesses {width} bytes at {int(addresses[thread]):#x}")
        for i in np.unique(buffer):
            yield *self._part(i, places[buffer == i], size), at[buffer == i]

    def load(self, addresses, active, size, count, *, is_whole):
        values = None
        for elements, index, threads in self._places(addresses, active, size, count, is_whole):
            part = [elements.take(index + k if k else index) for k in range(count)]
            if isinstance(threads, slice):
                values = part
                continue
            if values is None:
                values = [np.zeros(len(addresses), UNSIGNED[size]) for _ in range(count)]
            for value, x in zip(values, part, strict=True):
                value[threads] = x
        if self.traffic is not None:
            self.traffic.count(addresses, active, size * count, store=False)
        return values

    def store(self, addresses, active, size, values, *, is_whole):
        for elements, index, threads in self._places(addresses, active, size, len(values), is_whole):
            for k, value in enumerate(values):
                elements[index + k] = value[threads]
        if self.traffic is not None:
            self.traffic.count(addresses, active, size * len(values), store=True)


class Scratch:
    """Shared or local memory: one array of bytes for each owner, a program or a thread; filled with 0xFF, which is NaN."""

    def __init__(self, owners, size, first=0):
        self.size, self.first = -(-size // 16) * 16, first  # the first address
        self.start = owners.astype(np.int64) * self.size  # of each thread's owner
        self.bytes = np.full((int(owners.max()) + 1) * self.size, 0xFF, np.uint8)

    def _places(self, addresses, active, size, count, is_whole):
        width = size * count
        at = slice(None) if is_whole else np.flatnonzero(active)
        places = addresses.view(np.int64)[at]
        if self.first:
            places = places - self.first
        low, high = int(places.min()), int(places.max())
        if int(np.bitwise_or.reduce(places)) & (width - 1) or low < 0 or high + width > self.size:
            raise RuntimeError(f"shared or local memory of {self.size} bytes: an access of {width} at {low} .. {high}")
        return self.bytes.view(UNSIGNED[size]), (self.start[at] + places) // size, at

    def load(self, addresses, active, size, count, *, is_whole):
        elements, index, threads = self._places(addresses, active, size, count, is_whole)
        part = [elements.take(index + k if k else index) for k in range(count)]
        if is_whole:
            return part
        values = [np.zeros(len(addresses), UNSIGNED[size]) for _ in range(count)]
        for value, x in zip(values, part, strict=True):
            value[threads] = x
        return values

    def store(self, addresses, active, size, values, *, is_whole):
        elements, index, threads = self._places(addresses, active, size, len(values), is_whole)
        for k, value in enumerate(values):
            elements[index + k] = value[threads].astype(elements.dtype)
