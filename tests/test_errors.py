# Bad arguments: each is refused before any work, by name, with what came and what was expected.
#
#   Run: make test ARGS=tests/test_errors.py
#
# Not here: legal but non-finite logits (tests/test_loss.py).
import pytest
import torch
from torch import nn

from opd_ops import LinearHead, Multinomial, score_positions, select_positions, selective_opd_loss

LOGITS = torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(0))
HIDDEN, WEIGHT = torch.ones(4, 3, 8), torch.ones(20, 8)

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
    ({"process_group": object()}, TypeError, r"process_group: got object, expected a torch\.distributed\.ProcessGroup or None"),
    ({"num_items_in_batch": 0}, ValueError, "num_items_in_batch: got 0, expected a finite number > 0"),
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
        (LOGITS, LOGITS[:3], ValueError, r"teacher: got positions of shape \(3, 3\), expected those of the student, \(4, 3\)"),
        (LOGITS, LOGITS.to("meta"), ValueError, "teacher: is on the meta device"),
        (torch.tensor(1.0), LOGITS, ValueError, r"student: got logits of shape \(\), expected \(\.\.\., V\)"),
        (LOGITS.to("meta"), LOGITS.to("meta"), ValueError, "student: is on the meta device, which holds no numbers"),
        (torch.ones(4, 3, 0), LOGITS, ValueError, "student: got a vocabulary without an entry"),
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
