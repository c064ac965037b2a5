"""Selection by kernels (quantiles.py, place.py, choose.py) against the plain torch path of opd_ops/selection: statistics,
scores and selected positions, to the bit.

  Drawn batches have ties, constants, masks, infinities and NaN; one is drawn for each selector here, 60 in `full`,
  1,000 with OPD_BATCHES=1000.
  Run: make test ARGS=tests/kernels/test_selection.py
Not here: the torch path itself (tests/selection), calls of the loss (tests/backends/triton/test_selection.py).
"""

import os

import pytest
import torch
from opd_kernels import launch_table
from opd_kernels.choose import COUNTS, choose_fwd
from opd_kernels.place import FITS, STATS, place_fwd
from opd_kernels.quantiles import quantiles_fwd
from opd_kernels.score import COLUMNS
from opd_kernels.support import SUPPORT_COLUMNS

from opd_ops.inputs.sequences import sequence_ids
from opd_ops.selection.budget import Budget, select
from opd_ops.selection.selectors import SELECTORS, is_deterministic, needs_of
from opd_ops.selection.stats import TokenStats
from tests.support.cases import generator
from tests.support.kernel_oracle import same

INF, NAN = float("inf"), float("nan")
NAMES = COLUMNS + SUPPORT_COLUMNS
LOSSES = (None, "reverse_kl", "forward_kl")


def drawn_table(seed, n):
    """(16, n) statistics with the order of a launch's: skewed, some equal, infinite, NaN or 0; seldom all equal."""
    g = generator(seed)
    table = (1.5 * torch.randn(len(NAMES), n, generator=g)).exp()
    mass = slice(NAMES.index("support_mass"), NAMES.index("union_kl"))
    table[mass] = torch.rand(table[mass].shape, generator=g)
    if seed % 3 == 0:
        table = (2 * table).round() / 2
    if seed % 11 == 0:
        table[:] = table[:, :1]
    for share, value in ((0.03, INF), (0.03, NAN), (0.05, 0.0)):
        table = torch.where(torch.rand(table.shape, generator=g) < share, value, table)
    return table


def drawn_mask(seed, n):
    return None if seed % 2 else torch.rand(n, generator=generator(seed + 1)) < 0.7


def torch_path(table, rows, n, selector, loss):
    """What opd_ops/call/score.py makes of a table of statistics: TokenStats and scores."""
    columns = {name: table[NAMES.index(name)] for name in STATS}
    valid = torch.isfinite(columns["teacher_logsumexp"]) | ~torch.isfinite(columns["student_logsumexp"])
    stats = TokenStats(valid=valid, **columns).spread(rows, torch.Size((n,)))
    infinite = stats.valid & (getattr(stats, loss) == INF) if loss else torch.zeros_like(stats.valid)
    scores = SELECTORS[selector](stats).float()
    return stats, infinite, torch.where(stats.valid & ~infinite, scores, -INF)


def check_scores(seed, n, selector):
    """Statistics, validity and scores of a drawn batch against the torch path's; returns the kernels'."""
    table, mask, loss = drawn_table(seed, n), drawn_mask(seed, n), LOSSES[seed % 3]
    rows = None if mask is None else mask.nonzero().squeeze(1)
    table = table if rows is None else table[:, rows].contiguous()
    optional = torch.randn(seed % 3, table.shape[1], generator=generator(seed))
    placed = place_fwd(torch.cat((table, optional)), rows, n, selector=selector, loss=loss)
    stats, infinite, scores = torch_path(table, rows, n, selector, loss)
    optional = optional if rows is None else torch.zeros(len(optional), n).index_copy(1, rows, optional)
    assert torch.equal(placed.stats[len(STATS) :], optional.masked_fill(~stats.valid, 0))
    assert torch.equal(placed.valid.bool(), stats.valid)
    assert torch.equal(placed.infinite.bool(), infinite)
    assert same(placed.scores, scores)
    for name, column in zip(STATS, placed.stats, strict=False):
        assert same(column, getattr(stats, name)), name
    return placed


def check_choice(seed, placed, *, cu_seqlens=False):
    """Positions selected by one budget, and by one for each sequence, against the torch path's."""
    n, scores, valid, infinite = len(placed.scores), placed.scores, placed.valid.bool(), placed.infinite
    budget = (Budget(0.05), Budget(0.1), Budget(1.0, 7), Budget(0.3), Budget(1.0))[seed % 5]
    ratio = dict(zip(("numerator", "denominator"), budget.ratio, strict=True))
    given = placed.scores, placed.valid, infinite
    n_rows = budget.most(n)
    choice = choose_fwd(*given, n_rows=n_rows, **ratio)
    selected = select(scores, valid, budget, None)
    assert torch.equal(choice.selected.bool(), selected)
    assert torch.equal(choice.rows, torch.sort(selected.byte(), descending=True, stable=True).indices[:n_rows])
    assert choice.counts.tolist() == [int(x.sum()) for x in (selected, valid, infinite)]

    if cu_seqlens:
        inner = torch.randint(0, n + 1, (5,), generator=generator(seed)).sort().values
        bounds = torch.cat((torch.tensor([0]), inner, torch.tensor([n]))).int()
        lengths, ids = {"bounds": bounds}, sequence_ids(torch.Size((n,)), bounds, bounds.device)
    else:
        lengths, ids = {"length": 20 + seed % 97}, torch.arange(n) // (20 + seed % 97)
    choice = choose_fwd(*given, n_rows=n, **lengths, **ratio)
    selected = select(scores, valid, budget, ids)
    assert torch.equal(choice.selected.bool(), selected)
    assert torch.equal(choice.rows[: int(selected.sum())], selected.nonzero().squeeze(1))
    assert choice.counts.tolist() == [int(x.sum()) for x in (selected, valid, infinite)]


@pytest.mark.parametrize(("seed", "selector"), list(enumerate(FITS)))
def test_scores_and_selection_are_those_of_the_torch_path(seed, selector):
    placed = check_scores(seed, 100 + 17 * seed, selector)
    if seed < 4:
        check_choice(seed, placed, cu_seqlens=seed < 2)


@pytest.mark.full
@pytest.mark.parametrize("first", range(0, int(os.environ.get("OPD_BATCHES", "60")), 20))
def test_drawn_batches_select_as_the_torch_path(first):
    selectors = list(FITS)
    for seed in range(first, first + 20):
        n = int(torch.randint(1, 700, (), generator=generator(seed)))
        check_choice(seed, check_scores(seed, n, selectors[seed % len(selectors)]), cu_seqlens=seed % 4 < 2)


@pytest.mark.parametrize("selector", ["tip", "teachability"])
def test_more_positions_than_a_program_holds(selector, monkeypatch):
    """Keys are then kept in memory, and read a block at a time."""
    monkeypatch.setattr(launch_table, "selection", lambda n: launch_table.Tile({"BLOCK": 128}, num_warps=4))
    check_choice(3, check_scores(3, 300, selector), cu_seqlens=selector == "tip")


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_positions(n):
    check_choice(4, check_scores(4, n, "teachability"))


def test_masked_positions_have_statistics_but_are_not_valid():
    table, unmasked = drawn_table(6, 40), torch.arange(40) % 3 != 0
    table[NAMES.index("forward_kl"), ::2] = INF
    every, some = (place_fwd(table, None, 40, mask, selector="entropy", loss="forward_kl") for mask in (None, unmasked.byte()))
    assert same(every.stats, some.stats)
    assert every.infinite.sum() > some.infinite.sum() > 0
    for all_flags, flags in zip(every.flags, some.flags, strict=True):
        assert torch.equal(flags.bool(), all_flags.bool() & unmasked)
    assert torch.equal(some.scores, every.scores.masked_fill(~unmasked, -INF))


def test_quantiles_of_equal_and_of_close_values_are_exact():
    table = torch.ones(len(NAMES), 5)
    table[3] = torch.tensor([1.0, 2.0, 2.0, 2.0, 4.0])
    table[4] = 1 + 2.0**-23 * torch.tensor([4.0, 0.0, 1.0, 2.0, 3.0])
    got = quantiles_fwd(table, [3, 4], (0.5, 0.875))
    close = 1 + 2.0**-23 * torch.tensor([2.0, 3.5], dtype=torch.float64)
    assert torch.equal(got, torch.stack((torch.tensor([2.0, 3.0], dtype=torch.float64), close)))


def test_every_selector_that_does_not_draw_and_scores_by_columns_of_the_kernels_has_a_score_here():
    # These count along sequences, or read optional columns.
    others = {"prefix", *(name for name, selector in SELECTORS.items() if needs_of(selector))}
    assert set(FITS) == {name for name, selector in SELECTORS.items() if is_deterministic(selector)} - others


def test_positions_beyond_the_bounds_of_sequences_belong_to_the_first_and_to_one_more():
    scores, ones = torch.arange(10.0), torch.ones(10, dtype=torch.uint8)
    bounds = torch.tensor([2, 5, 8])
    choice = choose_fwd(scores, ones, 0 * ones, numerator=1, denominator=10, n_rows=10, bounds=bounds)
    assert choice.selected.nonzero().flatten().tolist() == [4, 7, 9]
    assert dict(zip(COUNTS, choice.counts.tolist(), strict=True)) == {"selected": 3, "valid": 10, "infinite": 0}
