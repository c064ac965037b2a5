"""The memory of a launch: the tensors it was given, and what its programs share or keep to themselves.

  An access is of `count` elements of `size` bytes at each thread's address. One that lies in no tensor of the launch, or is
  not aligned to its whole width, is refused: what a GPU does in silence, or dies of.

Not here: instructions (machine.py).
"""

from __future__ import annotations

import ctypes

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
    """Global memory: whole storages, at their own addresses."""

    def __init__(self, tensors):
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        storages.pop(0, None)  # of no byte
        self.bases = np.array(sorted(storages), np.uint64)
        self.sizes = np.array([storages[int(base)].nbytes() for base in self.bases], np.uint64)
        self.bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * int(size)).from_address(int(base)))
            for base, size in zip(self.bases, self.sizes, strict=True)
        ]
        self.traffic = Traffic()

    def _places(self, addresses, active, size, count):
        """(buffer, index of the element, threads) for each buffer that an active thread's access is in."""
        width = size * count
        at = np.flatnonzero(active)
        got = addresses[at]
        if (got % np.uint64(width)).any():
            raise RuntimeError(f"misaligned: an access of {width} bytes at {int(got[got % np.uint64(width) != 0][0]):#x}")
        buffer = np.searchsorted(self.bases, got, side="right").astype(np.int64) - 1
        offset = got - self.bases[buffer]
        outside = (buffer < 0) | (offset + np.uint64(width) > self.sizes[buffer])
        if outside.any():
            thread = at[outside][0]
            raise RuntimeError(f"out of bounds: thread {thread} accesses {width} bytes at {int(addresses[thread]):#x}")
        everywhere = len(buffer) > 0 and bool((buffer == buffer[0]).all())
        for i in buffer[:1] if everywhere else np.unique(buffer):
            of_this = slice(None) if everywhere else buffer == i
            view = self.bytes[i][: len(self.bytes[i]) // size * size].view(UNSIGNED[size])
            yield view, (offset[of_this] // np.uint64(size)).astype(np.int64), at[of_this]

    def load(self, addresses, active, size, count):
        values = [np.zeros(len(addresses), UNSIGNED[size]) for _ in range(count)]
        for view, index, threads in self._places(addresses, active, size, count):
            for k in range(count):
                values[k][threads] = view[index + k]
        self.traffic.count(addresses, active, size * count, store=False)
        return values

    def store(self, addresses, active, size, values):
        for view, index, threads in self._places(addresses, active, size, len(values)):
            for k, value in enumerate(values):
                view[index + k] = value[threads]
        self.traffic.count(addresses, active, size * len(values), store=True)


class Scratch:
    """Shared or local memory: one array of bytes for each owner, a program or a thread; filled with 0xFF, which is NaN."""

    def __init__(self, owners, size):
        self.size = -(-size // 16) * 16
        self.owner = owners  # of each thread
        self.bytes = np.full((int(owners.max()) + 1, self.size), 0xFF, np.uint8)

    def _places(self, addresses, active, size, count):
        width = size * count
        at = np.flatnonzero(active)
        got = addresses[at].astype(np.int64)
        if (got % width).any() or (got < 0).any() or (got + width > self.size).any():
            raise RuntimeError(
                f"shared or local memory of {self.size} bytes: an access of {width} at {got.min()} .. {got.max()}"
            )
        return self.bytes.reshape(-1).view(UNSIGNED[size]), (self.owner[at] * self.size + got) // size, at

    def load(self, addresses, active, size, count):
        view, index, threads = self._places(addresses, active, size, count)
        values = [np.zeros(len(addresses), UNSIGNED[size]) for _ in range(count)]
        for k in range(count):
            values[k][threads] = view[index + k]
        return values

    def store(self, addresses, active, size, values):
        view, index, threads = self._places(addresses, active, size, len(values))
        for k, value in enumerate(values):
            view[index + k] = value[threads].astype(view.dtype)
