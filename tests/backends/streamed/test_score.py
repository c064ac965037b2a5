"""Statistics of the streamed backend against the fp64 oracle, on dense logits and on heads.

  Compared: every column of TokenStats, by the bounds of support/tolerances.py. Run: make test
  ARGS=tests/backends/streamed/test_score.py

Not here: the oracle against the equations (tests/backends/test_eager.py), gradients (tests/loss/test_gradients.py).
"""

import math

import pytest
import torch

from opd_ops import score_positions
from opd_ops.backends.shared.grids import score_grid
from opd_ops.inputs.sources import Source
from opd_ops.inputs.workspace import Workspace
from tests.backends.test_eager import _Everything
from tests.support.cases import head_pair, logit_pair, to_double
from tests.support.tolerances import HEAD_ABSOLUTE, assert_stats, assert_within

SMALL, MEDIUM = 3_000, 60_000  # workspaces that force many vocabulary blocks, or many row tiles


def compare(student, teacher, **options):
    workspace = options.pop("workspace_bytes", MEDIUM)
    _, want = score_positions(to_double(student), to_double(teacher), backend="eager", **options)
    scores, got = score_positions(student, teacher, backend="torch", workspace_bytes=workspace, **options)
    assert_stats(got, want, absolute=1e-6 if isinstance(student, torch.Tensor) else HEAD_ABSOLUTE)
    return scores, got


@pytest.mark.parametrize("workspace_bytes", [1, SMALL, MEDIUM, 2**28])
@pytest.mark.parametrize("vocab", [17, 1031, 4096])
def test_statistics_match_eager_fp64(vocab, workspace_bytes):
    _, stats = compare(*logit_pair(13, vocab), workspace_bytes=workspace_bytes)
    assert stats.reverse_kl.dtype == torch.float32


@pytest.mark.parametrize("workspace_bytes", [SMALL, MEDIUM])
def test_optional_statistics_match_eager_fp64(workspace_bytes):
    compare(*logit_pair(13, 517), selector=_Everything(), workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("top_k", [1, 2, 16, 37])
def test_statistics_match_eager_fp64_at_every_top_k(top_k):
    compare(*logit_pair(9, 37, scale=1.0), top_k=top_k, workspace_bytes=SMALL)


@pytest.mark.parametrize("noise", [3e-4, 1e-3, 1e-2, 0.1, 1.0, 4.0, 16.0])
@pytest.mark.parametrize("scale", [1.0, 8.0, 60.0])
def test_kl_is_exact_and_never_negative_from_5e_7_to_50(scale, noise):
    _, stats = compare(*logit_pair(24, 2003, scale=scale, noise=noise, seed=3), workspace_bytes=MEDIUM)
    assert bool((stats.reverse_kl >= 0).all())
    assert bool((stats.forward_kl >= 0).all())


def test_kl_cases_span_5e_7_to_50():
    reached = []
    for noise in (3e-4, 1e-3, 1e-2, 0.1, 1.0, 4.0, 16.0):
        for scale in (1.0, 8.0, 60.0):
            student, teacher = logit_pair(24, 2003, scale=scale, noise=noise, seed=3, dtype=torch.float64)
            reached.append(score_positions(student, teacher, backend="eager")[1].reverse_kl)
    reached = torch.cat(reached)
    assert reached.min() < 5e-7
    assert reached.max() > 50


def test_kl_does_not_depend_on_a_constant_added_to_the_logits():
    student, teacher = logit_pair(24, 2003, noise=3e-3, seed=4)
    _, stats = compare(student, teacher + 17.0)
    assert stats.reverse_kl.median() < 1e-5


def test_student_equal_to_teacher_has_zero_kl():
    student, _ = logit_pair(24, 2003, scale=20.0)
    _, stats = score_positions(student, student.clone(), workspace_bytes=MEDIUM)
    assert torch.count_nonzero(stats.reverse_kl) == torch.count_nonzero(stats.forward_kl) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_match_eager_fp64_in_every_dtype(dtype):
    _, stats = compare(*logit_pair(13, 1031, dtype=dtype))
    assert stats.union_kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_ties_go_to_the_lower_id():
    student, teacher = logit_pair(16, 1031, scale=1.0, dtype=torch.bfloat16)
    student, teacher = student.round(), teacher.round()  # a handful of distinct values over a thousand ids
    for workspace_bytes in (SMALL, MEDIUM):
        compare(student, teacher, workspace_bytes=workspace_bytes)
    compare(torch.zeros(3, 513), teacher[:3, :513].float(), workspace_bytes=SMALL)  # all equal: S is 0 ... K-1


@pytest.mark.parametrize("workspace_bytes", [SMALL, 2**20])
def test_masked_vocabulary_entries_are_legal(workspace_bytes):
    student, teacher = logit_pair(8, 1031)
    student[:, :400] = teacher[:, :400] = -math.inf  # whole leading blocks
    student[0, 401:500] = -math.inf  # p = 0 where q > 0: forward KL is infinite
    teacher[1, 401:500] = -math.inf  # q = 0 where p > 0: reverse KL is infinite
    student[2, 420:] = -math.inf  # fewer entries left than K = 32
    teacher[2, 420:] = -math.inf
    teacher[3, 400:] = -200.0  # q underflows but is not zero
    _, stats = compare(student, teacher, top_k=32, workspace_bytes=workspace_bytes)
    assert stats.reverse_kl[1] == stats.forward_kl[0] == math.inf
    assert bool(stats.reverse_kl[[0, 2, 3]].isfinite().all())


def test_minus_infinity_in_some_rows_of_a_block_leaves_the_others_alone():
    student, teacher = logit_pair(64, 4099)
    student[20, 100:200] = -math.inf
    teacher[21, 3000:3001] = -math.inf
    sides = Source.of(student, 4099, 1.0), Source.of(teacher, 4099, 1.0)
    grid = score_grid(*sides, 64, top_k=16, whole_rows=False, workspace=Workspace(2**21))
    assert 3 * grid.chunk < grid.rows  # some chunks are summed again with masks, some are not
    compare(student, teacher, workspace_bytes=2**21)


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_of_either_sign_in_the_student_reaches_the_support_statistics(sign, backend):
    student, teacher = logit_pair(8, 300)
    student[3, 5] = math.copysign(math.nan, sign)  # inf - inf and 0 * inf have the sign bit set on common processors
    scores, stats = score_positions(student, teacher, backend=backend)
    for column in (stats.union_kl, stats.student_support_mass, stats.reverse_kl, scores):
        assert torch.equal(column.isnan(), torch.arange(8) == 3)


def test_reverse_kl_is_infinite_even_where_the_student_s_probability_underflows():
    student, teacher = logit_pair(2, 64, scale=1.0)
    student[0, 5], teacher[0, 5] = -300.0, -math.inf
    for backend in ("torch", "eager"):
        _, stats = score_positions(student, teacher, backend=backend)
        assert stats.reverse_kl[0] == math.inf
        assert stats.reverse_kl[1].isfinite()


def test_masked_rows_never_matter_whatever_they_hold():
    student, teacher = logit_pair(12, 257)
    mask = torch.arange(12) % 3 != 0
    scores, stats = compare(student, teacher, mask=mask)
    student[~mask], teacher[~mask] = math.nan, math.inf
    for backend in ("torch", "eager"):
        again, stats_again = score_positions(student, teacher, mask=mask, backend=backend)
        assert torch.equal(again == -math.inf, ~mask)
        assert_within(again[mask], scores[mask], absolute=1e-5, relative=1e-5, name="scores")
        for column in filter(lambda x: x is not None, stats_again):
            assert not column[~mask].any()
    assert not stats.valid[~mask].any()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_strides(layout):
    student, teacher = logit_pair(24, 130)
    student, teacher = student.view(4, 6, 130), teacher.view(4, 6, 130)
    if layout == "transposed":
        student, teacher = student.transpose(0, 1), teacher.transpose(0, 1)
    elif layout == "sliced":
        student, teacher = student[:, :-1, ::2], teacher[:, 1:, 1::2]
    else:
        student = student[:1].expand(4, 6, 130)
    compare(student, teacher)


def test_one_position_without_leading_dimensions():
    student, teacher = logit_pair(1, 130)
    scores, stats = compare(student[0], teacher[0])
    assert scores.shape == stats.reverse_kl.shape == ()


@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"scale": 0.6}, {"softcap": 8.0}, {"bias": True, "scale": 1.4, "softcap": 6.0}]
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("workspace_bytes", [SMALL, 2**20])
def test_head_statistics_match_eager_fp64(options, temperature, workspace_bytes):
    compare(*head_pair((3, 5), 523, **options), temperature=temperature, workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_statistics_of_low_precision_parameters_match_eager_fp64(dtype):
    compare(*head_pair((3, 5), 523, dtype=dtype), workspace_bytes=100_000)


def test_a_head_and_dense_logits_may_be_mixed():
    student, teacher = head_pair((15,), 523)
    logits = teacher.hidden @ teacher.weight.T
    _, stats = score_positions(student, logits)
    _, want = score_positions(student, teacher)
    assert_stats(stats, want, absolute=HEAD_ABSOLUTE)


def test_statistics_are_repeatable():
    student, teacher = head_pair((40,), 2003)
    first, second = (score_positions(student, teacher, workspace_bytes=2**20)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)


def test_no_positions():
    scores, stats = score_positions(torch.empty(0, 33), torch.empty(0, 33))
    assert scores.shape == stats.union_kl.shape == (0,)
    student, teacher = head_pair((4,), 33)
    scores, stats = score_positions(student, teacher, mask=torch.zeros(4))
    assert bool((scores == -math.inf).all())
    assert not stats.teacher_entropy.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_negative_zero_ties_with_zero(dtype):
    student, teacher = logit_pair(5, 300, scale=1.0, dtype=dtype)
    student = student.clamp_max(0.0)  # half the row is the maximum, 0.0
    student[:, ::3] = torch.where(student[:, ::3] == 0, -0.0, student[:, ::3])
    assert (1 / student == -math.inf).any()
    compare(student, teacher, workspace_bytes=SMALL)
