"""Meters for what a call costs, without a clock: live bytes of tensors, the largest tensor made, bytes saved for backward.

  Live bytes count every storage that an operator returns, from its making to its last reference, on any device; inputs of
  the call are not counted, its results are.

Not here: FLOPs (torch.utils.flop_counter), operators (benchmarks/static/operators.py), resident memory (benchmarks/).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes alive in storages made under this mode; `largest` is the numel of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._seen: dict[int, object] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                self._count(tensor)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return
        n = storage.nbytes()
        self._seen[storage._cdata] = weakref.finalize(storage, self._forget, storage._cdata, n)
        self.live += n
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, tensor.numel())

    def _forget(self, key: int, n: int) -> None:
        self.live -= n
        self._seen.pop(key, None)


@contextmanager
def saved_bytes(inputs: list[torch.Tensor]) -> Iterator[dict[str, int]]:
    """Bytes that autograd saved for backward and still holds at the end, counting no storage of `inputs` and none twice."""
    known = {t.untyped_storage()._cdata for t in inputs}
    alive: dict[int, int] = {}
    total = {"bytes": 0}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known and storage._cdata not in alive:
            alive[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, alive.pop, storage._cdata)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total["bytes"] = sum(alive.values())
