"""Scoring in 8 bits: quantisation, the shortlist, what is refused; the vendor's 8-bit matmul runs on a CPU too, for tests.

  Compared: products with the dequantised operands; the loss, its gradient and the shortlist with the exact call.
  Run: make test ARGS=tests/inputs/test_float8.py

Not here: how well 8 bits rank a real model's positions (benchmarks/cpu/ranking.py), a GPU (benchmarks/gpu/run.py).
"""

import math

import pytest
import torch

from opd_ops import Float8Rows, LinearHead, StudentStats, score_positions, selective_opd_loss
from opd_ops.inputs import float8
from tests.support.cases import gradients, head_pair, leaf_head
from tests.support.tolerances import relative_error


def heads(n=10, vocab=131, **options):
    return head_pair((n,), vocab, student_dim=32, teacher_dim=48, **options)


def test_quantised_rows_are_within_a_sixteenth_of_each_number():
    x = torch.randn(70, 32) * torch.logspace(-6, 4, 70).unsqueeze(1)
    x[3] = 0
    rows = Float8Rows.of(x)
    assert rows.values.shape == (128, 32)
    back = rows.dequantised(70)
    large = x.abs() > x.abs().amax(1, keepdim=True) / 2**14  # below, e4m3 has fewer bits
    assert bool(((back - x).abs() <= x.abs() / 16)[large].all())
    assert not back[3].any()
    assert not rows.values[70:].float().any()


def test_the_product_is_that_of_the_dequantised_operands():
    x, w = torch.randn(5, 32), torch.randn(131, 32)
    a, b = Float8Rows.of(x), Float8Rows.of(w)
    out = float8.product(a, b, torch.empty(5, 192, dtype=torch.bfloat16))
    want = a.dequantised(5) @ b.dequantised(131).T
    assert relative_error(out[:, :131], want) < 3e-3  # bf16 results
    assert relative_error(out[:, :131], x @ w.T) < 0.05


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_what_is_trained_on_is_exact(scope):
    pair = head_pair((2, 6), 131, student_dim=32, teacher_dim=48)
    student, plain = leaf_head(pair[0]), leaf_head(pair[0])
    options = {"fraction": 0.25, "scope": scope, "backend": "triton", "selector": "divergence"}
    got = selective_opd_loss(student, pair[1], score_dtype="float8", **options)
    want = selective_opd_loss(plain, pair[1], score_dtype="float32", **options)
    assert torch.equal(got.selected, want.selected)  # the margin of 2 n holds what 8 bits misplace here
    shortlisted = got.scores > -math.inf
    assert shortlisted.sum() == 6
    torch.testing.assert_close(got.scores[shortlisted], want.scores[shortlisted], rtol=1e-5, atol=1e-6)
    got.loss.backward()
    want.loss.backward()
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(student), gradients(plain), strict=True):
        assert relative_error(a, b) < 1e-5


def test_the_first_ranking_is_in_eight_bits():
    student, teacher = heads(4)
    _, rough = score_positions(student, teacher, backend="triton", score_dtype="float8")
    _, exact = score_positions(student, teacher, backend="triton")
    assert 1e-3 < relative_error(rough.student_logsumexp, exact.student_logsumexp) < 0.1
    assert relative_error(rough.union_kl, exact.union_kl) > 1e-3


def test_a_head_that_the_caller_keeps_in_eight_bits_is_read():
    student, teacher = heads(4, bias=True)
    kept = LinearHead(teacher.hidden, teacher.weight, teacher.bias, float8=Float8Rows.of(teacher.weight))
    zeros = LinearHead(teacher.hidden, teacher.weight, teacher.bias, float8=Float8Rows.of(torch.zeros_like(teacher.weight)))
    options = {"backend": "triton", "score_dtype": "float8"}
    (a, _), (b, _), (c, _) = (score_positions(student, side, **options) for side in (teacher, kept, zeros))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    (a, _), (c, _) = (score_positions(student, side, backend="triton") for side in (teacher, zeros))
    assert torch.equal(a, c)  # only a pass in 8 bits reads it


def test_the_common_vocabulary_may_be_smaller():
    student, teacher = heads(4, vocab=150)
    teacher = LinearHead(teacher.hidden, teacher.weight[:131])
    _, rough = score_positions(student, teacher, vocab_size=131, backend="triton", score_dtype="float8")
    _, exact = score_positions(student, teacher, vocab_size=131, backend="triton")
    assert relative_error(rough.student_logsumexp, exact.student_logsumexp) < 0.1


def test_statistics_from_the_rollout_may_be_joined_with_it():
    student, teacher = heads(8)
    stats = StudentStats.from_logits(student.hidden @ student.weight.T)
    # The shortlist is then everything: exact.
    out = selective_opd_loss(
        leaf_head(student), teacher, student_stats=stats, score_dtype="float8", fraction=0.5, backend="triton"
    )
    want = selective_opd_loss(student, teacher, fraction=0.5, backend="eager")
    assert torch.equal(out.selected, want.selected)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-4, atol=1e-6)


def test_every_sequence_keeps_one_where_the_selector_says_so():
    student, teacher = head_pair((2, 5), 131, student_dim=32, teacher_dim=48)
    teacher.hidden[1] = torch.cat((student.hidden[1], 0.01 * teacher.hidden[1, :, 32:]), -1)  # nothing to learn in the second
    options = {"selector": "teachability-released", "fraction": 0.1, "backend": "triton"}
    got = selective_opd_loss(student, teacher, score_dtype="float8", **options)
    assert got.selected.sum(1).tolist() == selective_opd_loss(student, teacher, **options).selected.sum(1).tolist() == [1, 1]


def test_it_is_refused_where_it_cannot_run(monkeypatch):
    student, teacher = heads(4)
    for backend, reason in (("torch", "chosen by name"), ("auto", "the device is cpu")):
        with pytest.raises(ValueError, match=f"score_dtype: got 'float8', which needs backend='triton' on Hopper.*{reason}"):
            score_positions(student, teacher, backend=backend, score_dtype="float8")
    dense = student.hidden @ student.weight.T
    with pytest.raises(ValueError, match="neither side is a LinearHead"):
        score_positions(dense, dense, backend="triton", score_dtype="float8")
    with pytest.raises(ValueError, match="a head's hidden size is 24, expected a multiple of 16"):
        score_positions(*head_pair((4,), 131), backend="triton", score_dtype="float8")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    assert "compute capability 8.0, expected 9.0 (Hopper) or newer" in float8.refusal(_OnCuda(student.weight))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert float8.refusal(_OnCuda(student.weight)) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "expected an NVIDIA GPU, Hopper or newer" in float8.refusal(student.weight)


class _OnCuda:
    def __init__(self, weight):
        self.shape, self.device = weight.shape, torch.device("cuda")


def test_it_is_refused_for_selectors_that_draw():
    student, teacher = heads(4)
    for selector in ("random", "multinomial"):
        with pytest.raises(ValueError, match=f"selector: got '{selector}', which draws at random, but score_dtype='float8'"):
            selective_opd_loss(student, teacher, backend="triton", score_dtype="float8", selector=selector)


def test_a_kept_head_of_another_weight_is_rejected():
    student, _ = heads(4)
    with pytest.raises(ValueError, match=r"LinearHead.float8: got values of shape \(64, 32\), expected \(192, 32\)"):
        LinearHead(student.hidden, student.weight, float8=Float8Rows.of(student.weight[:20]))
    with pytest.raises(TypeError, match=r"LinearHead.float8: got Tensor, expected Float8Rows\.of"):
        LinearHead(student.hidden, student.weight, float8=student.weight)
    kept = Float8Rows.of(student.weight)
    elsewhere = Float8Rows(kept.values.to("meta"), kept.scales)
    with pytest.raises(ValueError, match=r"LinearHead.float8: is on meta, the weight is on cpu; move one of them"):
        LinearHead(student.hidden, student.weight, float8=elsewhere)
    module = torch.nn.Linear(32, 131, bias=False)
    module.weight.data.copy_(student.weight)
    assert LinearHead.from_module(student.hidden, module, float8=kept).float8 is kept
    with pytest.raises(ValueError, match="score_dtype: got 'int8', expected one of: float32, float8"):
        score_positions(student, student, score_dtype="int8")
