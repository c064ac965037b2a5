"""Properties over drawn shapes, masks, strides, dtypes, selectors and options: what holds for every call.

  Finite results; gradient exactly zero off the selection; the budget met; both backends agree; permuting the vocabulary or
  shifting a row of logits changes no statistic. Run: make test ARGS=tests/loss/test_properties.py

Not here: values against the oracle at chosen hard cases (tests/backends/streamed/test_score.py, tests/loss/test_gradients.py).
"""

import math
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ops import score_positions, select_positions, selective_opd_loss
from opd_ops.selection.selectors import SELECTORS
from tests.support.cases import generator, leaf, logit_pair
from tests.support.tolerances import assert_gradient, assert_stats, assert_within


@st.composite
def calls(draw):
    """A legal call on dense logits: (student, teacher, options)."""
    shape = draw(st.sampled_from([(1,), (7,), (3, 5), (2, 1), (2, 3, 2), (0,), (2, 0)]))
    vocab = draw(st.integers(2, 150))
    n = math.prod(shape)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    scale, noise = draw(st.sampled_from([1.0, 4.0, 20.0])), draw(st.sampled_from([0.1, 1.0, 3.0]))
    student, teacher = (
        x.view(*shape, vocab)
        for x in logit_pair(n, vocab, scale=scale, noise=noise, seed=draw(st.integers(0, 99)), dtype=dtype)
    )
    if draw(st.booleans()) and n:
        absent = torch.rand(vocab, generator=generator(draw(st.integers(0, 9)))) < 0.3
        absent[draw(st.integers(0, vocab - 1))] = False
        student, teacher = (x.masked_fill(absent, -math.inf) for x in (student, teacher))
    if draw(st.booleans()):
        student, teacher = (x.repeat_interleave(2, -1)[..., ::2] for x in (student, teacher))  # no unit stride
    mask = (torch.rand(shape, generator=generator(draw(st.integers(0, 9)))) > 0.4) if draw(st.booleans()) else None
    options = {
        "mask": mask,
        "top_k": draw(st.integers(1, min(vocab, 20))),
        "temperature": draw(st.sampled_from([1.0, 0.5, 2.0])),
        "workspace_bytes": draw(st.sampled_from([1, 5_000, 2**20])),
    }
    return student, teacher, options


@settings(max_examples=40)
@given(
    calls(),
    st.sampled_from(sorted(SELECTORS)),
    st.sampled_from(["reverse_kl", "forward_kl"]),
    st.sampled_from([0.05, 0.3, 1.0]),
)
def test_loss_is_finite_and_its_gradient_is_zero_off_the_selection(call, selector, divergence, fraction):
    student, teacher, options = call
    student = leaf(student)
    options["tokens"] = student.argmax(-1)
    out = selective_opd_loss(
        student, teacher, selector=selector, divergence=divergence, fraction=fraction, generator=generator(0), **options
    )
    out.loss.backward()
    assert bool(out.loss.isfinite())
    assert out.loss >= 0
    assert bool(student.grad.isfinite().all())
    assert not student.grad[~out.selected].any()
    n_valid = student[..., 0].numel() if options["mask"] is None else int(options["mask"].sum())
    least = max(1, math.ceil(Fraction(str(fraction)) * n_valid)) if n_valid else 0
    extra = out.selected.shape[0] if selector.endswith("-released") or selector == "ier" else 0
    assert least <= out.selected.sum() <= least + extra
    if options["mask"] is not None:
        assert not out.selected[~options["mask"]].any()


@settings(max_examples=40)
@given(calls())
def test_backends_agree(call):
    student, teacher, options = call
    results = {}
    for backend in ("torch", "eager"):
        x = leaf(student, torch.float32)
        out = selective_opd_loss(x, teacher.float(), selector="entropy", fraction=1.0, backend=backend, **options)
        out.loss.backward()
        results[backend] = out, x.grad
    assert_stats(results["torch"][0].stats, results["eager"][0].stats, absolute=1e-5)  # eager in fp32 is no oracle
    want = results["eager"][1]
    if want.norm() > 1e-3:
        assert_gradient(results["torch"][1], want, 1e-3)


@settings(max_examples=25)
@given(calls(), st.integers(0, 9))
def test_permuting_the_vocabulary_changes_no_statistic(call, seed):
    student, teacher, options = call
    # Distinct logits: among equal ones the ids decide, and those are what is permuted.
    vocab = student.shape[-1]
    student = student.float() + torch.linspace(0, 1e-2, vocab)
    teacher = teacher.float() + torch.linspace(1e-2, 0, vocab)
    order = torch.randperm(vocab, generator=generator(seed))
    _, want = score_positions(student, teacher, **options)
    _, got = score_positions(student[..., order], teacher[..., order], **options)
    assert_stats(got, want, absolute=3e-6)


@settings(max_examples=25)
@given(calls(), st.sampled_from([-30.0, 0.5, 11.0]))
def test_shifting_the_logits_changes_no_statistic_but_the_log_sum_exp(call, shift):
    student, teacher, options = call
    student, teacher = student.double(), teacher.double()  # in fp32 the shift itself rounds
    _, want = score_positions(student, teacher, **options)
    _, got = score_positions(student + shift, teacher, **options)
    moved = shift / options["temperature"]
    assert_within(
        got.student_logsumexp[want.valid], want.student_logsumexp[want.valid] + moved, absolute=1e-9, relative=1e-9, name="lse"
    )
    same = {name: getattr(want, name) for name in ("student_logsumexp", "logsumexp_gap", "reference_student")}
    assert_stats(got._replace(**same), want)


@settings(max_examples=60)
@given(st.integers(0, 60), st.integers(1, 1000), st.integers(0, 99), st.booleans())
def test_selection_is_the_best_of_the_valid(n, permille, seed, coarse):
    scores = torch.rand(n, generator=generator(seed))
    scores = (scores * 4).floor() if coarse else scores  # many ties
    mask = torch.rand(n, generator=generator(seed + 1)) > 0.3
    selected = select_positions(scores, mask=mask, fraction=permille / 1000)
    ranked = sorted((i for i in range(n) if mask[i]), key=lambda i: (-scores[i].item(), i))
    keep = max(1, math.ceil(Fraction(permille, 1000) * len(ranked))) if ranked else 0
    assert selected.nonzero().flatten().tolist() == sorted(ranked[:keep])


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(0, 99))
def test_permuting_the_rows_permutes_the_scores(n, seed):
    student, teacher = logit_pair(n, 41, seed=seed)
    order = torch.randperm(n, generator=generator(seed))
    for selector in ("teachability", "tip", "overconfident", "teachability-released"):
        scores, _ = score_positions(student, teacher, selector=selector)
        permuted, _ = score_positions(student[order], teacher[order], selector=selector)
        assert_within(permuted, scores[order], absolute=1e-5, relative=1e-5, name=selector)
