"""The kernels of the generalised Jensen-Shannon divergence, interpreted or compiled, against float64: its equation, and
autograd of it through scale and soft-cap (support/kernel_oracle.py).

  Bounds: jsd and mean_slope 1e-6 + 1e-4 x; ||g - g64|| / ||g64|| <= 1e-4, or 3e-6 / sqrt(2 KL) below KL = 1e-3, where the KL is
  that of close models, JSD / (beta (1 - beta)).

Run: make test ARGS=tests/kernels/test_jsd.py
Not here: statistics (test_score.py), the gradients of the KLs (test_grad.py).
"""

import math
from functools import partial

import pytest
import torch
from opd_kernels.argmax import argmax_fwd
from opd_kernels.jsd import jsd_fwd, jsd_grad
from opd_kernels.score import score_fwd

from tests.support import kernel_oracle as oracle
from tests.support.cases import logit_pair
from tests.support.kernel_oracle import COMMON
from tests.support.tolerances import assert_within, small_kl_bound

INF = float("inf")
BETAS = [0.1, 0.5, 0.9]
SOME_BETAS = [0.1, *(pytest.param(x, marks=pytest.mark.full) for x in BETAS[1:])]


def run(s, t, weights, beta=0.5, rows=None, V=None, out=None, **changed):
    common = {**COMMON, **changed, "vocab_size": V or s.shape[1]}
    score = score_fwd(s, t, rows, **common)
    sums = jsd_fwd(s, t, rows, score.columns, beta=beta, **common)
    out = torch.full(s.shape, float("nan"), dtype=s.dtype) if out is None else out
    top = argmax_fwd(s, rows, score, vocab_size=common["vocab_size"])
    jsd_grad(s, t, rows, weights, score.columns, sums, top=top, out=out, beta=beta, **common)
    return out, sums


def wanted(s, t, weights, beta=0.5, **changed):
    gradient, jsd = oracle.gradient(partial(oracle.jsd, beta=beta), s, t, weights, **changed)
    common = {**COMMON, **changed}
    s64 = oracle.logit(s, common["s_scale"], common["s_softcap"], common["temperature"])
    t64 = oracle.logit(t, common["t_scale"], common["t_softcap"], common["temperature"])
    return gradient, torch.stack((jsd, oracle.mixture_kls(s64, t64, beta)[0]))


def assert_jsd(out, sums, want, want_sums, beta=0.5, tolerance=1e-4, floor=0.0):
    error = (out.double() - want).norm(dim=1)
    bound = torch.tensor([max(tolerance, small_kl_bound(x / (beta * (1 - beta)))) for x in want_sums[0].tolist()])
    assert (error <= bound * want.norm(dim=1) + floor).all(), (error / want.norm(dim=1), bound)
    for name, got, expected in zip(("jsd", "mean_slope"), sums, want_sums, strict=True):
        assert_within(got, expected, relative=1e-4, absolute=1e-6, name=name)
    assert not (sums[0] < 0).any()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("V", [5003, 2048, 131, 3])
def test_jsd_matches_oracle_fp64(V, beta):
    s, t = logit_pair(2, V, seed=V)
    w = torch.tensor([0.5, -2.0])
    assert_jsd(*run(s, t, w, beta), *wanted(s, t, w, beta), beta)


@pytest.mark.parametrize("beta", [0.01, 0.5, 0.99, *(pytest.param(x, marks=pytest.mark.full) for x in (0.1, 0.9))])
@pytest.mark.parametrize(("scale", "noise"), [(3, 1e-3), (0.1, 1e-3), (60, 0.01), (60, 5), (1, 0.05), (4, 0.5), (15, 15)])
def test_jsd_does_not_cancel(scale, noise, beta):
    s, t = logit_pair(1, 2100, scale=scale, noise=noise, seed=2)
    w = torch.ones(1)
    gradient, sums = wanted(s, t, w, beta)
    # At noise 15 f and mean_slope nearly agree: what is left of their rounding, with a GPU's exp2 of two units in the last
    # place.
    assert_jsd(*run(s, t, w, beta), gradient, sums, beta, floor=2e-7 * (1 - beta) * sums[1])


@pytest.mark.parametrize("beta", SOME_BETAS)
@pytest.mark.parametrize("scale", [0.1, 15, 60])
def test_jsd_of_models_that_share_no_mass(scale, beta):
    # Saturated: the gradient is 1e-12 and less, the difference of two numbers of size one that agree.
    s, t = logit_pair(1, 2100, scale=scale, noise=60, seed=2)
    w = torch.ones(1)
    out, sums = run(s, t, w, beta)
    want, want_sums = wanted(s, t, w, beta)
    assert (out - want).norm() < 1e-7 + 1e-4 * want.norm()
    assert_jsd(want, sums, want, want_sums, beta)


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_of_equal_models_is_zero(beta):
    s, _ = logit_pair(1, 2100)
    out, sums = run(s, s.clone(), torch.ones(1), beta)
    assert torch.equal(sums, torch.zeros(2, 1))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.7, "s_scale": 0.5, "t_scale": 0.3},
        {"temperature": 2.0},
        {"s_softcap": 30.0, "t_softcap": 50.0, "s_scale": 0.5, "t_scale": 0.5},
    ],
)
def test_jsd_follows_the_transform(changed):
    s, t = logit_pair(2, 3001, scale=8, seed=5)
    w = torch.tensor([1.0, 3.0])
    assert_jsd(*run(s, t, w, 0.3, **changed), *wanted(s, t, w, 0.3, **changed), 0.3)


def test_jsd_soft_cap_makes_no_logits_beyond_the_vocabulary():
    s, t = logit_pair(2, 131)  # a low cap, so that -cap would have a share
    w, changed = torch.ones(2), {"s_softcap": 1.0, "t_softcap": 2.0}
    assert_jsd(*run(s, t, w, **changed), *wanted(s, t, w, **changed))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_jsd_grad_rounds_once_to_the_stored_type(dtype, tolerance):
    s, t = logit_pair(2, 3001, dtype=dtype)
    w = torch.ones(2) * 100
    out, sums = run(s, t, w)
    assert out.dtype == dtype
    assert_jsd(out, sums, *wanted(s, t, w), tolerance=tolerance)


def test_assert_jsd_rejects_a_zero_gradient():
    s, t = logit_pair(1, 300)
    want, sums = wanted(s, t, torch.ones(1))
    assert_jsd(want, sums, want, sums)
    with pytest.raises(AssertionError):
        assert_jsd(torch.zeros_like(s), sums, want, sums)


def test_jsd_grad_writes_whole_rows_and_no_others():
    s, t = logit_pair(5, 2600)
    rows, w = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([1.0, 2.0])
    out, sums = run(s, t, w, rows=rows, V=2500)
    assert out[[0, 2, 4]].isnan().all()
    assert (out[[3, 1], 2500:] == 0).all()
    assert_jsd(out[[3, 1], :2500], sums, *wanted(s[[3, 1], :2500], t[[3, 1], :2500], w))


@pytest.mark.parametrize("into", ["student", "teacher"])
def test_jsd_grad_in_place_equals_out_of_place(into):
    s, t = logit_pair(3, 4300, dtype=torch.bfloat16)
    rows, w = torch.tensor([2, 0]), torch.tensor([1.0, 2.0])
    apart, sums = run(s, t, w, rows=rows)
    target = s if into == "student" else t
    kept = target.clone()
    together, same_sums = run(s, t, w, rows=rows, out=target)
    assert together is target
    assert torch.equal(target[[0, 2]], apart[[0, 2]])
    assert torch.equal(target[1], kept[1])
    assert torch.equal(sums, same_sums)


def test_jsd_grad_of_blocks_of_the_vocabulary_equals_that_of_the_whole():
    s, t = logit_pair(2, 4500)
    w = torch.tensor([1.0, -0.5])
    common = {**COMMON, "beta": 0.3}
    columns = score_fwd(s, t, None, **COMMON, vocab_size=4500).columns
    sums = jsd_fwd(s, t, None, columns, **common, vocab_size=4500)
    whole, parts = torch.full_like(s, float("nan")), torch.full_like(s, float("nan"))
    jsd_grad(s, t, None, w, columns, sums, top=None, out=whole, **common, vocab_size=4500)
    for a, b in ((0, 2048), (2048, 2100), (2100, 4500)):
        jsd_grad(s[:, a:b], t[:, a:b], None, w, columns, sums, top=None, out=parts[:, a:b], **common, vocab_size=b - a)
    assert torch.equal(whole, parts)


def test_jsd_grad_zero_weight_writes_zeros_whatever_the_row_holds():
    s, t = logit_pair(4, 2100)
    s[0, 7], t[1, 2080], s[2] = float("nan"), -INF, -INF
    out, _ = run(s, t, torch.zeros(4))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("changed", [{}, {"s_scale": 0.5}], ids=["one multiplier", "two"])
def test_jsd_ignores_entries_masked_in_both(changed):
    s, t = logit_pair(2, 4500)
    for x in (s, t):
        x[:, :2100], x[:, 4444] = -INF, -INF
    w = torch.ones(2)
    out, sums = run(s, t, w, **changed)
    assert (out[:, :2100] == 0).all()
    assert torch.isfinite(out).all()
    assert_jsd(out, sums, *wanted(s, t, w, **changed))


@pytest.mark.parametrize("beta", SOME_BETAS)
@pytest.mark.parametrize("masked", ["student", "teacher", "each its own", "all but one apart"])
def test_jsd_of_infinite_kls_is_finite(masked, beta):
    s, t = logit_pair(2, 4500)
    if masked in ("student", "each its own"):
        s[:, :2100] = -INF  # more than a block
    if masked == "teacher":
        t[0, 10], t[1, 2000:4400] = -INF, -INF
    if masked == "each its own":
        t[:, 2100:3000] = -INF
    if masked == "all but one apart":  # no token that both have: the largest JSD there is
        s[:, ::2], t[:, 1::2] = -INF, -INF
    w = torch.ones(2)
    out, sums = run(s, t, w, beta)
    assert torch.isfinite(out).all()
    assert (out[s == -INF] == 0).all()
    want, want_sums = wanted(s, t, w, beta)
    if masked == "all but one apart":
        largest = -(1 - beta) * math.log(1 - beta) - beta * math.log(beta)
        torch.testing.assert_close(sums[0], torch.full((2,), largest), rtol=1e-5, atol=0)
        assert want.norm() < 1e-12  # log(p / m) is the same everywhere
        assert out.norm() < 1e-6
    else:
        assert_jsd(out, sums, want, want_sums, beta)


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_jsd_never_hides_a_nan(model):
    s, t = logit_pair(2, 2100)
    (s if model == "student" else t)[0, 2050] = float("nan")
    out, sums = run(s, t, torch.ones(2))
    assert out[0].isnan().all()
    assert torch.isfinite(out[1]).all()
    assert sums.isnan().tolist() == [[True, False]] * 2


def test_jsd_offsets_pass_two_to_the_31(tmp_path):
    s, t = oracle.sparse_pair(tmp_path)
    rows, w = torch.tensor([69999, 0]), torch.ones(2) * 100
    want = wanted(s[rows], t[rows], w)
    out, sums = run(s, t, w, rows=rows, out=s)
    assert_jsd(out[rows], sums, *want, tolerance=5e-4)
