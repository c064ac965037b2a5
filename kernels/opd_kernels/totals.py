"""After the losses: positions with an infinite loss are dropped, and all sums and counts of a call are taken, in one launch.

  dropped    selected positions whose loss is +inf; they are no longer selected, and count as infinite
  scale      correction of the mean: (selected before) / (selected after) for a mean over the selected positions, else 1;
             NaN if a valid position has no finite student softmax or a NaN score
  The names and meanings of the sums: opd_ops/call/metrics.py.

Shapes: N positions, M rows of selected positions
  rows, losses     (M,)     in       int64, fp32: every selected position
  row_weights      (M,)     in       fp32, or None
  scores, valid    (N,)     in       fp32, uint8
  unmasked         (N,)     in       uint8, or None: all
  stats            (11, N)  in, out  fp32, the order of place.py's STATS; row LOSS gets the losses
  selected, infinite  (N,)  in, out  uint8
  numbers          (17,)    out      fp32, the order of NUMBERS
  counts           (4,)     out      int64, the order of COUNTS

Grid: (1,). Traffic: 28 bytes a position, some 30 a row. Sums are of fp32, by lane and then over the lanes: the same on each
run.

Not here: losses (opd_ops/call/losses.py), the selection (choose.py). Tests: tests/kernels/test_totals.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_table
from .device import check_launch
from .place import ENTROPY, MASS, REVERSE_KL, STATS
from .quantiles import INF, S_LSE, _is_finite

SUMS = ("kl_selected", "entropy_selected", "mass_selected", "kl_all", "entropy", "mass", "teacher_entropy")
NUMBERS = (*(f"{name}_sum" for name in SUMS), *SUMS, "loss_sum", "score_threshold", "scale")
COUNTS = ("n_selected", "n_valid", "n_infinite", "n_teacher_nonfinite")
TEACHER_ENTROPY = tl.constexpr(STATS.index("teacher_entropy"))


@triton.jit
def _column(stats_ptr, N, row, i, mask):
    return tl.load(stats_ptr + row * N + i, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["M", "N"], do_not_specialize_on_alignment=["infinite_ptr"])
def _totals_fwd_kernel(
    rows_ptr, losses_ptr, row_weights_ptr, scores_ptr, valid_ptr, unmasked_ptr, stats_ptr, selected_ptr,
    infinite_ptr, numbers_ptr, counts_ptr, M, N,
    HAS_WEIGHTS: tl.constexpr, HAS_MASK: tl.constexpr, LOSS: tl.constexpr,
    BY_SELECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.float32)
    none = tl.zeros((BLOCK,), tl.int32)
    N = tl.cast(N, tl.int64)
    loss_sum = zero
    for first in range(0, M, BLOCK):
        inside = first + lane < M
        row = tl.load(rows_ptr + first + lane, mask=inside, other=0)
        loss = tl.load(losses_ptr + first + lane, mask=inside, other=0.0)
        if LOSS >= 0:
            tl.store(stats_ptr + LOSS * N + row, loss, mask=inside)
        dropped = inside & (loss == INF)
        tl.store(infinite_ptr + row, tl.full((BLOCK,), 1, tl.uint8), mask=dropped)
        tl.store(selected_ptr + row, tl.zeros((BLOCK,), tl.uint8), mask=dropped)
        weighted = loss
        if HAS_WEIGHTS:
            weighted = loss * tl.load(row_weights_ptr + first + lane, mask=inside, other=0.0)
        loss_sum += tl.where(inside & (dropped == 0), weighted, 0.0)
    tl.debug_barrier()  # other threads read what this wrote
    kl_s, entropy_s, mass_s, kl_v, entropy_v, mass_v, teacher_v = zero, zero, zero, zero, zero, zero, zero
    n_selected, n_valid, n_infinite, n_unmasked, n_bad = none, none, none, none, none
    threshold = tl.full((BLOCK,), INF, tl.float32)
    for first in range(0, N, BLOCK):
        i = first + lane.to(tl.int64)
        inside = i < N
        selected = tl.load(selected_ptr + i, mask=inside, other=0) != 0
        valid = tl.load(valid_ptr + i, mask=inside, other=0) != 0
        score = tl.load(scores_ptr + i, mask=inside, other=0.0)
        kl = _column(stats_ptr, N, REVERSE_KL, i, inside)
        entropy = _column(stats_ptr, N, ENTROPY, i, inside)
        mass = _column(stats_ptr, N, MASS, i, inside)
        teacher = _column(stats_ptr, N, TEACHER_ENTROPY, i, inside)
        lse = _column(stats_ptr, N, S_LSE, i, inside)
        kl_s += tl.where(selected, kl, 0.0)
        entropy_s += tl.where(selected, entropy, 0.0)
        mass_s += tl.where(selected, mass, 0.0)
        kl_v += tl.where(valid, kl, 0.0)
        entropy_v += tl.where(valid, entropy, 0.0)
        mass_v += tl.where(valid, mass, 0.0)
        teacher_v += tl.where(valid, teacher, 0.0)
        threshold = tl.minimum(threshold, tl.where(selected, score, INF))
        n_selected += selected.to(tl.int32)
        n_valid += valid.to(tl.int32)
        n_infinite += tl.load(infinite_ptr + i, mask=inside, other=0).to(tl.int32)
        n_bad += (valid & ((_is_finite(lse) == 0) | (score != score))).to(tl.int32)
        if HAS_MASK:
            n_unmasked += tl.load(unmasked_ptr + i, mask=inside, other=0).to(tl.int32)
        else:
            n_unmasked += inside.to(tl.int32)
    selected_count = tl.sum(n_selected)
    valid_count = tl.sum(n_valid)
    sums = (
        tl.sum(kl_s), tl.sum(entropy_s), tl.sum(mass_s), tl.sum(kl_v), tl.sum(entropy_v), tl.sum(mass_v), tl.sum(teacher_v),
    )  # fmt: skip
    for k in tl.static_range(7):
        tl.store(numbers_ptr + k, sums[k])
        count = tl.maximum(selected_count if k < 3 else valid_count, 1).to(tl.float32)
        tl.store(numbers_ptr + (7 + k), tl.div_rn(sums[k], count))
    scale = tl.full((), 1.0, tl.float32)
    if BY_SELECTED:
        scale = tl.cast(M, tl.float64) / tl.maximum(selected_count, 1).to(tl.float64)
        scale = tl.where(selected_count > 0, scale, 1.0).to(tl.float32)
    tl.store(numbers_ptr + 14, tl.sum(loss_sum))
    tl.store(numbers_ptr + 15, tl.min(threshold))
    tl.store(numbers_ptr + 16, tl.where(tl.sum(n_bad) > 0, float("nan"), scale))
    tl.store(counts_ptr, selected_count.to(tl.int64))
    tl.store(counts_ptr + 1, valid_count.to(tl.int64))
    tl.store(counts_ptr + 2, tl.sum(n_infinite).to(tl.int64))
    tl.store(counts_ptr + 3, (tl.sum(n_unmasked) - valid_count).to(tl.int64))


def totals_fwd(
    rows: Tensor,  # (M,) int64
    losses: Tensor,  # (M,) fp32
    row_weights: Tensor | None,  # (M,) fp32
    scores: Tensor,  # (N,) fp32
    valid: Tensor,  # (N,) uint8
    unmasked: Tensor | None,  # (N,) uint8
    stats: Tensor,  # (11, N) fp32, contiguous; changed in place
    selected: Tensor,  # (N,) uint8; changed in place
    infinite: Tensor,  # (N,) uint8; changed in place
    *,
    loss: str | None,  # the column of the losses; None: no column holds them
    by_selected: bool,  # whether the mean is over the selected positions
) -> tuple[Tensor, Tensor]:
    """The numbers and the counts, in the order of NUMBERS and COUNTS."""
    check_launch(
        stats, rows=rows, losses=losses, row_weights=row_weights, scores=scores, valid=valid, unmasked=unmasked,
        stats=stats, selected=selected, infinite=infinite,
    )  # fmt: skip
    n, device = scores.shape[0], scores.device
    numbers = torch.empty(len(NUMBERS), dtype=torch.float32, device=device)
    counts = torch.empty(len(COUNTS), dtype=torch.int64, device=device)
    tile = launch_table.totals(n)
    _totals_fwd_kernel[(1,)](
        rows, losses, row_weights, scores, valid, unmasked, stats, selected, infinite, numbers, counts,
        rows.shape[0], n, HAS_WEIGHTS=row_weights is not None,
        HAS_MASK=unmasked is not None, LOSS=-1 if loss is None else STATS.index(loss), BY_SELECTED=by_selected,
        **tile.constants, num_warps=tile.num_warps, enable_fp_fusion=False, **tile.limits(),
    )  # fmt: skip
    return numbers, counts
