"""Parameters partitioned by DeepSpeed's ZeRO-3: the whole parameter is gathered, once per call, outside of a module's forward.

  forward    one all-gather, by DeepSpeed; DeepSpeed then puts an empty tensor in its place, but the whole tensor lives on
  backward   no collective here: DeepSpeed's hook on the parameter averages the gradient over ranks and partitions it

The gradient must reach this hook. Before, autograd compares it with the shape that the parameter had when it entered the
graph: so the parameter enters while it is gathered. Autograd also lays the gradient out like the parameter, which is empty in
the backward: DeepSpeed gathers before the backward of a module, but the loss reads this head without calling the module. The
shape is enough for the layout, so the backward gives the parameter a tensor of this shape without storage.
Checked with DeepSpeed 0.19.8 by benchmarks/cpu/check_zero3.py, which needs it installed; tests use a stand-in.
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
    """The whole tensor of a partitioned parameter; every rank of its group must call.

    With gradient accumulation call `engine.backward(loss)`. With a plain `loss.backward()` DeepSpeed divides only gradients
    that flow through the engine's outputs by the number of micro-batches.
    """
    from deepspeed.runtime.zero import GatheredParameters, ZeroParamStatus

    ds_parameter: Any = parameter
    # DeepSpeed leaves small parameters gathered, and the caller may have gathered this one. Gathering again would raise, and
    # leaving the context would partition the parameter.
    is_gathered = ds_parameter.ds_status == ZeroParamStatus.AVAILABLE
    with GatheredParameters([ds_parameter], enabled=not is_gathered):
        whole: Tensor = _Whole.apply(ds_parameter, is_gathered)
        return whole


class _Whole(torch.autograd.Function):
    """The parameter's tensor while it is gathered."""

    @staticmethod
    def forward(ctx: Any, parameter: Any, is_gathered: bool) -> Tensor:
        ctx.parameter = parameter
        data: Tensor = parameter.data
        return data.clone() if is_gathered else data.view_as(data)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        parameter = ctx.parameter
        if parameter.shape != parameter.ds_shape:
            empty = parameter.data
            parameter.data = empty.new_full((), math.nan).expand(parameter.ds_shape)  # no storage: no code may read it

            def put_back(_: Tensor) -> None:  # runs after DeepSpeed's hook, which was registered earlier
                handle.remove()
                if parameter.data.stride() == (0,) * parameter.dim():  # if not, a tied embedding's backward has gathered it
                    parameter.data = empty

            handle = parameter.register_post_accumulate_grad_hook(put_back)
        return gradient.contiguous(), None
