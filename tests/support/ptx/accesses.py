"""What the threads of a launch read and wrote, byte by byte, and where two of them are in conflict: a barrier is missing there.

  A conflict is a byte that two of these touch, of which one writes, unless all write the same value:
    two warps of a program between two barriers of the program, two threads of a warp between two barriers of the warp or the
    program, two programs of a launch
Seen is what this launch did: not a conflict that other numbers would cause, nor one between two launches, which run in order.
A shuffle is no barrier of memory.

Not here: who runs and where numbers are kept (machine.py, memory.py), the kernels' test (test_accesses.py).
"""

from __future__ import annotations

import numpy as np

from tests.support.ptx.memory import Buffers, Scratch

READ = -1  # in the place of a written byte
WARP = 32


class Accesses:
    """Of the programs of one launch, a batch of them after the other."""

    def __init__(self):
        self.logs: dict[str, list[list[np.ndarray]]] = {"global": [], "shared": []}  # by `_note`

    def watch(self, threads, ids: np.ndarray):
        """Note what these threads, of the programs `ids`, do from now on."""
        self.program = np.repeat(ids.astype(np.int64), threads.program.threads)
        self.thread = np.arange(threads.n) % threads.program.threads
        self.n_barriers, self.n_warp_barriers = np.zeros((2, threads.n), np.int64)  # that each thread has passed
        threads.accesses = self
        threads.buffers = _Watched(threads.buffers, self.logs["global"], self)
        threads.shared = _Watched(threads.shared, self.logs["shared"], self)

    def pass_barrier(self, active: np.ndarray, *, is_of_warp: bool):
        self.n_warp_barriers += active
        if not is_of_warp:
            self.n_barriers += active

    def conflicts(self) -> dict[str, int]:
        """How many bytes are in conflict, by kind; without those that are none."""
        kinds = {}
        for space, log in self.logs.items():
            if log:
                place, program, thread, barriers, warp_barriers, value = (np.concatenate(x) for x in zip(*log, strict=True))
                warp = thread // WARP
                kinds[f"{space}, between warps"] = _count([place, program, barriers], warp, value)
                kinds[f"{space}, in a warp"] = _count([place, program, warp_barriers, warp], thread, value)
                if space == "global":
                    kinds["global, between programs"] = _count([place], program, value)
        return {kind: n for kind, n in kinds.items() if n}


class _Watched:
    """A memory whose accesses are noted."""

    def __init__(self, memory: Buffers | Scratch, log: list[list[np.ndarray]], accesses: Accesses):
        self.memory, self.log, self.accesses = memory, log, accesses

    def load(self, addresses, active, size, count, *, is_whole):
        self._note(addresses, active, size * count, READ)
        return self.memory.load(addresses, active, size, count, is_whole=is_whole)

    def store(self, addresses, active, size, values, *, is_whole):
        parts = [np.ascontiguousarray(x[active]).view(np.uint8).reshape(-1, x.itemsize)[:, :size] for x in values]
        self._note(addresses, active, size * len(values), np.concatenate(parts, axis=1).reshape(-1))
        return self.memory.store(addresses, active, size, values, is_whole=is_whole)

    def _note(self, addresses, active, width, values):
        """An entry for each byte: its address, program, thread, the thread's barriers of both kinds, and what is written."""
        own = self.accesses
        places = (addresses[active].astype(np.int64)[:, None] + np.arange(width)).reshape(-1)
        who = [np.repeat(x[active], width) for x in (own.program, own.thread, own.n_barriers, own.n_warp_barriers)]
        self.log.append([places, *who, np.broadcast_to(np.asarray(values, np.int16), places.shape)])


def _count(places: list[np.ndarray], who: np.ndarray, values: np.ndarray) -> int:
    """How many different places are touched by several of `who`, with several values."""
    order = np.lexsort(places)
    changes = np.any([np.diff(x[order]) != 0 for x in places], axis=0)
    first = np.concatenate(([0], np.flatnonzero(changes) + 1))

    def differ(x):
        return np.minimum.reduceat(x[order], first) != np.maximum.reduceat(x[order], first)

    return int((differ(who) & differ(values)).sum())
