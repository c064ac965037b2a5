"""The gradient kernels of reverse and forward KL, interpreted or compiled, against autograd of the float64 specification
(support/kernel_oracle.py), scale and soft-cap included.

  Bounds: ||g - g64|| / ||g64|| <= 1e-4, or 3e-6 / sqrt(2 KL) below KL = 1e-3.

Run: make test ARGS=tests/kernels/test_grad.py
Not here: statistics (test_score.py).
"""

import pytest
import torch
from opd_kernels.argmax import argmax_fwd
from opd_kernels.forward_kl import forward_kl_grad
from opd_kernels.reverse_kl import reverse_kl_grad
from opd_kernels.score import score_fwd

from tests.support import kernel_oracle as oracle
from tests.support.cases import logit_pair
from tests.support.kernel_oracle import COMMON
from tests.support.tolerances import small_kl_bound

INF = float("inf")
KINDS = [(reverse_kl_grad, "reverse_kl"), (forward_kl_grad, "forward_kl")]
both_kinds = pytest.mark.parametrize(("grad", "kind"), KINDS, ids=["reverse_kl_grad", "forward_kl_grad"])


def run(grad, s, t, weights, rows=None, V=None, out=None, score=None, **changed):
    common = {**COMMON, **changed, "vocab_size": V or s.shape[1]}
    score = score_fwd(s, t, rows, **common) if score is None else score
    out = torch.full(s.shape, float("nan"), dtype=s.dtype) if out is None else out
    top = argmax_fwd(s, rows, score, vocab_size=common["vocab_size"])
    grad(s, t, rows, weights, score.columns, top=top, out=out, **common)
    return out


def assert_gradient(out, want, kl, tolerance=1e-4):
    error = (out.double() - want).norm(dim=1)
    bound = torch.tensor([max(tolerance, small_kl_bound(x)) for x in kl.tolist()])
    assert (error <= bound * want.norm(dim=1)).all(), (error / want.norm(dim=1), bound)


@both_kinds
@pytest.mark.parametrize("V", [5003, 2048, 131, 3])
def test_grad_matches_oracle_fp64(grad, kind, V):
    s, t = logit_pair(2, V, seed=V)
    w = torch.tensor([0.5, -2.0])
    assert_gradient(run(grad, s, t, w), *oracle.gradient(kind, s, t, w))


@both_kinds
@pytest.mark.parametrize(("scale", "noise"), [(3, 1e-3), (0.1, 1e-3), (60, 0.01), (60, 5), (15, 60)])
def test_grad_does_not_cancel(grad, kind, scale, noise):
    s, t = logit_pair(1, 5003, scale=scale, noise=noise, seed=2)
    w = torch.ones(1)
    assert_gradient(run(grad, s, t, w), *oracle.gradient(kind, s, t, w))


@both_kinds
@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.7, "s_scale": 0.5, "t_scale": 0.3},
        {"temperature": 2.0},
        {"s_softcap": 30.0, "t_softcap": 50.0, "s_scale": 0.5, "t_scale": 0.5},
    ],
)
def test_grad_follows_the_transform(grad, kind, changed):
    s, t = logit_pair(2, 3001, scale=8, seed=5)
    w = torch.tensor([1.0, 3.0])
    assert_gradient(run(grad, s, t, w, **changed), *oracle.gradient(kind, s, t, w, **changed))


@both_kinds
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_grad_rounds_once_to_the_stored_type(grad, kind, dtype, tolerance):
    s, t = logit_pair(2, 3001, dtype=dtype)
    w = torch.ones(2) * 100
    out = run(grad, s, t, w)
    assert out.dtype == dtype
    assert_gradient(out, *oracle.gradient(kind, s, t, w), tolerance=tolerance)


@pytest.mark.parametrize(
    ("grad", "kind", "dtype"),
    [(*KINDS[0], torch.bfloat16), *(pytest.param(*kind, torch.float16, marks=pytest.mark.full) for kind in KINDS)],
)
def test_grad_of_16_bit_rows_is_the_same_wherever_the_table_begins(grad, kind, dtype):
    s, t = logit_pair(2, 4104, dtype=dtype, seed=3)  # rows 16 bytes apart: read by words where the first begins at 16 bytes
    w = torch.tensor([0.5, -2.0])
    want, kl = oracle.gradient(kind, s, t, w)
    score = score_fwd(s, t, None, **COMMON, vocab_size=4104)  # of one table: its sums are in another order elsewhere
    got = run(grad, s, t, w, score=score)
    assert_gradient(got, want, kl, tolerance=4e-3)
    moved = [x.new_zeros(3 + x.numel()).as_strided(x.shape, x.stride(), 3).copy_(x) for x in (s, t, s)]
    assert torch.equal(run(grad, *moved[:2], w, out=moved[2], score=score), got)


def test_assert_gradient_rejects_a_zero_gradient():
    s, t = logit_pair(1, 300)
    want, kl = oracle.gradient("reverse_kl", s, t, torch.ones(1))
    with pytest.raises(AssertionError):
        assert_gradient(torch.zeros_like(s), want, kl)


@both_kinds
def test_grad_writes_whole_rows_and_no_others(grad, kind):
    s, t = logit_pair(5, 2600)
    rows, w = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([1.0, 2.0])
    out = run(grad, s, t, w, rows=rows, V=2500)
    assert out[[0, 2, 4]].isnan().all()
    assert (out[[3, 1], 2500:] == 0).all()
    assert_gradient(out[[3, 1], :2500], *oracle.gradient(kind, s[[3, 1], :2500], t[[3, 1], :2500], w))


@both_kinds
def test_grad_in_place_equals_out_of_place(grad, kind):
    s, t = logit_pair(3, 4300, dtype=torch.bfloat16)
    rows, w = torch.tensor([2, 0]), torch.tensor([1.0, 2.0])
    apart = run(grad, s, t, w, rows=rows)
    kept = s.clone()
    together = run(grad, s, t, w, rows=rows, out=s)
    assert together is s
    assert torch.equal(s[[0, 2]], apart[[0, 2]])
    assert torch.equal(s[1], kept[1])


@both_kinds
def test_grad_zero_weight_writes_zeros_whatever_the_row_holds(grad, kind):
    s, t = logit_pair(4, 2100)
    s[0, 7], t[1, 2080], s[2] = float("nan"), -INF, -INF
    out = run(grad, s, t, torch.zeros(4))
    assert torch.equal(out, torch.zeros_like(out))


@both_kinds
def test_grad_ignores_entries_masked_in_both(grad, kind):
    s, t = logit_pair(2, 4500)
    for x in (s, t):
        x[:, :2100], x[:, 4444] = -INF, -INF
    w = torch.ones(2)
    out = run(grad, s, t, w)
    assert (out[:, :2100] == 0).all()
    assert torch.isfinite(out).all()
    assert_gradient(out, *oracle.gradient(kind, s, t, w))


def test_grad_of_infinite_kl_is_finite():
    s, t = logit_pair(1, 2500)
    t[:, 10] = -INF
    out = run(reverse_kl_grad, s, t, torch.ones(1))
    assert torch.equal(out, torch.zeros_like(out))
    out = run(forward_kl_grad, s, t, torch.ones(1))
    assert_gradient(out, *oracle.gradient("forward_kl", s, t, torch.ones(1)))
    s, t = logit_pair(1, 2500)
    s[:, 10] = -INF
    out = run(reverse_kl_grad, s, t, torch.ones(1))
    assert_gradient(out, *oracle.gradient("reverse_kl", s, t, torch.ones(1)))
    out = run(forward_kl_grad, s, t, torch.ones(1))
    assert torch.isfinite(out).all()
    assert out[0, 10] < 0


@both_kinds
def test_grad_never_hides_a_nan(grad, kind):
    s, t = logit_pair(2, 2100)
    s[0, 2050] = float("nan")
    out = run(grad, s, t, torch.ones(2))
    assert out[0].isnan().all()
    assert torch.isfinite(out[1]).all()


@both_kinds
def test_grad_offsets_pass_two_to_the_31(grad, kind, tmp_path):
    s, t = oracle.sparse_pair(tmp_path)
    rows, w = torch.tensor([69999, 0]), torch.ones(2) * 100
    want = oracle.gradient(kind, s[rows], t[rows], w)
    out = run(grad, s, t, w, rows=rows, out=s)
    assert_gradient(out[rows], *want, tolerance=5e-4)
