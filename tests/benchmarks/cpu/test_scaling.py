"""The growth benchmark: what it makes of its measurements, which are made up here.

  Run: make test ARGS=tests/benchmarks/cpu/test_scaling.py

Not here: one measurement (test_compare.py), the figures (python -m benchmarks.cpu.scaling).
"""

import json

import pytest

from benchmarks.cpu import scaling
from benchmarks.cpu.methods import METHODS


@pytest.fixture
def got(tmp_path, monkeypatch):
    def run_process(task, name, sizes, settings, threads):
        if name == "liger":
            return {"status": "failed", "error": "out of memory"}
        return {"status": "ok", "seconds": 3.0, "peak_bytes": sizes.n * sizes.vocab}

    monkeypatch.setattr(scaling, "run_process", run_process)
    scaling.main(["--n-list", "8,16", "--vocab", "100", "--n", "4", "--vocab-list", "50,60", "--out", str(tmp_path)])
    return json.loads((tmp_path / "scaling.json").read_text()), tmp_path


def test_every_method_is_measured_at_every_size(got):
    result, _ = got
    names = set(METHODS) - {"floor"}
    assert {(p["method"], p["n"]) for p in result["against_n"]} == {(m, n) for m in names for n in (8, 16)}
    assert {(p["method"], p["vocab"]) for p in result["against_vocab"]} == {(m, v) for m in names for v in (50, 60)}
    ours = [p for p in result["against_vocab"] if p["method"] == "ours"]
    assert [p["peak_bytes"] for p in ours] == [200, 240]


def test_a_method_that_fails_says_so_and_spoils_nothing(got):
    _, folder = got
    page = (folder / "scaling.md").read_text()
    assert "| Liger chunked, eager | failed: out of memory | failed: out of memory |" in page
    assert "| ours, streamed | 0.00 | 0.00 |" in page
    assert (folder / "memory_against_v.png").stat().st_size > 10_000
