"""The numerics of the public contract, row by row, on rows that are hard: models that differ by a constant of up to 1,000, a
student with p near 1 on one token, masks written as -inf, `finfo.min` or -1e4 on either side, close models and far ones.

  Statistics: 1e-6 + 1e-5 x; KLs: 1e-6 + 1e-4 KL, infinite where the oracle's are; the gradient of every row:
  ||g - g64|| / ||g64|| <= 1e-4, below KL 1e-3 at most 3e-6 / sqrt(2 KL), and of 16-bit logits one rounding on top.

The oracle is float64 and written from the equations (none of the library's code): p = 0 where e^x is 0 in float64, and the
gradient of the most likely token is minus the sum of the others', which p (r - KL) in float64 is not for p near 1.
300 rows for each backend and divergence. Run: make test ARGS=tests/loss/test_contract.py

Not here: dense rows at chosen hard cases (backends/test_token_stats.py, test_gradients.py), heads
(backends/test_triton_heads.py).
"""

import math
import warnings

import pytest
import torch

from opd_ops import JSD, selective_opd_loss
from opd_ops.call import choose
from tests.support.cases import generator, leaf, logit_pair
from tests.support.tolerances import assert_within, small_kl_bound

N, V, K = 300, 211, 16
OFFSETS = [0.0, 60.0, -120.0, 500.0, -1000.0]
MASKS = ["none", "both", "other", "student", "teacher"]
BACKENDS = ["eager", "torch", "triton"]


def drawn_rows(dtype, seed=0):
    """(N, V) logits, a row a draw."""
    g = generator(seed)

    def pick(values):
        return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (N, 1), generator=g)]

    s = pick([1.0, 4.0, 15.0]) * torch.randn(N, V, generator=g, dtype=torch.float64)
    kind = torch.randint(len(MASKS), (N, 1), generator=g)
    # Where one model alone masks, its other entries differ by 0.1 or more: the bound is one of the KL, which such masks raise.
    noise = torch.where(kind >= MASKS.index("student"), pick([0.1, 1.0, 5.0]), pick([1e-3, 0.1, 1.0, 5.0]))
    u = s + noise * torch.randn(N, V, generator=g, dtype=torch.float64)
    # Saturated rows: the student's best is 10 to 60 above its others; the teacher is there too, or elsewhere by up to 100.
    lift, lag = pick([0.0, 0.0, 10.0, 25.0, 60.0]), pick([0.0, 0.0, 12.0, 40.0, 95.0])
    top = s.argmax(1, keepdim=True)
    s = s.scatter(1, top, s.amax(1, keepdim=True) + lift)
    u = u.scatter(1, top, torch.where(lift > 0, u.amax(1, keepdim=True) + lift - lag * (lift > 0), u.gather(1, top)))
    u = u + pick(OFFSETS)
    s, u = s.to(dtype), u.to(dtype)
    masked = (torch.rand(N, V, generator=g) < 0.3).scatter(1, top, False)
    low, least = -1e4, torch.finfo(dtype).min
    # both: in two spellings. other: -1e4 is a logit, whose probability is 0, where the other model masks.
    for name, (in_s, in_u) in {
        "both": (least, -math.inf), "other": (low, least), "student": (-math.inf, None), "teacher": (None, least),
    }.items():  # fmt: skip
        here = masked & (kind == MASKS.index(name))
        s = s if in_s is None else s.masked_fill(here, in_s)
        u = u if in_u is None else u.masked_fill(here, in_u)
    return s, u


def log_softmax(x):
    """float64, with the digits of log p near 0."""
    top = x.argmax(1, keepdim=True)
    z = x - x.gather(1, top)
    others = z.exp().scatter(1, top, 0.0)
    return z - torch.log1p(others.sum(1, keepdim=True))


def masked_double(x):
    """float64 logits, -inf where the stored number is -inf or the dtype's least."""
    return x.double().masked_fill(x <= torch.finfo(x.dtype).min, -math.inf)


def kl(log_a, log_b):
    a = log_a.exp()
    ratio = torch.where(a > 0, log_a - log_b, 0.0)
    return torch.where(ratio.isinf(), math.inf, a * ratio.nan_to_num(posinf=0.0)).sum(1)


def wanted(s, u, divergence):
    """Losses, (N,) and gradients, (N, V), with respect to the logits."""
    log_p, log_q = log_softmax(masked_double(s)), log_softmax(masked_double(u))
    p, q = log_p.exp(), log_q.exp()
    if divergence == "reverse_kl":
        losses = kl(log_p, log_q)
        slope = torch.where(p > 0, log_p - log_q - losses.unsqueeze(1), 0.0)
        gradient = torch.where(p > 0, p * slope, 0.0)
    elif divergence == "forward_kl":
        losses = kl(log_q, log_p)
        gradient = p - q
    else:
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        losses = (kl(log_p, log_m) + kl(log_q, log_m)) / 2
        ratio = torch.where(p > 0, log_p - log_m, 0.0)
        gradient = p * (ratio - (p * ratio).sum(1, keepdim=True)) / 2
    top = log_p.argmax(1, keepdim=True)
    others = gradient.scatter(1, top, 0.0).sum(1, keepdim=True)
    return losses, gradient.scatter(1, top, -others), (log_p, log_q)


def one_call(s, u, divergence, backend):
    x = leaf(s)
    out = selective_opd_loss(x, u, divergence=divergence, selector="entropy", fraction=1.0, top_k=K, backend=backend)
    out.loss.backward()
    return out, x.grad


@pytest.mark.filterwarnings("ignore:.*infinite")
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", JSD(0.5)], ids=["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_row_keeps_the_contract(backend, dtype, divergence):
    s, u = drawn_rows(dtype)
    out, gradient = one_call(s, u, divergence, backend)
    losses, want, (log_p, log_q) = wanted(s, u, divergence)
    trained = losses.isfinite()
    assert torch.equal(out.selected, trained)
    assert trained.sum() > N // 2
    columns = {"reverse_kl": kl(log_p, log_q), "forward_kl": kl(log_q, log_p)}
    columns |= {"student_entropy": -(log_p.exp() * log_p.clamp_min(-1e4)).sum(1)}
    columns |= {"teacher_entropy": -(log_q.exp() * log_q.clamp_min(-1e4)).sum(1)}
    for name, expected in columns.items():
        relative = 1e-4 if name.endswith("kl") else 1e-5
        assert_within(getattr(out.stats, name), expected, absolute=1e-6, relative=relative, name=name)
    if isinstance(divergence, str):
        assert out.loss.item() == pytest.approx(losses[trained].mean().item(), rel=1e-4)
    got = gradient.double() * int(trained.sum())
    assert not got[~trained].any()
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    for i in trained.nonzero().flatten().tolist():
        error, norm = (got[i] - want[i]).norm().item(), want[i].norm().item()
        kl_of_close_models = losses[i].item() * (1 if isinstance(divergence, str) else 4)
        bound = small_kl_bound(max(kl_of_close_models, 1e-12)) + rounding
        allowed = bound * norm if losses[i] >= 5e-7 else 3e-6  # the contract's smallest KL
        assert error <= allowed, f"row {i}, loss {losses[i]:.3g}: {error / norm:.2e} > {bound:.2e}"


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
def test_a_vocabulary_of_one_id_has_nothing_to_learn(backend):
    x = torch.tensor([[61.7], [3.3]], requires_grad=True)
    out = selective_opd_loss(x, torch.tensor([[1.1], [1000.0]]), fraction=1.0, top_k=1, backend=backend)
    out.loss.backward()
    assert abs(out.loss) < 5e-7  # it was 1.9e-6
    assert x.grad.abs().max() < 5e-7
