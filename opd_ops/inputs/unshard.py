"""Parameters sharded over data-parallel ranks: the whole parameter is gathered, once per call.

  FSDP2: forward   one all-gather
         backward  one reduce-scatter of the mean gradient over ranks, as FSDP2 does: every rank has its own data

A head whose vocabulary is shared out over ranks is not gathered: vocabulary.py.
Not here: `LinearHead.from_module`, the caller (linear_head.py), ZeRO-3 (zero3.py).
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
    return hasattr(tensor, "full_tensor")  # without importing torch.distributed.tensor


def unshard(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole parameter; the parameter itself if it is not sharded. Every rank that has a part must call.

    `dtype`: the dtype of the hidden states. The parameter is gathered in it, as FSDP2 does with mixed precision.
    """
    if is_zero3(parameter):
        return whole_of_zero3(parameter)
    if not is_dtensor(parameter):
        return parameter
    from torch.distributed.tensor import Partial

    sharded: Any = parameter.to(dtype)
    whole: Tensor = sharded.full_tensor(grad_placements=[Partial()] * sharded.device_mesh.ndim)
    with_mean_gradient: Tensor = _Mean.apply(whole, sharded.device_mesh.size())
    return with_mean_gradient


class _Mean(torch.autograd.Function):
    """Divides the gradient by the number of ranks: the ranks' gradients are summed later, and the sum must be the mean."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, n_ranks: int) -> Tensor:
        ctx.n_ranks = n_ranks
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.n_ranks, None
