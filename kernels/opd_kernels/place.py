"""Statistics at their positions, with their validity and the score of a selector, in one sweep.

  score = selector(statistics), -inf where not valid or where the divergence is infinite
  Selectors of TA's released code are fitted to all n rows, masked ones too; the others are not for masked rows.
  selectors and their equations: opd_ops/selection/selectors.py; everything in fp64 and in its order of operations, so that
  results equal the selectors' to the bit

Shapes: N positions, n of them have statistics, C columns with quantiles (quantiles.py), E optional statistics
  table        (16 + E, n)  in  fp32, the order of score.py's COLUMNS and support.py's SUPPORT_COLUMNS, then the optional ones
  rows         (n,)        in   int64, ascending: the position of each column entry; None: position i has entry i
  unmasked     (N,)        in   uint8: which positions are valid if their statistics are; None: all that have statistics
  quantiles    (C, 2 or 3) in   fp64; None for selectors without a normaliser
  stats        (11 + E, N) out  fp32, the order of STATS, then the optional ones; 0 where the statistics are not valid
  valid        (N,)        out  uint8, 0 or 1
  infinite     (N,)        out  uint8: valid, and the divergence is +inf
  scores       (1 or 2, N) out  fp32; the second, of selectors in KEEPS: the scores for a position that every sequence keeps

Grid: (N / BLOCK,). Traffic: 44 + 4 E bytes read and 50 + 4 E written a position. With rows, a position searches its entry by
bisection.

Not here: quantiles (quantiles.py), the budget's cut (choose.py). Tests: tests/kernels/test_selection.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_table
from .device import check_launch
from .quantiles import INF, _finite_or_zero, _is_valid, quantiles_fwd
from .score import COLUMNS
from .support import SUPPORT_COLUMNS

N_SCORED = 7  # COLUMNS that are statistics; normalisers of later kernels follow
STATS = COLUMNS[:N_SCORED] + SUPPORT_COLUMNS
SKIPPED = tl.constexpr(len(COLUMNS) - N_SCORED)
SCORED = tl.constexpr(N_SCORED)
ENTROPY = tl.constexpr(STATS.index("student_entropy"))
REVERSE_KL = tl.constexpr(STATS.index("reverse_kl"))
FORWARD_KL = tl.constexpr(STATS.index("forward_kl"))
MASS = tl.constexpr(STATS.index("support_mass"))
OVERLAP = tl.constexpr(STATS.index("overlap_mass"))
UNION_KL = tl.constexpr(STATS.index("union_kl"))
# fp64 numbers: a Python float in an expression of a kernel may become fp32
EPSILON = tl.constexpr(1e-8)
ROUNDING = tl.constexpr(8 * 2.0**-23)  # 8 units in the last place of fp32
LARGEST_FP32 = tl.constexpr(3.4028234663852886e38)
LEAST_RANGE = tl.constexpr(1e-12)  # of a column, for TA's released normaliser
QUANTILE_LEVELS = (0.05, 0.95)
MINMAX_LEVELS = (0.0, 1.0, 0.98)


class Fit(NamedTuple):
    """What a selector's normalisers are fitted on."""

    columns: tuple[str | tuple[str, str], ...] = ()  # two names: the product of two columns
    levels: tuple[float, ...] = QUANTILE_LEVELS
    fits_all: bool = False  # fitted on all rows of the table


_KEEP = "topk_entropy", ("released_kl", "overlap_mass")
FITS = {
    "teachability": Fit(("union_kl", "support_mass")),
    "teachability+entropy": Fit(("union_kl", "support_mass", "student_entropy")),
    "incompatibility": Fit(("union_kl", "support_mass")),
    "compatibility": Fit(("support_mass",)),
    "tip": Fit(("student_entropy", "reverse_kl"), MINMAX_LEVELS),
    "overconfident": Fit(("student_entropy",), MINMAX_LEVELS),
    "teachability-released": Fit((*_KEEP, "released_kl", "overlap_mass"), fits_all=True),
    "teachability+entropy-released": Fit(_KEEP, fits_all=True),
    "tip-released": Fit((*_KEEP, "released_kl"), fits_all=True),
    "entropy-released": Fit(_KEEP, fits_all=True),
    "entropy": Fit(),
    "divergence": Fit(),
    "divergence-reverse-kl": Fit(),
    "all": Fit(),
}
KEEPS = frozenset(name for name, fit in FITS.items() if fit.fits_all)


@triton.jit
def _clamped(z, scaled):
    # NaN stays NaN, +inf is 1
    scaled = tl.where(scaled < 0.0, 0.0, tl.where(scaled > 1.0, 1.0, scaled))
    return tl.where(z != z, z, tl.where(z == INF, 1.0, scaled))


@triton.jit
def _quantile_norm(x, quantiles_ptr, C: tl.constexpr):
    z = x.to(tl.float64)
    low = tl.load(quantiles_ptr + 2 * C)
    high = tl.load(quantiles_ptr + (2 * C + 1))
    rounding = tl.full((), ROUNDING, tl.float64) * tl.maximum(tl.abs(low), tl.abs(high))
    height = z - low
    width = high - low
    constant = tl.abs(height) <= tl.where(width <= rounding, rounding, -1.0)
    scaled = tl.where(constant, 0.0, height / (width + tl.full((), EPSILON, tl.float64)))
    return _clamped(z, scaled)


@triton.jit
def _minmax_norm(x, quantiles_ptr, C: tl.constexpr, CLIP: tl.constexpr):
    z = x.to(tl.float64)
    low = tl.load(quantiles_ptr + 3 * C)
    high = tl.load(quantiles_ptr + (3 * C + 1))
    if CLIP:
        limit = tl.load(quantiles_ptr + (3 * C + 2))
        z = tl.where(z > limit, limit, z)  # NaN stays
        low = tl.where(low > limit, limit, low)
        high = tl.where(high > limit, limit, high)
    rounding = tl.full((), ROUNDING, tl.float64) * tl.maximum(tl.abs(low), tl.abs(high))
    flat = (high <= low) | (high - low <= rounding)
    scaled = tl.where(flat, 0.0, (z - low) / tl.where(flat, 1.0, high - low))
    return _clamped(z, scaled)


@triton.jit
def _released_norm(x, quantiles_ptr, C: tl.constexpr):
    z = x.to(tl.float64)
    low = tl.load(quantiles_ptr + 2 * C)
    width = tl.load(quantiles_ptr + (2 * C + 1)) - low
    flat = width < tl.full((), LEAST_RANGE, tl.float64)
    return _clamped(z, tl.where(flat, 0.0, (z - low) / tl.where(flat, 1.0, width)))


@triton.jit
def _released_or(a, b):
    return 1.0 - (1.0 - a) * (1.0 - b)


@triton.jit
def _released_scores(kl, entropy, overlap, quantiles_ptr, SELECTOR: tl.constexpr):
    # the selector's score, and the score for a position that every sequence keeps; columns of fp32
    product = _released_norm(_finite_or_zero(kl * overlap), quantiles_ptr, 1)
    h = _released_norm(_finite_or_zero(entropy), quantiles_ptr, 0)
    keep = _released_or(h, product)
    score = keep
    if SELECTOR == "entropy-released":
        score = h
    elif SELECTOR != "teachability+entropy-released":
        d = _released_norm(_finite_or_zero(kl), quantiles_ptr, 2)
        if SELECTOR == "tip-released":
            score = _released_or(h, d)
        else:
            tl.static_assert(SELECTOR == "teachability-released")
            score = d * _released_norm(_finite_or_zero(overlap), quantiles_ptr, 3)
    return score.to(tl.float32), keep.to(tl.float32)


@triton.jit
def _soft_or(a, b):
    return (a + b) - a * b


@triton.jit
def _selector_score(column, quantiles_ptr, SELECTOR: tl.constexpr):
    # `column`: the statistics of a block of positions, in the order of STATS
    if SELECTOR == "entropy":
        score = column[ENTROPY]
    elif SELECTOR == "divergence":
        score = column[UNION_KL]
    elif SELECTOR == "divergence-reverse-kl":
        score = column[REVERSE_KL]
    elif SELECTOR == "all":
        score = tl.zeros(column[ENTROPY].shape, tl.float32)
    elif SELECTOR == "compatibility":
        score = _quantile_norm(column[MASS], quantiles_ptr, 0)
    elif SELECTOR == "tip":
        k = _minmax_norm(column[REVERSE_KL], quantiles_ptr, 1, False)  # first: with the other order sm_80 spills 8 bytes
        score = _soft_or(_minmax_norm(column[ENTROPY], quantiles_ptr, 0, True), k)
    elif SELECTOR == "overconfident":
        confident = 1.0 - _minmax_norm(column[ENTROPY], quantiles_ptr, 0, True)
        kl = column[FORWARD_KL]  # an infinite KL ranks first, and inf * 0 would be NaN
        score = tl.where(kl == INF, LARGEST_FP32, kl).to(tl.float64) * confident
    else:
        d = _quantile_norm(column[UNION_KL], quantiles_ptr, 0)
        c = _quantile_norm(column[MASS], quantiles_ptr, 1)
        if SELECTOR == "incompatibility":
            score = d * (1.0 - c)
        elif SELECTOR == "teachability":
            score = d * c
        else:
            tl.static_assert(SELECTOR == "teachability+entropy")
            score = _soft_or(_quantile_norm(column[ENTROPY], quantiles_ptr, 2), d * c)
    return score.to(tl.float32)


@triton.jit
def _entry_of(rows_ptr, position, n, steps):
    # the least i with rows[i] >= position, in `steps` halvings of 0 .. n
    low = tl.zeros(position.shape, tl.int32)
    high = low + n
    for _ in range(steps):
        middle = (low + high) >> 1
        open_ = low < high
        less = tl.load(rows_ptr + middle, mask=open_, other=0) < position
        low = tl.where(open_ & less, middle + 1, low)
        high = tl.where(open_ & (less == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["n", "N", "stride", "steps"], do_not_specialize_on_alignment=["infinite_ptr"])
def _place_fwd_kernel(
    table_ptr, rows_ptr, unmasked_ptr, quantiles_ptr, stats_ptr, valid_ptr, infinite_ptr, scores_ptr, n, N, stride, steps,
    SELECTOR: tl.constexpr, LOSS: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_MASK: tl.constexpr, COLUMNS: tl.constexpr,
    RELEASED_KL: tl.constexpr, TOPK_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < N
    i = position
    present = inside
    if HAS_ROWS:
        entry = _entry_of(rows_ptr, position, n, steps)
        present = inside & (entry < n)
        present = present & (tl.load(rows_ptr + entry, mask=present, other=-1) == position)
        i = entry.to(tl.int64)
    stride = tl.cast(stride, tl.int64)
    valid = present & _is_valid(table_ptr, stride, i, present)
    column = ()
    for c in tl.static_range(COLUMNS):
        row = c if c < SCORED else c + SKIPPED
        x = tl.load(table_ptr + row * stride + i, mask=valid, other=0.0)
        tl.store(stats_ptr + c * N.to(tl.int64) + position, x, mask=inside)
        column = column + (x,)
    if HAS_MASK:
        valid = valid & (tl.load(unmasked_ptr + position, mask=inside, other=0) != 0)
    infinite = valid & (inside == 0)
    if LOSS >= 0:
        infinite = valid & (column[LOSS] == INF)
    if RELEASED_KL >= 0:
        own = column[RELEASED_KL], column[TOPK_ENTROPY], column[OVERLAP]
        score, keep = _released_scores(own[0], own[1], own[2], quantiles_ptr, SELECTOR)
        keep = tl.where(valid & (infinite == 0), keep, float("-inf"))
        tl.store(scores_ptr + N.to(tl.int64) + position, keep, mask=inside)
    else:
        score = _selector_score(column, quantiles_ptr, SELECTOR)
    trainable = valid & (infinite == 0)
    tl.store(scores_ptr + position, tl.where(trainable, score, float("-inf")), mask=inside)
    tl.store(valid_ptr + position, valid.to(tl.uint8), mask=inside)
    tl.store(infinite_ptr + position, infinite.to(tl.uint8), mask=inside)


class Placed(NamedTuple):
    """Of N positions."""

    stats: Tensor  # (11 + E, N) fp32, the order of STATS, then the optional ones
    flags: Tensor  # (2, N) uint8: valid, infinite
    scores: Tensor  # (1, N) fp32; (2, N) of selectors in KEEPS: the second for a position that every sequence keeps

    @property
    def valid(self) -> Tensor:
        return self.flags[0]

    @property
    def infinite(self) -> Tensor:
        return self.flags[1]


def place_fwd(
    table: Tensor,  # (16 + E, n) fp32, unit stride along n
    rows: Tensor | None,  # (n,) int64, ascending
    n_positions: int,
    unmasked: Tensor | None = None,  # (N,) uint8
    *,
    selector: str,  # a name in FITS
    loss: str | None,  # the column that holds the divergence; None: no column does
    optional: Sequence[str] = (),  # the names of the E optional statistics that a selector in KEEPS needs
) -> Placed:
    """The statistics of all positions, and their scores."""
    n = table.shape[1]
    assert n <= 1 or table.stride(1) == 1, "unit stride along the rows"
    assert rows is not None or n == n_positions
    check_launch(table, rows=rows, unmasked=unmasked)
    fit, tile = FITS[selector], launch_table.place()
    names = (*COLUMNS, *SUPPORT_COLUMNS, *optional)
    n_columns = len(STATS) + table.shape[0] - len(COLUMNS + SUPPORT_COLUMNS)
    stats = torch.empty((n_columns, n_positions), dtype=torch.float32, device=table.device)
    flags = torch.empty((2, n_positions), dtype=torch.uint8, device=table.device)
    scores = torch.empty((2 if selector in KEEPS else 1, n_positions), dtype=torch.float32, device=table.device)
    placed = Placed(stats, flags, scores)
    if n_positions == 0:
        return placed
    columns = [names.index(x) if isinstance(x, str) else (names.index(x[0]), names.index(x[1])) for x in fit.columns]
    quantiles = quantiles_fwd(table, columns, fit.levels, fit_all=fit.fits_all) if columns else None
    lists = [len(STATS) + optional.index(x) if fit.fits_all else -1 for x in ("released_kl", "topk_entropy")]
    _place_fwd_kernel[(triton.cdiv(n_positions, tile.constants["BLOCK"]),)](
        table, rows, unmasked, quantiles, stats, *flags.unbind(0), scores, n, n_positions, table.stride(0), n.bit_length(),
        SELECTOR=selector, LOSS=-1 if loss is None else STATS.index(loss), HAS_ROWS=rows is not None,
        HAS_MASK=unmasked is not None, COLUMNS=n_columns, RELEASED_KL=lists[0], TOPK_ENTROPY=lists[1], **tile.constants,
        num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return placed
