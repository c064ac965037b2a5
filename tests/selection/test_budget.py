"""Budgets, scopes and ties of `select_positions`, against counts made with exact fractions; what "teachability-released"
selects, against support/released_oracle.py.

  Compared: how many and which positions are kept. Run: make test ARGS=tests/selection/test_budget.py

Not here: the scores (tests/selection/test_selectors.py), the loss (tests/loss/test_loss.py).
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from opd_ops import LogRatio, Settings, select_positions, selective_opd_loss
from opd_ops.selection.budget import Budget
from opd_ops.selection.selectors import SELECTORS, selection_options
from tests.support import released_oracle
from tests.support.cases import generator, logit_pair


@pytest.mark.parametrize(
    ("numerator", "denominator"),
    [(1, 10), (1, 20), (3, 10), (7, 100), (1, 3), (2, 3), (29, 1000), (1, 2000), (1, 10**9), (1, 1)],
)
def test_budget_is_the_exact_ceiling(numerator, denominator):
    n = torch.arange(0, 3000)
    want = [max(1, math.ceil(Fraction(numerator, denominator) * int(k))) if k else 0 for k in n]
    assert Budget(numerator / denominator).of(n).tolist() == want


def test_twice_a_budget_selects_twice_as_many_up_to_all():
    n = torch.tensor(99)
    for settings, twice in ((Settings(count=3), 6), (Settings(fraction=0.1), 20), (Settings(fraction=0.6), 99)):
        assert settings.budget.times(2).of(n) == twice


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_a_count_is_the_budget_of_each_scope_or_all_of_a_smaller_one(scope):
    scores = torch.rand(4, 9, generator=generator(1))
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[1, 2:], mask[2] = False, False
    selected = select_positions(scores, mask=mask, count=3, scope=scope)
    assert selected.sum(1).tolist() == [3, 2, 0, 3] if scope == "sequence" else selected.sum() == 3
    assert torch.equal(selected, select_positions(scores, mask=mask, count=3, fraction=0.9, scope=scope))
    assert torch.equal(select_positions(scores, mask=mask, count=99), mask)


def test_both_ends_are_the_highest_and_then_the_lowest_of_the_others():
    scores = torch.tensor([[0.1, 0.9, 0.5, -2.0, 0.9, -math.inf, 0.3]])
    for n, want in enumerate(([1], [1, 3], [1, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 6]), 1):
        got = select_positions(scores, count=n, both_ends=True, scope="sequence")
        assert got[0].nonzero().squeeze(1).tolist() == want, n
    assert select_positions(torch.zeros(5), count=4, both_ends=True).tolist() == [True] * 4 + [False]


def test_a_count_beside_a_threshold_and_a_threshold_for_both_ends_are_refused():
    with pytest.raises(ValueError, match=r"threshold: got 0\.1 and count 3, expected one of them"):
        Settings(count=3, threshold=0.1)
    with pytest.raises(ValueError, match="threshold: the selector takes both ends"):
        Settings(selector=LogRatio("both"), threshold=0.1)
    with pytest.raises(ValueError, match="count: got 0"):
        Settings(count=0)
    with pytest.raises(ValueError, match="threshold: got one with both_ends"):
        select_positions(torch.rand(4), threshold=0.1, both_ends=True)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_a_count_selects_the_same_by_kernels(scope):
    student, teacher = (x.view(2, 5, 67) for x in logit_pair(10, 67))
    options = {"selector": "entropy", "count": 2, "scope": scope, "denominator": "valid"}
    want, got = (selective_opd_loss(student, teacher, backend=backend, **options) for backend in ("torch", "triton"))
    assert torch.equal(got.selected, want.selected)
    assert got.metrics["n_selected"] == (2 if scope == "batch" else 4)


def test_minmaxtok_takes_one_token_of_each_end_of_each_response():
    student, teacher = (x.view(3, 8, 67) for x in logit_pair(24, 67))
    y = torch.randint(0, 67, (3, 8), generator=generator(1))
    options = {"tokens": y, "count": 2, "scope": "sequence", "denominator": "valid", "divergence": "sampled"}
    for backend in ("torch", "triton"):
        out = selective_opd_loss(student, teacher, selector=LogRatio("both"), backend=backend, **options)
        a = out.stats.teacher_logprob - out.stats.student_logprob
        ends = torch.stack((a.argmax(1), a.argmin(1)), 1).sort(1).values
        assert torch.equal(out.selected.nonzero()[:, 1].view(3, 2), ends)


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
    mask, valid = torch.tensor([1, 0, 1, -1, 0]).to(mask_dtype), torch.tensor([True, False, True, True, False])
    assert torch.equal(select_positions(torch.zeros(5), mask=mask, fraction=1.0), valid)
    assert torch.equal(selective_opd_loss(*logit_pair(5, 31), mask=mask, fraction=1.0).selected, valid)


def test_keep_one_per_sequence_adds_the_best_of_those_left_out():
    scores = torch.tensor([[9.0, 8.0, 7.0], [1.0, 3.0, 2.0], [5.0, 6.0, 4.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 0]])
    plain = select_positions(scores, mask=mask, fraction=0.3)
    assert plain.tolist() == [[True, True, False], [False] * 3, [False] * 3]
    added = select_positions(scores, mask=mask, fraction=0.3, keep_one_per_sequence=True)
    assert added.tolist() == [[True, True, False], [False, True, False], [False] * 3]


def test_keep_scores_say_what_is_best_of_those_left_out():
    scores = torch.tensor([[9.0, 8.0, 7.0], [1.0, 3.0, -math.inf], [5.0, 6.0, math.nan]])
    keep_scores = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 9.0], [4.0, 3.0, 9.0]])
    got = select_positions(scores, fraction=0.2, keep_one_per_sequence=True, keep_scores=keep_scores)
    assert got.tolist() == [[True, True, False], [True, False, False], [True, False, False]]
    got = select_positions(scores, threshold=6.5, keep_one_per_sequence=True, keep_scores=-keep_scores)
    assert got.tolist() == [[True] * 3, [False, True, False], [False, True, False]]


def test_places_give_ties_to_the_smaller_one_across_sequences():
    scores = torch.tensor([[0.0, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]])
    places = torch.tensor([[1, 2, 3, 4], [0, 1, 2, 3], [1, 2, 3, 4]])

    def kept(n, **options):
        return select_positions(scores, fraction=n / 12, places=places, **options).nonzero().tolist()

    assert kept(1) == [[1, 0]]
    assert kept(2) == [[1, 0], [1, 1]]
    assert kept(3) == [[1, 0], [1, 1], [2, 0]]
    assert kept(5) == [[0, 1], [1, 0], [1, 1], [1, 2], [2, 0]]
    assert kept(6) == [[0, 1], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1]]
    descending = torch.arange(12, 0, -1).view(3, 4)
    assert select_positions(scores, fraction=0.25, scope="sequence", places=descending).nonzero().tolist() == [
        [0, 3],
        [1, 0],
        [2, 3],
    ]
    got = select_positions(scores, threshold=2, places=descending, keep_one_per_sequence=True)
    assert got.nonzero().tolist() == [[0, 3], [1, 0], [2, 3]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep_scores": torch.zeros(2, 3)}, ValueError, "keep_scores: got scores, but keep_one_per_sequence=False"),
        ({"keep_scores": torch.zeros(6), "keep_one_per_sequence": True}, ValueError, r"keep_scores: got shape \(6,\)"),
        ({"places": torch.zeros(2, 3)}, TypeError, "places: got dtype torch.float32, expected int64"),
        ({"places": torch.zeros(3, 2, dtype=torch.long)}, ValueError, r"places: got shape \(3, 2\)"),
    ],
)
def test_select_positions_rejects_what_does_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        select_positions(torch.zeros(2, 3), **options)


RELEASED = "teachability-released"


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_teachability_released_selects_what_the_released_code_does(backend):
    """All of it: fit, budget, ties across responses, the one of a response that kept none."""
    differ = {"fit": 0, "ties": 0, "keep": 0}
    for seed in range(25):
        student, teacher, responses, mask = released_oracle.case(seed)
        for fraction in (0.05, 0.3, 0.6):
            want = released_oracle.released(student, teacher, responses, mask, fraction=fraction, top_k=5)
            options = {"mask": mask, "fraction": fraction}
            out = selective_opd_loss(student, teacher, selector=RELEASED, top_k=5, backend=backend, **options)
            assert out.selected.tolist() == want.selected.tolist(), (seed, fraction)
            # The two halves, as a user puts them together.
            asked = selection_options(SELECTORS[RELEASED], out.stats)
            assert torch.equal(select_positions(out.scores, **options, **asked), out.selected)
            for name, without in (("ties", {"places": None}), ("keep", {"keep_scores": None})):
                differ[name] += not torch.equal(select_positions(out.scores, **options, **asked | without), out.selected)
            other = released_oracle.released(student, teacher, mask, mask, fraction=fraction, top_k=5)
            differ["fit"] += not np.array_equal(other.selected, want.selected)
    assert min(differ.values()) > 10, differ  # each of the three decides often


@pytest.mark.parametrize("kind", ["teachability+entropy", "tip", "entropy"])
def test_the_released_code_s_relatives_select_what_it_does(kind):
    for seed in range(4):
        student, teacher, responses, mask = released_oracle.case(seed)
        for fraction in (0.05, 0.4):
            want = released_oracle.released(student, teacher, responses, mask, fraction=fraction, top_k=5, kind=kind)
            options = {"mask": mask, "fraction": fraction, "top_k": 5}
            out = selective_opd_loss(student, teacher, selector=f"{kind}-released", **options)
            assert out.selected.tolist() == want.selected.tolist(), (seed, fraction)


def test_teachability_released_with_a_threshold_or_a_budget_for_each_sequence():
    for seed in range(12):
        student, teacher, responses, mask = released_oracle.case(seed)
        want = released_oracle.released(student, teacher, responses, mask, fraction=1.0, top_k=5, threshold=0.5)
        options = {"mask": mask, "selector": RELEASED, "top_k": 5}
        got = selective_opd_loss(student, teacher, threshold=0.5, **options).selected
        assert got.tolist() == want.selected.tolist()
        got = selective_opd_loss(student, teacher, scope="sequence", fraction=0.3, **options).selected
        for row in range(len(mask)):
            valid = mask[row].nonzero().flatten().tolist()
            best = sorted(valid, key=lambda i, row=row: (-want.scores[row, i], i))[: math.ceil(Fraction("0.3") * len(valid))]
            assert got[row].nonzero().flatten().tolist() == sorted(best)


def test_special_ids_stay_in_the_response_that_teachability_released_reads():
    """The first token of the response leaves the mask; the places of the others and the fit do not change."""
    differ = 0
    for seed in range(20):
        student, teacher, responses, mask = released_oracle.case(seed)
        first = responses & (responses.cumsum(1) == 1)
        tokens = torch.where(first, 7, 8)
        options = {"selector": RELEASED, "top_k": 5, "fraction": 0.3}
        want = released_oracle.released(student, teacher, responses, mask & ~first, fraction=0.3, top_k=5)
        got = selective_opd_loss(student, teacher, mask=mask, tokens=tokens, special_ids=[7], **options).selected
        assert got.tolist() == want.selected.tolist()
        differ += not torch.equal(got, selective_opd_loss(student, teacher, mask=mask & ~first, **options).selected)
    assert differ > 3


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0)])
def test_degenerate_shapes(shape):
    for scope in ("batch", "sequence"):
        selected = select_positions(torch.zeros(shape), scope=scope)
        assert selected.shape == shape
        assert selected.sum() == min(1, selected.numel())


def test_a_count_beyond_int32_selects_all():
    assert Settings(count=2**40).budget.ratio == (2**31 - 1, 0)
