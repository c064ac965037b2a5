# The float64 side of the kernel tests: the specification (opd_ops/backends/eager.py) under the kernels' names.
#
#   COMMON is what every launcher takes; statistics, support and gradient are by column or by kernel.
#
# Not here: the tests (test_kernel_*.py), their inputs (cases.py), the numbers they are compared by (tolerances.py).
import torch

from opd_ops.backends import eager
from opd_ops.sources import Transform, finish_logits
from tests.cases import logit_pair
from tests.tolerances import assert_within

COMMON = {"temperature": 1.0, "s_scale": 1.0, "t_scale": 1.0, "s_softcap": None, "t_softcap": None}
DIVERGENCES = {"reverse_kl": eager.reverse_kl, "forward_kl": eager.forward_kl}


def logit(x, scale=1.0, softcap=None, temperature=1.0):
    return finish_logits(x.double().clone(), Transform(True, x.shape[-1], temperature, scale, softcap))


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


def gradient(divergence, s, t, weights, **changed):
    """The weighted gradient with respect to stored logits, by autograd through the transform, and the losses."""
    common = {**COMMON, **changed}
    x = s.double().requires_grad_()
    z = x * common["s_scale"]
    if common["s_softcap"] is not None:
        z = common["s_softcap"] * torch.tanh(z / common["s_softcap"])
    t64 = logit(t, common["t_scale"], common["t_softcap"], common["temperature"])
    kl = DIVERGENCES[divergence](z / common["temperature"], t64)
    return torch.autograd.grad(kl, x, weights.double())[0], kl.detach()


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


def assert_statistics(score, s64, t64):
    """The bounds of the public contract: entropy and log-sum-exp 1e-5, KL 1e-6 + 1e-4 KL."""
    for name, want in statistics(s64, t64).items():
        relative = 1e-4 if name.endswith("kl") else 1e-5
        assert_within(getattr(score, name), want, absolute=1e-6, relative=relative, name=name)
    assert not bool((score.reverse_kl < 0).any() or (score.forward_kl < 0).any())
