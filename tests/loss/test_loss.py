"""The contract of `selective_opd_loss`: what it returns, denominators, masks and labels, non-finite logits, vocabularies.

  Compared: with the same quantities put together by hand from `score_positions`, `select_positions` and plain torch.
  Run: make test ARGS=tests/loss/test_loss.py

Not here: gradients (tests/loss/test_gradients.py), bad arguments (tests/call/test_errors.py).
"""

import math
import warnings

import pytest
import torch

from opd_ops import (
    ForwardKL,
    LinearHead,
    ReverseKL,
    SelectiveOPDOutput,
    score_positions,
    select_positions,
    selective_opd_loss,
    selective_opd_token_losses,
)
from opd_ops.call.metrics import as_floats
from opd_ops.selection.selectors import SELECTORS
from tests.support.cases import generator, head_pair, leaf, logit_pair

BACKENDS = ["torch", "eager"]


def batch(seed=0, vocab=131):
    student, teacher = logit_pair(40, vocab, seed=seed)
    return student.view(4, 10, vocab), teacher.view(4, 10, vocab), torch.rand(4, 10, generator=generator(seed)) > 0.25


def test_selective_opd_loss_trains_the_top_twentieth_by_teachability_with_reverse_kl():
    student, teacher, mask = batch()
    out = selective_opd_loss(student, teacher, mask=mask)
    assert isinstance(out, SelectiveOPDOutput)
    scores, stats = score_positions(student, teacher, mask=mask)
    selected = select_positions(scores, mask=mask)
    assert selected.sum() == math.ceil(0.05 * mask.sum())
    assert torch.equal(out.selected, selected)
    assert torch.equal(out.scores, scores)
    assert torch.equal(out.stats.union_kl, stats.union_kl)
    log_p, log_q = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    want = (log_p.exp() * (log_p - log_q)).sum(-1)[selected].mean()
    torch.testing.assert_close(out.loss.double(), want, rtol=1e-5, atol=1e-6)
    assert out.loss.dtype == out.scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("divergence", "column"), [(ReverseKL(), "reverse_kl"), ("forward_kl", "forward_kl"), (ForwardKL(), "forward_kl")]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_divergence_by_name_or_instance(divergence, column, backend):
    student, teacher, mask = batch()
    out = selective_opd_loss(student, teacher, mask=mask, divergence=divergence, fraction=0.3, backend=backend)
    torch.testing.assert_close(out.loss, getattr(out.stats, column)[out.selected].mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(backend):
    student, _, mask = batch()
    student = leaf(student)
    out = selective_opd_loss(student, student.detach().clone(), mask=mask, fraction=1.0, backend=backend)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.0, abs=1e-7)
    assert student.grad.norm() < 1e-6


@pytest.mark.parametrize("num_items", [None, 100, 100.0, torch.tensor(100), torch.tensor(100.0)])
@pytest.mark.parametrize("denominator", ["selected", "valid"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_denominators(denominator, num_items, backend):
    student, teacher, mask = batch()
    out = selective_opd_loss(
        student, teacher, mask=mask, fraction=0.25, denominator=denominator, num_items_in_batch=num_items, backend=backend
    )
    n_selected, n_valid = out.selected.sum().item(), mask.sum().item()
    assert n_selected == math.ceil(n_valid / 4)
    total = out.stats.reverse_kl[out.selected].sum().item()
    items = n_valid if num_items is None else 100
    want = total / (items * n_selected / n_valid if denominator == "selected" else items)
    assert out.loss.item() == pytest.approx(want, rel=1e-5)
    assert out.loss.dtype == torch.float32


def test_selected_denominator_does_not_shrink_the_step():
    """Selecting a share and keeping the host's count of all tokens would scale the gradient by about that share."""
    student, teacher, mask = batch()
    norms = {}
    for num_items in (None, int(mask.sum())):
        x = leaf(student)
        selective_opd_loss(x, teacher, mask=mask, fraction=0.25, num_items_in_batch=num_items).loss.backward()
        norms[num_items] = x.grad.norm().item()
    assert norms[None] == pytest.approx(norms[int(mask.sum())], rel=1e-6)


def test_scope_sequence_keeps_some_of_every_row():
    student, teacher, mask = batch()
    out = selective_opd_loss(student, teacher, mask=mask, scope="sequence", fraction=0.2)
    assert torch.equal(out.selected.sum(1), (mask.sum(1) * 0.2).ceil().long())


def test_teachability_released_adds_one_of_every_sequence_left_out_by_its_own_score():
    student, teacher, mask = batch()
    out = selective_opd_loss(student, teacher, mask=mask, selector="teachability-released", fraction=0.04)
    plain = select_positions(out.scores, mask=mask, fraction=0.04)
    assert not plain.any(1).all()
    assert torch.equal(out.selected.sum(1), plain.sum(1).clamp_min(1))
    keep_scores = SELECTORS["teachability-released"].keep_scores(out.stats)
    for row in (~plain.any(1)).nonzero().flatten():
        assert keep_scores[row][out.selected[row]] == keep_scores[row][mask[row]].max()


def test_labels_of_packed_rows_give_the_last_row_of_each_no_target():
    student, teacher = logit_pair(10, 131)
    labels, cu_seqlens = torch.arange(10), torch.tensor([0, 4, 4, 5, 10])
    out = selective_opd_loss(student, teacher, labels=labels, cu_seqlens=cu_seqlens)
    assert out.stats.valid.int().tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1, 0]
    shifted = selective_opd_loss(student, teacher, shift_labels=labels, cu_seqlens=cu_seqlens)
    assert bool(shifted.stats.valid.all())


def test_labels_give_the_mask_as_in_hugging_face():
    student, teacher, _ = batch()
    labels = torch.randint(0, 131, (4, 10), generator=generator(1))
    labels[:, :4] = -100
    out = selective_opd_loss(student, teacher, labels=labels)
    want = torch.zeros(4, 10, dtype=torch.bool)
    want[:, 3:9] = True  # row i predicts labels[i + 1]; the last row predicts nothing
    assert torch.equal(out.stats.valid, want)
    assert torch.equal(selective_opd_loss(student, teacher, shift_labels=labels).stats.valid, labels != -100)
    both = selective_opd_loss(student, teacher, labels=labels.roll(1), shift_labels=labels)
    assert torch.equal(both.stats.valid, labels != -100)
    with_mask = selective_opd_loss(student, teacher, shift_labels=labels, mask=torch.arange(10).expand(4, 10) < 6)
    assert torch.equal(with_mask.stats.valid, (labels != -100) & (torch.arange(10) < 6))
    other = selective_opd_loss(student, teacher, shift_labels=labels.clamp_min(-1), ignore_index=-1)
    assert torch.equal(other.stats.valid, labels != -100)


def test_metrics_are_detached_means_sums_and_counts():
    student, teacher, mask = batch()
    student = leaf(student)
    out = selective_opd_loss(student, teacher, mask=mask, fraction=0.2)
    stats, chosen, m = out.stats, out.selected, out.metrics
    assert all(x.dim() == 0 and not x.requires_grad for x in m.values())
    want = {
        "loss": out.loss,
        "loss_sum": stats.reverse_kl[chosen].sum(),
        "kl_selected": stats.reverse_kl[chosen].mean(),
        "kl_all": stats.reverse_kl[mask].mean(),
        "kl_all_sum": stats.reverse_kl[mask].sum(),
        "entropy": stats.student_entropy[mask].mean(),
        "entropy_selected": stats.student_entropy[chosen].mean(),
        "teacher_entropy": stats.teacher_entropy[mask].mean(),
        "support_mass": stats.support_mass[mask].mean(),
        "support_mass_selected": stats.support_mass[chosen].mean(),
        "score_threshold": out.scores[chosen].min(),
    }
    for name, value in want.items():
        torch.testing.assert_close(m[name], value.detach(), msg=name)
    assert m["n_valid"] == mask.sum()
    assert m["n_selected"] == chosen.sum()
    assert m["n_infinite"] == m["n_teacher_nonfinite"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_of_the_student_makes_the_loss_nan_wherever_it_is(backend):
    student, teacher, mask = batch()
    mask[2, 3] = mask[1, 1] = True
    for value in (math.nan, math.inf):
        broken = student.clone()
        broken[2, 3, 7] = value
        out = selective_opd_loss(broken, teacher, mask=mask, backend=backend)
        assert out.loss.isnan()
        others = mask.clone()
        others[2, 3] = False
        assert selective_opd_loss(broken, teacher, mask=others, backend=backend).loss.isfinite()
    masked_row = student.clone()
    masked_row[1, 1] = -math.inf  # no distribution at all
    for selector in ("teachability", "all", "prefix"):  # the last two score the row as any other
        assert selective_opd_loss(masked_row, teacher, mask=mask, selector=selector, backend=backend).loss.isnan()


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_a_nan_of_both_models_is_the_student_s(backend):
    student, teacher, mask = (x[:2, :3] for x in batch())
    student[0, 0, 5] = teacher[0, 0, 3] = math.nan
    student.requires_grad_()
    out = selective_opd_loss(student, teacher, mask=mask, backend=backend)
    assert out.loss.isnan()
    assert out.metrics["n_teacher_nonfinite"] == 0
    with pytest.raises(ValueError, match=r"student: got logits without a finite softmax at position \(0, 0\)"):
        selective_opd_loss(student, teacher, mask=mask, backend=backend, check_finite=True)
    student, teacher, mask = (x[:2, :3] for x in batch())
    student[0, 0], teacher[0, 0], mask[0, 0] = math.nan, math.nan, 0  # masked rows hold anything
    assert selective_opd_loss(student, teacher, mask=mask, backend=backend).loss.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_of_the_teacher_excludes_the_position_and_is_counted(backend):
    student, teacher, mask = batch()
    mask[0, :3] = True
    without = mask.clone()
    without[0, :3] = False
    want = selective_opd_loss(student, teacher, mask=without, fraction=0.3, backend=backend)
    teacher[0, 0, 5], teacher[0, 1], teacher[0, 2, 9] = math.nan, -math.inf, math.inf
    student = leaf(student)
    out = selective_opd_loss(student, teacher, mask=mask, fraction=0.3, backend=backend)
    assert out.metrics["n_teacher_nonfinite"] == 3
    assert torch.equal(out.selected, want.selected)
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
    assert bool((out.scores[0, :3] == -math.inf).all())
    out.loss.backward()
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize(("side", "value"), [("teacher", math.nan), ("student", math.nan), ("teacher", math.inf)])
def test_check_finite_raises_with_the_position(side, value):
    student, teacher, mask = batch()
    mask[2, 3] = True
    {"student": student, "teacher": teacher}[side][2, 3, 7] = value
    with pytest.raises(ValueError, match=rf"{side}: got logits without a finite softmax at position \(2, 3\)"):
        selective_opd_loss(student, teacher, mask=mask, check_finite=True)
    mask[2, 3] = False
    assert selective_opd_loss(student, teacher, mask=mask, check_finite=True).loss.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_position_of_infinite_divergence_is_reported_and_not_selected(backend):
    student, teacher, mask = batch()
    mask[1, 4] = True
    teacher[1, 4, student[1, 4].argmax()] = -math.inf
    out = selective_opd_loss(student, teacher, mask=mask, fraction=1.0, backend=backend)
    assert out.stats.reverse_kl[1, 4] == math.inf
    assert out.stats.valid[1, 4]
    assert out.loss.isfinite()
    assert (mask & ~out.selected).nonzero().tolist() == [[1, 4]]
    assert out.metrics["n_infinite"] == 1
    # The forward KL is finite there, so it may be trained on.
    forward = selective_opd_loss(student, teacher, mask=mask, divergence="forward_kl", fraction=1.0, backend=backend)
    assert forward.selected[1, 4]
    # It takes no place in the budget, though its score would be the best.
    student[1, 4] *= 0.01
    best = selective_opd_loss(student, teacher, mask=mask, selector="entropy", count=1, backend=backend)
    assert best.stats.student_entropy.argmax() == 14
    assert best.scores[1, 4] == -math.inf
    assert best.selected.sum() == 1


def test_a_callable_s_nan_score_is_never_hidden():
    student, teacher, mask = batch()
    out = selective_opd_loss(student, teacher, mask=mask, selector=lambda s: s.reverse_kl / 0 * 0)
    assert out.loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_different_vocabularies_are_sliced_to_the_smaller_with_one_warning(backend):
    student, teacher = logit_pair(6, 152)
    want = selective_opd_loss(student[:, :136], teacher[:, :136], backend=backend)
    teacher[:, 136:] = 100.0  # must not matter
    with pytest.warns(UserWarning, match="the student has 136 entries, the teacher 152") as caught:
        out = selective_opd_loss(student[:, :136], teacher, backend=backend)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert out.loss.item() == want.loss.item()
    named = selective_opd_loss(student, teacher, vocab_size=136, backend=backend)  # named: no warning
    assert named.loss.item() == want.loss.item()


def test_the_warning_comes_once_whatever_happens_to_pythons_memory_of_it():
    student, teacher = torch.randn(6, 40), torch.randn(6, 44)

    def steps():
        for _ in range(3):
            selective_opd_loss(student, teacher)
            with warnings.catch_warnings():  # anybody's: it makes Python forget
                pass
        selective_opd_loss(student[:, :39], teacher)  # other vocabularies: another warning

    with pytest.warns(UserWarning, match="vocabularies differ") as caught:
        steps()
    assert len(caught) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_selector_that_works_in_place_changes_nothing_but_its_scores(backend):
    student, teacher, mask = batch()

    def halved(stats):
        return stats.reverse_kl.div_(2)

    want = selective_opd_loss(student, teacher, mask=mask, selector=lambda stats: stats.reverse_kl / 2, backend=backend)
    got = selective_opd_loss(student, teacher, mask=mask, selector=halved, backend=backend)
    assert got.loss.item() == want.loss.item()
    assert torch.equal(got.stats.reverse_kl, want.stats.reverse_kl)
    assert torch.equal(got.scores, want.scores)


@pytest.mark.parametrize("loss", [selective_opd_loss, selective_opd_token_losses])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("divergence", ["reverse_kl", pytest.param("tail_aware", marks=pytest.mark.full)])
def test_the_loss_keeps_its_dtype_whatever_torch_s_default_is(loss, backend, divergence):
    student, teacher = head_pair((4,), 131)
    before, got = torch.get_default_dtype(), []
    for default in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            out = loss(student, teacher, fraction=0.5, divergence=divergence, backend=backend)
        finally:
            torch.set_default_dtype(before)
        assert out[0].dtype == out.stats.union_kl.dtype == torch.float32
        got.append(out[0])
    assert got[0].count_nonzero() > 0
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


@pytest.mark.parametrize("zero", [0, torch.tensor(0)])
def test_a_step_without_a_valid_token_counts_none_of_them(zero):
    student, teacher, mask = batch()
    out = selective_opd_loss(student.requires_grad_(), teacher, mask=mask & False, num_items_in_batch=zero)
    out.loss.backward()
    assert out.loss.item() == 0
    assert not student.grad.any()


def test_the_qwen_vocabularies_are_sliced():
    g = generator(0)
    hidden = torch.randn(3, 2, generator=g)
    small = LinearHead(hidden, torch.randn(151_936, 2, generator=g))
    large = LinearHead(hidden, torch.cat((small.weight, torch.full((128, 2), 50.0))))
    with pytest.warns(UserWarning, match=r"151936 .* 152064.* Pass vocab_size=151936"):
        out = selective_opd_loss(small, large, fraction=1.0)
    assert out.loss.item() == pytest.approx(0.0, abs=1e-6)


def test_backends_select_the_same_positions():
    for seed in range(5):
        student, teacher, mask = batch(seed, vocab=523)
        for selector in ("teachability", "tip", "entropy", "teachability+entropy"):
            a, b = (
                selective_opd_loss(student, teacher, mask=mask, selector=selector, fraction=0.2, backend=x) for x in BACKENDS
            )
            assert torch.equal(a.selected, b.selected)


def test_equal_scores_select_the_same_positions_on_every_backend():
    student, teacher = logit_pair(6, 67, dtype=torch.bfloat16)
    student, teacher = student.repeat(4, 1), teacher.repeat(4, 1)  # every score four times
    a, b = (selective_opd_loss(student, teacher, fraction=0.25, backend=x).selected for x in BACKENDS)
    assert torch.equal(a, b)
    copies = a.view(4, 6)
    assert copies.sum(0).sort().values.tolist() == [0, 0, 0, 0, 2, 4]
    assert copies.int().diff(dim=0).max() == 0  # of equal rows the earlier ones


def test_fraction_one_is_plain_distillation():
    student, teacher = head_pair((4, 9), 131)
    out = selective_opd_loss(student, teacher, fraction=1.0)
    assert bool(out.selected.all())
    assert out.loss.item() == pytest.approx(out.stats.reverse_kl.mean().item(), rel=1e-6)


def test_metrics_of_any_dtype_become_floats_under_their_names():
    got = as_floats({"n": torch.tensor(3), "x": torch.tensor(0.1, dtype=torch.float64), "flag": torch.tensor(True)})
    assert got == {"n": 3.0, "x": 0.1, "flag": 1.0}
    assert as_floats({}) == {}


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
def test_num_items_of_zero_is_an_error_where_positions_are_selected(zero):
    student, teacher, mask = batch()
    with pytest.raises(
        ValueError, match=r"num_items_in_batch: got 0, but \d+ positions are selected; pass the count of valid tokens"
    ):
        selective_opd_loss(student, teacher, mask=mask, num_items_in_batch=zero)


@pytest.mark.parametrize("zero", [0, torch.tensor(0)])
@pytest.mark.parametrize("denominator", ["selected", "valid"])
@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
def test_num_items_of_zero_that_nobody_may_look_at_gives_no_gradient(zero, denominator, backend, monkeypatch):
    monkeypatch.setattr(
        "opd_ops.call.reduce._check_some_items", lambda value, selected: None
    )  # as on a device, in a graph, over ranks
    student, teacher, mask = batch()
    x = leaf(student)
    out = selective_opd_loss(x, teacher, mask=mask, num_items_in_batch=zero, denominator=denominator, backend=backend)
    out.loss.backward()
    assert out.selected.any()
    assert out.loss.item() == 0
    assert not x.grad.any()


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
def test_divergences_of_models_that_nearly_agree_are_not_negative(divergence, backend):
    student, teacher = logit_pair(20 if backend == "triton" else 300, 97, noise=1e-5)  # interpreted rows are slow
    x = leaf(student)
    out = selective_opd_loss(x, teacher, fraction=1.0, selector="all", divergence=divergence, backend=backend)
    for name in ("reverse_kl", "forward_kl", "union_kl"):
        assert getattr(out.stats, name).min() >= 0
    assert out.loss.item() >= 0
    out.loss.backward()
    y = leaf(student, torch.float64)
    selective_opd_loss(
        y, teacher.double(), fraction=1.0, selector="all", divergence=divergence, backend="eager"
    ).loss.backward()
    scale = (student.softmax(-1) / len(student)).norm().item()  # rounding of log-probabilities, relative to the probabilities
    assert (x.grad - y.grad).norm() <= 3e-6 * scale
    assert (x.grad != 0).any(1).all()  # no row's gradient is lost where rounding made its divergence negative


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
def test_what_a_head_holds_beyond_the_common_vocabulary_reaches_nothing(backend):
    student, teacher = head_pair((6,), 70, bias=True)
    expected = None
    for filler in (0.0, math.nan, math.inf):
        sides = []
        for head in (student, teacher):
            weight, bias = head.weight.clone(), head.bias.clone()
            weight[64:], bias[64:] = filler, filler
            sides.append(LinearHead(leaf(head.hidden), leaf(weight), leaf(bias)))
        out = selective_opd_loss(*sides, fraction=0.5, vocab_size=64, backend=backend)
        out.loss.backward()
        result = [out.loss.detach(), sides[0].hidden.grad, sides[0].weight.grad, sides[0].bias.grad]
        expected = result if expected is None else expected
        for got, want in zip(result, expected, strict=True):
            assert torch.equal(got, want)
    assert expected[1].count_nonzero() > 0
