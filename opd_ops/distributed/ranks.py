"""`Ranks`: the processes that compute a result together, and the three collectives that this package uses.

  sum(x)        one all-reduce                                           x.nbytes
  gather(x)     one all-gather of tensors of one shape, in rank order    size * x.nbytes
  first(x)      one broadcast of the first rank's x                      x.nbytes

All three give every rank the same bits. With one process or an empty tensor nothing is sent. A collective waits for every rank,
so all ranks must call it, whatever their data: a rank without a position takes part with empty sums.
Not here: the callers (backends/shared/joined.py, order_statistics.py), bytes per call (docs/scaling.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# The newer name if torch has it: the older name then warns.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


@dataclass(frozen=True)
class Ranks:
    """A process group; None: only this process."""

    group: dist.ProcessGroup | None = None

    @staticmethod
    def world() -> Ranks:
        """All processes; only this process if torch.distributed is not initialised."""
        return Ranks(dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @torch.no_grad()
    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place; `x` must be contiguous."""
        if self.size > 1 and x.numel():
            dist.all_reduce(x, group=self.group)
        return x

    @torch.no_grad()
    def gather(self, x: Tensor) -> Tensor:
        """(size, *x.shape): the `x` of every rank; shape and dtype must be the same on all ranks."""
        if self.size == 1:
            return x.unsqueeze(0)
        if not x.numel():
            return x.new_empty(self.size, *x.shape)
        gathered = x.new_empty(self.size * x.numel())
        getattr(dist, ALL_GATHER)(gathered, x.contiguous().view(-1), group=self.group)
        return gathered.view(self.size, *x.shape)

    @torch.no_grad()
    def first(self, x: Tensor) -> Tensor:
        """The first rank's `x`, in place on every rank; `x` must be contiguous."""
        if self.size > 1 and x.numel():
            dist.broadcast(x, group=self.group, group_src=0)
        return x
