"""Rows in 8 bits: the bits and scales of torch's own conversion, whatever the rows hold.

Run: make test ARGS=tests/kernels/test_quantise.py
Not here: products and rankings of such rows (tests/inputs/test_float8.py).
"""

import math

import pytest
import torch
from opd_kernels.quantise import quantise_rows

from opd_ops import Float8Rows
from tests.support import kernels
from tests.support.cases import logit_pair


def quantised(x):
    rows = Float8Rows.empty(x)
    rows.values.view(torch.uint8).fill_(77)
    rows.scales.fill_(-1)
    quantise_rows(x, rows.values.view(torch.uint8), rows.scales)
    return rows


def assert_same(x):
    got, want = quantised(x), Float8Rows.of(x)
    assert torch.equal(got.scales, want.scales)
    bits, expected = (rows.values.view(torch.uint8).int() for rows in (got, want))
    is_nan = (bits & 0x7F) == 0x7F
    assert torch.equal(is_nan, want.values.float().isnan())  # a NaN's sign is nobody's business
    assert torch.equal(bits[~is_nan], expected[~is_nan])
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5001, 48, 1])
def test_rows_have_the_bits_of_torch_s_conversion(dtype, width):
    x, _ = logit_pair(22, width, dtype=dtype)
    x[3], x[5] = 0, x[5] * 1e-3
    got = assert_same(x)
    assert got.values.float()[:70].any()
    assert not got.values.float()[70:].any()


def test_every_e4m3_number_stays_and_halves_go_to_the_even_neighbour():
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 .. 448, ascending
    middles = (numbers[1:] + numbers[:-1]) / 2
    row = torch.cat((numbers, middles, -middles, numbers[-1:]))
    got = assert_same(row.unsqueeze(0))
    assert got.scales[0] == 1
    bits = got.values[0].view(torch.uint8)
    assert bits[:127].tolist() == list(range(127))
    assert not (bits[127 : 127 + 126] % 2).any()


def test_what_is_no_number_shows_and_tiny_rows_are_zero():
    x = torch.randn(6, 131)
    x[0, 7], x[1, 130], x[2, 0] = math.nan, math.inf, -math.inf
    x[3] *= 1e-36 / 450
    x[4] *= 1e-33
    got = assert_same(x)
    values = got.values.float()
    assert values[0, 7].isnan()
    assert values[1, 130].isnan()
    assert not values[3].any()
    assert values[4].any()


def test_any_strides():
    whole = torch.randn(40, 3000)
    assert_same(whole[:, :130].T)  # a program a row
    assert_same(whole[::2, 5:1500:3])
    assert_same(torch.empty(0, 16))


@pytest.mark.skipif(kernels.IS_INTERPRETED, reason="Triton's interpreter counts no traffic")
def test_a_row_is_written_once_and_read_by_full_sectors():
    from tests.support.ptx import driver

    x = torch.randn(64, 4096).bfloat16()
    with driver.counted() as launches:
        quantised(x)
    traffic = launches[-1].traffic
    assert traffic.written_bytes == x.numel() + 4 * 64
    assert traffic.read_bytes == 2 * x.nbytes  # the second time from L1 or L2
    assert traffic.read_sectors * 32 == traffic.read_bytes
