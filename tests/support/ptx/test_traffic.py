"""Traffic and instructions of the compiled kernels at a real vocabulary: counts, where a GPU would give a time.

  sectors: a sector is 32 bytes of global memory; each request of a warp counts every sector that it touches
  instructions: of PTX, of the whole kernel, summed over warps, divided by the logit pairs of a thread

Not here: values (tests/kernels/), machine instructions of the main loop (benchmarks/static/roofline.py).
"""

import pytest
import torch
from opd_kernels.argmax import argmax_fwd
from opd_kernels.forward_kl import forward_kl_grad
from opd_kernels.reverse_kl import reverse_kl_grad
from opd_kernels.score import GROUP, score_fwd
from opd_kernels.support import support_fwd

from benchmarks.static.call_time import TOP_K_INSTRUCTIONS
from tests.support.cases import logit_pair
from tests.support.kernel_oracle import COMMON
from tests.support.ptx.driver import counted
from tests.support.ptx.memory import SECTOR

V, ODD = 151_936, 50_257
pytestmark = pytest.mark.full  # rows of whole vocabularies
FEW = 4096  # bytes that all programs of a launch may read or write beside rows: their numbers, weights, columns


@pytest.fixture(scope="module")
def pair():
    return logit_pair(3, V, dtype=torch.bfloat16)


def launched(launcher, *arguments, **options):
    """What it returned, and its launches."""
    with counted() as launches:
        return launcher(*arguments, **options), launches


def test_score_reads_every_logit_once_by_whole_sectors(pair):
    _, (score,) = launched(score_fwd, *pair, None, vocab_size=V, **COMMON)
    rows = 2 * pair[0].nbytes
    assert score.traffic.read_bytes == rows
    assert score.traffic.read_sectors == rows // SECTOR
    assert score.traffic.written_bytes <= rows / GROUP + FEW
    assert 32 * score.instructions / pair[0].numel() < 19.5


def test_score_reads_nothing_of_rows_that_are_masked(pair):
    rows = torch.tensor([2, 0], dtype=torch.int32)
    _, (score,) = launched(score_fwd, *pair, rows, vocab_size=V, **COMMON)
    assert 0 <= score.traffic.read_bytes - 2 * pair[0][rows.long()].nbytes <= FEW


def test_score_reads_rows_with_masked_padding_twice_and_without_it_once():
    student, teacher = logit_pair(3, 20_480, dtype=torch.bfloat16)
    student[:, -64:] = -torch.inf
    row_bytes, reads, instructions = 2 * student.nbytes, [], []
    for vocab_size in (20_480, 20_480 - 64):
        _, (score,) = launched(score_fwd, student, teacher, None, vocab_size=vocab_size, **COMMON)
        reads.append(score.traffic.read_bytes / row_bytes * 20_480 / vocab_size)
        instructions.append(score.instructions)
    assert reads == [2, 1]
    assert 2 < instructions[0] / instructions[1] < 3


def test_score_of_rows_that_start_anywhere_asks_for_each_sector_twice_at_most():
    odd = logit_pair(16, ODD, dtype=torch.bfloat16)
    _, (score,) = launched(score_fwd, *odd, None, vocab_size=ODD, **COMMON)
    rows = 2 * odd[0].nbytes
    assert score.traffic.read_bytes == rows
    assert score.traffic.read_sectors <= 2 * rows / SECTOR
    assert 32 * score.instructions / odd[0].numel() < 37


def test_support_touches_a_small_part_of_the_rows_again(pair):
    score = score_fwd(*pair, None, vocab_size=V, **COMMON)
    _, support = launched(support_fwd, *pair, None, score, top_k=16, vocab_size=V, **COMMON)
    assert [x.kernel for x in support] == [
        "_support_groups_fwd_kernel", "_support_topk_fwd_kernel", "_support_stats_fwd_kernel"
    ]  # fmt: skip
    assert SECTOR * sum(x.traffic.read_sectors for x in support) < 0.042 * 2 * pair[0].nbytes
    # 21,400 where all keys are searched at once
    assert sum(x.instructions for x in support) <= len(pair[0]) * TOP_K_INSTRUCTIONS


@pytest.mark.parametrize("gradient", [reverse_kl_grad, forward_kl_grad])
def test_a_gradient_reads_two_rows_and_writes_one_of_those_selected(pair, gradient):
    rows = torch.tensor([2, 0], dtype=torch.int32)
    score = score_fwd(*pair, rows, vocab_size=V, **COMMON)
    out, top = torch.full_like(pair[0], 7.0), argmax_fwd(pair[0], rows, score, vocab_size=V)
    options = {"top": top, "out": out, "vocab_size": V, **COMMON}
    _, (launch,) = launched(gradient, *pair, rows, torch.ones(2), score.columns, **options)
    row = pair[0][0].nbytes
    assert 0 <= launch.traffic.read_bytes - 2 * 2 * row <= 2 * 128 * 40  # each thread loads ten numbers of its row
    assert launch.traffic.read_sectors <= (2 * 2 * row + FEW) / SECTOR
    assert 0 <= launch.traffic.written_bytes - 2 * row <= FEW
    assert launch.traffic.written_sectors <= (2 * row + FEW) / SECTOR
    assert bool((out[1] == 7).all())
