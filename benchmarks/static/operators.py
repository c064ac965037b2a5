"""Operators of torch that a call runs, counted by name, forward and backward; views and allocations are not counted.

Not here: launches of kernels and shapes of matmuls (launches.py), FLOP (torch.utils.flop_counter).
"""

from __future__ import annotations

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

FREE = {  # operators that compute nothing
    "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "new_empty", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """While active, counts the operators in `names`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1].rstrip("_")
        if name not in FREE:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))
