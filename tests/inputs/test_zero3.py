"""Heads that ZeRO-3 partitions, against a stand-in that does to a parameter what DeepSpeed does: empties it outside of a
gathering, and takes its gradient by a hook. Against DeepSpeed itself: benchmarks/cpu/check_zero3.py.

Command: make test ARGS=tests/inputs/test_zero3.py
Not here: FSDP2 (test_unshard.py).
"""

import sys
from enum import Enum
from types import ModuleType

import pytest
import torch

from opd_ops import LinearHead, selective_opd_loss
from tests.support.cases import generator
from tests.support.tolerances import assert_gradient


class ZeroParamStatus(Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2


class GatheredParameters:
    """Whole inside, empty again outside."""

    def __init__(self, parameters, enabled=True):
        self.parameters = parameters if enabled else []

    def __enter__(self):
        for parameter in self.parameters:
            assert parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE, "gathered twice"
            parameter.data, parameter.ds_status = parameter.kept, ZeroParamStatus.AVAILABLE

    def __exit__(self, *_):
        for parameter in self.parameters:
            parameter.data, parameter.ds_status = torch.empty(0), ZeroParamStatus.NOT_AVAILABLE


@pytest.fixture
def partition(monkeypatch):
    """Partitions a module's parameters; `parameter.taken` is what the hook found."""
    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["deepspeed.runtime.zero"].GatheredParameters = GatheredParameters
    sys.modules["deepspeed.runtime.zero"].ZeroParamStatus = ZeroParamStatus

    def partitioned(module):
        for i, parameter in enumerate(module.parameters()):
            parameter.ds_id, parameter.ds_shape, parameter.taken = i, parameter.shape, []
            parameter.kept, parameter.data = parameter.data, torch.empty(0)
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE

            def take(p):
                p.taken.append(p.grad)
                p.grad = None

            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(take)
        return module

    return partitioned


def _inputs():
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(16, 61), torch.randn(12, 16, generator=generator(1), requires_grad=True)
    return head, hidden, 3 * torch.randn(12, 61, generator=generator(2))


def _loss(head, hidden, teacher):
    return selective_opd_loss(LinearHead.from_module(hidden, head), teacher, fraction=0.5).loss


def test_the_hook_takes_the_gradient_and_the_parameter_is_empty_again(partition):
    head, hidden, teacher = _inputs()
    _loss(head, hidden, teacher).backward()
    want = [head.weight.grad, head.bias.grad, hidden.grad]
    head, hidden, teacher = _inputs()
    head = partition(head)
    for _ in range(2):  # a step leaves nothing behind
        hidden.grad = None
        loss = _loss(head, hidden, teacher)
        assert head.weight.shape == (0,)
        loss.backward()
        assert head.weight.shape == head.bias.shape == (0,)
        for parameter, wanted in zip(head.parameters(), want, strict=False):
            (got,) = parameter.taken
            assert_gradient(got, wanted, 1e-6)
            parameter.taken.clear()
        assert_gradient(hidden.grad, want[2], 1e-6)


def test_a_parameter_that_is_gathered_already_stays_so(partition):
    head, hidden, teacher = _inputs()
    whole = _loss(head, hidden, teacher)
    head = partition(head)
    with GatheredParameters(list(head.parameters())):
        loss = _loss(head, hidden, teacher)
        assert torch.equal(loss, whole)
        assert head.weight.ds_status is ZeroParamStatus.AVAILABLE
        loss.backward()
    assert all(len(parameter.taken) == 1 for parameter in head.parameters())


def test_a_frozen_head_is_gathered_without_a_graph(partition):
    head, hidden, teacher = _inputs()
    whole = _loss(head, hidden, teacher)
    head = partition(head.requires_grad_(False))
    assert torch.equal(_loss(head, hidden, teacher), whole)
    assert head.weight.shape == (0,)


def test_the_partitioned_parameter_itself_is_refused_by_name(partition):
    head, hidden, _ = _inputs()
    head = partition(head)
    with pytest.raises(ValueError, match=r"LinearHead\.weight: got a parameter that ZeRO-3 partitions.*from_module"):
        LinearHead(hidden, head.weight)
