"""Bad arguments: each is refused before any work, by name, with what came and what was expected. And what is no bad argument:
NumPy's numbers and arrays in the place of Python's.

  Run: make test ARGS=tests/call/test_errors.py

Not here: legal but non-finite logits (tests/loss/test_loss.py).
"""

import numpy as np
import pytest
import torch
from torch import nn

from opd_ops import (
    JSD,
    EntropyAware,
    Extrapolated,
    LinearHead,
    LocalSupport,
    Mixture,
    Multinomial,
    SampledLogprobs,
    SampledToken,
    Settings,
    StudentStats,
    TailAware,
    TopKForwardKL,
    TopKLogprobs,
    estimate,
    score_positions,
    select_positions,
    selective_opd_loss,
    selective_opd_token_losses,
)
from opd_ops.estimates.communication import estimate_communication
from tests.support.cases import logit_pair

LOGITS = torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(0))
HUGE = 10**400  # no float holds it
NAMELESS = 10**5000  # and Python does not write it
IDS = torch.randint(0, 20, (4, 3), generator=torch.Generator().manual_seed(1))
HIDDEN, WEIGHT = torch.ones(4, 3, 8), torch.ones(20, 8)


class Needing:
    """A selector of a user, with `needs` as given."""

    def __init__(self, needs):
        self.needs = needs

    def __call__(self, stats):
        return stats.reverse_kl


ARGUMENTS = [
    ({"fraction": 0.0}, ValueError, r"fraction: got 0.0, expected a number in \(0, 1\]"),
    ({"fraction": 1.5}, ValueError, r"fraction: got 1.5, expected a number in \(0, 1\]"),
    ({"fraction": True}, ValueError, "fraction: got True"),
    ({"fraction": float("nan")}, ValueError, "fraction: got nan"),
    ({"selector": "entropic"}, ValueError, "selector: got 'entropic', expected a callable or one of: teachability, .*prefix"),
    ({"selector": 3}, TypeError, "selector: got int"),
    (
        {"divergence": "kl"},
        ValueError,
        "divergence: got 'kl', expected one of: entropy_aware, forward_kl, forward_kl_topk",
    ),
    ({"divergence": 3}, TypeError, "divergence: got int"),
    ({"backend": "cuda"}, ValueError, "backend: got 'cuda', expected one of: auto, eager, torch, triton"),
    ({"scope": "row"}, ValueError, "scope: got 'row', expected one of: batch, sequence, global"),
    ({"denominator": "mean"}, ValueError, "denominator: got 'mean', expected one of: selected, valid"),
    ({"top_k": 21}, ValueError, "top_k: got 21, expected at most the vocabulary size, 20"),
    ({"top_k": 0}, ValueError, "top_k: got 0, expected at least 1"),
    ({"top_k": 2.0}, TypeError, "top_k: got 2.0, expected an integer"),
    ({"temperature": 0.0}, ValueError, "temperature: got 0.0, expected a finite number > 0"),
    ({"temperature": float("inf")}, ValueError, "temperature: got inf"),
    ({"vocab_size": 21}, ValueError, r"vocab_size: got 21, expected at most 20 \(the student has 20, the teacher 20\)"),
    ({"workspace_bytes": 0}, ValueError, "workspace_bytes: got 0, expected at least 1"),
    (
        {"process_group": object()},
        TypeError,
        r"process_group: got object, expected a ProcessGroup that this process is in, or None",
    ),
    ({"num_items_in_batch": 0}, ValueError, r"num_items_in_batch: got 0, but \d+ positions are selected"),
    ({"num_items_in_batch": torch.ones(2)}, ValueError, r"num_items_in_batch: got a tensor of shape \(2,\)"),
    (
        {"num_items_in_batch": torch.tensor(-3)},
        ValueError,
        r"num_items_in_batch: got tensor\(-3\), expected a finite number > 0",
    ),
    ({"num_items_in_batch": torch.tensor(True)}, ValueError, r"num_items_in_batch: got a tensor of dtype torch\.bool"),
    ({"threshold": torch.tensor(float("nan"))}, ValueError, r"threshold: got tensor\(nan\), expected a number"),
    ({"threshold": torch.ones(2)}, ValueError, r"threshold: got a tensor of shape \(2,\), expected a 0-dim one"),
    ({"scope": None}, ValueError, "scope: got None, expected one of: batch, sequence, global"),
    ({"selector": Multinomial}, TypeError, "selector: got the class Multinomial, expected an instance of it"),
    ({"selector": lambda stats: stats.jsd}, ValueError, "selector: returned NoneType, .*name it in the selector's `needs`"),
    ({"selector": Needing("jsd")}, ValueError, "Needing.needs: got 'jsd', expected names of columns of TokenStats"),
    ({"selector": Needing({"nope"})}, ValueError, "Needing.needs: got {'nope'}, expected names of columns of TokenStats"),
    ({"selector": lambda stats: stats.reverse_kl.to("meta")}, ValueError, "scores on meta, expected real ones on cpu"),
    ({"mask": torch.ones(4, 20)}, ValueError, r"mask: got shape \(4, 20\), expected \(4, 3\)"),
    ({"mask": [1, 0]}, TypeError, "mask: got list"),
    ({"labels": torch.ones(3, 4)}, ValueError, r"labels: got shape \(3, 4\), expected \(4, 3\)"),
    ({"shift_labels": torch.ones(4)}, ValueError, r"shift_labels: got shape \(4,\)"),
    ({"cu_seqlens": torch.tensor([0.0, 12.0])}, TypeError, "cu_seqlens: got dtype torch.float32, expected an int32 or int64"),
    ({"cu_seqlens": [0, 12]}, TypeError, "cu_seqlens: got list, expected an int32 or int64"),
    ({"generator": 3, "selector": "random"}, TypeError, "generator: got 3, expected a torch.Generator"),
    ({"generator": 3}, TypeError, "generator: got 3"),
    ({"ignore_index": None, "labels": torch.ones(4, 3)}, TypeError, "ignore_index: got None, expected an integer"),
    ({"cu_seqlens": torch.tensor([[0, 12]])}, ValueError, r"cu_seqlens: got shape \(1, 2\)"),
    ({"cu_seqlens": torch.tensor([0, 7, 5, 12])}, ValueError, "expected non-decreasing numbers from 0 to 12"),
    ({"cu_seqlens": torch.tensor([0, 11])}, ValueError, r"cu_seqlens: got 0 \.\.\. 11"),
    ({"mask": torch.ones(4, 3, device="meta")}, ValueError, "mask: is on meta, the student is on cpu"),
    ({"fraction": HUGE}, ValueError, r"fraction: got 1000.*00\.\.\., expected a number in"),
    ({"fraction": NAMELESS}, ValueError, r"fraction: got an integer of thousands of digits, expected a number in"),
    ({"threshold": HUGE}, ValueError, r"threshold: got 1000.*00\.\.\., expected a number or a 0-dim tensor of one"),
    ({"threshold": -NAMELESS}, ValueError, "threshold: got an integer of thousands of digits, expected a number"),
    ({"num_items_in_batch": HUGE}, ValueError, r"num_items_in_batch: got 1000.*\.\.\., expected a finite number > 0"),
    ({"temperature": HUGE}, ValueError, r"temperature: got 1000.*\.\.\., expected a finite number > 0"),
    ({"top_k": HUGE}, ValueError, r"top_k: got 1000.*\.\.\., expected at most 9223372036854775807"),
    ({"workspace_bytes": HUGE}, ValueError, r"workspace_bytes: got 1000.*\.\.\., expected at most 9223372036854775807"),
    ({"ignore_index": HUGE, "labels": IDS}, ValueError, r"ignore_index: got 1000.*, which labels of dtype torch\.int64 cannot"),
    ({"shift_labels": IDS.byte()}, ValueError, "ignore_index: got -100, which shift_labels of dtype torch.uint8 cannot hold"),
    (
        {"labels": IDS.float()},
        TypeError,
        r"labels: got dtype torch\.float32, expected token ids as int64; pass labels\.long\(\)",
    ),
    ({"shift_labels": IDS > 3}, TypeError, r"shift_labels: got dtype torch\.bool, .*, or mask= for a mask of valid positions"),
    ({"special_ids": [HUGE], "tokens": IDS}, ValueError, r"special_ids: got 1000.*\.\.\., expected at most"),
    ({"special_ids": [2**40], "tokens": IDS.int()}, ValueError, "special_ids: got 1099511627776, expected ids of at most 2147"),
    ({"eos_ids": np.array(3)}, TypeError, r"eos_ids: got array\(3\), expected a sequence of token ids"),
    ({"eos_ids": np.array([3.0, 4.0])}, TypeError, r"eos_ids: got np\.float64\(3\.0\), expected an integer"),
    ({"fraction": np.array([0.5])}, ValueError, r"fraction: got array\(\[0\.5\]\), expected a number"),
    ({"fraction": np.bool_(True)}, ValueError, r"fraction: got np\.True_, expected a number"),
    ({"top_k": np.float32(4)}, TypeError, r"top_k: got np\.float32\(4\.0\), expected an integer"),
    ({"threshold": np.float32(np.nan)}, ValueError, r"threshold: got np\.float32\(nan\), expected a number"),
    (
        {"mask": torch.ones(4, 3).to_sparse()},
        TypeError,
        r"mask: got a tensor of layout torch\.sparse_coo, expected an ordinary",
    ),
    ({"weights": torch.ones(4, 3).to_sparse()}, TypeError, "weights: got a tensor of layout"),
    ({"labels": IDS.to_sparse()}, TypeError, "labels: got a tensor of layout"),
    ({"tokens": IDS.to_sparse()}, TypeError, "tokens: got a tensor of layout"),
    ({"cu_seqlens": torch.tensor([0, 12]).to_sparse()}, TypeError, "cu_seqlens: got a tensor of layout"),
    ({"threshold": torch.tensor(0.5).to_sparse()}, TypeError, "threshold: got a tensor of layout"),
    ({"num_items_in_batch": torch.tensor(5.0).to_sparse()}, TypeError, "num_items_in_batch: got a tensor of layout"),
    ({"selector": lambda stats: stats.student_entropy.to_sparse()}, ValueError, "selector: returned a tensor of layout"),
]


# By the names of the options: the values of some print as addresses, which differ between the processes that run the tests.
@pytest.mark.parametrize(("options", "error", "message"), ARGUMENTS, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_selective_opd_loss_rejects(options, error, message):
    with pytest.raises(error, match=message):
        selective_opd_loss(LOGITS, LOGITS, **options)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (LOGITS.long(), LOGITS, TypeError, "student: got logits of dtype torch.int64, expected a floating-point"),
        (LOGITS, LOGITS.int(), TypeError, "teacher: got logits of dtype torch.int32"),
        (LOGITS, None, TypeError, "teacher: got NoneType, expected a logits tensor"),
        (LOGITS, Extrapolated(1.2, LOGITS, LOGITS.to_sparse()), TypeError, r"Mixture.teachers\[1\]: got a tensor of layout"),
        (LOGITS, LOGITS[:3], ValueError, r"teacher: got positions of shape \(3, 3\), expected those of the student, \(4, 3\)"),
        (LOGITS, LOGITS.to("meta"), ValueError, "teacher: is on the meta device"),
        (torch.tensor(1.0), LOGITS, ValueError, r"student: got logits of shape \(\), expected \(\.\.\., V\)"),
        (LOGITS.to("meta"), LOGITS.to("meta"), ValueError, "student: is on the meta device, which holds no numbers"),
        (torch.ones(4, 3, 0), LOGITS, ValueError, "student: got a vocabulary without an entry"),
        (LOGITS.to_sparse(), LOGITS, TypeError, r"student: got a tensor of layout torch\.sparse_coo, expected an ordinary one"),
        (LOGITS, LOGITS.to_sparse(), TypeError, r"teacher: got a tensor of layout torch\.sparse_coo"),
        (
            torch.nested.nested_tensor([LOGITS[0], LOGITS[1, :2]], layout=torch.jagged),
            LOGITS,
            TypeError,
            "student: got a nested",
        ),
    ],
)
def test_sources_that_do_not_fit_are_rejected(student, teacher, error, message):
    for function in (selective_opd_loss, score_positions):
        with pytest.raises(error, match=message):
            function(student, teacher)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((HIDDEN, torch.ones(20, 7)), ValueError, r"hidden: got shape \(4, 3, 8\), expected \(\.\.\., 7\)"),
        ((HIDDEN, torch.ones(20)), ValueError, r"weight: got shape \(20,\), expected \(V, D\)"),
        ((HIDDEN, WEIGHT, torch.ones(8)), ValueError, r"bias: got shape \(8,\), expected \(20,\)"),
        ((HIDDEN, WEIGHT, None, 0.0), ValueError, "scale: got 0.0, expected a finite number > 0"),
        ((HIDDEN, WEIGHT, None, 1.0, -5.0), ValueError, "softcap: got -5.0"),
        ((HIDDEN.long(), WEIGHT), TypeError, "hidden: got dtype torch.int64"),
        ((HIDDEN, WEIGHT.to("meta")), ValueError, "weight: is on meta, hidden is on cpu"),
        ((HIDDEN, [1]), TypeError, "weight: got list, expected a tensor"),
        ((HIDDEN, WEIGHT, None, HUGE), ValueError, r"scale: got 1000.*, expected a finite number > 0"),
        ((HIDDEN, WEIGHT, None, 1.0, HUGE), ValueError, r"softcap: got 1000.*, expected a finite number > 0"),
        ((HIDDEN.to_sparse(), WEIGHT), TypeError, r"LinearHead\.hidden: got a tensor of layout torch\.sparse_coo"),
        ((HIDDEN, WEIGHT.to_sparse()), TypeError, r"LinearHead\.weight: got a tensor of layout"),
        ((HIDDEN, WEIGHT, torch.ones(20).to_sparse()), TypeError, r"LinearHead\.bias: got a tensor of layout"),
        ((HIDDEN, nn.Linear(8, 20)), TypeError, r"weight: got a module \(Linear\).*from_module"),
    ],
)
def test_linear_head_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        LinearHead(*arguments)


class LoraLinear(nn.Module):
    """What PEFT's wrapper looks like from outside: the base layer's weight, and adapters beside it."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(8, 20)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 20)})

    @property
    def weight(self):
        return self.base_layer.weight


def test_a_lora_wrapped_head_is_rejected():
    for build in (LinearHead, LinearHead.from_module):
        with pytest.raises(ValueError, match="LoRA-wrapped head; its adapter would silently never train"):
            build(HIDDEN, LoraLinear())


def test_linear_head_from_module_takes_weight_and_bias():
    head = nn.Linear(8, 20)
    built = LinearHead.from_module(HIDDEN, head, scale=2.0, softcap=30.0)
    assert built.weight is head.weight
    assert built.bias is head.bias
    assert (built.scale, built.softcap) == (2.0, 30.0)
    assert LinearHead.from_module(HIDDEN, nn.Linear(8, 20, bias=False)).bias is None
    with pytest.raises(TypeError, match=r"hidden: got NoneType, expected a tensor \(\.\.\., D\)"):
        LinearHead.from_module(None, head)
    with pytest.raises(TypeError, match="head: got ReLU, expected a module with a"):
        LinearHead.from_module(HIDDEN, nn.ReLU())


def test_select_positions_rejects():
    with pytest.raises(TypeError, match=r"scores: got torch\.int64, expected a floating-point tensor"):
        select_positions(torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="fraction: got -1"):
        select_positions(torch.ones(3), fraction=-1)
    with pytest.raises(ValueError, match=r"mask: got shape \(4,\)"):
        select_positions(torch.ones(3), mask=torch.ones(4))
    with pytest.raises(TypeError, match="scores: got a tensor of layout"):
        select_positions(torch.ones(3).to_sparse())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda x: JSD(x), "JSD.beta"),
        (lambda x: SampledToken(x), "SampledToken.clip"),
        (lambda x: EntropyAware(alpha=x), "EntropyAware.alpha"),
        (lambda x: EntropyAware(tau=x), "EntropyAware.tau"),
        (lambda x: Extrapolated(x, LOGITS, LOGITS), "Extrapolated.lam"),
        (lambda x: LocalSupport(x), "TopK.top_k"),
        (lambda x: Multinomial(gamma=x), "Multinomial.gamma"),
        (lambda x: TopKLogprobs(IDS, -torch.ones(4, 3), temperature=x), "TopKLogprobs.temperature"),
        (lambda x: StudentStats.from_logits(LOGITS, temperature=x), "temperature"),
        (lambda x: estimate(x, 20, 8, 8), "N"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_number_that_no_float_holds_is_rejected_by_name(make, name):
    for number in (HUGE, -NAMELESS):
        with pytest.raises(ValueError, match=rf"^{name}: got "):
            make(number)


def test_sparse_lists_and_statistics_are_rejected():
    sparse = torch.ones(4, 3).to_sparse()
    with pytest.raises(TypeError, match=r"TopKLogprobs\.ids: got a tensor of layout"):
        TopKLogprobs(IDS.to_sparse(), -sparse)
    with pytest.raises(TypeError, match=r"SampledLogprobs\.logprobs: got a tensor of layout"):
        SampledLogprobs(IDS, -sparse)
    with pytest.raises(TypeError, match=r"StudentStats\.entropy: got a tensor of layout"):
        StudentStats(torch.ones(4, 3), sparse, IDS.unsqueeze(-1), torch.ones(4, 3, 1))
    with pytest.raises(TypeError, match="logits: got a tensor of layout"):
        StudentStats.from_logits(LOGITS.to_sparse())


FLOATS, INTEGERS = (np.float16, np.float32, np.float64, np.asarray), (np.int32, np.int64, np.asarray)
NUMBERS = [
    *((name, value, kind) for name, value in (("fraction", 0.5), ("threshold", 0.25), ("temperature", 0.5)) for kind in FLOATS),
    *(("num_items_in_batch", 7, kind) for kind in (*FLOATS[:3], *INTEGERS)),
    *(("top_k", 3, kind) for kind in INTEGERS),
    *(("workspace_bytes", 30_000, kind) for kind in INTEGERS),
    *(("vocab_size", 50, kind) for kind in INTEGERS),
    *(("ignore_index", 4, kind) for kind in INTEGERS),
]


@pytest.mark.parametrize(("name", "value", "kind"), NUMBERS, ids=lambda x: getattr(x, "__name__", None))
def test_numpy_s_numbers_are_taken_as_python_s(name, value, kind):
    s, u = (x.view(4, 3, 60) for x in logit_pair(12, 60, scale=3.0))
    options = {"shift_labels": IDS % 6, "fraction": 0.3, name: value}
    want, got = (selective_opd_loss(s, u, **options | {name: x}) for x in (value, kind(value)))
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.selected, want.selected)
    assert got.loss > 0
    if name in ("fraction", "threshold"):
        chosen = [select_positions(want.scores, **{name: x}) for x in (value, kind(value))]
        assert torch.equal(*chosen)


@pytest.mark.parametrize("name", ["special_ids", "eos_ids"])
def test_numpy_s_ids_are_taken_as_lists(name):
    s, u = (x.view(4, 3, 60) for x in logit_pair(12, 60, scale=3.0))
    given = ([3, 4], np.array([3, 4]), np.array([3, 4], dtype=np.int32), [np.int64(3), np.uint8(4)], (x for x in (3, 4)))
    got = [selective_opd_loss(s, u, tokens=IDS % 6, fraction=0.5, **{name: ids}) for ids in given]
    assert all(torch.equal(out.loss, got[0].loss) for out in got)
    assert got[0].loss != selective_opd_loss(s, u, tokens=IDS % 6, fraction=0.5).loss


@pytest.mark.parametrize("make", [np.float32, np.float64, np.asarray])
def test_numpy_s_numbers_in_objects_become_python_s(make):
    half, four = make(0.5), np.int64(4)
    pairs = [
        (JSD(half), JSD(0.5)),
        (SampledToken(half), SampledToken(0.5)),
        (EntropyAware(half, half, four), EntropyAware(0.5, 0.5, 4)),
        (Multinomial(half, half), Multinomial(0.5, 0.5)),
        *((kind(four), kind(4)) for kind in (LocalSupport, TailAware, TopKForwardKL)),
    ]
    for got, want in pairs:
        assert got == want
        assert repr(got) == repr(want)
    for weights in ((half, half), np.array([half, half])):
        assert type(Mixture((LOGITS, LOGITS), weights).weights[0]) is float
    assert SampledToken(ratio="tis", bounds=np.array([0.0, 2.0])) == SampledToken(ratio="tis", bounds=(0.0, 2.0))
    head = LinearHead(HIDDEN, WEIGHT, scale=half, softcap=half)
    assert (type(head.scale), type(head.softcap)) == (float, float)
    assert type(TopKLogprobs(IDS, -torch.ones(4, 3), temperature=half).temperature) is float
    by_python, by_numpy = (StudentStats.from_logits(LOGITS, top_k=k, temperature=t) for k, t in ((4, 0.5), (four, half)))
    assert torch.equal(by_numpy.logprobs, by_python.logprobs)
    assert estimate(four, four * 10, four, four, fraction=half, top_k=four) == estimate(4, 40, 4, 4, fraction=0.5, top_k=4)
    sizes = {"tp": np.int64(2), "fraction": half}
    assert estimate_communication(four * 10, four * 10, four, **sizes) == estimate_communication(40, 40, 4, tp=2, fraction=0.5)
    numbers = {"fraction": half, "top_k": np.int64(300), "eos_ids": np.array([151_643, 151_645])}
    assert Settings(**numbers) == Settings(fraction=0.5, top_k=300, eos_ids=(151_643, 151_645))


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f, in_dims=1)(x.unsqueeze(1)),
    "grad of vmap": lambda f, x: torch.func.grad(lambda y: torch.func.vmap(f, in_dims=1)(y.unsqueeze(1)).sum())(x),
}
CALLS = {
    "loss": lambda s, u, **options: selective_opd_loss(s, u, fraction=0.5, **options).loss,
    "token losses": lambda s, u, **options: selective_opd_token_losses(s, u, fraction=0.5, **options).losses.sum(),
    "scores": lambda s, u, **options: score_positions(s, u, **options)[0].sum(),
}
# What the oracle's plain torch can do; nothing else is under a transform.
ALLOWED = {("loss", name) for name in ("grad", "vjp", "jvp", "jacrev")} | {("scores", name) for name in TRANSFORMS}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("call", CALLS)
def test_transforms_of_torch_func_are_rejected_where_there_is_no_rule(call, transform):
    s, u = logit_pair(6, 60, scale=3.0)
    for backend in ("auto", "torch", "triton", "eager"):
        if backend == "eager" and (call, transform) in ALLOWED:
            TRANSFORMS[transform](lambda x: CALLS[call](x, u, backend="eager"), s)
            continue
        message = (
            rf"backend: got '{backend}' under a transform of torch\.func \(.*\), for which it has no rule; use loss\.backw"
        )
        with pytest.raises(ValueError, match=message):
            TRANSFORMS[transform](lambda x, backend=backend: CALLS[call](x, u, backend=backend), s)


def test_eager_s_gradient_under_torch_func_is_autograd_s():
    s, u = logit_pair(6, 60, scale=3.0)
    x = s.clone().requires_grad_()
    CALLS["loss"](x, u, backend="eager").backward()
    got = torch.func.grad(lambda y: CALLS["loss"](y, u, backend="eager"))(s)
    assert torch.equal(got, x.grad)
    assert got.any()


@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_functional_call_trains_the_parameters_it_is_given(backend):
    head, hidden = nn.Linear(8, 60), torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    parameters = {name: p.detach().clone().mul_(5).requires_grad_() for name, p in head.named_parameters()}
    logits = torch.func.functional_call(head, parameters, (hidden,))
    CALLS["loss"](logits, logit_pair(6, 60, scale=3.0)[1], backend=backend).backward()
    assert all(p.grad.any() for p in parameters.values())
    assert all(p.grad is None for p in head.parameters())
