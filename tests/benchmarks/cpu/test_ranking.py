"""The comparison of cheaper rankings, on made-up heads: what it computes, not what a real model gives.

  Run: make test ARGS=tests/benchmarks/cpu/test_ranking.py

Not here: the figures (python -m benchmarks.cpu.ranking), the rankings themselves (inputs/test_float8.py,
inputs/test_rollout.py).
"""

import json

import pytest

from benchmarks.cpu import ranking
from opd_ops import StudentStats
from tests.support.cases import head_pair


@pytest.fixture
def inputs():
    student, teacher = head_pair((60,), 300, student_dim=32, teacher_dim=48)
    recorded, rounded = (
        StudentStats.from_logits((h @ w.T).float())
        for h, w in ((student.hidden, student.weight), (student.hidden.bfloat16(), student.weight.bfloat16()))
    )
    return ranking.Inputs(student, teacher, recorded, rounded)


def test_rankings_are_held_against_the_exact_one(inputs):
    rows = {(row["ranking"], row["fraction"]): row for row in ranking.compare(inputs)}
    for fraction in ranking.FRACTIONS:
        assert rows["exact", fraction]["overlap"] == rows["exact", fraction]["score_kept"] == 1.0
        assert rows["rollout", fraction]["overlap"] == 1.0
        assert rows["fp8", fraction]["selected"] == rows["exact", fraction]["selected"]
        assert rows["fp8", fraction]["overlap"] <= rows["fp8, shortlist", fraction]["overlap"] <= 1.0
    assert min(row["overlap"] for row in rows.values()) < 1.0


def test_differences_are_those_of_the_precision(inputs):
    errors = {(row["ranking"], row["column"]): row["largest"] for row in ranking.differences(inputs)}
    assert errors["rollout", "union_kl"] < 1e-5 < errors["rollout, bf16", "union_kl"]


def test_the_program_writes_its_results(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ranking, "real_inputs", lambda *_: inputs)
    ranking.main(["--out", str(tmp_path)])
    got = json.loads((tmp_path / "ranking.json").read_text())
    assert got["positions"] == 60
    page = (tmp_path / "ranking.md").read_text()
    assert page.strip() in capsys.readouterr().out
    assert "| exact | 1.000 (1.000) | 1.000 (1.000) | 1.000 (1.000) |" in page
