"""Gradients of the streamed backend: against the fp64 oracle's autograd, finite differences, and the ways autograd is used.

  Compared: relative norms of d loss / d {logits, hidden, weight, bias}, by support/tolerances.py.
  Run: make test ARGS=tests/loss/test_gradients.py

Not here: the oracle against the closed forms (tests/backends/test_eager.py), memory and FLOPs (tests/loss/test_cost.py).
"""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from opd_ops import LinearHead, TopKLogprobs, score_positions, selective_opd_loss, selective_opd_token_losses
from tests.support.cases import gradients, head_pair, leaf, leaf_head, logit_pair, to_double
from tests.support.tolerances import assert_gradient, relative_error, small_kl_bound

DIVERGENCES = ["reverse_kl", "forward_kl"]


def backward(student, teacher, **options):
    out = selective_opd_loss(student, teacher, **{"fraction": 0.3, "workspace_bytes": 60_000, **options})
    out.loss.backward()
    return out


def compare_logits(student, teacher, bound, **options):
    want, got = leaf(student, torch.float64), leaf(student)
    expected = backward(want, teacher.double(), backend="eager", **options)
    out = backward(got, teacher, backend="torch", **options)
    assert torch.equal(out.selected, expected.selected)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-4, atol=1e-6)
    assert_gradient(got.grad, want.grad, bound)
    assert not got.grad[~out.selected].any()
    return out


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("workspace_bytes", [1, 60_000, 2**28])
@pytest.mark.parametrize("vocab", [17, 1031])
def test_logit_gradient_matches_eager_fp64(vocab, workspace_bytes, divergence):
    compare_logits(*logit_pair(20, vocab), 1e-5, workspace_bytes=workspace_bytes, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("noise", [1e-3, 1e-2, 0.1, 1.0, 4.0, 16.0])
@pytest.mark.parametrize("scale", [1.0, 8.0, 60.0])
def test_logit_gradient_is_exact_for_kl_from_5e_7_to_50(scale, noise, divergence):
    student, teacher = logit_pair(24, 2003, scale=scale, noise=noise, seed=3)
    bound = small_kl_bound(score_positions(student, teacher)[1].reverse_kl.max().item())  # the largest rules the norm
    compare_logits(student, teacher, bound, divergence=divergence, fraction=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_low_precision_logit_gradient_is_no_worse_than_eager(divergence, dtype):
    student, teacher = logit_pair(20, 1031, dtype=dtype)
    grads = {}
    for name, cast, backend in (("want", torch.float64, "eager"), ("eager", dtype, "eager"), ("torch", dtype, "torch")):
        x = leaf(student, cast)
        backward(x, teacher.to(cast), backend=backend, selector="entropy", divergence=divergence)
        grads[name] = x.grad
    assert grads["torch"].dtype == dtype
    assert relative_error(grads["torch"], grads["want"]) <= 2 * relative_error(grads["eager"], grads["want"])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"scale": 0.6}, {"softcap": 8.0}, {"bias": True, "scale": 1.4, "softcap": 6.0}]
)
def test_head_gradients_match_eager_fp64(options, temperature, divergence):
    student, teacher = head_pair((4, 9), 523, **options)
    want, got = leaf_head(student, torch.float64), leaf_head(student)
    expected = backward(want, to_double(teacher), backend="eager", temperature=temperature, divergence=divergence)
    out = backward(got, teacher, temperature=temperature, divergence=divergence)
    assert torch.equal(out.selected, expected.selected)
    assert len(gradients(got)) == (3 if options.get("bias") else 2)
    for a, b in zip(gradients(got), gradients(want), strict=True):
        assert_gradient(a, b, 2e-5)
    assert not got.hidden.grad[~out.selected].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_low_precision_head_gradients_are_no_worse_than_eager(divergence):
    student, teacher = head_pair((30,), 523, dtype=torch.bfloat16, bias=True)
    heads = {"want": leaf_head(student, torch.float64), "eager": leaf_head(student), "torch": leaf_head(student)}
    for name, head in heads.items():
        side = to_double(teacher) if name == "want" else teacher
        backend = "torch" if name == "torch" else "eager"
        backward(head, side, backend=backend, selector="entropy", divergence=divergence, workspace_bytes=100_000)
    for got, eager, want in zip(*(gradients(heads[name]) for name in ("torch", "eager", "want")), strict=True):
        assert got.dtype == torch.bfloat16
        assert relative_error(got, want) <= 2 * relative_error(eager, want)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence):
    student, teacher = head_pair((3, 2), 13, student_dim=4, teacher_dim=5, bias=True, softcap=5.0, dtype=torch.float64)

    def loss(hidden, weight, bias):
        head = LinearHead(hidden, weight, bias, softcap=student.softcap)
        return selective_opd_loss(head, teacher, fraction=0.5, selector="prefix", divergence=divergence, top_k=3).loss

    assert torch.autograd.gradcheck(loss, tuple(map(leaf, (student.hidden, student.weight, student.bias))), fast_mode=True)

    def logit_loss(logits):
        return selective_opd_loss(
            logits, teacher, fraction=0.5, selector="prefix", divergence=divergence, top_k=3, temperature=0.8
        ).loss

    assert torch.autograd.gradcheck(
        logit_loss, (leaf(logit_pair(6, 13, dtype=torch.float64)[0].view(3, 2, 13)),), fast_mode=True
    )


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_requires_grad_gets_one(trained):
    student, teacher = head_pair((9,), 130, bias=True)
    full = leaf_head(student)
    backward(full, teacher)
    part = LinearHead(student.hidden, student.weight, student.bias)
    getattr(part, trained).requires_grad_()
    backward(part, teacher)
    for name in ("hidden", "weight", "bias"):
        if name == trained:
            assert torch.equal(getattr(part, name).grad, getattr(full, name).grad)
        else:
            assert getattr(part, name).grad is None


@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_nothing_flows_to_the_teacher(backend):
    student, teacher = head_pair((9,), 130, bias=True)
    student, teacher = leaf_head(student), leaf_head(teacher)
    backward(student, teacher, backend=backend)
    assert gradients(teacher) == []
    logits = leaf(logit_pair(9, 130)[1])
    backward(student, logits, backend=backend)
    assert logits.grad is None


def test_a_shared_weight_gets_the_student_s_gradient_alone():
    student, _ = head_pair((9,), 130)
    weight = leaf(student.weight)
    backward(LinearHead(student.hidden, weight), LinearHead(student.hidden.roll(1, 0), weight))
    other = leaf(student.weight)
    backward(LinearHead(student.hidden, other), LinearHead(student.hidden.roll(1, 0), weight.detach()))
    assert weight.grad.norm() > 0
    assert torch.equal(weight.grad, other.grad)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_logit_gradient_of_any_strides(layout):
    student, teacher = logit_pair(24, 130)
    student, teacher = student.view(4, 6, 130), teacher.view(4, 6, 130)

    def view(x):
        return x.transpose(0, 1) if layout == "transposed" else x[:, :-1, ::2]

    want, got = leaf(student, torch.float64), leaf(student)
    backward(view(want), view(teacher).double(), backend="eager")
    backward(view(got), view(teacher))
    assert_gradient(got.grad, want.grad, 1e-5)


def test_vocabulary_entries_beyond_the_common_ones_get_zero():
    student, teacher = head_pair((9,), 130, bias=True)
    student = leaf_head(student)
    short = LinearHead(teacher.hidden, teacher.weight[:101], teacher.bias[:101])
    with pytest.warns(UserWarning, match="vocabularies differ"):
        backward(student, short)
    want = leaf_head(LinearHead(student.hidden, student.weight[:101], student.bias[:101]))
    backward(want, short)
    assert_gradient(student.weight.grad[:101], want.weight.grad, 1e-6)
    assert_gradient(student.bias.grad[:101], want.bias.grad, 1e-6)
    assert not student.weight.grad[101:].any()
    assert not student.bias.grad[101:].any()


def test_masked_vocabulary_entries_give_no_nan():
    student, teacher = logit_pair(12, 257)
    student[:, 40:90] = teacher[:, 40:90] = -math.inf
    student[0, 100] = -math.inf
    teacher[1, 101] = -math.inf
    for divergence in DIVERGENCES:
        out = compare_logits(student, teacher, 1e-5, divergence=divergence, fraction=1.0)
        lost = 1 if divergence == "reverse_kl" else 0  # the row where this divergence is infinite
        assert out.selected.logical_not().nonzero().flatten().tolist() == [lost]
        assert out.metrics["n_infinite"] == 1


def test_retain_graph_gives_the_same_gradient_twice():
    student, teacher = head_pair((9,), 130)
    student = leaf_head(student)
    loss = selective_opd_loss(student, teacher, fraction=0.5).loss
    loss.backward(retain_graph=True)
    first = [g.clone() for g in gradients(student)]
    loss.backward()
    for once, twice in zip(first, gradients(student), strict=True):
        assert torch.equal(twice, 2 * once)


def test_upstream_gradient_scales_the_gradient():
    student, teacher = head_pair((9,), 130)
    one, three = leaf_head(student), leaf_head(student)
    selective_opd_loss(one, teacher).loss.backward()
    (3 * selective_opd_loss(three, teacher).loss).backward()
    for a, b in zip(gradients(one), gradients(three), strict=True):
        assert_gradient(b, 3 * a, 1e-6)


def test_gradient_accumulation_adds_up():
    student, teacher = head_pair((12,), 130)
    halves = leaf_head(student)
    for part in (slice(0, 6), slice(6, 12)):
        one = LinearHead(halves.hidden[part], halves.weight)
        selective_opd_loss(
            one, LinearHead(teacher.hidden[part], teacher.weight), fraction=1.0, num_items_in_batch=12
        ).loss.backward()
    whole = leaf_head(student)
    selective_opd_loss(whole, teacher, fraction=1.0).loss.backward()
    for a, b in zip(gradients(halves), gradients(whole), strict=True):
        assert_gradient(a, b, 1e-5)  # of 6 rows and of 12: some processors' matmuls round each in their own way


def test_no_grad_and_inference_give_the_same_loss():
    student, teacher = head_pair((9,), 130)
    want = selective_opd_loss(leaf_head(student), teacher).loss
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = selective_opd_loss(student, teacher).loss
        assert not loss.requires_grad
        assert loss.item() == want.item()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradient(use_reentrant):
    student, teacher = head_pair((9,), 130)
    plain, rerun = leaf_head(student), leaf_head(student)

    def loss(hidden, weight):
        return selective_opd_loss(LinearHead(hidden, weight), teacher, selector="random", fraction=0.5).loss

    torch.manual_seed(0)
    loss(plain.hidden, plain.weight).backward()
    torch.manual_seed(0)
    checkpoint(loss, rerun.hidden, rerun.weight, use_reentrant=use_reentrant).backward()
    for a, b in zip(gradients(plain), gradients(rerun), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("vocab", [4096, pytest.param(4097, marks=pytest.mark.full)])  # an odd block is not shared out evenly
@pytest.mark.parametrize("fraction", [0.1, 1.0])  # few rows, which are shared out, and more
def test_gradient_of_heads_matches_eager_fp64_on_two_threads(two_threads, monkeypatch, fraction, vocab):
    shared = []
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: shared.append(a.shape) or product(a, b))
    student, teacher = head_pair((200,), vocab)
    got, want = leaf_head(student), leaf_head(student, torch.float64)
    selective_opd_loss(got, teacher, fraction=fraction, backend="torch", selector="prefix").loss.backward()
    selective_opd_loss(want, to_double(teacher), fraction=fraction, backend="eager", selector="prefix").loss.backward()
    for a, b in zip(gradients(got), gradients(want), strict=True):
        assert_gradient(a, b)
    assert bool(shared) == (fraction == 0.1 and vocab == 4096)


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_autocast_does_not_change_the_result(backend):
    student, teacher = head_pair((9,), 130)
    plain, cast = leaf_head(student), leaf_head(student)
    want = selective_opd_loss(plain, teacher, backend=backend).loss
    want.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = selective_opd_loss(cast, teacher, backend=backend).loss
        if backend == "torch":  # eager's backward is autograd's own, which autocast may change
            loss.backward()
    if backend == "eager":
        loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == want.item()
    for a, b in zip(gradients(plain), gradients(cast), strict=True):
        assert torch.equal(a, b)


def test_low_precision_hidden_states_with_fp32_weights():
    """What autocast hands over: hidden states in bf16, parameters in fp32."""
    student, teacher = head_pair((9,), 130)
    got = LinearHead(leaf(student.hidden.bfloat16()), leaf(student.weight))
    backward(got, teacher)
    want = LinearHead(leaf(student.hidden.bfloat16().double()), leaf(student.weight.double()))
    backward(want, to_double(teacher), backend="eager")
    assert got.hidden.grad.dtype == torch.bfloat16
    assert_gradient(got.hidden.grad, want.hidden.grad, 4e-3)
    assert_gradient(got.weight.grad, want.weight.grad, 1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("side", ["logits", "heads"])
@pytest.mark.parametrize("loss", [selective_opd_loss, selective_opd_token_losses])
@pytest.mark.parametrize("divergence", ["reverse_kl", "tail_aware"])  # two autograd functions of backend "triton"
def test_a_second_derivative_is_an_error(backend, side, loss, divergence):
    student, teacher = logit_pair(6, 70) if side == "logits" else head_pair((6,), 70)
    student = leaf(student) if side == "logits" else leaf_head(student)
    leading = student if side == "logits" else student.hidden
    out = loss(student, teacher, fraction=0.5, divergence=divergence, backend=backend)
    total = out.loss if loss is selective_opd_loss else out.losses.sum()
    (gradient,) = torch.autograd.grad(total, leading, create_graph=True)
    assert gradient.count_nonzero() > 0
    with pytest.raises(RuntimeError, match="no second derivative; expected one backward, or backend='eager'"):
        (total + gradient.square().sum()).backward()  # a penalty: the gradient that comes in requires none


def test_eager_has_a_second_derivative():
    student, teacher = logit_pair(6, 70)
    student = leaf(student)
    loss = selective_opd_loss(student, teacher, fraction=0.5, backend="eager").loss
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), student)
    assert second.count_nonzero() > 0


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
@pytest.mark.parametrize("side", ["logits", "heads"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "tail_aware"])
def test_a_teacher_of_inference_mode_is_a_teacher(backend, side, divergence):
    student, teacher = logit_pair(6, 70) if side == "logits" else head_pair((6,), 70, bias=True)
    got = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            if side == "logits":
                given = torch.stack((teacher, teacher))[0]  # a view
            else:
                given = LinearHead(teacher.hidden.clone(), teacher.weight.clone(), teacher.bias.clone())
        mine = leaf(student) if side == "logits" else leaf_head(student)
        out = selective_opd_loss(mine, given, fraction=0.5, top_k=8, divergence=divergence, backend=backend)
        out.loss.backward()
        got.append([out.loss, *(gradients(mine) if side == "heads" else [mine.grad])])
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


def test_a_list_of_inference_mode_is_a_teacher():
    student, teacher = (x.log_softmax(-1) for x in logit_pair(6, 70))
    student = leaf(student)
    with torch.inference_mode():
        listed = TopKLogprobs(*reversed(teacher.topk(16)))
    selective_opd_loss(student, listed, fraction=0.5, divergence="tail_aware").loss.backward()
    assert student.grad.count_nonzero() > 0


def test_hidden_states_of_one_position_have_a_gradient():
    student, teacher = head_pair((1,), 130)
    want = leaf_head(student)
    selective_opd_loss(want, teacher).loss.backward()
    for divergence in ("reverse_kl", "tail_aware"):
        got = LinearHead(leaf(student.hidden[0]), leaf(student.weight))
        other = LinearHead(teacher.hidden[0], teacher.weight)
        out = selective_opd_loss(got, other, divergence=divergence)
        assert out.selected.shape == ()
        out.loss.backward()
        assert got.hidden.grad.count_nonzero() > 0
        if divergence == "reverse_kl":
            for a, b in zip(gradients(got), gradients(want), strict=True):
                assert_gradient(a.view_as(b), b, 1e-6)


def test_gradients_are_repeatable():
    runs = []
    for _ in range(2):
        student, teacher = (leaf_head(head) for head in head_pair((40,), 2003, bias=True))
        backward(student, teacher, workspace_bytes=2**18)
        runs.append(gradients(student))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_an_overwritten_input_is_noticed():
    student, teacher = head_pair((9,), 130)
    student = leaf_head(student)
    loss = selective_opd_loss(student, teacher).loss
    with torch.no_grad():
        student.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("side", ["logits", "head"])
def test_empty_selection_gives_a_connected_zero(side):
    student, teacher = head_pair((9,), 130)
    student = leaf_head(student) if side == "head" else leaf(logit_pair(9, 130)[0])
    for backend in ("torch", "eager"):
        out = selective_opd_loss(student, teacher, mask=torch.zeros(9), backend=backend)
        assert out.loss.item() == 0.0
        out.loss.backward()
        grads = gradients(student) if side == "head" else [student.grad]
        assert len(grads) == (2 if side == "head" else 1)
        assert not any(bool(g.any()) for g in grads)
