"""The float64 side of the kernel tests: the specification (opd_ops/backends/eager.py) under the kernels' names.

  COMMON: the arguments of every launcher of two models; ONE: those of a launcher of one.
  statistics, support, gradient, jsd, off_list: the results of the kernel of that name.

Not here: the tests (tests/kernels/), their inputs (cases.py), the numbers they are compared by (tolerances.py).
"""

import math

import torch

from opd_ops.backends import eager
from opd_ops.inputs.sources import Transform, finish_logits
from tests.support.cases import logit_pair
from tests.support.tolerances import assert_within

COMMON = {"temperature": 1.0, "s_scale": 1.0, "t_scale": 1.0, "s_softcap": None, "t_softcap": None}
ONE = {"temperature": 1.0, "scale": 1.0, "softcap": None}
DIVERGENCES = {"reverse_kl": eager.reverse_kl, "forward_kl": eager.forward_kl}


def logit(x, scale=1.0, softcap=None, temperature=1.0):
    return finish_logits(x.double().clone(), Transform(True, x.shape[-1], temperature, scale, softcap), x.dtype)


def statistics(s, t):
    """Columns by name, from float64 logits (n, V)."""
    lse_s, lse_t = s.logsumexp(-1), t.logsumexp(-1)
    return {
        "student_logsumexp": lse_s,
        "teacher_logsumexp": lse_t,
        "logsumexp_gap": lse_s - lse_t,
        "student_entropy": eager.entropy(s),
        "teacher_entropy": eager.entropy(t),
        "reverse_kl": eager.reverse_kl(s, t),
        "forward_kl": eager.forward_kl(s, t),
    }


def support(s, t, s_ids, t_ids):
    """Support columns from float64 logits and the ids of the two supports."""
    in_s, in_t = eager.membership(s_ids, s.shape[1]), eager.membership(t_ids, t.shape[1])
    return {
        "support_mass": eager.mass(t.softmax(-1), in_s),
        "student_support_mass": eager.mass(s.softmax(-1), in_s),
        "overlap_mass": eager.mass(t.softmax(-1), in_s & in_t),
        "union_kl": eager.kl_on(in_s | in_t, t, s),
    }


def traced_logit(x, scale, softcap, temperature):
    """logit, out of place: for autograd from the stored numbers on."""
    z = x * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def gradient(divergence, s, t, weights, **changed):
    """The weighted gradient with respect to stored logits, by autograd through the transform, and the losses."""
    common = {**COMMON, **changed}
    x = s.double().requires_grad_()
    t64 = logit(t, common["t_scale"], common["t_softcap"], common["temperature"])
    divergence = DIVERGENCES.get(divergence, divergence)
    kl = divergence(traced_logit(x, common["s_scale"], common["s_softcap"], common["temperature"]), t64)
    return torch.autograd.grad(kl, x, weights.double())[0], kl.detach()


def mixture_kls(s, t, beta):
    """KL(p || m) and KL(q || m) (n,), m = beta q + (1 - beta) p, from float64 logits (n, V)."""
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    nowhere = (log_p == -torch.inf) & (log_q == -torch.inf)
    # where() before the products: autograd would make NaN of a zero times an infinity.
    a, b = torch.where(nowhere, 0.0, log_p), torch.where(nowhere, 0.0, log_q)
    log_m = torch.logaddexp(a + math.log(1 - beta), b + math.log(beta))

    def kl(log_a):
        absent = log_a == -torch.inf
        return (log_a.exp() * torch.where(absent, 0.0, torch.where(absent, 0.0, log_a) - log_m)).sum(-1)

    return kl(log_p), kl(log_q)


def jsd(s, t, beta):
    """The generalised Jensen-Shannon divergence (n,) of arXiv:2306.13649, with TRL's beta."""
    kl_p, kl_q = mixture_kls(s, t, beta)
    return (1 - beta) * kl_p + beta * kl_q


def listed(ids, V):
    """(n, V) bool: is v among the row's ids (n, K), of which those beyond V are filler."""
    return eager.membership(ids.long().clamp_max(V), V + 1)[:, :V]


def off_list(z, ids):
    """log sum e^z off ids (n,), from float64 logits (n, V)."""
    return z.masked_fill(listed(ids, z.shape[1]), -torch.inf).logsumexp(-1)


def off_list_gradient(x, ids, values, coef, **changed):
    """The gradient with respect to stored logits of sum values logit[ids] + coef off_list, by autograd."""
    common = {**ONE, **changed}
    x = x.double().requires_grad_()
    z = traced_logit(x, common["scale"], common["softcap"], common["temperature"])
    inside = ids < x.shape[1]
    at_ids = z.gather(1, torch.where(inside, ids, 0).long())
    total = (torch.where(inside, values.double(), 0.0) * at_ids).sum() + (coef.double() * off_list(z, ids)).sum()
    return torch.autograd.grad(total, x)[0]


def sparse_pair(folder, n=70000, stride=40000):
    """(n, 300) fp16 logits of which only the first and last row are set, at a row stride that takes offsets past
    2^31: memory-mapped files that are holes but for those two rows.
    """
    pairs = []
    for name, x in zip("st", logit_pair(2, 300, dtype=torch.float16), strict=True):
        with open(folder / name, "wb") as file:
            file.truncate(n * stride * x.element_size())
        rows = torch.from_file(str(folder / name), shared=True, size=n * stride, dtype=x.dtype).view(n, stride)[:, :300]
        rows[0], rows[-1] = x[0], x[1]
        pairs.append(rows)
    return pairs


def assert_statistics(score, s64, t64, gap=0.0):
    """The bounds of the public contract: entropy and log-sum-exp 1e-5, KL 1e-6 + 1e-4 KL; `gap`: more for the difference of
    two log-sum-exps, which is small where each is not.
    """
    for name, want in statistics(s64, t64).items():
        relative = 1e-4 if name.endswith("kl") else 1e-5
        absolute = 1e-6 + (gap if name == "logsumexp_gap" else 0.0)
        assert_within(getattr(score, name), want, absolute=absolute, relative=relative, name=name)
    assert not bool((score.reverse_kl < 0).any() or (score.forward_kl < 0).any())


def same(a, b):
    """Equal bits, but for the sign of 0 and the payload of NaN."""
    a_number, b_number = (x.nan_to_num(0.0, math.inf, -math.inf) for x in (a, b))
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a_number, b_number)
