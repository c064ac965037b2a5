"""Rows that are zeroed: all of each, whatever its width and alignment, and no byte beside them; 16 bytes at a time.

Run: make test ARGS=tests/kernels/test_zero_rows.py
Not here: which rows (backends/triton/test_layout.py, backends/triton/test_backend.py).
"""

import pytest
import torch
from opd_kernels.zero_rows import zero_rows

from tests.support import kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "step"), [(5000, 5000), (4999, 4999), (4999, 5003), (131, 160), (7, 7), (3, 5), (1, 1)])
def test_rows_are_zeroed_whole_and_nothing_else_is_written(dtype, width, step):
    storage = torch.arange(1.0, 4 * step + 10).to(dtype)
    table = storage[1:].as_strided((4, width), (step, 1))  # begins anywhere
    want = storage.clone()
    want[1:].as_strided((4, width), (step, 1))[[0, 3]] = 0
    zero_rows(table, torch.tensor([0, 1, 5, 0], dtype=torch.uint8))
    assert torch.equal(storage, want)


def test_no_row_and_no_column():
    zero_rows(torch.empty(0, 5), torch.empty(0, dtype=torch.uint8))
    zero_rows(torch.empty(5, 0), torch.zeros(5, dtype=torch.uint8))


@pytest.mark.skipif(kernels.IS_INTERPRETED, reason="Triton's interpreter counts no traffic")
@pytest.mark.parametrize("width", [40_000, 40_003])
def test_a_row_is_written_once_by_full_sectors(width):
    from tests.support.ptx import driver

    table = torch.ones(3, width, dtype=torch.bfloat16)
    with driver.counted() as launches:
        zero_rows(table, torch.tensor([0, 1, 0], dtype=torch.uint8))
    traffic = launches[-1].traffic
    assert traffic.written_bytes == 2 * 2 * width
    assert traffic.written_sectors * 32 <= 1.01 * traffic.written_bytes + 2 * 2 * 32
