"""Backward passes whose gradients cannot be differentiated again: a second derivative is an error.

  torch's `once_differentiable` raises only if the incoming gradient requires a gradient. A loss gets a plain 1, so a penalty on
  the loss's gradient would silently have no gradient. Here every gradient computed under `create_graph=True` raises when it is
  differentiated.

Not here: the backwards (shared/gradient_in_backward.py, triton/heads_loss.py); a second derivative, which
backend "eager" has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

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
    """Decorator for the backward of an autograd.Function; it returns a tuple of gradients."""

    @wraps(backward)
    def once(ctx: Any, *incoming: Tensor) -> Gradients:
        with torch.no_grad():
            gradients = backward(ctx, *incoming)
        if not torch.is_grad_enabled():
            return gradients
        anchor = torch.zeros((), requires_grad=True)
        refusing = iter(_Refusing.apply(anchor, *(gradient for gradient in gradients if gradient is not None)))
        return tuple(None if gradient is None else next(refusing) for gradient in gradients)

    return once
