"""Meters for what a call costs, without a clock: live bytes, the largest tensor made, bytes saved for backward, operators.

  Live bytes count every storage that an operator returns, from its making to its last reference, on any device; inputs of
  the call are not counted, its results are.

Not here: FLOPs (torch.utils.flop_counter), resident memory of a process (benchmarks/).
"""

from __future__ import annotations

import weakref
from collections import Counter
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


FREE = {  # operators that compute nothing: views and allocations
    "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "new_empty", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts operators by name, forward and backward, without those of `FREE`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1].rstrip("_")
        if name not in FREE:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


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
