"""Parameters that DeepSpeed's ZeRO-3 partitions: gathered whole, once a call, outside of any module's forward.

  forward    one all-gather, by DeepSpeed; the whole tensor outlives the partitioning, which puts an empty one in its place
  backward   nothing here: DeepSpeed's own hook on the parameter averages its gradient over the ranks and partitions it

The gradient only has to get to that hook. On its way autograd compares it with the shape that the parameter had when it
entered the graph, hence inside of the gathering, and lays it out like the parameter, which is empty by then: DeepSpeed
gathers before the backward of a module, and a head that the loss reads is not called as one. The shape is enough, so that is
what the parameter gets.
Checked against DeepSpeed 0.19.8 by benchmarks/cpu/check_zero3.py, which needs it installed; tests use a stand-in.
Not here: FSDP2 (unshard.py), `LinearHead.from_module`, which calls both (linear_head.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def is_zero3(tensor: object) -> bool:
    return hasattr(tensor, "ds_id") and hasattr(tensor, "ds_status")  # without importing DeepSpeed


def whole_of_zero3(parameter: Tensor) -> Tensor:
    """The whole of a partitioned parameter; every rank of its group must call.

    With gradient accumulation call `engine.backward(loss)`: a plain `loss.backward()` is divided by the number of micro-batches
    only where it flows through the engine's outputs.
    """
    from deepspeed.runtime.zero import GatheredParameters, ZeroParamStatus

    found: Any = parameter
    # Small ones stay gathered, and the caller may have gathered it: nesting raises, and leaving would partition those.
    is_kept = found.ds_status == ZeroParamStatus.AVAILABLE
    with GatheredParameters([found], enabled=not is_kept):
        whole: Tensor = _Whole.apply(found, is_kept)
        return whole


class _Whole(torch.autograd.Function):
    """The parameter's tensor while it is gathered."""

    @staticmethod
    def forward(ctx: Any, parameter: Any, is_kept: bool) -> Tensor:
        ctx.parameter = parameter
        data: Tensor = parameter.data
        return data.clone() if is_kept else data.view_as(data)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        parameter = ctx.parameter
        if parameter.shape != parameter.ds_shape:
            empty = parameter.data
            parameter.data = empty.new_full((), math.nan).expand(parameter.ds_shape)  # no storage: nothing may read it

            def put_back(_: Tensor) -> None:  # after DeepSpeed's hook, which is older
                handle.remove()
                if parameter.data.stride() == (0,) * parameter.dim():  # a tied embedding's backward may have gathered it
                    parameter.data = empty

            handle = parameter.register_post_accumulate_grad_hook(put_back)
        return gradient.contiguous(), None
