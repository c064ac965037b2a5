"""Losses whose gradient is made in the backward, from what the forward kept: one autograd function for all of them.

A backend says how in a `GradientPlan`. What is made in the forward, beside the loss, is in triton/heads_loss.py.
Not here: second derivatives, which are refused (first_order.py), inputs overwritten in between (overwritten.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opd_ops.backends.shared.first_order import first_order


class GradientPlan(ABC):
    """What a backward needs beside tensors."""

    @abstractmethod
    def gradients(self, saved: Sequence[Tensor], dlosses: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        """The gradient of sum dlosses l with respect to each of the saved tensors; `needs`: which are asked for.

        Fewer than there are tensors: the others have none.
        """


class _GradientInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: GradientPlan, losses: Tensor, *tensors: Tensor) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(*tensors)
        return losses.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.autocast(dlosses.device.type, enabled=False):
            found = ctx.plan.gradients(saved, dlosses, ctx.needs_input_grad[2:])
        return None, None, *found, *(None,) * (len(saved) - len(found))


def connected(plan: GradientPlan, losses: Tensor, *tensors: Tensor | None) -> Tensor:
    """The (M,) losses, connected to the tensors, which are saved."""
    result: Tensor = _GradientInBackward.apply(plan, losses, *tensors)
    return result
