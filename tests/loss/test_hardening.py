"""Drawn combinations of teacher, divergence, selector, scope, dtype and mask: what holds for every one of them.

  Finite results; a gradient of exactly zero off the selection; permuting the vocabulary or the rows permutes what comes out;
  adding a constant to a row's logits changes nothing; all backends agree. Run: make test ARGS=tests/loss/test_hardening.py

Not here: properties of scores and selection alone (tests/loss/test_properties.py), values against the equations
(tests/divergences/test_divergences.py, tests/inputs/test_teacher_lists.py).
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ops import (
    JSD,
    EntropyAware,
    Extrapolated,
    ForwardKL,
    LinearHead,
    LocalSupport,
    Power,
    ReverseKL,
    SampledLogprobs,
    SampledToken,
    SkewKL,
    TailAware,
    TopK,
    TopKForwardKL,
    TopKLogprobs,
    TotalVariation,
    selective_opd_loss,
)
from opd_ops.selection.selectors import SELECTORS
from tests.support.cases import generator, leaf, logit_pair
from tests.support.tolerances import relative_error

pytestmark = pytest.mark.full
K = 6
WHOLE = [
    ReverseKL(),
    ForwardKL(),
    JSD(0.3),
    TotalVariation(),
    SkewKL(0.2, "forward"),
    Power(0.5),
    JSD(0.7, entry_clip=0.02),
    SampledToken(baseline="kl"),
    EntropyAware(tau=1.0, top_k=K),
    EntropyAware(top_k=K, divergence=JSD()),
    TopK("jsd", "union", "bucket", K),
    TopK("reverse", "student", "mass", K),
]
ON_LIST = [LocalSupport(top_k=K), TailAware(top_k=K), TopKForwardKL(top_k=K), TopK("forward", "intersection", "mass", K)]
SAMPLED = [SampledToken(), SampledToken(clip=0.5), SampledToken(shape="power"), SampledToken(shape="tanh")]
OF_LISTS = ["teachability", "teachability+entropy", "teachability-released", "incompatibility", "compatibility", "divergence"]
OF_STUDENT = ["entropy", "random", "all", "prefix"]
OF_TOKENS = ["dial", "log-ratio"]


@dataclass(frozen=True)
class Call:
    """A call as tensors of whole rows, in fp64, and what is made of them."""

    s: torch.Tensor  # (B, T, V)
    u: torch.Tensor
    reference: torch.Tensor | None
    tokens: torch.Tensor  # (B, T)
    teacher: str  # dense, head, top_k, sampled
    student: str  # dense, head
    dtype: torch.dtype
    options: dict

    def side(self, kind, logits):
        logits = logits.to(self.dtype)
        if kind != "head":
            return logits
        return LinearHead(logits, torch.eye(logits.shape[-1], dtype=self.dtype))

    def made(self):
        """The student, as a leaf and as it is passed, and the teacher."""
        student = leaf(self.s.to(self.dtype))
        passed = self.side(self.student, student)
        log_q = self.u.log_softmax(-1)
        if self.teacher == "top_k":
            got = log_q.topk(K, dim=-1)
            teacher = TopKLogprobs(got.indices, got.values.to(self.dtype))
        elif self.teacher == "sampled":
            token_logprobs = log_q.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)
            teacher = SampledLogprobs(self.tokens, token_logprobs.to(self.dtype))
        else:
            teacher = self.side(self.teacher, self.u)
        return student, passed, teacher

    def run(self, backend="torch", **changed):
        student, passed, teacher = self.made()
        options = {**self.options, **changed}
        if self.reference is not None:
            teacher = Extrapolated(1.25, teacher, self.reference.to(self.dtype))
        out = selective_opd_loss(passed, teacher, tokens=self.tokens, backend=backend, generator=generator(0), **options)
        out.loss.backward()
        return out, student.grad


@st.composite
def calls(
    draw,
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    selectors=None,
    shapes=((1, 1), (2, 5), (3, 4), (1, 9)),
):
    shape = draw(st.sampled_from(shapes))
    vocab = draw(st.integers(K + 1, 90))
    n = shape[0] * shape[1]
    noise, scale = draw(st.sampled_from([0.3, 1.0])), draw(st.sampled_from([1.5, 4.0]))
    s, u = (
        x.view(*shape, vocab)
        for x in logit_pair(n, vocab, scale=scale, noise=noise, seed=draw(st.integers(0, 99)), dtype=torch.float64)
    )
    teacher = draw(st.sampled_from(["dense", "head", "top_k", "sampled"]))
    kinds = {"top_k": ON_LIST, "sampled": SAMPLED}.get(teacher, WHOLE + ON_LIST + SAMPLED)
    names = {"top_k": OF_LISTS + OF_STUDENT, "sampled": OF_STUDENT + OF_TOKENS}.get(teacher, sorted(SELECTORS))
    is_mixed = teacher in ("dense", "head") and draw(st.booleans())
    tokens = torch.multinomial(s.softmax(-1).view(n, vocab), 1, generator=generator(1)).view(shape)
    mask = torch.rand(shape, generator=generator(draw(st.integers(0, 9)))) > 0.4
    options = {
        "mask": mask if draw(st.booleans()) else None,
        "weights": 0.5 + torch.rand(shape, generator=generator(3)) if draw(st.booleans()) else None,
        "divergence": draw(st.sampled_from(kinds)),
        "selector": draw(st.sampled_from([x for x in names if selectors is None or x in selectors])),
        "scope": draw(st.sampled_from(["batch", "sequence"])),
        "fraction": draw(st.sampled_from([0.2, 0.5, 1.0])),
        "top_k": draw(st.integers(1, K)),
        "temperature": draw(st.sampled_from([1.0, 0.5])) if teacher in ("dense", "head") else 1.0,
        "eos_ids": draw(st.sampled_from([(), (0, 3)])) if teacher != "sampled" else (),
        "special_ids": draw(st.sampled_from([(), (1, 2)])),
        "workspace_bytes": draw(st.sampled_from([1, 20_000, 2**20])),
    }
    reference = s + 0.3 * torch.randn(s.shape, generator=generator(5), dtype=s.dtype) if is_mixed else None
    student = draw(st.sampled_from(["dense", "head"]))
    return Call(s, u, reference, tokens, teacher, student, draw(st.sampled_from(dtypes)), options)


@settings(max_examples=80)
@given(calls())
def test_results_are_finite_and_the_gradient_is_zero_off_the_selection(call):
    out, gradient = call.run()
    assert bool(out.loss.isfinite())
    assert bool(gradient.isfinite().all())
    assert not gradient[~out.selected].any()
    assert not out.selected[~out.stats.valid].any()
    assert out.metrics["n_selected"] == out.selected.sum()
    if out.stats.valid.any():
        assert out.selected.any() or out.metrics["n_infinite"]
    if call.options["mask"] is not None:
        assert not out.selected[~call.options["mask"]].any()


def assert_same(got, want, *, bound):
    """Loss and gradient, (output, gradient) each."""
    assert torch.equal(got[0].selected, want[0].selected)
    assert got[0].loss.item() == pytest.approx(want[0].loss.item(), rel=bound, abs=bound)
    if want[1].norm() > 1e-6:
        assert relative_error(got[1], want[1]) <= bound


@settings(max_examples=80)
@given(calls(dtypes=(torch.float64,)))
def test_the_streamed_backend_is_the_specification(call):
    assert_same(call.run("torch"), call.run("eager"), bound=1e-7)


@settings(max_examples=12)
@given(calls(dtypes=(torch.float32,), selectors=("all", "prefix"), shapes=((1, 1), (1, 2))))  # interpreted rows are slow
def test_the_triton_backend_is_the_specification(call):
    call = replace(call, options={**call.options, "eos_ids": ()})  # which kernels do not read
    assert_same(call.run("triton"), replace(call, dtype=torch.float64).run("eager"), bound=1e-4)


@settings(max_examples=60)
@given(calls(dtypes=(torch.float64,)), st.integers(0, 9))
def test_permuting_the_vocabulary_permutes_the_gradient(call, seed):
    vocab = call.s.shape[-1]
    order = torch.randperm(vocab, generator=generator(seed))
    place = order.argsort()  # of each id after the permutation
    moved = replace(
        call,
        s=call.s[..., order],
        u=call.u[..., order],
        reference=None if call.reference is None else call.reference[..., order],
        tokens=place[call.tokens],
        options={
            **call.options,
            "eos_ids": tuple(place[list(call.options["eos_ids"])].tolist()),
            "special_ids": tuple(place[list(call.options["special_ids"])].tolist()),
        },
    )
    (out, gradient), want = moved.run(), call.run()
    assert_same((out, gradient[..., place]), want, bound=1e-8)


@settings(max_examples=60)
@given(calls(dtypes=(torch.float64,), selectors=("entropy", "divergence", "compatibility", "tip", "teachability", "all")))
def test_permuting_the_sequences_permutes_the_gradient(call):
    order = torch.arange(len(call.s)).flip(0)

    def moved(x):
        return None if x is None else x[order]

    options = {**call.options, "mask": moved(call.options["mask"]), "weights": moved(call.options["weights"])}
    if options["selector"] == "all":
        options["fraction"] = 1.0  # ties go to the earlier position
    call = replace(call, options={**call.options, "fraction": options["fraction"]})
    swapped = replace(
        call, s=moved(call.s), u=moved(call.u), reference=moved(call.reference), tokens=moved(call.tokens), options=options
    )
    (out, gradient), want = swapped.run(), call.run()
    scores = want[0].scores[want[0].scores.isfinite()]
    if call.options["selector"] != "all" and len(scores.unique()) < len(scores):
        return  # equal scores: which is kept depends on the order, as it should
    assert torch.equal(out.selected[order], want[0].selected)
    assert_same((out._replace(selected=out.selected[order]), gradient[order]), want, bound=1e-7)


@settings(max_examples=60)
@given(calls(dtypes=(torch.float64,)), st.sampled_from([-20.0, 0.5, 300.0]))
def test_adding_a_constant_to_a_row_s_logits_changes_nothing(call, shift):
    rows = torch.linspace(0, 1, call.s[..., 0].numel(), dtype=torch.float64).view(*call.s.shape[:-1], 1)
    moved = replace(call, s=call.s + shift * rows, u=call.u - shift * rows)
    assert_same(moved.run(), call.run(), bound=1e-7)
