"""`selective_opd_token_losses`: values, gradients under any weights, what it costs, on every backend.

  Compared: losses and the gradient of sum_t c_t losses_t with the weighted sum that the eager backend differentiates in fp64,
  c of both signs and 0; finite differences (gradcheck); the scalar loss and its metrics; FLOPs with the docstring's units.
  Run: make test ARGS=tests/loss/test_token_losses.py

Not here: the losses themselves (divergences/test_divergences.py, test_gradients.py), selection (selection/test_budget.py).
"""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opd_ops import LinearHead, StudentStats, TopK, TopKLogprobs, selective_opd_loss, selective_opd_token_losses
from tests.support.cases import generator, gradients, head_pair, leaf, leaf_head, logit_pair, to_double
from tests.support.tolerances import assert_gradient

SHAPE, VOCAB = (2, 5), 67
MASK = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]])
TOKENS = torch.randint(0, VOCAB, SHAPE, generator=generator(5))
BACKENDS = ["eager", "torch", "triton"]
OF_LOGITS = ["reverse_kl", "forward_kl", "jsd", "total_variation", "tail_aware", "local_support", "entropy_aware", "sampled"]
ON_ANY_DEVICE = [(backend, divergence) for backend in ("eager", "torch") for divergence in OF_LOGITS]
BY_KERNELS = [("triton", "reverse_kl"), ("triton", "jsd"), ("triton", "sampled")]
OPTIONS = {"mask": MASK, "fraction": 0.5, "tokens": TOKENS}
FEW = {"mask": MASK * torch.tensor([0, 1, 0, 1, 0]), "fraction": 0.5, "tokens": TOKENS}  # interpreted kernels are slow


def of(backend):
    return {"backend": backend} | (FEW if backend == "triton" else OPTIONS)


def coefficients():
    """Both signs, and a zero at a selected position of nearly every selection."""
    c = torch.randn(SHAPE, generator=generator(3), dtype=torch.float64)
    c[0, 0] = c[1, 2] = 0.0
    return c


def dense_pair(dtype=torch.float32, **options):
    return tuple(x.view(*SHAPE, VOCAB) for x in logit_pair(10, VOCAB, dtype=dtype, **options))


def expected(student, teacher, out, c, **options):
    """The same weighted sum by eager in fp64, on the positions that `out` selected: its gradients, and the losses."""
    options = {"divergence": "reverse_kl", "tokens": TOKENS, "temperature": 1.0} | options
    one = {"selector": "all", "fraction": 1.0, "denominator": "valid", "num_items_in_batch": 1, "backend": "eager"}
    total = selective_opd_loss(student, teacher, mask=out.selected, weights=c, **one, **options)
    total.loss.backward()
    losses = torch.zeros(SHAPE, dtype=torch.float64)
    for place in out.selected.nonzero().tolist():
        single = torch.zeros(SHAPE, dtype=torch.bool)
        single[tuple(place)] = True
        losses[tuple(place)] = selective_opd_loss(student, teacher, mask=single, **one, **options).loss.item()
    return losses


def compare_dense(student, teacher, c, bound=1e-5, **options):
    got, want = leaf(student), leaf(student, torch.float64)
    out = selective_opd_token_losses(got, teacher, **OPTIONS | options)
    (out.losses * c.to(out.losses.dtype)).sum().backward()
    shared = {name: options[name] for name in ("divergence", "temperature") if name in options}
    losses = expected(want, to_double(teacher) if isinstance(teacher, torch.Tensor) else teacher, out, c, **shared)
    torch.testing.assert_close(out.losses.double(), losses, rtol=1e-4, atol=1e-6)
    assert_gradient(got.grad, want.grad, bound)
    assert not got.grad[~out.selected].any()
    assert not got.grad[c == 0].any()
    return out


@pytest.mark.parametrize(("backend", "divergence"), ON_ANY_DEVICE + BY_KERNELS)
def test_losses_of_logits_and_their_gradients_match_eager_fp64(backend, divergence):
    options = {"divergence": divergence, "temperature": 0.8} | of(backend)
    out = compare_dense(*dense_pair(), coefficients(), **options)
    assert out.selected.sum() == math.ceil(int((options["mask"] != 0).sum()) / 2)
    assert not out.losses[~out.selected].any()


LISTED = [(backend, name) for backend in ("eager", "torch") for name in ("tail_aware", "local_support", "forward_kl_topk")]


@pytest.mark.parametrize(("backend", "divergence"), [*LISTED, ("triton", "forward_kl_topk")])
def test_losses_of_a_listed_teacher_match_eager_fp64(backend, divergence):
    student, teacher = dense_pair()
    log_q, ids = teacher.log_softmax(-1).topk(20)
    compare_dense(student, TopKLogprobs(ids, log_q), coefficients(), divergence=divergence, **of(backend))


OF_HEADS = [(backend, name) for backend in ("eager", "torch") for name in ("reverse_kl", "jsd", "local_support")]


@pytest.mark.parametrize(("backend", "divergence"), [*OF_HEADS, ("triton", "reverse_kl")])
def test_losses_of_heads_and_their_gradients_match_eager_fp64(backend, divergence):
    student, teacher = head_pair(SHAPE, VOCAB, bias=True, softcap=20.0)
    got, want, c = leaf_head(student), leaf_head(student, torch.float64), coefficients()
    out = selective_opd_token_losses(got, teacher, divergence=divergence, **of(backend))
    (out.losses * c.float()).sum().backward()
    losses = expected(want, to_double(teacher), out, c, divergence=divergence)
    torch.testing.assert_close(out.losses.double(), losses, rtol=1e-4, atol=1e-5)
    assert len(gradients(got)) == 3
    for a, b in zip(gradients(got), gradients(want), strict=True):
        assert_gradient(a, b, 1e-4)


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "tail_aware"])
def test_gradients_are_those_of_finite_differences(divergence, backend):
    student, teacher = dense_pair(torch.float64, scale=1.0)
    c = coefficients()  # `prefix`: a selection that does not move with the logits

    def f(x):
        out = selective_opd_token_losses(x, teacher, divergence=divergence, selector="prefix", backend=backend, **OPTIONS)
        return out.losses * c

    assert torch.autograd.gradcheck(f, leaf(student), fast_mode=True)


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_their_mean_is_the_scalar_loss_with_its_metrics(backend):
    student, teacher = dense_pair()
    weights = torch.linspace(0.0, 2.0, 10).view(SHAPE)
    a, b = leaf(student), leaf(student)
    options = of(backend) | {"weights": weights, "scope": "sequence", "selector": "tip"}
    scalar, out = selective_opd_loss(a, teacher, **options), selective_opd_token_losses(b, teacher, **options)
    scalar.loss.backward()
    (out.losses.sum() / out.selected.sum()).backward()
    assert torch.equal(scalar.selected, out.selected)
    assert torch.equal(scalar.scores, out.scores)
    assert_gradient(b.grad, a.grad, 1e-6)
    assert scalar.metrics.keys() == out.metrics.keys()
    for name, value in scalar.metrics.items():
        torch.testing.assert_close(out.metrics[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_threshold_and_the_rollout_s_statistics_select():
    student, teacher = dense_pair()
    values, ids = student.log_softmax(-1).topk(16)
    p = student.softmax(-1)
    stats = StudentStats(student.logsumexp(-1), -(p * p.log()).sum(-1), ids, values)
    out = compare_dense(student, teacher, coefficients(), student_stats=stats, backend="torch")
    cut = out.scores[out.selected].min()
    again = selective_opd_token_losses(student, teacher, student_stats=stats, threshold=cut, mask=MASK)
    assert torch.equal(again.selected, out.selected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_selected_is_a_connected_zero(backend):
    student, teacher = dense_pair()
    x = leaf(student)
    out = selective_opd_token_losses(x, teacher, mask=torch.zeros(SHAPE), backend=backend)
    assert not out.losses.any()
    out.losses.sum().backward()
    assert not x.grad.any()
    assert out.metrics["loss"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_entries_are_legal_and_infinite_positions_are_left_out(backend):
    student, teacher = dense_pair()
    student[..., 40:] = teacher[..., 40:] = -math.inf
    teacher[1, 3, :3] = -math.inf  # p > 0 where q = 0
    out = compare_dense(student, teacher, coefficients(), **of(backend) | {"fraction": 1.0, "selector": "all"})
    assert not out.selected[1, 3]
    assert out.metrics["n_infinite"] == 1


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_a_position_found_infinite_by_its_loss_alone_is_left_out(backend):
    student, teacher = dense_pair()
    log_q, ids = teacher.log_softmax(-1).topk(4)
    student[1, 3] = student[1, 3].scatter(0, ids[1, 3], -math.inf)  # it can write none of the list
    options = OPTIONS | {"fraction": 1.0, "selector": "all", "divergence": "local_support"}
    x = leaf(student)
    out = selective_opd_token_losses(x, TopKLogprobs(ids, log_q), backend=backend, **options)
    out.losses.sum().backward()
    assert not out.selected[1, 3]
    assert out.selected.sum() == MASK.sum() - 1
    assert out.losses.isfinite().all()
    assert not x.grad[1, 3].any()
    assert out.metrics["n_infinite"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_of_the_student_is_never_hidden(backend):
    student, teacher = dense_pair()
    student[1, 3, 0] = math.nan
    x = leaf(student)
    out = selective_opd_token_losses(x, teacher, **of(backend))
    out.losses[0].sum().backward()
    assert out.losses.isnan().all()
    assert x.grad.isnan().any()


def test_a_second_backward_gives_the_same_and_the_teacher_nothing():
    student, teacher = dense_pair()
    x, t = leaf(student), leaf(teacher)
    out = selective_opd_token_losses(x, t, **OPTIONS)
    first, second = (torch.autograd.grad(out.losses.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    out.losses.sum().backward()
    assert t.grad is None


def test_logits_overwritten_before_the_backward_are_an_error():
    student, teacher = dense_pair()
    x = leaf(student) * 1
    out = selective_opd_token_losses(x, teacher, **OPTIONS)
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.losses.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_only_what_requires_a_gradient_gets_one(backend):
    student, teacher = head_pair(SHAPE, VOCAB)
    weight = leaf(student.weight)
    selective_opd_token_losses(LinearHead(student.hidden, weight), teacher, backend=backend).losses.sum().backward()
    assert weight.grad.any()
    frozen = selective_opd_token_losses(student, teacher, backend=backend)
    assert not frozen.losses.requires_grad


UNITS = [
    ("torch", "reverse_kl", 4),
    ("torch", "forward_kl", 4),
    ("torch", "jsd", 8),
    ("torch", "total_variation", 8),
    ("torch", "skew_kl", 8),
]
UNITS += [("triton", "reverse_kl", 6), ("triton", "jsd", 6)]


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize(("backend", "divergence", "units_per_selected"), UNITS)
def test_units_are_those_of_the_docstring(backend, divergence, units_per_selected, is_frozen):
    n, dim, fraction = (4, 32, 0.5) if backend == "triton" else (20, 32, 0.25)
    student, teacher = head_pair((n,), 131, student_dim=dim, teacher_dim=dim)
    side = LinearHead(leaf(student.hidden), student.weight) if is_frozen else leaf_head(student)
    with FlopCounterMode(display=False) as counter:
        out = selective_opd_token_losses(side, teacher, fraction=fraction, divergence=divergence, backend=backend)
        (out.losses * torch.linspace(-1, 2, n)).sum().backward()
    units = 2 + (units_per_selected - is_frozen) * fraction
    assert counter.get_total_flops() / (2 * n * 131 * dim) == pytest.approx(units, rel=1e-12)


@pytest.mark.parametrize("name", ["num_items_in_batch", "denominator", "inplace_backward"])
def test_it_rejects_what_the_host_decides(name):
    with pytest.raises(TypeError, match=name):
        selective_opd_token_losses(*dense_pair(), **{name: 1})


def test_its_other_arguments_are_checked_as_those_of_the_loss():
    with pytest.raises(ValueError, match=r"fraction: got 1\.5, expected a number in \(0, 1\]"):
        selective_opd_token_losses(*dense_pair(), fraction=1.5)
    with pytest.raises(ValueError, match="tokens: got None"):
        selective_opd_token_losses(*dense_pair(), divergence="sampled")
    with pytest.raises(ValueError, match="threshold: score_dtype='float8'"):
        selective_opd_token_losses(*dense_pair(), threshold=0.0, score_dtype="float8")


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_the_gradient_is_of_the_tokens_that_the_forward_read(backend):
    student, teacher = logit_pair(12, 61)
    tokens = torch.arange(12) * 5
    grads = []
    for is_overwritten in (False, True):
        x, y = leaf(student), tokens.clone()
        options = {"divergence": "sampled", "selector": "entropy", "fraction": 0.5, "tokens": y, "backend": backend}
        out = selective_opd_token_losses(x, teacher, **options)
        if is_overwritten:
            y.copy_((tokens + 7) % 61)
        out.losses.sum().backward()
        grads.append(x.grad)
    assert grads[0].any()
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_an_infinite_weight_of_a_row_with_an_infinite_loss_reaches_no_loss(backend):
    student, teacher = logit_pair(5, 31, scale=3.0)
    teacher[2] = torch.where(student[2] > student[2].median(), -math.inf, teacher[2])  # no id is on both lists
    weights = torch.ones(5).index_fill(0, torch.tensor([2]), math.inf)
    x = leaf(student)
    out = selective_opd_token_losses(
        x,
        teacher,
        weights=weights,
        divergence=TopK("reverse", "intersection", "drop", 4),
        backend=backend,
        selector="all",
        fraction=1.0,
    )
    assert out.losses.isfinite().all()
    assert not out.selected[2]
    out.losses.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[2].any()
