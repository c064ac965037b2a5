"""The loss of a divergence on a short list of ids, and the two gradients from which a backend makes the logits' gradient.

  ids        the list (list_ids.py); LAST_ID (inputs/teacher_lists.py) marks a missing entry
  off_list   log sum e^{x_v} over the ids v that are not on the list; x_v: the student's logit of id v
  Terms      l,  dl/dx_k at the ids,  dl/d off_list

`OnSupport` (divergences/base.py) defines l; autograd differentiates it on (M, K) tensors in fp64. Nothing here has size V.
Not here: both models on the lists (streamed/list_losses.py, triton/kernel_loss.py), the losses (divergences/).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.divergences import OnSupport, Support
from opd_ops.divergences.equations import relative_to_top


class Terms(NamedTuple):
    """Loss and gradients of a divergence on a list, at the selected positions."""

    losses: Tensor  # (M,) fp64
    ids: Tensor  # (M, K)
    x: Tensor  # (M, K) student logits at the ids
    dx: Tensor  # (M, K) dl/dx, compute dtype
    off_list: Tensor | None  # (M,) fp64, the student's log-sum-exp off the ids; None: the loss does not read it
    d_off_list: Tensor | None  # (M,) dl/d off_list, compute dtype


def evaluate(divergence: OnSupport, support: Support, ids: Tensor, dtype: torch.dtype) -> Terms:
    """Losses and gradients, row by row, from both models on the list (`support`)."""
    with torch.inference_mode(False), torch.enable_grad():  # the caller may be in any mode; these are small copies
        support = Support(*(None if column is None else column.detach().double().clone() for column in support))  # type: ignore[arg-type]
        x, off_list = support.student.requires_grad_(), support.student_off_list.requires_grad_()
        if divergence.reads_off_list:
            relative = relative_to_top(torch.cat((x, off_list.unsqueeze(1)), 1))
            support = support._replace(student=relative[:, :-1], student_off_list=relative[:, -1])
        else:
            support = support._replace(student=relative_to_top(x))
        losses = divergence.loss(support)
        dx, d_off_list = torch.autograd.grad(losses.sum(), (x, off_list), allow_unused=True)
    losses = losses.detach()
    # An infinite loss and an entry with p = 0 have no gradient: the formulas there are 0 * inf.
    no_gradient = losses == math.inf
    x, off_list = x.detach(), off_list.detach()
    dx = torch.zeros_like(x) if dx is None else dx
    dx = dx.masked_fill(no_gradient.unsqueeze(1) | (x == -math.inf), 0).to(dtype)
    if not divergence.reads_off_list or d_off_list is None:
        return Terms(losses, ids, x.to(dtype), dx, None, None)
    return Terms(losses, ids, x.to(dtype), dx, off_list, d_off_list.masked_fill(no_gradient, 0).to(dtype))
