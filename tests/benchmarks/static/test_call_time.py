"""The predicted time of a call over its matmul floor: what a product takes, by hand; the budget of a whole call.

Run: make test ARGS=tests/benchmarks/static/test_call_time.py
Not here: the trace (test_launches.py), the replay (test_model.py).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.static import call_time
from benchmarks.static.call_time import DEVICE, MATMUL_RATE, matmul_ms
from benchmarks.static.launches import Matmul, V

ROOT = Path(__file__).resolve().parents[3]


def test_a_product_takes_whole_waves_of_whole_tiles():
    tile_ms = 1e3 * 2 * 128 * 256 * 2048 / MATMUL_RATE
    assert matmul_ms(Matmul(512, 2048, V, 0)) == pytest.approx(18 * 132 * tile_ms)  # 4 x 594 tiles
    assert matmul_ms(Matmul(513, 2048, V, 0)) == pytest.approx(41 / 2 * 132 * tile_ms)  # 9 x 594 tiles of half as many rows


def test_a_product_of_few_rows_takes_the_time_of_its_bytes():
    product = Matmul(52, 4096, V, 2 * 4096 * V)
    assert matmul_ms(product) == pytest.approx(1e3 * product.nbytes / DEVICE.copy)
    assert matmul_ms(product) > 1.5 * matmul_ms(product._replace(nbytes=0))


def test_a_long_sum_for_few_tiles_is_shared_out_or_leaves_multiprocessors_idle():
    product = Matmul(512, V, 2048, 0)
    assert matmul_ms(product) == pytest.approx(1e3 * product.flops / MATMUL_RATE)
    assert matmul_ms(product, splits=False) == pytest.approx(132 / 64 * matmul_ms(product))  # 64 half tiles


@pytest.mark.full
def test_a_call_takes_at_most_1_14_of_its_matmuls():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.static.call_time"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    floor, *terms = (float(x) for x in re.findall(r"^ *([\d.]+) ms  ", done.stdout, re.MULTILINE))
    over = float(re.search(r"([\d.]+) of the floor", done.stdout).group(1))
    assert 1.05 < over <= call_time.LIMIT
    assert 1 + sum(terms) / floor == pytest.approx(over, abs=0.003)
