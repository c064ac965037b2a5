"""The trace of launches as a gate: so many launches a call, tiles that fill waves, groups that fill the matmul's tiles; and
`estimate` against it.

Run: make test ARGS=tests/benchmarks/static/test_launches.py
"""

import json

import pytest

from benchmarks.static import launches
from opd_ops import estimate
from tests.support import kernels

pytestmark = pytest.mark.skipif(kernels.IS_INTERPRETED, reason="an interpreted launch cannot be recorded")


@pytest.mark.parametrize(("n", "most"), [(1024, 47), (16_384, 275)])
def test_a_call_launches_no_more_than_its_budget(n, most):
    row = launches.call_trace(n)
    assert row["score"]["launches"] + row["loss"]["launches"] <= most
    tiles = [x.rows for x in row["score"]["matmuls"] if x.columns == launches.V]
    assert sum(tiles) == 2 * n
    assert all(rows % 256 == 0 for rows in tiles[:-2])
    groups = [x.rows for x in row["loss"]["matmuls"] if x.columns == launches.V]
    assert sum(groups) == 2 * row["selected"]
    assert all(rows >= 256 for rows in groups[:-2])


def test_rows_that_are_kept_spare_the_second_look_up_to_65536():
    products = [x for x in launches.call_trace(65_536)["loss"]["matmuls"] if x.columns != launches.V]
    spans = -(-3277 // 512)
    assert len(products) == 2 * spans  # of the hidden states and of the weight, for each span of kept rows


@pytest.mark.parametrize("n", [4096, 16_384])
def test_estimate_agrees_with_the_trace(n):
    parts = launches.parts(n)
    expected = estimate(n, launches.V, launches.STUDENT_DIM, launches.TEACHER_DIM, fraction=launches.FRACTION)
    assert sum(x.flops for part in parts for x in part.matmuls) == expected.flops
    # The estimate scales the gradients, also by 1, and leaves out the copies of hidden rows, half a percent.
    unscaled = expected.bytes_moved - 2 * expected.gradient_bytes
    assert sum(part.bytes_moved for part in parts) == pytest.approx(unscaled, rel=0.006)


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    assert launches.main(["--json", str(tmp_path / "rows.json"), "--n", "600"]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    total = row["score"]["launches"] + row["loss"]["launches"]
    assert f"{600:>7} {total:>9}" in capsys.readouterr().out
