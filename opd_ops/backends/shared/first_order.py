"""Backwards that have no derivative of their own: to differentiate what they return is an error.

  torch's `once_differentiable` raises where the gradient that comes in requires one. A loss gets a plain 1: a penalty on
  its gradient would lose its own in silence. Here whatever `create_graph=True` asks for raises when it is differentiated.

Not here: the backwards (streamed/loss.py, triton/, call/reduce.py); a second derivative, which "eager" has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from opd_ops.arguments import is_traced

Gradients = tuple[Tensor | None, ...]


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "selective OPD: got a gradient to differentiate once more, but backends 'torch' and 'triton' have no second "
            "derivative; expected one backward, or backend='eager'"
        )


def first_order(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorator of the backward of an autograd.Function that returns a tuple."""

    @wraps(backward)
    def once(ctx: Any, *incoming: Tensor) -> Gradients:
        with torch.no_grad():
            found = backward(ctx, *incoming)
        if is_traced() or not torch.is_grad_enabled():
            return found
        anchor = torch.zeros((), requires_grad=True)
        refusing = iter(_Refusing.apply(anchor, *(gradient for gradient in found if gradient is not None)))
        return tuple(None if gradient is None else next(refusing) for gradient in found)

    return once
