"""Top-K lists built block by block against one stable sort of the whole row: ids, order, ties, and both logits.

  Both ways to take in a block are forced, and the data that makes the pruned way give up.
  Run: make test ARGS=tests/backends/shared/test_top_k.py

Not here: the support statistics (tests/backends/streamed/test_score.py), the kernel's lists (tests/kernels/test_support.py).
"""

import math

import pytest
import torch

from opd_ops.backends.shared import top_k
from tests.support.cases import logit_pair

N = 9


def blocks(vocab: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, vocab)) for start in range(0, vocab, width)]


def built(own: torch.Tensor, other: torch.Tensor, k: int, width: int, candidates: int = 4096) -> top_k.TopKList:
    got = None
    for block in blocks(own.shape[1], width):
        got = top_k.extended(got, torch.stack((own[:, block], other[:, block])), k, block.start, candidates)
    assert got is not None
    return got.rows(slice(0, len(own)))


def check(own: torch.Tensor, other: torch.Tensor, k: int, width: int, **options: int) -> None:
    got = built(own, other, k, width, **options)
    want = torch.sort(own, dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(got.ids, want)
    assert torch.equal(got.own, own.gather(1, want))
    assert torch.equal(got.other, other.gather(1, want))


@pytest.fixture
def pruned(monkeypatch) -> list[bool]:
    """Whether each block that was offered to the pruned way was taken in by it."""
    outcomes = []
    whole = top_k._pruned

    def watched(*args):
        outcome = whole(*args)
        outcomes.append(outcome is not None)
        return outcome

    monkeypatch.setattr(top_k, "_pruned", watched)
    return outcomes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 16, 128])
@pytest.mark.parametrize("width", [64, 1000, 4096, 16_411])
def test_lists_equal_a_stable_sort_at_every_block_width(width, k, dtype):
    check(*logit_pair(N, 16_411, dtype=dtype), k, width)


@pytest.mark.parametrize("width", [3, 20, 70])
def test_blocks_narrower_than_k_or_than_a_group(width):
    check(*logit_pair(N, 211), 37, width)


def test_k_as_large_as_the_vocabulary():
    check(*logit_pair(N, 211), 211, 64)


def test_blocks_of_ordinary_logits_are_pruned(pruned):
    check(*logit_pair(N, 16_411), 16, 4096)
    assert pruned == [True] * 5


def test_candidates_are_read_a_few_at_a_time_and_change_nothing(pruned):
    check(*logit_pair(N, 16_411), 16, 4096, candidates=top_k.PRUNED_GROUP - 1)
    assert all(pruned)


def test_bf16_ties_go_to_the_lower_id(pruned):
    own, other = logit_pair(N, 16_411, dtype=torch.bfloat16)
    assert len(own.unique()) < 3000  # of 147,699
    check(own.float(), other.float(), 16, 4096)
    assert any(pruned)


@pytest.mark.parametrize(
    "own",
    [
        torch.arange(8192.0).expand(N, -1),  # every block beats all before it
        torch.zeros(N, 8192),  # every group maximum equal
        torch.full((N, 8192), -math.inf),
        torch.arange(8192.0).remainder(2).expand(N, -1),
    ],
    ids=["rising", "equal", "absent", "two values"],
)
def test_what_does_not_pay_to_prune_is_ranked(own, pruned):
    other = logit_pair(N, 8192)[0]
    check(own.contiguous(), other, 16, 2048)
    assert not all(pruned)


def test_one_rising_row_among_ordinary_ones():
    own, other = logit_pair(N, 8192)
    own[3] = torch.arange(8192.0)
    check(own, other, 16, 2048)


def test_rows_with_fewer_finite_logits_than_k_are_filled_with_the_lowest_ids():
    own, other = logit_pair(N, 8192)
    own[2, 5:] = -math.inf  # all in the first block
    own[4, :8190] = -math.inf  # all in the last
    check(own, other, 16, 2048)


def test_minus_zero_ties_with_zero(pruned):
    own, other = logit_pair(N, 8192)
    own = -own.abs()
    own[:, 100::900] = 0.0
    own[:, 200::900] = -0.0
    check(own, other, 16, 2048)
    assert all(pruned)


def test_nan_takes_the_first_place_of_its_row_alone(pruned):
    own, other = logit_pair(N, 8192)
    own[5, 3000] = own[6, 10] = math.nan
    got = built(own, other, 16, 2048)
    assert all(pruned)
    assert torch.equal(got.own.isnan().sum(1), torch.tensor([0, 0, 0, 0, 0, 1, 1, 0, 0]))
    kept = torch.ones(N, dtype=torch.bool)
    kept[5:7] = False
    check(own[kept], other[kept], 16, 2048)


@pytest.mark.parametrize("case", ["distinct", "tie", "nan"])
def test_a_narrow_block_ranks_candidates_unless_groups_tie(case):
    own, other = logit_pair(N, 512)
    if case == "tie":
        own[4, [50, 69]] = own[4].max() + 1  # the lower id is in the later group: 50, not 69 - 64
    if case == "nan":
        own[4, 69] = math.nan
    assert (top_k._narrow_candidates(own, 1) is None) == (case != "distinct")
    got = built(own, other, 1, 512)
    assert torch.equal(got.ids, torch.sort(own, dim=1, descending=True, stable=True).indices[:, :1])
