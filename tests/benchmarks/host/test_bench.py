"""The calls of benchmarks/host: those by hand select what ours select, and every call leaves the student's gradient.

Not here: their time (make bench-host), the operators of ours (tests/loss/test_cost.py).
"""

import importlib.util

import pytest
import torch

from benchmarks.host.calls import SELECTORS, by_hand, calls, inputs, ours


@pytest.mark.parametrize("kind", ["dense", "heads"])
@pytest.mark.parametrize("selector", SELECTORS)
def test_a_call_by_hand_selects_what_ours_selects_and_has_its_gradient(selector, kind):
    mine, theirs = inputs(kind), inputs(kind)
    selected = ours(mine, selector=selector, backend="torch")
    rows = by_hand(theirs, selector=selector)
    assert rows.tolist() == selected.nonzero().squeeze(1).tolist()
    for got, want in zip(mine, theirs, strict=True) if kind == "dense" else [(mine.student_weight, theirs.student_weight)]:
        if want.requires_grad:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("call", [x for x in calls().values() if x.modules], ids=lambda x: x.name)
@pytest.mark.full
def test_a_peer_leaves_the_gradient_of_the_head(call):
    for module in call.modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    heads = inputs(call.inputs)
    call.run(heads)
    assert heads.student_weight.grad.abs().sum() > 0
