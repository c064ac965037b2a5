"""A tensor times a number that the host does not know; nothing is touched where it is 1.

Run: make test ARGS=tests/kernels/test_scale.py
"""

import pytest
import torch
from opd_kernels.scale import scale

from tests.support import kernels
from tests.support.cases import logit_pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.25, -3.0, 1.0, float("nan")])
def test_every_element_is_scaled_once(dtype, factor):
    x, _ = logit_pair(3, 3001, dtype=dtype)
    want = (x.double() * factor).to(dtype)
    scale(x, torch.tensor([factor]))
    assert torch.equal(x.isnan(), want.isnan())
    assert torch.equal(x.nan_to_num(), want.nan_to_num())


def test_any_order_of_dimensions_without_gaps():
    x = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)
    want = 2 * x
    scale(x, torch.tensor([2.0]))
    assert torch.equal(x, want)
    with pytest.raises(AssertionError, match="without gaps"):
        scale(torch.ones(4, 6)[:, :3], torch.tensor([2.0]))
    scale(torch.empty(0, 3), torch.tensor([2.0]))


@pytest.mark.skipif(kernels.IS_INTERPRETED, reason="Triton's interpreter counts no traffic")
def test_a_factor_of_one_costs_no_traffic():
    from tests.support.ptx import driver

    for factor, n_bytes in ((1.0, 0), (2.0, 2 * 10_000)):
        with driver.counted() as launches:
            scale(torch.ones(10_000, dtype=torch.bfloat16), torch.tensor([factor]))
        traffic = launches[-1].traffic
        assert traffic.written_bytes == n_bytes
        assert traffic.read_bytes >= n_bytes
