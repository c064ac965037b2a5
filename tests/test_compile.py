# torch.compile(fullgraph=True) of the loss on the Triton backend, and its operators by torch's own checks.
#
#   Compared: bitwise with the same call in eager mode. Traced by dynamo and aot autograd, kernels interpreted: that inductor
#   can generate code around the operators on a GPU is not shown here.
#   Run: make test ARGS=tests/test_compile.py
#
# Not here: the values themselves (tests/test_triton.py).
import math

import pytest
import torch

from opd_ops import selective_opd_loss
from opd_ops.backends import triton_ops
from opd_ops.selection import budget, most_selected
from tests.cases import leaf, logit_pair

OPTIONS = 2**20, 130, 0.7  # workspace_bytes, vocab_size, temperature
OPERATORS = {
    "token_columns": lambda s, t, rows: (s, t, rows, 8, "jsd,released_kl", *OPTIONS),
    "divergence_gradient": lambda s, t, rows: (s, t, rows, torch.ones(2), "reverse_kl", *OPTIONS),
    "selected_losses": lambda s, t, rows: (leaf(s), t, rows, torch.ones(2), "forward_kl", *OPTIONS),
}


def compiled(call):
    """For these shapes alone: a shape that varies between calls is not supported, and dynamo would try."""
    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, dynamic=False, backend="aot_eager")


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_pass_opcheck(name):
    student, teacher = (x.view(2, 2, 131) for x in logit_pair(4, 131))
    found = torch.library.opcheck(getattr(triton_ops, name), OPERATORS[name](student, teacher, torch.tensor([2, 0])))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("shape", [(6, 131), (2, 3, 131)])
@pytest.mark.parametrize(("divergence", "selector"), [("reverse_kl", "teachability"), ("forward_kl", "tip")])
def test_selective_opd_loss_compiles_fullgraph(divergence, selector, shape):
    student, teacher = (x.view(shape) for x in logit_pair(6, 131))
    teacher = teacher.clone()

    def call(s, t):
        out = selective_opd_loss(s, t, fraction=0.5, divergence=divergence, selector=selector, backend="triton")
        return out.loss, out.selected, out.metrics["kl_all"]

    plain, traced = leaf(student), leaf(student)
    want = call(plain, teacher)
    got = compiled(call)(traced, teacher)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    want[0].backward()
    got[0].backward()
    assert torch.equal(traced.grad, plain.grad)
    assert plain.grad.any()


def test_a_compiled_call_leaves_rows_that_cannot_be_trained_on_out_of_a_full_budget():
    student, teacher = logit_pair(4, 131)
    teacher[1, 5], teacher[2, 7] = math.nan, -math.inf  # not valid; infinite reverse KL

    def call(s, t):
        return selective_opd_loss(s, t, fraction=1.0, selector="entropy", backend="triton").loss

    plain, traced = leaf(student), leaf(student)
    want, got = call(plain, teacher), compiled(call)(traced, teacher)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    want.backward()
    got.backward()
    torch.testing.assert_close(traced.grad, plain.grad, rtol=1e-6, atol=0)
    assert not traced.grad[1:3].any()
    assert traced.grad[0].any()


def test_inplace_backward_is_rejected_while_tracing():
    student, teacher = logit_pair(3, 131)

    def call(s, t):
        return selective_opd_loss(s * 1.0, t, backend="triton", inplace_backward=True).loss

    with pytest.raises(Exception, match="inplace_backward"):
        compiled(call)(leaf(student), teacher)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 1.0])
def test_most_selected_is_the_budget_of_all(fraction):
    for n in range(50):
        assert most_selected(n, fraction) == budget(torch.tensor(n), fraction)
