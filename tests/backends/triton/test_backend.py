"""The Triton backend, its kernels interpreted or compiled, against the fp64 oracle: statistics, gradients, layouts, refusals.

  Compared: columns of TokenStats and relative norms of gradients, by support/tolerances.py. Few rows: one takes 0.2 s
  interpreted. Run: make test ARGS=tests/backends/triton/test_backend.py

Not here: the kernels one by one (tests/kernels/), layouts (test_layout.py), compiled code on a GPU
(benchmarks/gpu/run.py).
"""

import logging
import math
import sys

import pytest
import torch

from opd_ops import LinearHead, ReverseKL, score_positions, selective_opd_loss
from opd_ops.backends import resolve as backends
from opd_ops.backends.interface import Needs
from opd_ops.backends.resolve import resolve_backend
from opd_ops.backends.streamed.backend import STREAMED
from opd_ops.backends.triton import backend as triton_backend
from opd_ops.inputs.sources import Source
from tests.backends.test_eager import _Everything
from tests.support.cases import head_pair, leaf, logit_pair, to_double
from tests.support.meters import saved_bytes
from tests.support.tolerances import assert_gradient, assert_stats, relative_error, small_kl_bound

DIVERGENCES = ["reverse_kl", "forward_kl"]


def compare_stats(student, teacher, **options):
    _, want = score_positions(student.double(), teacher.double(), backend="eager", **options)
    scores, got = score_positions(student, teacher, backend="triton", **options)
    assert_stats(got, want)
    return scores, got


def backward(student, teacher, **options):
    out = selective_opd_loss(student, teacher, **{"fraction": 0.5, "backend": "triton", **options})
    out.loss.backward()
    return out


def compare_gradient(student, teacher, bound=1e-5, view=lambda x: x, **options):
    want, got = leaf(student, torch.float64), leaf(student)
    expected = backward(view(want), view(teacher).double(), **{**options, "backend": "eager"})
    out = backward(view(got), view(teacher), **options)
    assert torch.equal(out.selected, expected.selected)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-4, atol=1e-6)
    assert_gradient(got.grad, want.grad, bound)
    assert not view(got.grad)[~out.selected].any()
    return out


# statistics


@pytest.mark.parametrize("dtype", triton_backend.DTYPES)
@pytest.mark.parametrize("vocab", [17, 131, 300])
def test_statistics_match_eager_fp64(vocab, dtype):
    _, stats = compare_stats(*logit_pair(3, vocab, dtype=dtype))
    assert stats.reverse_kl.dtype == torch.float32
    assert stats.jsd is None


@pytest.mark.parametrize("workspace_bytes", [1, 2**20])
def test_optional_statistics_match_eager_fp64(workspace_bytes):
    compare_stats(*logit_pair(4, 131), selector=_Everything(), workspace_bytes=workspace_bytes, temperature=0.7)


@pytest.mark.parametrize("top_k", [1, 37])
def test_statistics_match_eager_fp64_at_every_top_k(top_k):
    compare_stats(*logit_pair(2, 37, scale=1.0), top_k=top_k, temperature=1.3)


@pytest.mark.parametrize(("scale", "noise"), [(1.0, 1e-3), (8.0, 3e-4), (60.0, 1e-3), (60.0, 4.0), (8.0, 16.0)])
def test_kl_is_exact_and_never_negative(scale, noise):
    compare_stats(*logit_pair(2, 2003, scale=scale, noise=noise, seed=3))


def test_masked_vocabulary_entries_and_rows_are_legal():
    student, teacher = logit_pair(5, 300)
    student[:, :150] = teacher[:, :150] = -math.inf
    student[0, 151:200] = teacher[1, 151:200] = -math.inf
    student[2, 160:] = teacher[2, 160:] = -math.inf  # fewer entries left than K
    mask = torch.arange(5) < 4
    student[4], teacher[4] = math.nan, math.inf
    _, stats = compare_stats(student, teacher, mask=mask)
    assert stats.reverse_kl[1] == stats.forward_kl[0] == math.inf


def test_the_size_of_the_workspace_does_not_change_the_result():
    student, teacher = logit_pair(5, 131)
    runs = []
    for workspace_bytes in (1, 5_000, 2**29):
        x = leaf(student)
        out = backward(x, teacher, workspace_bytes=workspace_bytes)
        runs.append((out.stats.reverse_kl, out.stats.union_kl, out.loss, x.grad))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_it_selects_what_torch_selects():
    student, teacher = logit_pair(12, 257, dtype=torch.bfloat16)
    for selector in ("teachability", "tip", "teachability-released"):
        a, b = (selective_opd_loss(student, teacher, selector=selector, fraction=0.3, backend=x) for x in ("triton", "torch"))
        assert torch.equal(a.selected, b.selected)
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-5)


def test_no_positions_and_an_empty_selection():
    scores, stats = score_positions(torch.empty(0, 33), torch.empty(0, 33), backend="triton")
    assert scores.shape == stats.union_kl.shape == (0,)
    student, teacher = logit_pair(3, 130)
    student = leaf(student)
    out = backward(student, teacher, mask=torch.zeros(3))
    assert out.loss.item() == 0.0
    assert not student.grad.any()


# gradients


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocab", [17, 300])
def test_gradient_matches_eager_fp64(vocab, divergence):
    compare_gradient(*logit_pair(5, vocab), divergence=divergence, temperature=0.8, selector="entropy")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("scale", "noise"), [(1.0, 1e-3), (60.0, 1e-2), (8.0, 16.0)])
def test_gradient_is_exact_for_small_and_large_kl(scale, noise, divergence):
    student, teacher = logit_pair(3, 2003, scale=scale, noise=noise, seed=3)
    bound = small_kl_bound(score_positions(student, teacher)[1].reverse_kl.max().item())
    compare_gradient(student, teacher, bound, divergence=divergence, fraction=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_low_precision_gradient_is_no_worse_than_eager(divergence, dtype):
    student, teacher = logit_pair(4, 517, dtype=dtype)
    grads = {}
    for name, cast, backend in (("want", torch.float64, "eager"), ("eager", dtype, "eager"), ("triton", dtype, "triton")):
        x = leaf(student, cast)
        backward(x, teacher.to(cast), backend=backend, selector="entropy", divergence=divergence)
        grads[name] = x.grad
    assert grads["triton"].dtype == dtype
    assert relative_error(grads["triton"], grads["want"]) <= 2 * relative_error(grads["eager"], grads["want"])


VIEWS = {
    "shifted": lambda x: x[:, :-1],
    "transposed": lambda x: x.transpose(0, 1),
    "one position": lambda x: x[1, 0],
}


@pytest.mark.parametrize("name", VIEWS)
def test_logits_are_read_in_any_leading_layout(name):
    student, teacher = (x.view(2, 3, 130) for x in logit_pair(6, 130))
    compare_gradient(student, teacher, view=VIEWS[name])


def test_vocabulary_entries_beyond_the_common_ones_get_zero():
    student, teacher = (leaf(x) for x in logit_pair(4, 150))
    backward(student, teacher[:, :131], vocab_size=130)
    want = leaf(student[:, :130], torch.float64)
    backward(want, teacher[:, :130].double(), backend="eager")
    assert_gradient(student.grad[:, :130], want.grad, 1e-5)
    assert not student.grad[:, 130:].any()
    assert teacher.grad is None


def test_non_finite_logits_follow_the_contract():
    student, teacher = logit_pair(6, 131)
    student[:, 3:9] = teacher[:, 3:9] = -math.inf
    teacher[1, student[1].argmax()] = -math.inf  # infinite: reported, not selected
    teacher[2, 5] = math.nan  # not valid
    x = leaf(student)
    out = backward(x, teacher, fraction=1.0)
    assert out.stats.reverse_kl[1] == math.inf
    assert out.selected.tolist() == [True, False, False, True, True, True]
    assert out.metrics["n_teacher_nonfinite"] == out.metrics["n_infinite"] == 1
    assert out.loss.isfinite()
    assert x.grad.isfinite().all()
    student[4, 7] = math.nan
    assert selective_opd_loss(student, teacher, backend="triton").loss.isnan()


def test_retain_graph_and_upstream_gradients():
    student, teacher = logit_pair(4, 131)
    once, thrice = leaf(student), leaf(student)
    backward(once, teacher)
    loss = selective_opd_loss(thrice, teacher, fraction=0.5, backend="triton").loss
    (2 * loss).backward(retain_graph=True)
    loss.backward()
    assert_gradient(thrice.grad, 3 * once.grad, 1e-6)


def test_an_overwritten_input_is_noticed():
    student, teacher = logit_pair(3, 131)
    student = leaf(student)
    loss = selective_opd_loss(student, teacher, backend="triton").loss
    with torch.no_grad():
        student.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_of_the_size_of_the_logits_is_saved():
    student, teacher = logit_pair(4, 517)
    student = leaf(student)
    with saved_bytes([student, teacher]) as saved:
        selective_opd_loss(student, teacher, fraction=0.5, backend="triton")
    assert saved["bytes"] < 300


# in place


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocab_size", [None, 120])
def test_inplace_backward_gives_the_same_gradient_in_the_student_s_memory(vocab_size, divergence):
    student, teacher = (x.view(2, 3, 131) for x in logit_pair(6, 131, dtype=torch.bfloat16))
    apart, base = leaf(student), leaf(student)
    options = {"divergence": divergence, "vocab_size": vocab_size, "mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    backward(apart.clone(), teacher, **options)
    logits = base.clone()
    where = []
    logits.register_hook(lambda gradient: where.append(gradient.data_ptr()))
    loss = selective_opd_loss(logits, teacher, fraction=0.5, backend="triton", inplace_backward=True, **options).loss
    assert torch.equal(logits, student)
    loss.backward()
    assert where == [logits.data_ptr()]
    assert torch.equal(base.grad, apart.grad)
    assert base.grad.any()


def test_inplace_backward_zeroes_the_right_rows_of_any_layout():
    def gradient(inplace):
        student, teacher = (x.view(3, 4, 40) for x in logit_pair(12, 40))
        x = leaf(student)
        logits = x.transpose(0, 1) * 1.0  # no view, and its rows lie in another order than its positions
        assert logits.stride() == (40, 160, 1)
        options = {"fraction": 0.25, "backend": "triton", "inplace_backward": inplace}
        selective_opd_loss(logits, teacher.transpose(0, 1), **options).loss.backward()
        return x.grad

    assert torch.equal(gradient(True), gradient(False))
    assert gradient(True).any()


def test_inplace_backward_raises_where_the_logits_are_used_twice():
    student, teacher = logit_pair(3, 131)
    options = {"fraction": 0.5, "backend": "triton", "inplace_backward": True}
    logits = leaf(student).clone()
    loss = selective_opd_loss(logits, teacher, **options).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"inplace_backward: the backward ran a second time.*retain_graph"):
        loss.backward()
    logits = leaf(student).clone()
    pair = [selective_opd_loss(logits, teacher, **options).loss for _ in range(2)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (pair[0] + pair[1]).backward()
    logits = leaf(student).clone()
    squared = logits.square().sum()  # saves the logits
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squared + selective_opd_loss(logits, teacher, **options).loss).backward()


def test_inplace_backward_rejects_logits_that_others_may_read():
    student, teacher = logit_pair(4, 131)
    options = {"backend": "triton", "inplace_backward": True}
    made = leaf(student).clone()
    cases = [
        (student, teacher, "do not require a gradient"),
        (leaf(student), teacher, "are a leaf"),
        (made[:2], teacher[:2], "are a view"),
        (made, made.detach(), "share their memory with the teacher's"),
    ]
    for s, t, message in cases:
        with pytest.raises(ValueError, match=f"inplace_backward: got True, but the student's logits {message}"):
            selective_opd_loss(s, t, **options)
    with torch.no_grad():
        assert selective_opd_loss(student, teacher, **options).loss > 0
    for backend in ("torch", "eager"):
        with pytest.raises(
            ValueError,
            match=f"has, for dense logits of the whole vocabulary and reverse or forward KL; this call uses '{backend}'",
        ):
            selective_opd_loss(made, teacher, backend=backend, inplace_backward=True)
    with pytest.raises(ValueError, match=r"this call uses 'torch' \(the device is cpu\)"):
        selective_opd_loss(made, teacher, inplace_backward=True)


# which backend


LOGITS = torch.zeros(4, 3, 20)
MIXED = LinearHead(torch.zeros(4, 3, 8), torch.zeros(20, 8, dtype=torch.bfloat16))
REFUSED = [
    (
        MIXED,
        LOGITS,
        {},
        r"student has hidden states of torch\.float32 and a weight of torch\.bfloat16, expected one dtype; pass hidden\.to",
    ),
    (LOGITS, to_double(head_pair((4, 3), 20)[1]), {}, r"teacher has dtype torch\.float64"),
    (
        LOGITS.double(),
        LOGITS,
        {},
        r"student has dtype torch\.float64, expected fp32, bf16 or fp16",
    ),
    (
        LOGITS,
        LOGITS.expand(4, 3, 20)[..., ::2],
        {"vocab_size": 10, "top_k": 5},
        r"teacher has strides \(60, 20, 2\).*\.contiguous\(\)",
    ),
    (LOGITS[:1].expand(4, 3, 20), LOGITS, {}, "student has strides .* no memory shared between positions"),
    (LOGITS, LOGITS.view(3, 4, 20).transpose(0, 1), {}, "student and teacher lay their positions out differently"),
    (torch.zeros(3, 200), torch.zeros(3, 200), {"top_k": 129}, "top_k is 129, expected at most 128; use 'torch'"),
]


@pytest.mark.parametrize(("student", "teacher", "options", "message"), REFUSED)
def test_triton_by_name_rejects_what_it_cannot_run(student, teacher, options, message):
    with pytest.raises(ValueError, match=f"backend: got 'triton', but {message}"):
        selective_opd_loss(student, teacher, backend="triton", **options)


def test_triton_by_name_rejects_a_machine_it_cannot_run_on(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="but the logits are on cpu, expected one of: cuda, xpu; use 'torch' there"):
        selective_opd_loss(LOGITS, LOGITS, backend="triton")
    monkeypatch.setattr("triton.__version__", "3.4.0")
    with pytest.raises(ValueError, match=r"but triton 3\.4\.0 is installed, expected 3\.6 or newer"):
        selective_opd_loss(LOGITS, LOGITS, backend="triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"but triton is not installed; pip install 'opd-ops\[triton\]'"):
        selective_opd_loss(LOGITS, LOGITS, backend="triton")
    assert selective_opd_loss(LOGITS, LOGITS).loss == 0


def test_a_gpu_that_triton_does_not_compile_for_takes_torch(monkeypatch):
    monkeypatch.setattr("torch.version.hip", None)
    for capability, refused in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        known = {None: (9, 0), torch.device("cuda:1"): capability}  # None: the current device
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, known=known: known[device])
        answer = backends._without_triton(torch.device("cuda:1"))
        assert refused == (answer is not None)
        assert answer is None or "cuda:1 has compute capability 7.5, expected 8.0 or newer" in answer


def test_auto_takes_triton_on_a_gpu_where_it_can_run_and_says_so(monkeypatch, caplog):
    def chosen(student, teacher):
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "opd_ops"):
            sources = Source.of(student, 20, 1.0), Source.of(teacher, 20, 1.0)
            return resolve_backend("auto", *sources, Needs(ReverseKL(), top_k=16))

    assert chosen(LOGITS, LOGITS) is STREAMED
    assert "using 'torch' (the device is cpu)" in caplog.text
    monkeypatch.setattr(backends, "DEVICES", ("cpu",))
    assert chosen(LOGITS, LOGITS) is triton_backend.TRITON
    assert "using 'triton' (the device is cpu)" in caplog.text
    assert chosen(LOGITS.double(), LOGITS) is STREAMED
    assert "using 'torch' (student has dtype torch.float64" in caplog.text
