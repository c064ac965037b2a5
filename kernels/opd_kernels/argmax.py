"""Argmax: the student's most likely id of each row, found from score.py's maxima of groups of 128 logits.

  top = the lowest v with s[v] = max s
  A row's gradient sums to 0 over the vocabulary. At `top`, where p may be near 1, the gradient kernels compute it as minus the
  sum of the others.

Shapes: n rows, V vocabulary, NG = ceil(V / 128) groups
  s          (N, V)           in   stored logits; rows (n,) in, or None
  group_max  (n, 2, >= NG)    in   score.py; only the student's are read
  top        (n,)             out  int32

Grid: (n,). Traffic: NG maxima and 128 logits a row, about 2 % of the row.
Stored logits have the order of the logits. For a row of NaN or of -inf alone, top is some id inside the vocabulary.

Not here: the K most likely ids (support.py). Tests: tests/kernels/test_grad.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import check_launch, row_step
from .score import GROUP, Score


@triton.jit
def _argmax_fwd_kernel(
    s_ptr, rows_ptr, gmax_ptr, top_ptr, stride_sn, stride_g, n_groups, V,
    HAS_ROWS: tl.constexpr, UNIT_S: tl.constexpr, NG: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row = pid
    if HAS_ROWS:
        row = tl.load(rows_ptr + pid).to(tl.int64)
    g = tl.arange(0, NG)
    # 128-bit loads: stride_g is a multiple of 16; maxima beyond n_groups are replaced by -inf
    x = tl.load(gmax_ptr + pid * 2 * stride_g + g, mask=g < stride_g, other=float("-inf")).to(tl.float32)
    x = tl.where(g < n_groups, x, float("-inf"))
    group = tl.min(tl.where(x == tl.max(x, 0), g, NG), 0)
    group = tl.minimum(group, n_groups - 1)
    ids = group * GROUP + tl.arange(0, GROUP)
    s = tl.load(s_ptr + row * stride_sn * UNIT_S + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    tl.store(top_ptr + pid, tl.min(tl.where((s == tl.max(s, 0)) & (ids < V), ids, V - 1), 0))


def argmax_fwd(
    student: Tensor,  # (N, >= vocab_size), unit stride along the vocabulary
    rows: Tensor | None,  # (n,), the rows given to score_fwd
    score: Score,
    *,
    vocab_size: int,
) -> Tensor:
    """(n,) int32 ids."""
    n, _, stride_g = score.group_max.shape
    assert student.stride(1) == 1, "unit stride along the vocabulary"
    check_launch(student, rows=rows)
    top = torch.empty(n, dtype=torch.int32, device=student.device)
    if n == 0:
        return top
    stride_s, unit_s = row_step(student)
    n_groups = triton.cdiv(vocab_size, GROUP)
    _argmax_fwd_kernel[(n,)](
        student, rows, score.group_max, top, stride_s, stride_g, n_groups, vocab_size,
        HAS_ROWS=rows is not None, UNIT_S=unit_s, NG=max(GROUP, triton.next_power_of_2(n_groups)), GROUP=GROUP,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return top
