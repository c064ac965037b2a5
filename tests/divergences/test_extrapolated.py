"""`Extrapolated`: the divergence to a teacher that is mixed with a reference, against the mixed logits in fp64.

  Run: make test ARGS=tests/divergences/test_extrapolated.py
Not here: the divergences themselves (test_divergences.py), ranks that share out the vocabulary (inputs/test_vocabulary.py).
"""

import pytest
import torch

from opd_ops import Extrapolated, LinearHead
from opd_ops.backends import eager
from opd_ops.divergences import DIVERGENCES
from opd_ops.inputs.sources import Source
from tests.divergences.test_divergences import INF, every_backend, expected, run
from tests.support import divergence_oracle as oracle
from tests.support.cases import generator, gradients, head_pair, leaf, leaf_head, logit_pair, to_double
from tests.support.tolerances import HEAD_ABSOLUTE, assert_gradient, assert_within


@pytest.mark.parametrize("backend", ["torch", "eager", "auto"])
@pytest.mark.parametrize("lam", [1.25, 0.5, 1.0])
@pytest.mark.parametrize("base", ["reverse_kl", "jsd", "tail_aware"])
def test_extrapolated_is_the_divergence_to_the_mixed_teacher(base, lam, backend):
    s, u = logit_pair(5, 131, scale=3.0, seed=8)
    r = s + 0.5 * torch.randn(s.shape, generator=generator(3))
    divergence = Extrapolated(lam, r, divergence=DIVERGENCES[base])
    x = leaf(s)
    out = run(divergence, x, u, backend, temperature=1.3, workspace_bytes=4_000)
    out.loss.backward()
    mixed = (lam * u.double() + (1 - lam) * r.double()) / 1.3
    losses, gradient = expected(base, s.double() / 1.3, mixed, None)
    assert_within(out.loss, losses.sum(), absolute=1e-5, relative=1e-4, name=base)
    assert_gradient(x.grad, gradient / 1.3)
    if base == "reverse_kl":  # the statistics are of the teacher that is trained towards
        assert_within(out.stats.reverse_kl, losses, absolute=1e-6, relative=1e-4, name="reverse_kl")


@every_backend
def test_extrapolated_reads_heads_and_soft_caps(backend):
    student, teacher = head_pair((6,), 97, bias=True, softcap=11.0, seed=3)
    reference = LinearHead(teacher.hidden + 0.3, teacher.weight, softcap=7.0)
    result = leaf_head(student)
    out = run(Extrapolated(1.25, reference), result, teacher, backend, workspace_bytes=15_000)
    out.loss.backward()
    rows = torch.arange(6)
    u, r = (eager.logits(Source.of(to_double(x), 97, 1.0), rows, torch.float64) for x in (teacher, reference))
    of_oracle = leaf_head(student, torch.float64)
    s = eager.logits(Source.of(of_oracle, 97, 1.0), rows, torch.float64)
    losses, gradient = oracle.reverse_kl(s.detach(), 1.25 * u - 0.25 * r)
    s.backward(gradient)
    assert_within(out.loss, losses.sum(), absolute=6 * HEAD_ABSOLUTE, relative=1e-4, name="loss")
    for got, want in zip(gradients(result), gradients(of_oracle), strict=True):
        assert_gradient(got, want)


def test_extrapolated_keeps_what_the_teacher_masks():
    s, u = logit_pair(3, 50)
    u[:, 7] = s[:, 7] = -INF
    r = s.masked_fill(s == -INF, 0.0)
    out = run(Extrapolated(1.25, r), leaf(s), u, "torch")
    assert out.loss.isfinite()
    r[1, 3] = -INF  # extrapolating away from the impossible has no softmax
    out = run(Extrapolated(1.25, r), leaf(s), u, "torch")
    assert out.metrics["n_teacher_nonfinite"] == 1
