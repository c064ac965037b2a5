"""The numerics of the public contract, row by row, on rows that are hard (support/hard_rows.py).

  Statistics: 1e-6 + 1e-5 x; KLs: 1e-6 + 1e-4 KL, infinite where the oracle's are; the gradient of every row:
  ||g - g64|| / ||g64|| <= 1e-4, below KL 1e-3 at most 3e-6 / sqrt(2 KL), and of 16-bit logits one rounding on top.

300 rows for each backend and divergence. Run: make test ARGS=tests/loss/test_contract.py

Not here: rows at chosen hard cases (backends/streamed/test_score.py, test_gradients.py), ranks that share out the vocabulary
(inputs/test_vocabulary.py).
"""

import math
import warnings

import pytest
import torch

from opd_ops import (
    JSD,
    EntropyAware,
    Extrapolated,
    ForwardKL,
    LinearHead,
    ReverseKL,
    selective_opd_loss,
)
from opd_ops.call import choose
from tests.support import kernels
from tests.support.cases import leaf, logit_pair
from tests.support.hard_rows import MASKS, V, assert_gradients, drawn_rows, kl, wanted
from tests.support.tolerances import assert_within, relative_error

K = 16
BACKENDS = ["eager", "torch", "triton"]
DIVERGENCES = {
    "reverse_kl": ReverseKL(),
    "forward_kl": ForwardKL(),
    "jsd": JSD(0.5),
    "entropy_aware": EntropyAware(tau=1e9, divergence=JSD(0.5)),  # whose second part is 0
}


def rows_for(backend, dtype, **options):
    """300 rows; 40 where Triton interprets its kernels, which takes a third of a second for each."""
    few = slice(40) if backend == "triton" and kernels.IS_INTERPRETED else slice(None)
    return [x[few] for x in drawn_rows(dtype, **options)]


def one_call(s, u, divergence, backend):
    x = leaf(s)
    out = selective_opd_loss(x, u, divergence=divergence, selector="entropy", fraction=1.0, top_k=K, backend=backend)
    out.loss.backward()
    return out, x.grad


@pytest.mark.filterwarnings("ignore:.*infinite")
@pytest.mark.parametrize(
    ("backend", "dtype", "name"),
    [
        pytest.param(backend, dtype, name, marks=[pytest.mark.full] if is_slow else [])
        for backend in BACKENDS
        for dtype in (torch.float32, torch.bfloat16)
        for name in DIVERGENCES
        for is_slow in [
            backend == "triton" and (dtype, name) not in ((torch.float32, "reverse_kl"), (torch.float32, "forward_kl"))
        ]
    ],
)
def test_every_row_keeps_the_contract(backend, dtype, name):
    s, u = rows_for(backend, dtype)
    out, gradient = one_call(s, u, DIVERGENCES[name], backend)
    losses, want, (log_p, log_q) = wanted(s, u, name)
    trained = losses.isfinite()
    assert torch.equal(out.selected, trained)
    assert trained.sum() > len(s) // 2
    columns = {"reverse_kl": kl(log_p, log_q), "forward_kl": kl(log_q, log_p)}
    columns |= {"student_entropy": -(log_p.exp() * log_p.clamp_min(-1e4)).sum(1)}
    columns |= {"teacher_entropy": -(log_q.exp() * log_q.clamp_min(-1e4)).sum(1)}
    for column, expected in columns.items():
        relative = 1e-4 if column.endswith("kl") else 1e-5
        assert_within(getattr(out.stats, column), expected, absolute=1e-6, relative=relative, name=column)
    if name.endswith("kl"):
        assert out.loss.item() == pytest.approx(losses[trained].mean().item(), rel=1e-4)
    assert_gradients(gradient.double() * int(trained.sum()), want, losses, divergence=name, dtype=dtype)


@pytest.mark.filterwarnings("ignore:.*infinite")
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("backend", ["eager", "torch", pytest.param("triton", marks=pytest.mark.full)])
def test_every_row_of_heads_keeps_the_contract(backend, name):
    s, u = rows_for(backend, torch.float32, masks=MASKS[:1])  # a head without a bias masks nothing
    weight = torch.eye(V)  # the logits are the hidden states, to the bit
    student = LinearHead(leaf(s), weight)
    out = selective_opd_loss(
        student, LinearHead(u, weight), divergence=name, selector="entropy", fraction=1.0, top_k=K, backend=backend
    )
    out.loss.backward()
    losses, want, _ = wanted(s, u, name)
    assert torch.equal(out.selected, losses.isfinite())
    got = student.hidden.grad.double() * int(losses.isfinite().sum())
    assert_gradients(got, want, losses, divergence=name, dtype=torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mostly_infinite_divergences_warn_once(backend):
    s, u = logit_pair(6, 61)
    u[:4, 7] = -math.inf  # the student can write it

    def n_infinite():
        out = selective_opd_loss(s, u, selector="entropy", fraction=1.0, backend=backend)
        return out.metrics["n_infinite"]

    with pytest.warns(UserWarning, match="divergence: 'reverse_kl' is infinite at 4 of 6 valid positions"):
        assert n_infinite() == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert n_infinite() == 4
        u[0, 7] = 0.0
        choose._warned_of.clear()
        assert n_infinite() == 3  # half of them


def test_infinite_losses_that_are_known_where_selected_alone_warn_too():
    s, u = logit_pair(40, 61)
    tokens = torch.arange(40)
    u[tokens, tokens] = -math.inf
    options = {"divergence": "sampled", "selector": "entropy", "fraction": 0.05, "tokens": tokens}
    with pytest.warns(UserWarning, match="divergence: 'sampled' is infinite at 2 of 2 selected positions"):
        assert selective_opd_loss(s, u, **options).loss == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.9, 20.0])
@pytest.mark.parametrize(("student", "teacher"), [(-1e4, None), (None, -math.inf), (None, None), (-math.inf, -1e6)])
def test_masks_may_be_written_in_any_way(student, teacher, temperature, backend):
    """The KL is that of the ids that are left, whatever each model writes for the others; None: finfo.min."""
    s, u = logit_pair(5, 61)
    want = wanted((s / temperature)[:, ::2], (u / temperature)[:, ::2], "reverse_kl")[0]
    least = torch.finfo(torch.float32).min
    s[:, 1::2], u[:, 1::2] = (least if x is None else x * max(temperature, 1.0) for x in (student, teacher))
    out = selective_opd_loss(s, u, fraction=1.0, top_k=40, temperature=temperature, backend=backend)
    assert_within(out.stats.reverse_kl, want, absolute=1e-6, relative=1e-4, name="reverse_kl")
    assert out.stats.union_kl.isfinite().all()
    assert out.loss.item() == pytest.approx(want.mean().item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("student", "teacher"), [(-1e4, None), (None, -math.inf), (None, None)])
def test_masks_of_fp16_are_its_minimum(student, teacher, backend):
    s, u = logit_pair(5, 61, dtype=torch.float16)
    want = wanted(s[:, ::2], u[:, ::2], "reverse_kl")[0]
    least = torch.finfo(torch.float16).min
    s[:, 1::2], u[:, 1::2] = (least if x is None else x for x in (student, teacher))
    out = selective_opd_loss(s, u, fraction=1.0, top_k=40, backend=backend)
    assert_within(out.stats.reverse_kl, want, absolute=1e-6, relative=1e-4, name="reverse_kl")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("temperature", "scale"), [(0.9, 1.0), (1.0, 0.25)])
@pytest.mark.parametrize("mask", [-math.inf, torch.finfo(torch.float32).min])
def test_a_head_masks_by_its_bias(mask, temperature, scale, backend):
    s, u = logit_pair(5, 61)
    want = wanted(*(x[:, ::2] * (scale / temperature) for x in (s, u)), "reverse_kl")[0]
    bias = torch.zeros(61).index_fill_(0, torch.arange(1, 61, 2), mask)
    student, teacher = (LinearHead(x, torch.eye(61), bias, scale=scale) for x in (s, u))
    out = selective_opd_loss(student, teacher, fraction=1.0, temperature=temperature, backend=backend)
    assert_within(out.stats.reverse_kl, want, absolute=1e-6, relative=1e-4, name="reverse_kl")


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        (backend, name)
        for backend in BACKENDS
        for name in ("total_variation", "skew_kl", "power", "tail_aware", "extrapolated")
        # Autograd of this equation subtracts powers that agree; the docstring of `Power` says so.
        if (backend, name) != ("eager", "power")
    ],
)
def test_saturated_rows_of_other_divergences_keep_every_rows_gradient(backend, name):
    """p within 1e-6 to 1e-13 of 1, the teacher there too or elsewhere; "eager" in fp64 computes with the others' sum."""
    s, u = logit_pair(9, 211)
    top, lift = s.argmax(1, keepdim=True), torch.tensor([14.0, 20.0, 30.0] * 3).unsqueeze(1)
    s = s.scatter(1, top, s.amax(1, keepdim=True) + lift)
    u = u.scatter(1, top, u.amax(1, keepdim=True) + torch.tensor([-3.0, 1.0, 8.0]).repeat_interleave(3).unsqueeze(1))
    gradients = []
    for dtype, of in ((torch.float64, "eager"), (torch.float32, backend)):
        is_mixed, teacher = name == "extrapolated", u.to(dtype)
        teacher = Extrapolated(1.25, teacher, (u * 0.9).to(dtype)) if is_mixed else teacher
        gradients.append(one_call(s.to(dtype), teacher, "reverse_kl" if is_mixed else name, of)[1].double())
    want, got = gradients
    assert ((got - want).norm(dim=1) <= 1e-4 * want.norm(dim=1)).all(), (got - want).norm(dim=1) / want.norm(dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vocabulary_of_one_id_has_nothing_to_learn(backend):
    x = torch.tensor([[61.7], [3.3]], requires_grad=True)
    out = selective_opd_loss(x, torch.tensor([[1.1], [1000.0]]), fraction=1.0, top_k=1, backend=backend)
    out.loss.backward()
    assert abs(out.loss) < 5e-7
    assert x.grad.abs().max() < 5e-7


@pytest.mark.parametrize("name", ["local_support", "tail_aware", "forward_kl_topk"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_changes_no_loss_on_a_list(backend, name):
    s, u = logit_pair(4, 211)
    # Multiples of 2^-10: the constant rounds no logit, so the result must be the same.
    s, u = (torch.round(x * 1024) / 1024 for x in (s, u))
    want, gradient = one_call(s, u, name, "eager")
    got, gradient_with_constant = one_call(s, u + 1000, name, backend)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)
    assert relative_error(gradient_with_constant, gradient) < 1e-5
