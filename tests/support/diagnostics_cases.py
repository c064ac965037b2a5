"""Frozen contexts for the tests of the diagnostics: a student, a teacher, and a student that moved part of the way to it.

  after = before + step * (teacher - before) + noise, in logits; answers of different lengths; every prompt answered twice.

Not here: what is computed from them (diagnostics/test_diagnostics.py), the page (diagnostics/test_report.py).
"""

from __future__ import annotations

import torch

from opd_ops import score_positions
from opd_ops.diagnostics import Contexts
from opd_ops.selection.selectors import Released
from tests.support.cases import generator, logit_pair

VOCAB = 97
WORDS = (" the", " of", "<b>", " a&b", "line\nbreak", '"q"', " sky", "</script>")


def frozen_contexts(b: int = 12, length: int = 20, *, trained: bool = True, seed: int = 0) -> Contexts:
    student, teacher = (
        x.view(b, length, VOCAB) for x in logit_pair(b * length, VOCAB, scale=3.0, seed=seed, dtype=torch.float64)
    )
    g = generator(seed + 1)
    lengths = torch.randint(length // 2, length + 1, (b, 1), generator=g)
    mask = torch.arange(length) < lengths
    _, before = score_positions(student, teacher, mask=mask, selector=Released())
    after = None
    if trained:
        noise = torch.randn(student.shape, generator=g, dtype=torch.float64)
        moved = student + 0.3 * (teacher - student) + 0.2 * noise
        after = score_positions(moved, teacher, mask=mask)[1].forward_kl
    tokens = [[WORDS[(3 * row + i * i) % len(WORDS)] for i in range(n)] for row, n in enumerate(lengths.flatten().tolist())]
    return Contexts(before, after, tokens, [f"question <{row // 2}>" for row in range(b)])
