"""`Ranks`: the processes that compute one thing together, and the three collectives that this package uses between them.

  sum(x)        one all-reduce                                           x.nbytes
  gather(x)     one all-gather of tensors of one shape, in rank order    size * x.nbytes
  first(x)      one broadcast of the first rank's                        x.nbytes

All three give every rank the same bits. With one process, or nothing to send, nothing is sent. A collective waits for every
rank, so whoever calls one calls it on all of them, whatever their data: a rank without a position takes part with empty sums.
Not here: what is sent (backends/shared/joined.py, order_statistics.py), how much of it (docs/scaling.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# By its newer name where there is one: the older warns there.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


@dataclass(frozen=True)
class Ranks:
    """A process group, or None: this process alone."""

    group: dist.ProcessGroup | None = None

    @staticmethod
    def world() -> Ranks:
        """All processes; this one alone where torch.distributed is not set up."""
        return Ranks(dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @torch.no_grad()
    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place of `x`, which must be contiguous."""
        if self.size > 1 and x.numel():
            dist.all_reduce(x, group=self.group)
        return x

    @torch.no_grad()
    def gather(self, x: Tensor) -> Tensor:
        """(size, *x.shape) everyone's `x`, which must have one shape and dtype on all ranks."""
        if self.size == 1:
            return x.unsqueeze(0)
        if not x.numel():
            return x.new_empty(self.size, *x.shape)
        every = x.new_empty(self.size * x.numel())
        getattr(dist, ALL_GATHER)(every, x.contiguous().view(-1), group=self.group)
        return every.view(self.size, *x.shape)

    @torch.no_grad()
    def first(self, x: Tensor) -> Tensor:
        """The first rank's `x`, in place of everyone's, which must be contiguous."""
        if self.size > 1 and x.numel():
            dist.broadcast(x, group=self.group, group_src=0)
        return x
