"""Sums and counts of a call by one kernel against torch, in fp64; positions with an infinite loss are dropped.

  Compared: counts exactly, sums to 1e-6. Run: make test ARGS=tests/kernels/test_totals.py
Not here: calls of the loss (tests/backends/triton/test_selection.py).
"""

import pytest
import torch
from opd_kernels.place import STATS
from opd_kernels.totals import COUNTS, NUMBERS, totals_fwd

from tests.support.cases import generator

INF = float("inf")


def drawn(n, n_rows, *, seed=0):
    """Arguments of `totals_fwd`; the first two losses are infinite."""
    g = generator(seed)
    stats = torch.randn(len(STATS), n, generator=g).exp()
    valid = torch.rand(n, generator=g) < 0.8
    rows = valid.nonzero().squeeze(1)[:n_rows]
    stats[:, ~valid] = 0
    selected = torch.zeros(n, dtype=torch.uint8).index_fill(0, rows, 1)
    infinite = torch.zeros(n, dtype=torch.uint8)
    infinite[-2:] = valid[-2:].byte()
    losses, weights = torch.randn(2, len(rows), generator=g).exp()
    losses[:2] = INF
    scores = torch.where(valid, torch.randn(n, generator=g), -INF)
    unmasked = valid | (torch.rand(n, generator=g) < 0.5)
    return [rows, losses, weights, scores, valid.byte(), unmasked.byte(), stats, selected, infinite]


@pytest.mark.parametrize(("n", "n_rows", "given"), [(300, 40, True), (2500, 1100, False), (1, 0, True)])
def test_sums_and_counts_are_those_of_torch(n, n_rows, given):
    arguments = drawn(n, n_rows)
    rows, losses, weights, scores, valid, unmasked, stats, selected, infinite = arguments
    if not given:
        arguments[2] = arguments[5] = None
    before, n_infinite = stats.clone(), int(infinite.sum()) + min(2, len(rows))
    numbers, counts = totals_fwd(*arguments, loss="reverse_kl", by_selected=given)
    finite = losses != INF
    assert selected.nonzero().squeeze(1).tolist() == rows[finite].tolist()
    assert torch.equal(stats, before.index_copy(1, rows, stats[:, rows]))
    assert torch.equal(stats[STATS.index("reverse_kl"), rows], losses)
    n_unmasked = int(unmasked.sum()) if given else n
    n_selected, n_valid = int(finite.sum()), int(valid.sum())
    assert dict(zip(COUNTS, counts.tolist(), strict=True)) == {
        "n_selected": n_selected,
        "n_valid": n_valid,
        "n_infinite": n_infinite,
        "n_teacher_nonfinite": n_unmasked - n_valid,
    }
    want = {"loss_sum": (losses * (weights if given else 1))[finite].sum(), "scale": 1.0}
    if given and n_selected:
        want["scale"] = len(rows) / n_selected
    want["score_threshold"] = scores[rows[finite]].min() if n_selected else INF
    names = {"kl_all": "reverse_kl", "entropy": "student_entropy", "mass": "support_mass", "teacher_entropy": "teacher_entropy"}
    for name, column in names.items():
        values = stats[STATS.index(column)].double()
        want[f"{name}_sum"] = values[valid.bool()].sum()
        want[name] = want[f"{name}_sum"] / max(1, n_valid)
        selected_name = f"{name.removesuffix('_all')}_selected"
        if name != "teacher_entropy":
            want[f"{selected_name}_sum"] = values[rows[finite]].sum()
            want[selected_name] = want[f"{selected_name}_sum"] / max(1, n_selected)
    assert set(want) == set(NUMBERS)
    for name, number in zip(NUMBERS, numbers.tolist(), strict=True):
        assert number == pytest.approx(float(want[name]), rel=1e-6), name


@pytest.mark.parametrize("row", [0, 2])
def test_a_valid_position_that_blew_up_makes_the_scale_nan(row):
    arguments = drawn(50, 10)
    position = int(arguments[4].nonzero()[row])
    if row:
        arguments[3][position] = float("nan")
    else:
        arguments[6][STATS.index("student_logsumexp"), position] = INF
    numbers, _ = totals_fwd(*arguments, loss=None, by_selected=False)
    assert numbers[NUMBERS.index("scale")].isnan()
