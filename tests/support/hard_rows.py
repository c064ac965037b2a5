"""Rows that are hard for the numerics, and the equations in float64: models that differ by a constant of up to 1,000, a student
with p near 1 on one token, masks written as -inf, `finfo.min` or -1e4 on either side, close models and far ones.

The oracle is written from the equations (none of the library's code): p = 0 where e^x is 0 in float64, and the gradient of the
most likely token is minus the sum of the others', which p (r - KL) in float64 is not for p near 1.
Not here: the tests (loss/test_contract.py, inputs/test_vocabulary.py).
"""

import math

import torch

from tests.support.cases import generator
from tests.support.tolerances import small_kl_bound

N, V = 300, 211
OFFSETS = [0.0, 60.0, -120.0, 500.0, -1000.0]
MASKS = ["none", "both", "other", "student", "teacher", "top"]


def drawn_rows(dtype, masks=MASKS):
    """(N, V) logits, a row a draw."""
    g = generator(0)

    def pick(values):
        return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (N, 1), generator=g)]

    s = pick([1.0, 4.0, 15.0]) * torch.randn(N, V, generator=g, dtype=torch.float64)
    kind = torch.randint(len(masks), (N, 1), generator=g)
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
    # top: the teacher masks the student's most likely id. The KLs are infinite there, bounded divergences are not.
    return s, u.scatter(1, top, torch.where(kind == MASKS.index("top"), -math.inf, u.gather(1, top)))


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
    """Losses, (N,), gradients with respect to the logits, (N, V), and log p and log q."""
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


def assert_gradients(got, want, losses, *, divergence, dtype):
    """Every row of the contract: ||g - g64|| / ||g64|| <= 1e-4, below KL 1e-3 at most 3e-6 / sqrt(2 KL), and one rounding of 16
    bits; infinite losses have no gradient. A JSD is about a quarter of the KL of close models."""
    trained = losses.isfinite()
    assert not got[~trained].any()
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    for i in trained.nonzero().flatten().tolist():
        error, norm = (got[i] - want[i]).norm().item(), want[i].norm().item()
        kl_of_close_models = losses[i].item() * (1 if divergence.endswith("kl") else 4)
        bound = small_kl_bound(max(kl_of_close_models, 1e-12)) + rounding
        allowed = bound * norm if losses[i] >= 5e-7 else 3e-6  # the contract's smallest KL
        assert error <= allowed, f"row {i}, loss {losses[i]:.3g}: {error / norm:.2e} > {bound:.2e}"
