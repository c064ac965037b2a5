"""The kernels with every approximate instruction wrong to one side, by all that its documentation allows, which sums do not
average out.

  Not here: errors to both sides, as all other tests run with.
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
from tests.support.ptx import operations
from tests.support.tolerances import relative_error, small_kl_bound


@pytest.fixture(params=[-1, 1])
def one_sided(monkeypatch, request):
    monkeypatch.setattr(operations, "error_sign", request.param)


# KL from 3e-7 to 31
@pytest.mark.parametrize(("scale", "noise"), [(3, 1e-3), (0.1, 1e-3), (4, 1), (15, 15)])
def test_statistics_and_gradients_keep_their_bounds(one_sided, scale, noise):
    s, t = logit_pair(2, 9001, scale=scale, noise=noise, seed=3)
    score = score_fwd(s, t, None, vocab_size=9001, **COMMON)
    oracle.assert_statistics(score, s.double(), t.double())
    weights, top = torch.tensor([1.0, -0.5]), argmax_fwd(s, None, score, vocab_size=9001)
    for name, launch in (("reverse_kl", reverse_kl_grad), ("forward_kl", forward_kl_grad)):
        out = torch.full_like(s, float("nan"))
        launch(s, t, None, weights, score.columns, top=top, out=out, vocab_size=9001, **COMMON)
        want, kl = oracle.gradient(name, s, t, weights)
        for i in range(2):
            assert relative_error(out[i], want[i]) <= small_kl_bound(kl[i].item())
