"""Matrix products of heads: operands in their own 16 bits where the result can be fp32, else converted.

  head_product   x @ w.T + bias    logits of some rows
  fp32_product   a @ b             operands of any one dtype, fp32 result
  long_product   a @ b             sums over the vocabulary
  without_autocast                 autocast would multiply in 16 bits

The vendor's matmul accumulates in fp32; CUDA can also return that sum unrounded. Elsewhere (ROCm, XPU, a CPU) the operands are
widened first, a slice of the weight at a time.
Not here: which rows and when (tiles.py, streamed/loss.py, triton/heads_loss.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from opd_ops.inputs.chunks import chunks


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """No autocast on the device. Where there is none, a context of torch would cost a small call some microseconds."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


def operand_dtype(x: Tensor, out: torch.dtype) -> torch.dtype:
    """The dtype in which `head_product` multiplies `x` for a result of dtype `out`: the dtype of `x`, or `out`."""
    return x.dtype if out == x.dtype or (out == torch.float32 and _returns_fp32(x)) else out


def head_product(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, *, cast_columns: int) -> Tensor:
    """Write x @ w.T + bias into `out`: (n, B) of (n, D) and (B, D).

    `x` has its `operand_dtype`. A weight of another dtype is converted, `cast_columns` of its rows at a time.
    """
    if w.dtype != x.dtype:
        for part in chunks(len(w), cast_columns):
            torch.mm(x, w[part].to(x.dtype).T, out=out[:, part])
    elif out.dtype != x.dtype:
        torch.mm(x, w.T, out_dtype=torch.float32, out=out)
    elif bias is not None and bias.dtype == out.dtype:
        return torch.addmm(bias, x, w.T, out=out)  # the bias is added before the rounding
    else:
        torch.mm(x, w.T, out=out)
    return out if bias is None else out.add_(bias)


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with its fp32 sums unrounded."""
    if _returns_fp32(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def long_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a long inner dimension; fp32 if possible, because the vendor may split the sum and join parts in 16 bits."""
    return torch.mm(a, b, out_dtype=torch.float32) if _returns_fp32(a) else torch.mm(a, b)


def _returns_fp32(x: Tensor) -> bool:
    # "meta": sizes are computed as on CUDA (opd_ops/estimates).
    if x.device.type not in ("cuda", "meta") or torch.version.hip is not None:  # some ROCm builds refuse it
        return False
    reduced = x.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation
    return x.dtype in (torch.bfloat16, torch.float16) and not reduced
