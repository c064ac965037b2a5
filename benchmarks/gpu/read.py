"""What a kernel that only reads can reach: both models' rows read 16 bytes at a time, and nothing kept but maxima.

  A copy writes as many bytes as it reads, so it is no ceiling for the score pass, which reads 2 N V logits and writes little.

Not here: the score kernel (kernels/opd_kernels/score.py), how it is timed (logits.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits of each model an iteration: 128 threads with four 128-bit loads of 16-bit logits


@triton.jit
def _read_kernel(s_ptr, t_ptr, out_ptr, stride_sn, stride_tn, V, BLOCK: tl.constexpr):
    # One program a row. V is a multiple of the 128-bit loads; what lies beyond the last whole block is not read.
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for v in range(0, V // BLOCK * BLOCK, BLOCK):
        s = tl.load(s_ptr + row * stride_sn + v + offs)
        t = tl.load(t_ptr + row * stride_tn + v + offs)
        top = tl.maximum(top, tl.maximum(s, t).to(tl.float32))
    tl.store(out_ptr + row, tl.max(top, 0))


def read(student: Tensor, teacher: Tensor, block: int = BLOCK) -> Tensor:
    """The largest logit of each row, of both models and whole blocks: (N,) fp32."""
    n, vocab = student.shape
    out = torch.empty(n, device=student.device)
    _read_kernel[(n,)](student, teacher, out, student.stride(0), teacher.stride(0), vocab, BLOCK=block, num_warps=4)
    return out


def read_bytes(student: Tensor, block: int = BLOCK) -> int:
    """That `read` reads of both models."""
    n, vocab = student.shape
    return 2 * n * (vocab // block * block) * student.element_size()
