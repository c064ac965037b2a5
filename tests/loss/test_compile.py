"""torch.compile(fullgraph=True) of the loss on the Triton backend, and its operators by torch's own checks.

  Compared: bitwise with the same call in eager mode. Traced by dynamo and aot autograd, on a CPU: whether inductor
  can generate code around the operators on a GPU is not shown here. CUDA-graph capture as far as a CPU shows it: the call
  runs no operator that asks the host.
  Run: make test ARGS=tests/loss/test_compile.py

Not here: the values themselves (tests/backends/triton/test_backend.py).
"""

import math
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd_ops import LinearHead, Mixture, StudentStats, selective_opd_loss
from opd_ops.arguments import may_look, traced_as_constant
from opd_ops.backends.triton import operators as triton_ops
from opd_ops.inputs.sources import Source
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.budget import Budget
from tests.support.cases import head_pair, leaf, leaf_head, logit_pair

OPTIONS = 2**20, 130, 0.7  # workspace_bytes, vocab_size, temperature
HEAD_OPTIONS = "jsd,released_kl,topk_entropy", torch.float32  # optional columns, score_dtype
FLAGS = torch.ones(2, dtype=torch.uint8)
PLACES = torch.tensor([0, 2, 3])
OPERATORS = {
    "token_columns": lambda s, t, rows: (s, t, rows, 8, "jsd,released_kl,topk_entropy", *OPTIONS),
    "divergence_gradient": lambda s, t, rows: (s, t, rows, torch.ones(2), "reverse_kl", *OPTIONS),
    "selected_losses": lambda s, t, rows: (leaf(s), t, rows, torch.ones(2), "forward_kl", *OPTIONS),
    "placed_scores": lambda s, t, rows: (
        s.view(-1)[:54].view(18, 3).exp(),
        PLACES,
        4,
        None,
        "tip-released",
        "reverse_kl",
        "released_kl,topk_entropy",
    ),
    "chosen_positions": lambda s, t, rows: (s[0, 0, :2], FLAGS, 0 * FLAGS, 1, 2, 1, 1, None, torch.arange(2), s[0, 1, :2]),
}


def head_operator(name, dtype):
    """An operator on heads and its arguments."""
    student, teacher = head_pair((4,), 131, bias=True, softcap=20.0, dtype=dtype)
    student = LinearHead(student.hidden.T.contiguous().T, student.weight, student.bias, softcap=20.0)  # of any strides
    student = student if name == "head_columns" else leaf_head(student)
    sources = Source.of(student, 130, 0.7), Source.of(teacher, 130, 0.7)
    rows = torch.tensor([2, 0])
    if name == "head_columns":
        return triton_ops.head_columns, (*triton_ops.head_arguments(*sources, Workspace(2**20), 8), rows, *HEAD_OPTIONS)
    arguments = triton_ops.head_arguments(*sources, Workspace(2**20), True, True, False)
    return triton_ops.head_loss, (*arguments, rows, torch.tensor([0.5, 1.0]), "reverse_kl")


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.bfloat16])
@pytest.mark.parametrize("name", [pytest.param("head_columns", marks=pytest.mark.full), "head_loss"])
def test_operators_on_heads_pass_opcheck(name, dtype):
    got = torch.library.opcheck(*head_operator(name, dtype))
    assert set(got.values()) == {"SUCCESS"}


@pytest.mark.full
@pytest.mark.parametrize("frozen", [False, True])
def test_a_training_step_around_heads_compiles_fullgraph(frozen):
    """The last norm and the loss of two models, hidden states in: what a trainer compiles."""
    heads = head_pair((6,), 131)
    gain = torch.linspace(0.5, 1.5, heads[0].hidden.shape[-1])

    def step(gain, weight):
        student = LinearHead(heads[0].hidden * gain, weight)
        out = selective_opd_loss(student, heads[1], fraction=0.5, backend="triton")
        return 2 * out.loss, out.selected, out.metrics["kl_selected"]

    runs = []
    for call in (step, compiled(step)):
        tensors = leaf(gain), heads[0].weight if frozen else leaf(heads[0].weight)
        got = call(*tensors)
        got[0].backward()
        runs.append([*got, *(x.grad for x in tensors if x.requires_grad)])
    assert len(runs[0]) == (4 if frozen else 5)
    assert torch.equal(runs[0][1], runs[1][1])
    for a, b in zip(*runs, strict=True):  # an eager call is summed by kernels: the last bit may differ
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert runs[0][3].any()


class _NoSynchronisation(TorchDispatchMode):
    """Raises at operators whose result depends on data the host must read: what stream capture refuses on a GPU."""

    FORBIDDEN = (
        "aten.nonzero",
        "aten._local_scalar_dense",
        "aten.masked_select",
        "aten.item",
        "aten.lift_fresh",  # a constant made on the host
        "aten.unique",
        "aten.is_nonzero",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not str(func).startswith(self.FORBIDDEN), f"{func} synchronises"
        return func(*args, **(kwargs or {}))


def capture(monkeypatch, capturing):
    """Let calls believe that a CUDA graph captures them, whose numbers nothing reads."""
    monkeypatch.setattr("opd_ops.call.prepare.is_in_graph", lambda device: capturing)
    for name, module in list(sys.modules.items()):
        if name.startswith("opd_ops.") and hasattr(module, "may_look"):
            monkeypatch.setattr(module, "may_look", lambda tensor: not capturing and may_look(tensor))


@pytest.mark.parametrize("inputs", ["logits", "heads", "rollout", "logits, rollout"])
def test_a_captured_call_never_asks_the_host(inputs, monkeypatch):
    heads, options = head_pair((2, 3), 131), {"fraction": 0.4, "backend": "triton", "num_items_in_batch": 7}
    if "rollout" in inputs:
        options["student_stats"] = StudentStats.from_logits(heads[0].hidden @ heads[0].weight.T)
    monkeypatch.setattr("opd_ops.call.prepare.check_student_stats", lambda *_, **__: None)  # which looks at ids, on a CPU alone
    runs = []
    for capturing in (False, True):
        capture(monkeypatch, capturing)
        student, teacher = leaf_head(heads[0]), heads[1]
        sides = (student, teacher) if "logits" not in inputs else [head.hidden @ head.weight.T for head in (student, teacher)]
        with _NoSynchronisation() if capturing else nullcontext():
            out = selective_opd_loss(*sides, **options)
            out.loss.backward()
        runs.append([out.loss, out.selected, student.hidden.grad, student.weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    with pytest.raises(AssertionError, match=r"aten.nonzero.* synchronises"), _NoSynchronisation():
        selective_opd_loss(*sides, **options, mask=torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_bytes", [pytest.param(2**10, marks=pytest.mark.full), 2**29])
def test_rows_that_fill_up_a_captured_call_may_hold_nan(workspace_bytes, dtype, monkeypatch):
    heads = head_pair((4,), 131, dtype=dtype)
    heads[1].hidden[0] = math.nan  # the teacher's: not valid, and the first to fill up
    options = {"fraction": 1.0, "backend": "triton", "workspace_bytes": workspace_bytes}
    options["weighting"] = lambda stats: stats.valid / stats.valid  # NaN where not valid, else 1
    runs = []
    for capturing in (False, True):
        capture(monkeypatch, capturing)
        student = leaf_head(heads[0])
        out = selective_opd_loss(student, heads[1], **options)
        out.loss.backward()
        assert out.selected.tolist() == [False, True, True, True]
        runs.append([out.loss.detach(), student.weight.grad, student.hidden.grad])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_captured_call_trains_on_what_is_kept_on_top_of_the_budget(monkeypatch):
    heads = head_pair((4, 3), 131)
    options = {"fraction": 0.1, "backend": "triton", "selector": "teachability-released"}
    runs = []
    for capturing in (False, True):
        capture(monkeypatch, capturing)
        student = leaf_head(heads[0])
        with _NoSynchronisation() if capturing else nullcontext():
            out = selective_opd_loss(student, heads[1], **options)
            out.loss.backward()
        assert out.selected.sum() > Budget(0.1).most(12)
        runs.append([out.loss.detach(), out.selected, student.weight.grad, student.hidden.grad])
    assert torch.equal(runs[0][1], runs[1][1])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert bool((runs[1][3].abs().sum(-1) > 0).equal(runs[1][1]))


def compiled(call):
    """For these shapes alone: a shape that varies between calls is not supported, and dynamo would try."""
    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, dynamic=False, backend="aot_eager")


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_pass_opcheck(name):
    student, teacher = (x.view(2, 2, 131) for x in logit_pair(4, 131))
    got = torch.library.opcheck(getattr(triton_ops, name), OPERATORS[name](student, teacher, torch.tensor([2, 0])))
    assert set(got.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("divergence", "selector", "shape"),
    [
        ("reverse_kl", "teachability", (2, 3, 131)),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("reverse_kl", "teachability", (6, 131)),
                ("forward_kl", "tip", (6, 131)),
                ("forward_kl", "tip", (2, 3, 131)),
                ("reverse_kl", "teachability-released", (6, 131)),
                ("reverse_kl", "teachability-released", (2, 3, 131)),
            )
        ),
    ],
)
def test_selective_opd_loss_compiles_fullgraph(divergence, selector, shape):
    student, teacher = (x.view(shape) for x in logit_pair(6, 131))
    teacher = teacher.clone()

    def call(s, t):
        out = selective_opd_loss(s, t, fraction=0.5, divergence=divergence, selector=selector, backend="triton")
        return out.loss, out.selected, out.metrics["kl_all"]

    plain, traced = leaf(student), leaf(student)
    want = call(plain, teacher)
    got = compiled(call)(traced, teacher)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert float(got[2]) == pytest.approx(float(want[2]), rel=1e-6)  # outside of a graph a kernel sums, in another order
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


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_mixture_is_refused_while_tracing(backend):
    s, u = logit_pair(2, 31)
    teacher = Mixture((u, s), (0.6, 0.4))

    def loss(x):
        return selective_opd_loss(x, teacher, backend=backend).loss

    with pytest.raises(Exception, match=r"got Mixture, which torch\.compile cannot trace"):
        torch.compile(loss, fullgraph=True, dynamic=False, backend="eager")(s)


def test_ier_is_refused_while_tracing():
    s, u = logit_pair(2, 31)

    def loss(x):
        return selective_opd_loss(x, u, selector="ier", tokens=torch.arange(2), backend="triton").loss

    with pytest.raises(Exception, match=r"'ier', which torch\.compile cannot trace"):
        torch.compile(loss, fullgraph=True, dynamic=False, backend="eager")(s)


def test_a_constant_of_the_trace_is_marked_as_torch_marks_it():
    def ours(): ...

    def torchs(): ...

    assert vars(traced_as_constant(ours)) == vars(torch.compiler.assume_constant_result(torchs)) != {}


@pytest.mark.full
def test_the_package_loads_no_compiler():
    code = "import sys, torch, opd_ops; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 1.0])
def test_most_selected_is_the_budget_of_all(fraction):
    for n in range(50):
        assert Budget(fraction).most(n) == Budget(fraction).of(torch.tensor(n))


@pytest.mark.full
def test_vocabularies_that_differ_compile_and_are_warned_of_while_tracing():
    student, teacher = (head.hidden @ head.weight.T for head in head_pair((6,), 131))

    def call(student):
        return selective_opd_loss(student, teacher, fraction=0.5, backend="triton").loss

    student = student[:, :120]
    with pytest.warns(UserWarning, match="vocabularies differ: the student has 120 entries, the teacher 131") as caught:
        traced = compiled(call)(student)
    assert sum("vocabularies differ" in str(x.message) for x in caught) == 1
    assert torch.equal(traced, call(student))
