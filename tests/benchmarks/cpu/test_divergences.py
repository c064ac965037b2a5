"""The benchmark of the divergences at a small size: every one of them runs, what is counted is counted.

  Run: make test ARGS=tests/benchmarks/cpu/test_divergences.py

Not here: the counts themselves (tests/loss/test_cost_divergences.py), the figures (python -m benchmarks.cpu.divergences).
"""

import json

import pytest

from benchmarks.cpu import divergences
from opd_ops.divergences import DIVERGENCES

pytestmark = pytest.mark.full


def test_it_writes_a_row_for_every_divergence(tmp_path):
    arguments = ["--n", "20", "--vocab", "640", "--dims", "16,16", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]
    got = divergences.main(arguments)
    assert json.loads((tmp_path / "divergences.json").read_text())["rows"] == got["rows"]
    rows = {row["name"]: row for row in got["rows"]}
    assert {f"`{name}`" for name in DIVERGENCES} <= set(rows)
    assert rows["`reverse_kl`"]["units"] == pytest.approx(2 + 4 / 20)
    assert rows["`jsd`"]["units"] == pytest.approx(2 + 6 / 20)
    assert rows["`reverse_kl`"]["ratios"] == [1.0, 1.0]
    page = (tmp_path / "divergences.md").read_text()
    assert "| `reverse_kl` | 1.00 (1.00 to 1.00) | 2.20 |" in page
    assert page.count("\n| ") == len(rows) + 1
