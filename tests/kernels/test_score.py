"""The score kernel, interpreted or compiled, against the float64 specification (support/kernel_oracle.py).

  Bounds: entropy and log-sum-exp 1e-5 (absolute 1e-6), KL 1e-6 + 1e-4 KL, never negative.

Run: make test ARGS=tests/kernels/test_score.py. Registers and instructions
are counted in tests/benchmarks/static/test_roofline.py, traffic in support/ptx/test_traffic.py.
Not here: top-K (test_support.py), gradients (test_grad.py).
"""

import pytest
import torch
from opd_kernels import launch_table
from opd_kernels.device import row_step, rows_are_aligned
from opd_kernels.score import GROUP, score_fwd

from opd_ops.backends import eager
from tests.support import kernel_oracle as oracle
from tests.support.cases import logit_pair
from tests.support.kernel_oracle import COMMON
from tests.support.ptx import operations

INF = float("inf")


def check(s, t, rows=None, V=None, **changed):
    """Runs the kernel and compares every column with the oracle; returns the score."""
    V = V or s.shape[1]
    common = {**COMMON, **changed}
    score = score_fwd(s, t, rows, vocab_size=V, **common)
    pick = slice(None) if rows is None else rows.long()
    T = common["temperature"]
    s64 = oracle.logit(s[pick, :V], common["s_scale"], common["s_softcap"], T)
    t64 = oracle.logit(t[pick, :V], common["t_scale"], common["t_softcap"], T)
    cap = max(common["s_softcap"] or 0.0, common["t_softcap"] or 0.0) / T
    oracle.assert_statistics(score, s64, t64, gap=2.0**-22 * cap)  # the error of a capped logit itself: device.py
    return score


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [9001, 4096, 131, 7])
def test_score_fwd_matches_oracle_fp64(dtype, V):
    check(*logit_pair(1, V, dtype=dtype, seed=V))


# KL from 5e-7 to 400, logits of scale 0.1 to 60
SCALES_AND_NOISES = [(3, 1e-3), (1, 1e-3), (0.1, 3e-3), (60, 1e-3), (60, 0.1), (60, 5), (10, 10), (15, 60)]


@pytest.mark.parametrize(("scale", "noise"), SCALES_AND_NOISES)
def test_score_fwd_kl_does_not_cancel(scale, noise):
    check(*logit_pair(1, 9001, scale=scale, noise=noise, seed=3))


# Of the bounds a quarter where exp2 is rounded to nearest. By its documented two units it may err on the largest logit, whose
# exponent is not 0 but the rounding of k z: twice 2.4e-7 in a row of p near 1, where the bound is 1e-6.
@pytest.mark.full
@pytest.mark.parametrize(("exp2_units", "share"), [(0.5, 0.25), (2, 0.4)])
def test_score_fwd_errors_are_a_small_share_of_the_bounds(exp2_units, share, monkeypatch):
    monkeypatch.setitem(operations.APPROXIMATE, "ex2", exp2_units)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for scale, noise in SCALES_AND_NOISES:
            s, t = logit_pair(2, 9001, scale=scale, noise=noise, seed=3, dtype=dtype)
            score = score_fwd(s, t, None, vocab_size=9001, **COMMON)
            for name, want in oracle.statistics(s.double(), t.double()).items():
                allowed = 1e-6 + (1e-4 if name.endswith("kl") else 1e-5) * want.abs()
                if name != "logsumexp_gap":
                    assert ((getattr(score, name) - want).abs() <= share * allowed).all(), (name, dtype, scale, noise)


def test_score_fwd_equal_models_have_zero_kl():
    s, _ = logit_pair(2, 4500, scale=20)
    score = check(s, s.clone())
    assert torch.equal(score.reverse_kl, torch.zeros(2))
    assert torch.equal(score.forward_kl, torch.zeros(2))


def test_score_fwd_shifted_teacher_keeps_kl():
    s, t = logit_pair(2, 4500, scale=3, noise=1e-3)
    check(s, t + 40.0)


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.7},
        {"s_scale": 0.25, "t_scale": 1.5},
        {"s_softcap": 30.0, "t_softcap": None},
        {"s_softcap": 20.0, "t_softcap": 50.0, "s_scale": 0.5, "temperature": 1.3},
    ],
)
def test_score_fwd_transforms_logits(changed):
    check(*logit_pair(1, 4501, scale=8, seed=4), **changed)


@pytest.mark.parametrize("V", [1, 128])
def test_score_fwd_of_capped_and_plain_logits_side_by_side(V):
    for seed in range(3):
        check(*logit_pair(4, V, dtype=torch.bfloat16, seed=seed), s_softcap=30.0, t_softcap=None)
        check(*logit_pair(4, V, dtype=torch.bfloat16, seed=seed), s_softcap=30.0, t_softcap=30.0)


def test_score_fwd_reads_only_the_rows_and_columns_asked_for():
    s, t = logit_pair(6, 5000)
    s[[0, 4]], t[[0, 4]] = float("nan"), float("nan")
    s[:, 4321:], t[:, 4321:] = float("nan"), float("nan")
    for dtype in (torch.int32, torch.int64):
        check(s, t, rows=torch.tensor([5, 1, 2], dtype=dtype), V=4321)


def test_score_fwd_takes_any_row_stride_and_mixed_types():
    wide_s, wide_t = logit_pair(3, 10007)
    s, t = wide_s[:, 1:4444], wide_t[:, 3:4446].to(torch.bfloat16)
    check(s, t)


def test_score_fwd_takes_no_rows():
    s, t = logit_pair(1, 300)
    score = score_fwd(s, t, torch.empty(0, dtype=torch.int32), vocab_size=300, **COMMON)
    assert score.reverse_kl.shape == (0,)
    assert score.group_max.shape == (0, 2, 16)


def test_score_fwd_offsets_pass_two_to_the_31(tmp_path):
    s, t = oracle.sparse_pair(tmp_path)
    check(s, t, rows=torch.tensor([69999, 0]))


# the variance of the log-ratio


def check_variance(s, t, **changed):
    """The variance within 1e-4 of float64's, beside what rounding the mean of the gap leaves; the other columns as without."""
    common, variance = {**COMMON, **changed}, torch.full((len(s),), torch.nan)
    with_it = score_fwd(s, t, None, variance=variance, vocab_size=s.shape[1], **common)
    without = score_fwd(s, t, None, vocab_size=s.shape[1], **common)
    assert torch.equal(with_it.columns.nan_to_num(7.0), without.columns.nan_to_num(7.0))
    models = (("s", s), ("t", t))
    pair = [oracle.logit(x, common[f"{name}_scale"], common[f"{name}_softcap"], common["temperature"]) for name, x in models]
    want = eager.ratio_variance(*pair)
    close = torch.isfinite(want)
    assert torch.equal(variance.double().nan_to_num(7.0, 8.0)[~close], want.nan_to_num(7.0, 8.0)[~close])
    size = torch.stack(pair).masked_fill(torch.stack(pair).isinf(), 0).abs().amax((0, 2))
    bound = 1e-4 * want + (4e-7 * size).square()
    assert bool((((variance - want).abs() <= bound) | ~close).all()), (variance, want, bound)
    return variance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "noise", "V"), [(4, 1, 9001), (3, 1e-3, 9001), (60, 5, 131), (0.1, 3e-3, 7)])
def test_score_fwd_variance_matches_float64(dtype, scale, noise, V):
    check_variance(*logit_pair(1, V, scale=scale, noise=noise, dtype=dtype, seed=3))


def test_score_fwd_variance_of_many_programs_a_row_of_transformed_and_of_saturated_logits():
    s, t = logit_pair(3, 9001, scale=2, seed=5)  # few rows: several programs each
    s[:2, 7] = torch.tensor([40.0, 25.0])
    t[:, 9] = 30
    check_variance(s, t, temperature=0.7)
    check_variance(*logit_pair(2, 4501, scale=8, seed=4), s_softcap=20.0, t_softcap=50.0, s_scale=0.5)


def test_score_fwd_variance_of_masked_rows():
    s, t = logit_pair(6, 4501, scale=4)
    s[0, :100], t[0, :100] = -INF, -INF
    t[1, 50:60], s[2, 40:50] = -INF, -INF
    s[3, 5] = torch.nan
    s[4], t[4] = -INF, -INF
    s[5, 9], t[5, 9] = -2000.0, -INF  # p is 0 in float64
    variance = check_variance(s, t)
    assert variance[1] == INF
    assert bool(variance[[0, 2, 5]].isfinite().all())


# -inf


def masked(n, V, where_s, where_t, **kw):
    s, t = logit_pair(n, V, **kw)
    s[:, where_s], t[:, where_t] = -INF, -INF
    return s, t


@pytest.mark.parametrize("stop", [40, 4096, 8800])
def test_score_fwd_ignores_entries_masked_in_both(stop):
    score = check(*masked(1, 9001, slice(0, stop), slice(0, stop)))
    assert torch.isfinite(score.columns).all()


@pytest.mark.parametrize("where", [slice(0, 4096), slice(9000, 9001), slice(100, 5000, 7)])
def test_score_fwd_one_sided_inf_gives_infinite_kl(where):
    nowhere = slice(0, 0)
    only_teacher = check(*masked(1, 9001, nowhere, where))
    assert (only_teacher.reverse_kl == INF).all()
    assert torch.isfinite(only_teacher.forward_kl).all()
    only_student = check(*masked(1, 9001, where, nowhere))
    assert (only_student.forward_kl == INF).all()
    assert torch.isfinite(only_student.reverse_kl).all()
    crossed = check(*masked(1, 9001, slice(5, 9), slice(5000, 5004)))
    assert (crossed.reverse_kl == INF).all()
    assert (crossed.forward_kl == INF).all()


# Logits of 4,096 ids and more are read as words of two; the last 100 ids here one by one.
@pytest.mark.parametrize("where", [40, 41, 4150])
@pytest.mark.parametrize(
    ("dtype", "mask"),
    [(torch.bfloat16, -(2.0**120)), (torch.bfloat16, -INF), (torch.float32, -(2.0**121)), (torch.float16, -65504.0)],
)
def test_score_fwd_notices_one_masked_logit(dtype, mask, where):
    s, t = logit_pair(2, 4196, dtype=dtype)
    t[0, where] = mask
    s[1, where] = mask
    score = check(s, t, temperature=8.0)  # at which no multiple of a finite mask overflows
    assert score.reverse_kl.isinf().tolist() == [True, False]
    assert score.forward_kl.isinf().tolist() == [False, True]


@pytest.mark.parametrize("mask", [-(2.0**119), -60000.0])
def test_score_fwd_takes_what_is_no_mask_for_a_logit(mask):
    s, t = logit_pair(1, 4196)
    s[0, [40, 4150]], t[0, [41, 4150]] = mask, mask
    check(s, t)


@pytest.mark.parametrize("where", [40, 41, 4150])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_score_fwd_notices_one_nan_and_one_infinity(dtype, where):
    for value in (float("nan"), INF):
        s, t = logit_pair(2, 4196, dtype=dtype)
        s[0, where] = value
        score = score_fwd(s, t, None, vocab_size=4196, **COMMON)
        for name in ("student_logsumexp", "student_entropy", "reverse_kl", "forward_kl"):
            assert getattr(score, name).isnan().tolist() == [True, False], name
        assert score.teacher_entropy.isfinite().all()


def test_score_fwd_large_finite_masks_count_as_zero_probability():
    s, t = logit_pair(2, 5000)
    s[:, :4200], t[:, :4200] = -1e9, -1e9
    check(s, t)


def test_score_fwd_nan_and_empty_rows_stay_in_their_row():
    s, t = logit_pair(5, 4500)
    s[0, 4400], t[1, 3] = float("nan"), float("nan")
    s[2], t[3] = -INF, -INF
    score = score_fwd(s, t, None, vocab_size=4500, **COMMON)
    assert score.student_logsumexp.isnan().tolist() == [True, False, False, False, False]
    assert score.teacher_logsumexp.isnan().tolist() == [False, True, False, False, False]
    assert score.student_logsumexp[2] == -INF
    assert score.teacher_logsumexp[3] == -INF
    for name in ("reverse_kl", "forward_kl"):
        assert getattr(score, name).isnan().tolist() == [True, True, True, True, False], name
    check(s, t, rows=torch.tensor([4]))


# group maxima and split rows


def groups(score, V):
    """(n, 2, NG), without the end of each row that is not written."""
    return score.group_max[:, :, : -(-V // GROUP)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [5001, 4096, 50])
def test_score_fwd_stores_the_maximum_of_every_group(dtype, V):
    s, t = logit_pair(2, V, dtype=dtype)
    s[:, 128:256] = -INF
    s[:, 300:310] = float("nan")  # passed over
    score = score_fwd(s, t, None, vocab_size=V, **COMMON)
    s[:, 300:310] = -INF
    pad = torch.nn.functional.pad(torch.stack((s, t), 1), (0, -V % GROUP), value=-INF)
    assert torch.equal(groups(score, V), pad.view(2, 2, -1, GROUP).amax(3))
    assert score.group_max.stride(1) % 16 == 0


@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.full), 3])
def test_score_fwd_split_rows_match_oracle_fp64(monkeypatch, parts):
    monkeypatch.setattr(launch_table, "score_parts", lambda *_: parts)
    s, t = logit_pair(2, 13001, scale=20, noise=0.01)
    score = check(s, t)
    again = score_fwd(s, t, None, vocab_size=13001, **COMMON)
    assert torch.equal(score.columns, again.columns)
    monkeypatch.undo()
    assert torch.equal(groups(score, 13001), groups(score_fwd(s, t, None, vocab_size=13001, **COMMON), 13001))
    s[:, :9000], t[:, :9000] = -INF, -INF  # whole parts without a single logit
    monkeypatch.setattr(launch_table, "score_parts", lambda *_: parts)
    check(s, t)


def test_score_parts_fills_the_device_only_with_few_rows(monkeypatch):
    monkeypatch.setattr(launch_table, "_multiprocessors", lambda _: 132)
    tile = launch_table.score(torch.bfloat16, torch.bfloat16)
    parts = [launch_table.score_parts(n, 151936, tile, None) for n in (1, 8, 64, 263, 264, 8192)]
    assert parts == [37, 37, 9, 3, 1, 1]
    assert launch_table.score_parts(1, 500, tile, None) == 1


# row strides


def test_row_step_counts_in_16_bytes_where_rows_are_so_far_apart():
    table = torch.empty(3, 64)
    assert row_step(table) == (16, 4)
    assert row_step(table.half()) == (8, 8)
    assert row_step(torch.empty(3, 40, dtype=torch.bfloat16)) == (5, 8)  # no multiple of 16 elements
    assert row_step(torch.empty(3, 50_257, dtype=torch.bfloat16)) == (50_257, 1)
    assert row_step(table[:1].expand(3, -1)) == (0, 4)


def test_rows_are_aligned_where_stride_and_first_row_are():
    table = torch.empty(3, 64)
    assert rows_are_aligned(table, table[1:, 4:])
    assert not rows_are_aligned(table, table[:, 1:])
    assert not rows_are_aligned(torch.empty(3, 63), table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [4616, 4620])  # 16 bytes apart in both types, in fp32 alone
def test_score_fwd_reads_rows_whose_stride_is_counted_in_units(dtype, stride):
    s, t = (x.to(dtype)[:, :4500] for x in logit_pair(4, stride))
    check(s, t, rows=torch.tensor([3, 0]), V=4500)
