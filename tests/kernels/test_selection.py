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
from opd_kernels.place import FITS, KEEPS, STATS, place_fwd
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


def drawn_optional(seed, n, selector):
    """Optional statistics by name, (n,) each: 0 to 2 of them, or those that the selector needs among others."""
    names = ("jsd", "ratio_variance")[: seed % 3]
    columns = dict(zip(names, torch.randn(len(names), n, generator=generator(seed)), strict=True))
    if selector in KEEPS:
        table = drawn_table(seed + 100, n)
        columns |= {"released_kl": table[0] - table[1], "topk_entropy": table[NAMES.index("support_mass")]}
    return {name: columns[name] for name in sorted(columns)}


def torch_path(table, optional, rows, n, selector, loss):
    """What opd_ops/call/score.py makes of a table of statistics: TokenStats, infinite positions, and one or two scores."""
    columns = {name: table[NAMES.index(name)] for name in STATS}
    valid = torch.isfinite(columns["teacher_logsumexp"]) | ~torch.isfinite(columns["student_logsumexp"])
    stats = TokenStats(valid=valid, **columns, **optional).spread(rows, torch.Size((n,)))
    infinite = stats.valid & (getattr(stats, loss) == INF) if loss else torch.zeros_like(stats.valid)
    if selector in KEEPS:
        places = torch.ones(n) if rows is None else torch.zeros(n).index_fill(0, rows, 1)
        scores = SELECTORS[selector].both_scores(stats._replace(response_place=places))
    else:
        scores = (SELECTORS[selector](stats),)
    return stats, infinite, [torch.where(stats.valid & ~infinite, x.float(), -INF) for x in scores]


def check_scores(seed, n, selector):
    """Statistics, validity and scores of a drawn batch against the torch path's; returns the kernels'."""
    table, mask, loss = drawn_table(seed, n), drawn_mask(seed, n), LOSSES[seed % 3]
    rows = None if mask is None else mask.nonzero().squeeze(1)
    table = table if rows is None else table[:, rows].contiguous()
    optional = drawn_optional(seed, table.shape[1], selector)
    wide = torch.stack((*table.unbind(), *optional.values()))
    placed = place_fwd(wide, rows, n, selector=selector, loss=loss, optional=list(optional))
    stats, infinite, scores = torch_path(table, optional, rows, n, selector, loss)
    assert torch.equal(placed.valid.bool(), stats.valid)
    assert torch.equal(placed.infinite.bool(), infinite)
    assert len(placed.scores) == len(scores)
    assert all(same(*pair) for pair in zip(placed.scores, scores, strict=True))
    for name, column in zip((*STATS, *optional), placed.stats, strict=True):
        assert same(column, getattr(stats, name)), name
    return placed


def drawn_sequences(seed, n, *, cu_seqlens):
    """Sequences as the kernel takes them, and the number of each position's."""
    if not cu_seqlens:
        return {"length": 20 + seed % 97}, torch.arange(n) // (20 + seed % 97)
    inner = torch.randint(0, n + 1, (5,), generator=generator(seed)).sort().values
    bounds = torch.cat((torch.tensor([0]), inner, torch.tensor([n]))).int()
    return {"bounds": bounds}, sequence_ids(torch.Size((n,)), bounds, bounds.device)


def check_choice(seed, placed, *, cu_seqlens=False):
    """Positions selected by one budget, by one for each sequence, and by one that leaves every sequence a position, against
    the torch path's; the first and the last by place, too."""
    n, valid, infinite = placed.scores.shape[1], placed.valid.bool(), placed.infinite
    scores, keep_scores = placed.scores[0], placed.scores[-1]
    budget = (Budget(0.05), Budget(0.1), Budget(1.0, 7), Budget(0.3), Budget(1.0))[seed % 5]
    ratio = dict(zip(("numerator", "denominator"), budget.ratio, strict=True))
    sequences, ids = drawn_sequences(seed, n, cu_seqlens=cu_seqlens)
    places = torch.arange(n) - torch.searchsorted(ids, ids)
    keeps = {"places": places, "keep_scores": keep_scores}
    for given, options, n_rows in (
        ({}, {}, budget.most(n)),
        ({"places": places}, {"places": places}, budget.most(n)),
        (sequences, {"ids": ids}, n),
        (sequences | keeps, {"keep_one_in": ids, **keeps}, min(n, budget.most(n) + 9)),
    ):
        choice = choose_fwd(scores, placed.valid, infinite, n_rows=n_rows, **given, **ratio)
        selected = select(scores, valid, budget, **{"ids": None, **options})
        assert torch.equal(choice.selected.bool(), selected)
        assert torch.equal(choice.rows, torch.sort(selected.byte(), descending=True, stable=True).indices[:n_rows])
        assert choice.counts.tolist() == [int(x.sum()) for x in (selected, valid, infinite)]


@pytest.mark.parametrize(("seed", "selector"), list(enumerate(FITS)))
def test_scores_and_selection_are_those_of_the_torch_path(seed, selector):
    placed = check_scores(seed, 100 + 17 * seed, selector)
    if seed < 4 or selector in KEEPS:
        check_choice(seed, placed, cu_seqlens=seed < 2)


@pytest.mark.full
@pytest.mark.parametrize("first", range(0, int(os.environ.get("OPD_BATCHES", "60")), 20))
def test_drawn_batches_select_as_the_torch_path(first):
    selectors = list(FITS)
    for seed in range(first, first + 20):
        n = int(torch.randint(1, 700, (), generator=generator(seed)))
        check_choice(seed, check_scores(seed, n, selectors[seed % len(selectors)]), cu_seqlens=seed % 4 < 2)


@pytest.mark.parametrize("selector", ["tip", "teachability-released"])
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
    every, masked = (
        place_fwd(table, None, 40, mask, selector="entropy", loss="forward_kl") for mask in (None, unmasked.byte())
    )
    assert same(every.stats, masked.stats)
    assert every.infinite.sum() > masked.infinite.sum() > 0
    for all_flags, flags in zip(every.flags, masked.flags, strict=True):
        assert torch.equal(flags.bool(), all_flags.bool() & unmasked)
    assert torch.equal(masked.scores, every.scores.masked_fill(~unmasked, -INF))


def test_quantiles_of_equal_and_of_close_values_are_exact():
    table = torch.ones(len(NAMES), 5)
    table[3] = torch.tensor([1.0, 2.0, 2.0, 2.0, 4.0])
    table[4] = 1 + 2.0**-23 * torch.tensor([4.0, 0.0, 1.0, 2.0, 3.0])
    got = quantiles_fwd(table, [3, 4], (0.5, 0.875))
    close = 1 + 2.0**-23 * torch.tensor([2.0, 3.5], dtype=torch.float64)
    assert torch.equal(got, torch.stack((torch.tensor([2.0, 3.0], dtype=torch.float64), close)))


def test_every_selector_that_does_not_draw_and_scores_by_columns_of_the_kernels_has_a_score_here():
    # These count along sequences, or read optional columns that no kernel computes.
    others = {"prefix", *(name for name, selector in SELECTORS.items() if needs_of(selector) and name not in KEEPS)}
    assert set(FITS) == {name for name, selector in SELECTORS.items() if is_deterministic(selector)} - others


def test_positions_beyond_the_bounds_of_sequences_belong_to_the_first_and_to_one_more():
    scores, ones = torch.arange(10.0), torch.ones(10, dtype=torch.uint8)
    bounds = torch.tensor([2, 5, 8])
    choice = choose_fwd(scores, ones, 0 * ones, numerator=1, denominator=10, n_rows=10, bounds=bounds)
    assert choice.selected.nonzero().flatten().tolist() == [4, 7, 9]
    assert dict(zip(COUNTS, choice.counts.tolist(), strict=True)) == {"selected": 3, "valid": 10, "infinite": 0}


def test_a_sequence_keeps_the_earliest_of_its_best_positions():
    scores, ones = torch.cat((torch.zeros(600), torch.ones(600))), torch.ones(1200, dtype=torch.uint8)
    scores[:5] = -INF
    options = {"numerator": 1, "denominator": 1200, "n_rows": 4, "bounds": torch.tensor([0, 600, 1200])}
    choice = choose_fwd(scores, ones, 0 * ones, keep_scores=torch.zeros(1200), **options)
    assert choice.selected.nonzero().flatten().tolist() == [5, 600]
    assert choice.rows.tolist() == [5, 600, 0, 1]
