"""Selection over several processes, against one process that holds all their positions.

  Compared: selected sets and normalised scores exactly; the number of collectives and their bytes with what
  docs/guides/several-gpus.md states. Ranks hold unequal parts, some of them none.
  Drawn statistics: 20 batches in `full`, 1,000 with OPD_BATCHES=1000.
  Run: make test ARGS=tests/selection/test_budget_over_ranks.py

A function that `ranks.run` calls makes the whole data on every rank, from a seed, and compares its own part.
Not here: the search itself (distributed/test_order_statistics.py), one process (test_budget.py, test_selectors.py), losses
(loss/test_loss_over_ranks.py).
"""

import math
import os

import pytest
import torch
import torch.distributed as dist

from opd_ops import (
    TokenStats,
    select_positions,
    selective_opd_loss,
)
from opd_ops.distributed.ranks import Ranks
from opd_ops.selection.normalisers import minmax_norm, over_ranks, quantile_norm, rank_norm, released_norm
from opd_ops.selection.selectors import SELECTORS
from tests.support.cases import generator, logit_pair
from tests.support.ranks import SIZE, own_pair
from tests.support.selecting_ranks import assert_sent, collectives, parts, unequal

FRACTIONS = (0.05, 0.1, 0.3, 1 / 3, 1.0)
DETERMINISTIC = sorted(set(SELECTORS) - {"random", "multinomial"})


def some_scores(shape, seed):
    """Distinct ones, ties by rounding to bf16, few values, all equal; a NaN, an infinity."""
    g = generator(seed)
    scores = torch.rand(shape, generator=g)
    kind = seed % 5
    if kind == 1:
        scores = scores.bfloat16().float()
    elif kind == 2:
        scores = (4 * scores).round() - 2
    elif kind == 3:
        scores = torch.zeros(shape)
    elif kind == 4:
        scores = scores.double() * 1e-9
    wild = torch.rand(shape, generator=g)
    scores = torch.where(wild < 0.1, -math.inf, torch.where(wild < 0.15, math.nan, torch.where(wild < 0.17, math.inf, scores)))
    return scores, torch.rand(shape, generator=g) > 0.25


# --- positions -------------------------------------------------------------------------------------------------------


def one_budget(seeds):
    for seed in seeds:
        group = None if seed % 2 else own_pair()
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        sizes = unequal(seed, size)
        scores, mask = some_scores((sum(sizes),), seed)
        mine, options = parts(sizes, rank), {"fraction": FRACTIONS[seed % 3]}
        with collectives() as sent:
            got = select_positions(scores[mine], mask=mask[mine], scope="global", selection_group=group, **options)
        assert_sent(sent, (scores.dtype, 1, 1), gathered=[8])
        assert torch.equal(got, select_positions(scores, mask=mask, **options)[mine]), seed
        places = torch.randint(0, 9, scores.shape, generator=generator(seed))
        with collectives() as sent:
            got = select_positions(
                scores[mine], mask=mask[mine], places=places[mine], scope="global", selection_group=group, **options
            )
        assert_sent(sent, (scores.dtype, 1, 1), (torch.float32, 1, 1), gathered=[8])
        assert torch.equal(got, select_positions(scores, mask=mask, places=places, **options)[mine]), seed
        ends = {"count": 1 + seed % 6, "both_ends": True}
        with collectives() as sent:
            got = select_positions(scores[mine], mask=mask[mine], scope="global", selection_group=group, **ends)
        assert_sent(sent, *[(scores.dtype, 1, 1)] * 2, gathered=[8, 8])
        assert torch.equal(got, select_positions(scores, mask=mask, **ends)[mine]), seed
        with collectives() as sent:
            got = select_positions(scores[mine], threshold=0.25, scope="global", selection_group=group)
        assert not sent
        assert torch.equal(got, select_positions(scores[mine], threshold=0.25))
    return len(seeds)


def test_one_budget_over_all_ranks_selects_what_one_process_does(ranks):
    assert ranks.run(one_budget, range(12)) == [12] * SIZE


def packed(lengths, seed):
    """Scores of sequences whose parts have these (n_sequences, size) lengths, and where each rank's positions are, in order."""
    scores, mask = some_scores((int(lengths.sum()),), seed)
    owner = torch.arange(lengths.shape[1]).repeat(len(lengths)).repeat_interleave(lengths.flatten())
    return scores, mask, owner


def edges(lengths):
    return torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))


def budgets_of_sequences(seeds):
    for seed in seeds:
        group = dist.group.WORLD if seed % 2 else own_pair()
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        n = (1, 3, 30)[seed % 3]
        lengths = torch.randint(0, 12, (n, size), generator=generator(seed))
        if seed % 4 < 2:  # rows: of one length on a rank
            lengths = lengths[:1].expand(n, size).contiguous()
        lengths = lengths * (torch.arange(size) != seed % 5)
        scores, mask, owner = packed(lengths, seed)
        mine, own = owner == rank, lengths[:, rank]
        whole = {"scope": "sequence", "cu_seqlens": edges(lengths.sum(1))}
        if seed % 4 < 2:
            view = (n, int(own[0]))
            part = {"scope": "sequence", "selection_group": group}
        else:
            view = (int(own.sum()),)
            part = {"scope": "sequence", "selection_group": group, "cu_seqlens": edges(own)}
        options = {"fraction": FRACTIONS[seed % 5], "keep_one_per_sequence": seed % 7 == 0}
        with collectives() as sent:
            got = select_positions(scores[mine].view(view), mask=mask[mine].view(view), **part, **options)
        assert_sent(sent, (scores.dtype, n, 1), gathered=[8, 8 * n])
        assert torch.equal(got.flatten(), select_positions(scores, mask=mask, **whole, **options)[mine]), seed
        options = {"threshold": 0.9, "keep_one_per_sequence": True}
        with collectives() as sent:
            got = select_positions(scores[mine].view(view), mask=mask[mine].view(view), **part, **options)
        assert_sent(sent, (scores.dtype, n, 1), gathered=[8, 8 * n], summed=[8 * n])
        assert torch.equal(got.flatten(), select_positions(scores, mask=mask, **whole, **options)[mine]), seed
        others = {
            "keep_scores": (3 * torch.rand(scores.shape, generator=generator(seed))).round(),
            "places": torch.randint(0, 4, scores.shape, generator=generator(seed)),
        }
        own = {name: x[mine].view(view) for name, x in others.items()}
        with collectives() as sent:
            got = select_positions(scores[mine].view(view), mask=mask[mine].view(view), **part, **options, **own)
        assert_sent(sent, (scores.dtype, n, 1), (torch.float32, n, 1), gathered=[8, 8 * n], summed=[8 * n])
        want = select_positions(scores, mask=mask, **whole, **options, **others)[mine]
        assert torch.equal(got.flatten(), want), seed
    return len(seeds)


def test_sequences_over_ranks_have_one_budget_each(ranks):
    assert ranks.run(budgets_of_sequences, range(12)) == [12] * SIZE


def test_one_process_is_a_group_of_its_own():
    scores, mask = some_scores((3, 20), 1)
    got = select_positions(scores, mask=mask, scope="global")
    assert torch.equal(got, select_positions(scores, mask=mask))
    student, teacher = logit_pair(9, 31)
    out = selective_opd_loss(student, teacher, scope="global", fraction=0.4)
    assert torch.equal(out.loss, selective_opd_loss(student, teacher, fraction=0.4).loss)


# --- scores ----------------------------------------------------------------------------------------------------------


def columns_of(n, seed, dtype=torch.float32):
    """Statistics with ties, infinities and NaN, which no model would make but a normaliser must bear."""
    g = generator(seed)
    names = [name for name in TokenStats._fields if name not in ("valid", "response_place")]
    got = {name: torch.rand(n, generator=g, dtype=torch.float64).pow(1 + 3 * (seed % 3)).to(dtype) for name in names}
    if seed % 2:
        got = {name: x.bfloat16().to(dtype) for name, x in got.items()}
        for name in ("reverse_kl", "forward_kl", "union_kl", "student_entropy"):
            got[name] = torch.where(
                torch.rand(n, generator=g) < 0.1, torch.tensor([math.inf, math.nan])[seed // 2 % 2], got[name]
            )
    place = torch.randint(0, 9, (n,), generator=generator(seed))
    return TokenStats(valid=torch.rand(n, generator=g) > (2.0 if seed % 7 == 0 else 0.2), response_place=place, **got)


def normalised(seeds):
    world = Ranks.world()
    n_columns = {  # one search each
        "teachability": 2,
        "teachability+entropy": 3,
        "teachability-released": 2,
        "teachability+entropy-released": 2,
        "tip-released": 2,
        "entropy-released": 1,
        "incompatibility": 2,
        "compatibility": 1,
        "tip": 2,
        "overconfident": 1,
    }
    for seed in seeds:
        dtype = (torch.float32, torch.float64)[seed % 4 == 3]
        sizes = unequal(seed, SIZE)
        stats = columns_of(sum(sizes), seed, dtype)
        mine = torch.arange(sum(sizes))[parts(sizes, world.rank)]
        for name in DETERMINISTIC:
            if name == "prefix":
                continue
            with over_ranks(world), collectives() as sent:
                got = SELECTORS[name](stats.take(mine))
            assert_sent(sent, *[(dtype, 1, 4)] * n_columns.get(name, 0))
            want = SELECTORS[name](stats)[mine]
            assert torch.equal(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0)), (seed, name)
        with over_ranks(world), collectives() as sent:
            got = rank_norm(stats.take(mine).ier, stats.take(mine).valid)
        assert_sent(sent, gathered=[8, 8 * max(sizes)] if max(sizes) else [8])
        assert torch.equal(got, rank_norm(stats.ier, stats.valid)[mine])
        released = SELECTORS["teachability-released"]
        with over_ranks(world), collectives() as sent:
            got = released.keep_scores(stats.take(mine))
        assert_sent(sent, *[(dtype, 1, 4)] * 2)
        assert torch.equal(got, released.keep_scores(stats)[mine]), seed
        for dtype in (torch.bfloat16, torch.float16):  # a column of a user's own
            z, valid = stats.support_mass.to(dtype), stats.valid
            for norm in (quantile_norm, released_norm, minmax_norm):
                with over_ranks(world):
                    got = norm(z[mine], valid[mine])
                assert torch.equal(got.nan_to_num(nan=7.0), norm(z, valid)[mine].nan_to_num(nan=7.0))
    return len(seeds)


def test_normalisers_over_ranks_equal_those_of_the_concatenated_batch(ranks):
    assert ranks.run(normalised, range(4)) == [4] * SIZE


def drawn(seeds):
    """Drawn statistics, scored and selected by ranks, and by one process: one budget, and one for each sequence."""
    world = Ranks.world()
    for seed in seeds:
        selector = SELECTORS[[name for name in DETERMINISTIC if name != "prefix"][seed % (len(DETERMINISTIC) - 1)]]
        lengths = torch.randint(0, 12, (1 + seed % 20, SIZE), generator=generator(seed)) * (torch.arange(SIZE) != seed % 5)
        stats = columns_of(int(lengths.sum()), seed)
        budget = {"fraction": FRACTIONS[seed % 5]} if seed % 3 else {"count": 1 + seed % 9}
        owner = torch.arange(SIZE).repeat(len(lengths)).repeat_interleave(lengths.flatten())
        in_rank_order, mine = owner.sort().values == world.rank, owner == world.rank
        for here, whole, part in (
            (in_rank_order, {}, {"scope": "global"}),
            (
                mine,
                {"scope": "sequence", "cu_seqlens": edges(lengths.sum(1))},
                {"scope": "sequence", "cu_seqlens": edges(lengths[:, world.rank]), "selection_group": dist.group.WORLD},
            ),
        ):
            with over_ranks(world):
                scores = selector(stats.take(here.nonzero().squeeze(1)))
            want = selector(stats)
            assert torch.equal(scores.nan_to_num(nan=7.0), want[here].nan_to_num(nan=7.0)), seed
            got = select_positions(scores, mask=stats.valid[here], **part, **budget)
            assert torch.equal(got, select_positions(want, mask=stats.valid, **whole, **budget)[here]), seed
    return len(seeds)


@pytest.mark.full
@pytest.mark.parametrize("first", range(0, int(os.environ.get("OPD_BATCHES", "20")), 20))
def test_drawn_statistics_over_ranks_select_what_one_process_does(ranks, first):
    assert ranks.run(drawn, range(first, first + 20)) == [20] * SIZE


def test_normalisers_look_at_other_ranks_only_where_told(ranks):
    assert ranks.run(told) == [True] * SIZE


def told():
    stats = columns_of(30 + dist.get_rank(), dist.get_rank())
    with pytest.raises(ZeroDivisionError), over_ranks(Ranks.world()):
        raise ZeroDivisionError
    with collectives() as sent:
        quantile_norm(stats.union_kl, stats.valid)
    return not sent
