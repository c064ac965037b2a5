"""The loss of a divergence on a short list of ids, and the two gradients that the logits' gradient is made of.

  ids        the teacher's top-K, or the sampled token; LAST_ID where missing
  Terms      l,  dl/dx_k at the ids,  dl/drest,  of divergences/base.py's `OnSupport`, by autograd on (M, K) tensors in fp64

Nothing here is of size V.
Not here: both models on the lists (streamed/list_losses.py, triton/kernel_loss.py), the losses (divergences/support.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.divergences import OnSupport, Support


class Terms(NamedTuple):
    """What a divergence on a list gives the selected positions."""

    losses: Tensor  # (M,) fp64
    ids: Tensor  # (M, K)
    x: Tensor  # (M, K) student logits there
    dx: Tensor  # (M, K) compute dtype
    rest: Tensor | None  # (M,) fp64; None: the loss does not read it
    drest: Tensor | None  # (M,) compute dtype


def evaluate(part: OnSupport, at: Support, ids: Tensor, dtype: torch.dtype) -> Terms:
    """Losses and gradients, row by row."""
    with torch.inference_mode(False), torch.enable_grad():  # whatever mode the caller is in: these are small copies
        at = Support(*(column.detach().double().clone() for column in at))
        x, beside = at.student.requires_grad_(), at.student_rest.requires_grad_()
        losses = part.loss(at)
        dx, drest = torch.autograd.grad(losses.sum(), (x, beside), allow_unused=True)
    losses = losses.detach()
    # Where there is no loss there is no gradient, and where p = 0 neither: the formulas there are 0 * inf.
    nothing = losses == math.inf
    x, beside = x.detach(), beside.detach()
    dx = torch.zeros_like(x) if dx is None else dx
    dx = dx.masked_fill(nothing.unsqueeze(1) | (x == -math.inf), 0).to(dtype)
    if not part.reads_rest or drest is None:
        return Terms(losses, ids, x.to(dtype), dx, None, None)
    return Terms(losses, ids, x.to(dtype), dx, beside, drest.masked_fill(nothing, 0).to(dtype))
