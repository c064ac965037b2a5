"""LinearHeads on the Triton backend, kernels interpreted or compiled: values and gradients, what they cost, what they hold.

  Compared: columns of TokenStats and relative norms of gradients with the fp64 oracle, by support/tolerances.py. Counted:
  matmul FLOPs against 2 + 4 rho units, live bytes against the workspace. Few rows: one takes up to 0.2 s interpreted.
  Run: make test ARGS=tests/backends/triton/test_heads.py

Not here: 8 bits (inputs/test_float8.py), statistics from the rollout (inputs/test_rollout.py), a GPU (benchmarks/gpu/run.py).
"""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.static.operators import Operators
from opd_ops import LinearHead, score_positions, selective_opd_loss
from opd_ops.backends.shared import grids
from opd_ops.inputs.sources import Source
from opd_ops.inputs.workspace import Workspace
from tests.support.cases import gradients, head_pair, leaf, leaf_head, to_double
from tests.support.meters import LiveBytes
from tests.support.tolerances import HEAD_ABSOLUTE, assert_gradient, assert_stats, relative_error

TRANSFORMS = [{}, {"bias": True, "scale": 0.5}, {"softcap": 20.0}]
SMALL, LARGE = 2**16, 2**29  # workspaces: several groups of rows, one


def dense(head):
    return head.hidden @ head.weight.T


def run(student, teacher, **options):
    out = selective_opd_loss(student, teacher, **{"fraction": 0.5, "backend": "triton", **options})
    out.loss.backward()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_statistics_match_eager_fp64(transform, dtype):
    student, teacher = head_pair((2, 2), 300, dtype=dtype, **transform)
    options = {"temperature": 0.8, "selector": "teachability-released"}
    _, got = score_positions(student, teacher, backend="triton", workspace_bytes=SMALL, score_dtype="float32", **options)
    _, want = score_positions(to_double(student), to_double(teacher), backend="eager", **options)
    assert_stats(got, want, absolute=HEAD_ABSOLUTE)


def test_sixteen_bit_heads_are_ranked_by_sixteen_bit_logits():
    student, teacher = head_pair((4,), 300, dtype=torch.bfloat16)
    _, got = score_positions(student, teacher, backend="triton")
    _, want = score_positions(dense(student), dense(teacher), backend="triton")
    assert_stats(got, want)
    _, exact = score_positions(student, teacher, backend="triton", score_dtype="float32")
    assert relative_error(got.reverse_kl, exact.reverse_kl) > 1e-4


@pytest.mark.parametrize("sides", ["student", "teacher"])
def test_one_side_may_be_dense(sides):
    heads = dict(zip(("student", "teacher"), head_pair((2, 3), 131), strict=True))
    mixed = {name: leaf_head(head) if name == sides else leaf(dense(head)) for name, head in heads.items()}
    double = {
        name: leaf_head(side, torch.float64) if isinstance(side, LinearHead) else leaf(side, torch.float64)
        for name, side in mixed.items()
    }
    got, want = run(**mixed), run(**double, backend="eager")
    assert torch.equal(got.selected, want.selected)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-4, atol=1e-6)
    student, expected = mixed["student"], double["student"]
    pairs = zip(gradients(student), gradients(expected), strict=True) if sides == "student" else [(student.grad, expected.grad)]
    for result, wanted in pairs:
        assert_gradient(result, wanted)


@pytest.mark.parametrize("workspace_bytes", [SMALL, LARGE])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_gradients_match_eager_fp64(divergence, transform, workspace_bytes):
    heads = head_pair((2, 3), 300, **transform)
    student, double = leaf_head(heads[0]), leaf_head(heads[0], torch.float64)
    options = {"divergence": divergence, "temperature": 0.8}
    got = run(student, heads[1], workspace_bytes=workspace_bytes, **options)
    want = run(double, to_double(heads[1]), backend="eager", **options)
    assert torch.equal(got.selected, want.selected)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-4, atol=1e-6)
    for result, wanted in zip(gradients(student), gradients(double), strict=True):
        assert_gradient(result, wanted)
    assert not student.hidden.grad[~got.selected].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workspace_bytes", [2**15, 2**17, LARGE])  # two looks; gradients of logits kept; one group
def test_sixteen_bit_gradients_are_no_worse_than_eager(dtype, workspace_bytes):
    heads = head_pair((8,), 300, dtype=dtype, bias=True)
    student, double, rounded = leaf_head(heads[0]), leaf_head(heads[0], torch.float64), leaf_head(heads[0])
    got = run(student, heads[1], workspace_bytes=workspace_bytes, score_dtype="float32")
    want = run(double, to_double(heads[1]), backend="eager")
    assert torch.equal(got.selected, want.selected)
    s, u = dense(rounded) + rounded.bias, dense(heads[1]) + heads[1].bias  # logits in 16 bits, as a model returns them
    log_p, log_q = torch.log_softmax(s.float(), 1), torch.log_softmax(u.float(), 1)
    (log_p.exp() * (log_p - log_q)).sum(1)[want.selected].mean().backward()
    for result, wanted, plain in zip(gradients(student), gradients(double), gradients(rounded), strict=True):
        assert result.dtype == dtype
        assert relative_error(result, wanted) <= 2 * relative_error(plain, wanted)
        assert_gradient(result, wanted, bound=5e-3)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        got.stats.reverse_kl[got.selected].double(), want.stats.reverse_kl[want.selected], rtol=1e-4, atol=1e-6
    )


def test_a_loss_far_below_one_keeps_the_digits_of_fp16_gradients():
    heads = head_pair((4,), 131, dtype=torch.float16)
    student, scaled = leaf_head(heads[0]), leaf_head(heads[0])
    run(student, heads[1])
    out = selective_opd_loss(scaled, heads[1], fraction=0.5, backend="triton", num_items_in_batch=2.0**20)
    (out.loss * 2.0**18).backward()  # as a GradScaler does
    for got, wanted in zip(gradients(scaled), gradients(student), strict=True):
        assert_gradient(got, wanted, bound=2e-3)


def test_entries_beyond_the_common_vocabulary_get_no_gradient():
    student, teacher = head_pair((4,), 150, bias=True)
    student = leaf_head(student)
    teacher = LinearHead(teacher.hidden, teacher.weight[:131], teacher.bias[:131])
    run(student, teacher, vocab_size=131)
    assert student.weight.grad[:131].any()
    assert not student.weight.grad[131:].any()
    assert not student.bias.grad[131:].any()


def test_a_second_backward_gives_the_same_gradients():
    heads = head_pair((4,), 131)
    student = leaf_head(heads[0])
    loss = selective_opd_loss(student, heads[1], fraction=0.5, backend="triton").loss
    first = torch.autograd.grad(loss, [student.hidden, student.weight], retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(2 * loss, [student.hidden, student.weight])
    for a, b, before in zip(first, second, kept, strict=True):
        assert torch.equal(2 * a, b)
        assert torch.equal(a, before)


def test_an_empty_selection_has_gradients_of_zero():
    heads = head_pair((3,), 131, dtype=torch.bfloat16)
    student = leaf_head(heads[0])
    assert run(student, heads[1], mask=torch.zeros(3)).loss == 0
    assert not student.weight.grad.any()
    assert not student.hidden.grad.any()


def test_masked_vocabulary_entries_and_rows_are_legal():
    student, teacher = head_pair((4,), 131, bias=True)
    student.bias[:60] = teacher.bias[:60] = -math.inf
    student.hidden[3] = math.nan
    double = leaf_head(student, torch.float64)
    student = leaf_head(student)
    mask = torch.arange(4) < 3
    got, want = run(student, teacher, mask=mask), run(double, to_double(teacher), mask=mask, backend="eager")
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-4, atol=1e-6)
    for result, wanted in zip(gradients(student), gradients(double), strict=True):
        assert_gradient(result, wanted)


def test_autocast_changes_nothing():
    heads = head_pair((3,), 131)
    runs = []
    for enabled in (False, True):
        student = leaf_head(heads[0])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = selective_opd_loss(student, heads[1], fraction=0.5, backend="triton").loss
        loss.backward()
        runs.append([loss.detach(), *gradients(student)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_inplace_backward_rejects_heads():
    student, teacher = head_pair((3,), 131)
    with pytest.raises(ValueError, match="only backend='triton' has, for dense logits"):
        selective_opd_loss(student, teacher, backend="triton", inplace_backward=True)


# cost

VOCAB, DIM = 140, 32


def heads(n, dtype=torch.float32):
    return head_pair((n,), VOCAB, student_dim=DIM, teacher_dim=DIM, dtype=dtype)


def units(student, teacher, n, **options):
    with FlopCounterMode(display=False) as counter:
        run(student, teacher, **options)
    return counter.get_total_flops() / (2 * n * VOCAB * DIM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_bytes", [2**17, LARGE])
def test_two_heads_cost_two_plus_four_rho_units(workspace_bytes, dtype):
    student, teacher = heads(10, dtype)
    options = {"fraction": 0.2, "workspace_bytes": workspace_bytes}
    assert units(leaf_head(student), teacher, 10, **options) == pytest.approx(2 + 4 * 0.2, rel=1e-12)


def test_a_frozen_student_head_costs_two_plus_three_rho_units():
    student, teacher = heads(10, torch.bfloat16)
    frozen = LinearHead(leaf(student.hidden), student.weight)
    assert units(frozen, teacher, 10, fraction=0.2, workspace_bytes=2**15) == pytest.approx(2 + 3 * 0.2, rel=1e-12)


def test_more_selected_rows_than_the_workspace_keeps_cost_a_second_look():
    student, teacher = heads(10, torch.bfloat16)
    got = units(leaf_head(student), teacher, 10, fraction=0.5, workspace_bytes=2**11)
    assert got == pytest.approx(2 + 6 * 0.5, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_kept_for_a_span_of_rows_cost_no_second_look(dtype, monkeypatch):
    """Tiles of a few rows, so that ten rows are three spans: what 16,384 positions are in the default workspace."""
    monkeypatch.setattr(grids, "TILE_ROWS", (8, 4, 2))
    student, teacher = head_pair((10,), 131, bias=True, dtype=dtype)
    kept = grids.SelectedGrid.of(
        *(Source.of(x) for x in (student, teacher)), n=10, needs=(True, True, True), workspace=Workspace(2**14)
    ).kept
    assert 0 < kept < 10
    result, whole, exact = leaf_head(student), leaf_head(student), leaf_head(student, torch.float64)
    units_of_spans = units(result, teacher, 10, fraction=1.0, workspace_bytes=2**14)
    assert units_of_spans == units(whole, teacher, 10, fraction=1.0)
    run(exact, to_double(teacher), fraction=1.0, backend="eager")
    for got, at_once, want in zip(gradients(result), gradients(whole), gradients(exact), strict=True):
        assert relative_error(got, want) <= 2 * relative_error(at_once, want) + 1e-6


@pytest.mark.full
def test_more_spans_than_eight_cost_a_second_look(monkeypatch):
    monkeypatch.setattr(grids, "TILE_ROWS", (8, 4, 2))
    student, teacher = heads(34, torch.bfloat16)
    options = {"fraction": 1.0, "workspace_bytes": 2**13}
    assert units(leaf_head(student), teacher, 34, **options) == pytest.approx(2 + 6, rel=1e-12)
    monkeypatch.setattr(grids, "MOST_SPANS", 9)
    assert units(leaf_head(student), teacher, 34, **options) == pytest.approx(2 + 4, rel=1e-12)


def test_a_bias_in_fp16_keeps_its_digits_under_small_weights():
    student, teacher = head_pair((10,), 131, bias=True, dtype=torch.bfloat16)
    student = LinearHead(student.hidden, student.weight, student.bias.half())
    got, exact = leaf_head(student), leaf_head(student, torch.float64)
    for head, options in ((got, {}), (exact, {"backend": "eager"})):
        side = teacher if head is got else to_double(teacher)
        options |= {"fraction": 1.0, "weights": torch.full((10,), 1e-7)}
        (selective_opd_loss(head, side, **{"backend": "triton"} | options).loss * 1e7).backward()
    assert relative_error(got.bias.grad, exact.bias.grad) < 2**-7


def test_masked_rows_cost_nothing():
    student, teacher = heads(10)
    got = units(leaf_head(student), teacher, 10, fraction=0.2, mask=torch.arange(10) % 2)
    assert got == pytest.approx((2 + 4 * 0.2) / 2, rel=1e-12)


def test_hidden_states_of_several_tiles_are_copied_at_once(monkeypatch):
    monkeypatch.setattr(grids, "TILE_ROWS", (2,))
    student, teacher = heads(7)
    options = {"backend": "triton", "workspace_bytes": 13_400}
    sources = [Source.of(x) for x in (student, teacher)]
    tile = grids.score_tile(*sources, n=7, top_k=16, optional=False, workspace=Workspace(13_400), score_dtype=None)
    assert (tile.rows, tile.span) == (2, 6)
    with Operators() as counted:
        _, got = score_positions(student, teacher, **options)
    with Operators() as whole:
        _, want = score_positions(student, teacher, **options | {"workspace_bytes": LARGE})
    assert counted.names["mm"] == 8
    assert counted.names["index"] - whole.names["index"] == 2  # two spans of each model instead of one
    assert relative_error(got.reverse_kl, want.reverse_kl) < 1e-6


@pytest.mark.parametrize("n", [8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_workspace_plus_gradients_plus_order_n(n, dtype, prompt_launches):
    workspace_bytes = 2**18
    student, teacher = head_pair((n,), 1100, student_dim=DIM, teacher_dim=DIM, dtype=dtype)
    student = leaf_head(student)
    with LiveBytes() as meter:
        run(student, teacher, fraction=0.2, workspace_bytes=workspace_bytes)
    required = student.weight.element_size() * (student.weight.numel() + student.hidden.numel())
    assert meter.peak > required
    assert meter.peak - required <= workspace_bytes + 8 * 60 * n
    assert meter.largest <= max(workspace_bytes // 4, student.weight.numel())
