"""Matrix products as the heads of a GPU need them: 16-bit operands, and the result in their dtype or kept in fp32.

  head_product   x @ w.T + bias    logits of some rows
  fp32_product   a @ b             of operands of any one dtype
  long_product   a @ b             whose sums are over the vocabulary

The vendor's matmul accumulates in fp32 either way; CUDA can also return that sum unrounded. Elsewhere (ROCm, XPU, a CPU for
the interpreted kernels) the operands are widened first, a slice of the weight at a time.
Not here: which rows and when (shared/tiles.py, heads_loss.py), the fp32 tiles of any device (streamed/backend.py).
"""

from __future__ import annotations

import torch
from torch import Tensor


def head_product(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, *, cast_bytes: int) -> Tensor:
    """Write x @ w.T + bias into `out`: (n, B) of (n, D) and (B, D).

    `out` has the operands' dtype, or fp32. `cast_bytes`: the most that a widened slice of `w` may take.
    """
    if out.dtype == x.dtype:
        if bias is not None and bias.dtype == out.dtype:
            return torch.addmm(bias, x, w.T, out=out)  # the bias is added before the rounding
        torch.mm(x, w.T, out=out)
    elif _returns_fp32(x):
        torch.mm(x, w.T, out_dtype=torch.float32, out=out)
    else:
        wide, step = x.to(out.dtype), max(1, cast_bytes // (out.element_size() * w.shape[1]))
        for start in range(0, len(w), step):
            torch.mm(wide, w[start : start + step].to(out.dtype).T, out=out[:, start : start + step])
    return out if bias is None else out.add_(bias)


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with its fp32 sums unrounded."""
    if _returns_fp32(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def long_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of a long inner dimension, which the vendor may split into parts: in fp32 where it would join them in 16 bits."""
    return torch.mm(a, b, out_dtype=torch.float32) if _returns_fp32(a) else torch.mm(a, b)


def _returns_fp32(x: Tensor) -> bool:
    if x.device.type != "cuda" or torch.version.hip is not None:  # some ROCm builds refuse it
        return False
    reduced = x.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation
    return x.dtype in (torch.bfloat16, torch.float16) and not reduced
