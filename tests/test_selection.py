# Budgets, scopes and ties of `select_positions`, against counts made with exact fractions.
#
#   Compared: how many and which positions are kept. Run: make test ARGS=tests/test_selection.py
#
# Not here: the scores (tests/test_selectors.py), the loss (tests/test_loss.py).
import math
from fractions import Fraction

import pytest
import torch

from opd_ops import select_positions
from opd_ops.selection import budget
from tests.cases import generator


@pytest.mark.parametrize(
    ("numerator", "denominator"), [(1, 10), (1, 20), (3, 10), (7, 100), (1, 3), (2, 3), (29, 1000), (1, 1)]
)
def test_budget_is_the_exact_ceiling(numerator, denominator):
    n = torch.arange(0, 3000)
    want = [max(1, math.ceil(Fraction(numerator, denominator) * int(k))) if k else 0 for k in n]
    assert budget(n, numerator / denominator).tolist() == want


def test_budget_of_a_tenth_of_thirty_is_three():
    assert math.ceil(0.1 * 30 + 1e-15) == 4  # what floating point can make of it
    assert select_positions(torch.rand(30, generator=generator(0)), fraction=0.1).sum() == 3


def test_batch_scope_keeps_the_best_of_all():
    scores = torch.rand(4, 25, generator=generator(1))
    selected = select_positions(scores, fraction=0.07)
    assert selected.sum() == 7
    assert scores[selected].min() > scores[~selected].max()


def test_sequence_scope_keeps_the_best_of_each_row():
    scores = torch.rand(5, 21, generator=generator(2))
    mask = torch.zeros(5, 21)
    for row, length in enumerate((21, 10, 1, 0, 11)):
        mask[row, 21 - length :] = 2.5
    selected = select_positions(scores, mask=mask, fraction=0.1, scope="sequence")
    assert selected.sum(1).tolist() == [3, 1, 1, 0, 2]
    for row in range(5):
        kept, valid = scores[row][selected[row]], scores[row][mask[row] != 0]
        assert torch.equal(kept.sort().values, valid.sort().values[len(valid) - len(kept) :])


def test_sequence_scope_of_packed_rows_equals_that_of_padded_ones():
    lengths = [7, 0, 12, 1, 5]
    scores = torch.rand(25, generator=generator(3))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    selected = select_positions(scores, fraction=0.3, scope="sequence", cu_seqlens=cu_seqlens)
    want = [select_positions(part, fraction=0.3) for part in scores.split(lengths) if len(part)]
    assert torch.equal(selected, torch.cat(want))


def test_more_spans_than_positions():
    selected = select_positions(torch.rand(2), scope="sequence", cu_seqlens=torch.tensor([0, 0, 0, 1, 1, 1, 2]))
    assert selected.tolist() == [True, True]


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_ties_go_to_the_earlier_position(scope):
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0, 2.0, 1.0, 1.0]])
    selected = select_positions(scores, fraction=3 / 8, scope=scope)
    assert selected.nonzero()[:, 1].tolist() == [1, 2, 3]


def test_equal_scores_of_a_large_batch_keep_the_first():
    selected = select_positions(torch.zeros(70, 100), fraction=0.01)
    assert selected.flatten().nonzero().flatten().tolist() == list(range(70))


def test_scores_of_minus_infinity_and_nan_are_never_kept():
    scores = torch.tensor([-math.inf, 3.0, math.nan, -math.inf, 1.0])
    assert select_positions(scores, fraction=1.0).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.uint8])
def test_mask_of_any_dtype(mask_dtype):
    mask = torch.tensor([1, 0, 1, 1, 0], dtype=mask_dtype)
    assert torch.equal(select_positions(torch.zeros(5), mask=mask, fraction=1.0), mask != 0)


def test_keep_one_per_sequence_adds_the_best_of_those_left_out():
    scores = torch.tensor([[9.0, 8.0, 7.0], [1.0, 3.0, 2.0], [5.0, 6.0, 4.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 0]])
    plain = select_positions(scores, mask=mask, fraction=0.3)
    assert plain.tolist() == [[True, True, False], [False] * 3, [False] * 3]
    added = select_positions(scores, mask=mask, fraction=0.3, keep_one_per_sequence=True)
    assert added.tolist() == [[True, True, False], [False, True, False], [False] * 3]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0)])
def test_degenerate_shapes(shape):
    for scope in ("batch", "sequence"):
        selected = select_positions(torch.zeros(shape), scope=scope)
        assert selected.shape == shape
        assert selected.sum() == min(1, selected.numel())
