"""Parameters that data-parallel ranks shard: gathered whole, once a call.

  FSDP2: forward   one all-gather
         backward  one reduce-scatter of the mean over ranks, as FSDP2 makes of a gradient: every rank has data of its own

A head over which ranks share out the vocabulary is not gathered: vocabulary.py.
Not here: `LinearHead.from_module`, which calls this (linear_head.py), ZeRO-3's own way (zero3.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opd_ops.inputs.zero3 import is_zero3, whole_of_zero3

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    return hasattr(tensor, "full_tensor")  # without importing what DTensors need


def unshard(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole of a parameter, itself if it is not sharded; every rank that has a part must call.

    `dtype`: of the hidden states beside it, in which FSDP2 gathers too where its policy computes in fewer bits.
    """
    if is_zero3(parameter):
        return whole_of_zero3(parameter)
    if not is_dtensor(parameter):
        return parameter
    from torch.distributed.tensor import Partial

    found: Any = parameter.to(dtype)
    whole: Tensor = found.full_tensor(grad_placements=[Partial()] * found.device_mesh.ndim)
    scaled: Tensor = _Mean.apply(whole, found.device_mesh.size())
    return scaled


class _Mean(torch.autograd.Function):
    """The gradients of all ranks will be added up: each gives its share of their mean. (Not every library averages.)"""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, n_ranks: int) -> Tensor:
        ctx.n_ranks = n_ranks
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.n_ranks, None
