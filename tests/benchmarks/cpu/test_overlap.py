"""The overlaps of selections, on made-up statistics: what is computed, not what a real model gives.

  Run: make test ARGS=tests/benchmarks/cpu/test_overlap.py

Not here: the figures (python -m benchmarks.cpu.overlap), the selectors (selection/).
"""

import json

import pytest
import torch

from benchmarks.cpu import overlap
from opd_ops import score_positions, selective_opd_loss
from tests.support.cases import logit_pair


@pytest.fixture
def batch():
    student, teacher = (x.view(4, 30, 97) for x in logit_pair(120, 97))
    mask = torch.arange(30).expand(4, -1) < torch.tensor([[30], [11], [23], [30]])
    tokens = torch.distributions.Categorical(logits=student).sample()
    return student, teacher, {"mask": mask, "tokens": tokens}


def test_an_overlap_is_that_of_the_positions_that_the_loss_selects(batch):
    student, teacher, rows = batch
    _, stats = score_positions(student, teacher, selector="dial", **rows)
    matrix = torch.tensor(overlap.overlaps(stats, 0.2))
    assert torch.equal(matrix, matrix.T)
    assert matrix.diagonal().eq(1).all()
    for pair in (("entropy", "tip"), ("teachability", "dial")):
        selected = [selective_opd_loss(student, teacher, selector=name, fraction=0.2, **rows).selected for name in pair]
        first, second = (set(map(tuple, x.nonzero().tolist())) for x in selected)
        expected = len(first & second) / len(first | second)
        assert matrix[tuple(map(overlap.SHOWN.index, pair))].item() == pytest.approx(expected)


def test_the_program_writes_a_matrix_for_each_fraction(batch, tmp_path, monkeypatch, capsys):
    student, teacher, rows = batch
    stats = score_positions(student, teacher, selector="dial", **rows)[1]
    monkeypatch.setattr(overlap, "real_statistics", lambda *_: stats)
    overlap.main(["--out", str(tmp_path)])
    result = json.loads((tmp_path / "overlap.json").read_text())
    assert result["positions"] == 94
    assert result["overlaps"] == {"0.05": overlap.overlaps(stats, 0.05), "0.2": overlap.overlaps(stats, 0.2)}
    assert "20% of 94 tokens" in capsys.readouterr().out
