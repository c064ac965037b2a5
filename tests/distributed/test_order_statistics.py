"""Order statistics found digit by digit, on one process and over four, against a sort of all values.

  Compared: values bitwise, how many lie below and how many are equal; the collectives made with those that `cost` states.
  Run: make test ARGS=tests/distributed/test_order_statistics.py

Not here: what they are used for (tests/selection/test_budget_over_ranks.py).
"""

import math

import pytest
import torch
import torch.distributed as dist

from opd_ops.distributed.order_statistics import cost, order_statistics, widths
from opd_ops.distributed.ranks import Ranks
from tests.support.cases import generator

SPECIAL = [math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, -1.0]


def values_of(n, dtype, seed):
    """Wide and narrow values, few and many ties, infinities and both zeros."""
    g = generator(seed)
    got = torch.randn(n, generator=g, dtype=torch.float64) * 10 ** (6 * torch.randn(n, generator=g, dtype=torch.float64))
    kind = torch.randint(0, 4, (n,), generator=g)
    got = torch.where(kind == 0, (3 * torch.rand(n, generator=g)).round().double(), got)
    special = torch.tensor(SPECIAL, dtype=torch.float64)[torch.randint(0, len(SPECIAL), (n,), generator=g)]
    got = torch.where(kind == 1, special, got).to(dtype)
    return got if seed % 3 else got.bfloat16().to(dtype)


def expected(values, among, groups, n_groups, index):
    """By sorting: (values, below, equal) for the (G, T) indices."""
    out = torch.full(index.shape, math.inf, dtype=values.dtype), torch.zeros_like(index), torch.zeros_like(index)
    for g in range(n_groups):
        ordered = values[among & (groups == g)].sort().values
        for t, k in enumerate(index[g].tolist()):
            if k < len(ordered):
                out[0][g, t] = ordered[k]
                out[1][g, t], out[2][g, t] = (ordered < ordered[k]).sum(), (ordered == ordered[k]).sum()
    return out


def assert_order_statistics(got, values, among, groups, n_groups):
    want = expected(values, among, groups, n_groups, got.places)
    assert torch.equal(got.values, want[0])
    is_there = got.places < got.total.unsqueeze(1)
    assert torch.equal(got.below[is_there], want[1][is_there])
    assert torch.equal(got.equal, want[2])
    assert got.total.tolist() == [int((among & (groups == g)).sum()) for g in range(n_groups)]


def quarters(n_targets):
    """From the first to beyond the last."""
    return lambda count: (count.unsqueeze(1) * torch.arange(n_targets)) // max(1, n_targets - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n_groups", "n_targets"), [(1, 1), (1, 4), (3, 2), (200, 1), (3000, 1)])
def test_one_process_finds_what_a_sort_finds(n_groups, n_targets, dtype):
    for seed, n in enumerate((0, 1, 2, 50, 500)):
        values, g = values_of(n, dtype, seed), generator(seed)
        among, groups = torch.rand(n, generator=g) > 0.2, torch.randint(0, n_groups, (n,), generator=g)
        got = order_statistics(values, among, quarters(n_targets), n_targets, Ranks(), groups=groups, n_groups=n_groups)
        assert_order_statistics(got, values, among, groups, n_groups)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_sixteen_bits(dtype):
    values = torch.randn(99, generator=generator(0)).to(dtype)
    got = order_statistics(values, torch.ones(99, dtype=torch.bool), quarters(5), 5, Ranks())
    assert got.values.dtype == torch.float32
    assert torch.equal(got.values[0, :4], values.sort().values[got.places[0, :4]].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_zeros_are_one_value(dtype):
    values = torch.tensor([0.0, -0.0, -0.0, 0.0, 1.0, -1.0], dtype=dtype)
    got = order_statistics(values, torch.ones(6, dtype=torch.bool), lambda total: torch.arange(6).view(1, 6), 6, Ranks())
    assert got.values.tolist() == [[-1.0, 0.0, 0.0, 0.0, 0.0, 1.0]]
    assert got.below.tolist() == [[0, 1, 1, 1, 1, 5]]
    assert got.equal.tolist() == [[1, 4, 4, 4, 4, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_groups", [1, 7, 64, 5000])
@pytest.mark.parametrize("n_targets", [1, 4, 6])
def test_digits_cover_the_key_and_histograms_stay_small(dtype, n_groups, n_targets):
    got = widths(dtype, n_groups, n_targets)
    assert sum(got) == (64 if dtype == torch.float64 else 32)
    assert max(got) <= 11
    assert n_groups * n_targets * 2 ** max(got) <= max(2**14, n_groups * n_targets * 16)


def test_cost_of_the_common_searches():
    """What docs/guides/several-gpus.md states."""
    assert [cost(torch.float32, 1, n) for n in (1, 4, 6)] == [(3, 20_480), (3, 69_632), (3, 102_400)]
    assert cost(torch.float32, 64, 1) == (4, 262_144)
    assert cost(torch.float32, 1, 1) == (3, 4 * (2**10 + 2**11 + 2**11))
    assert cost(torch.float32, 1, 4) == (3, 4 * (2**10 + 2 * 4 * 2**11))
    assert cost(torch.float64, 1, 1)[0] == 6


def over_ranks(seeds):
    """In a process: what it finds, and what it sends, of random values whose number differs by rank (0 on one of them)."""
    sent, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda x, **options: (sent.append(x.nbytes), all_reduce(x, **options))
    try:
        for seed in seeds:
            g = generator(seed)
            dtype = (torch.float32, torch.float64)[seed % 2]
            n_groups, n_targets = ((1, 1), (1, 4), (5, 2), (300, 1))[seed % 4]
            sizes = torch.randint(0, 60, (4,), generator=g)
            sizes[seed % 5 : seed % 5 + 1] = 0
            n, mine = int(sizes.sum()), dist.get_rank()
            values = values_of(n, dtype, seed)
            among, groups = torch.rand(n, generator=g) > 0.3, torch.randint(0, n_groups, (n,), generator=g)
            part = slice(int(sizes[:mine].sum()), int(sizes[: mine + 1].sum()))
            sent.clear()
            got = order_statistics(
                values[part],
                among[part],
                quarters(n_targets),
                n_targets,
                Ranks.world(),
                groups=groups[part],
                n_groups=n_groups,
            )
            assert_order_statistics(got, values, among, groups, n_groups)
            assert (len(sent), sum(sent)) == cost(dtype, n_groups, n_targets)
    finally:
        dist.all_reduce = all_reduce
    return len(seeds)


def test_four_processes_find_what_a_sort_of_all_their_values_finds(ranks):
    assert ranks.run(over_ranks, range(12)) == [12] * 4
