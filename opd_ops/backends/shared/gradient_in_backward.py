"""Losses whose gradient is computed in the backward, from tensors saved in the forward: one autograd function for all of them.

A backend computes the gradient in its `GradientPlan`. triton/heads_loss.py alone computes gradients in the forward. Calls that
torch.compile traces have a pair of their own, as operators (triton/operators.py).
Not here: second derivatives, which are refused (first_order.py), inputs overwritten between forward and backward
(overwritten.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opd_ops.backends.shared.first_order import first_order
from opd_ops.backends.shared.matmul import without_autocast


class GradientPlan(ABC):
    """Computes the gradients in the backward; holds all that it reads besides tensors."""

    @abstractmethod
    def gradients(self, saved: Sequence[Tensor], dlosses: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        """The gradient of sum dlosses l with respect to each saved tensor. `needs`: whether each is needed.

        The list may be shorter than `saved`: the last tensors then have no gradient.
        """

    def check(self) -> None:  # noqa: B027 most plans have nothing to check
        """Raise if the backward cannot run. It runs before autograd compares the saved tensors with their versions."""


class _GradientInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: GradientPlan, losses: Tensor, *tensors: Tensor) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(*tensors)
        return losses.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        ctx.plan.check()
        saved = ctx.saved_tensors
        with without_autocast(dlosses.device):
            gradients = ctx.plan.gradients(saved, dlosses, ctx.needs_input_grad[2:])
        return None, None, *gradients, *(None,) * (len(saved) - len(gradients))


def connected(plan: GradientPlan, losses: Tensor, *tensors: Tensor | None) -> Tensor:
    """The (M,) losses, connected to the tensors. The tensors are saved for the backward."""
    result: Tensor = _GradientInBackward.apply(plan, losses, *tensors)
    return result
