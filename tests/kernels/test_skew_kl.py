"""The kernels of skew KL, interpreted or compiled, against float64: its equation, and autograd of it through scale and soft-cap
(support/kernel_oracle.py).

  Bounds: loss and mean slope 1e-6 + 1e-4 x; ||g - g64|| / ||g64|| <= 1e-4, or 3e-6 / sqrt(2 KL) below KL = 1e-3.
  Run: make test ARGS=tests/kernels/test_skew_kl.py
Not here: the polynomial and the sums' kernel where both are jsd's (test_jsd.py), losses of calls (backends/triton/).
"""

import math

import pytest
import torch
from opd_kernels.argmax import argmax_fwd
from opd_kernels.score import score_fwd
from opd_kernels.skew_kl import forward_skew_fwd, forward_skew_grad, reverse_skew_fwd, reverse_skew_grad

from tests.support import kernel_oracle as oracle
from tests.support.cases import logit_pair
from tests.support.kernel_oracle import COMMON
from tests.support.tolerances import assert_within, small_kl_bound

INF = float("inf")
KERNELS = {"reverse": (reverse_skew_fwd, reverse_skew_grad), "forward": (forward_skew_fwd, forward_skew_grad)}
every_direction = pytest.mark.parametrize("direction", KERNELS)


def run(s, t, weights, direction, alpha=0.1, **changed):
    common = {**COMMON, **changed, "vocab_size": s.shape[1]}
    forward, backward = KERNELS[direction]
    beta = 1 - alpha if direction == "reverse" else alpha
    score = score_fwd(s, t, None, **common)
    sums = forward(s, t, None, score.columns, beta=beta, **common)
    out, top = torch.full(s.shape, float("nan"), dtype=s.dtype), argmax_fwd(s, None, score, vocab_size=s.shape[1])
    backward(s, t, None, weights, score.columns, sums, top=top, out=out, beta=beta, **common)
    return out, sums


def skew(s, t, direction, alpha):
    """(n,) losses of float64 logits, masked entries apart; an entry that neither model can write adds 0."""
    log_p, log_q = s.log_softmax(1), t.log_softmax(1)
    left, right, own = (log_p, log_q, alpha) if direction == "reverse" else (log_q, log_p, alpha)
    left, right = (x.masked_fill(x == -INF, -800.0) for x in (left, right))
    return (left.exp() * (left - torch.logaddexp(left + math.log(own), right + math.log1p(-own)))).sum(1)


def assert_skew(out, sums, s, t, weights, direction, alpha=0.1, tolerance=1e-4, **changed):
    gradient, loss = oracle.gradient(lambda x, y: skew(x, y, direction, alpha), s, t, weights, **changed)
    bound = torch.tensor([max(tolerance, small_kl_bound(x / (1 - alpha) ** 2)) for x in loss.tolist()])
    error = (out.double() - gradient).norm(dim=1)
    assert (gradient.norm(dim=1) > 0).all()
    assert (error <= bound * gradient.norm(dim=1)).all(), (error / gradient.norm(dim=1), bound)
    assert_within(sums[0], loss, relative=1e-4, absolute=1e-6, name="loss")
    assert not (sums[0] < 0).any()


@every_direction
@pytest.mark.parametrize(
    ("noise", "alpha"), [(1.0, 0.1), *(pytest.param(*x, marks=pytest.mark.full) for x in ((1e-2, 0.6), (8.0, 0.1)))]
)
def test_skew_matches_the_oracle(noise, alpha, direction):
    s, t = logit_pair(2, 701, noise=noise, seed=3)
    w = torch.tensor([0.5, -2.0])
    assert_skew(*run(s, t, w, direction, alpha), s, t, w, direction, alpha)


@pytest.mark.full
@every_direction
def test_skew_follows_the_transform_and_the_stored_type(direction):
    s, t = logit_pair(2, 301, scale=8, seed=5, dtype=torch.bfloat16)
    w, changed = torch.tensor([1.0, 3.0]), {"temperature": 0.7, "s_softcap": 30.0, "t_softcap": 20.0, "s_scale": 0.5}
    assert_skew(*run(s, t, w, direction, 0.3, **changed), s, t, w, direction, 0.3, 4e-3, **changed)


@pytest.mark.full
@every_direction
def test_skew_of_equal_models_is_zero(direction):
    s, _ = logit_pair(1, 301)
    out, sums = run(s, s.clone(), torch.ones(1), direction)
    assert torch.equal(sums, torch.zeros(2, 1))
    assert torch.equal(out, torch.zeros_like(out))


@every_direction
def test_skew_of_infinite_kls_is_finite_and_hides_no_nan(direction):
    s, t = logit_pair(3, 401)
    s[:, :40], t[:, 20:90] = -INF, -INF  # some masked in both
    w = torch.ones(3)
    out, sums = run(s, t, w, direction)
    assert (out[:, :40] == 0).all()
    assert_skew(out, sums, s, t, w, direction)
    for side in (s, t):
        side[0, 300] = float("nan")
        out, sums = run(s, t, w, direction)
        assert out[0].isnan().all()
        assert sums[:, 0].isnan().all()
        assert torch.isfinite(out[1:]).all()
        side[0, 300] = 0.0
