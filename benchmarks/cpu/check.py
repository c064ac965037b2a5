"""What a method must pass before it is timed: its loss, gradients and selection against the fp64 oracle; and its FLOP count.

  |L - L64| <= 1e-6 + 1e-4 L64;   |g - g64| / |g64| <= 1e-4 for hidden and weight;   the same positions selected
  units = FLOP of every matmul, forward and backward (torch.utils.flop_counter) / 2 N V Ds; both at sizes of seconds.
  Score matmuls alone are 1 + Dt/Ds units. Element-wise work is not counted.

The oracle is `opd_ops`' own eager backend in float64, with the method's selector; dense methods against fraction 1.
Not here: the methods (methods.py), time and memory (measure.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cpu.heads import Heads, Sizes, build_heads
from benchmarks.cpu.methods import METHODS, Settings
from opd_ops import LinearHead, selective_opd_loss

GATE_SIZES = Sizes(n=600, vocab=2053, student_dim=64, teacher_dim=96)  # two chunks of 512, an odd vocabulary
GATE_WORKSPACE_MIB = 1  # several tiles and blocks, where a method has such
LOSS_ATOL, LOSS_RTOL, GRADIENT_RTOL = 1e-6, 1e-4, 1e-4
COUNT_N, COUNT_VOCAB = 400, 2048


def run_gate(name: str, settings: Settings) -> dict[str, Any] | None:
    """The method's errors, with `passed` and the reasons why not; None where it computes no loss."""
    method = METHODS[name]
    if method.selector is None:
        return None
    heads = build_heads(GATE_SIZES)
    outcome = method.run(heads, replace(settings, workspace_mib=GATE_WORKSPACE_MIB))
    assert outcome.loss is not None
    exact = heads.to(torch.float64)
    oracle = selective_opd_loss(
        LinearHead(exact.student_hidden, exact.student_weight),
        LinearHead(exact.teacher_hidden, exact.teacher_weight),
        selector=method.selector,
        fraction=1.0 if method.selector == "all" else settings.fraction,
        backend="eager",
    )
    oracle.loss.backward()
    rows = oracle.selected.nonzero().squeeze(1)
    chosen = rows if outcome.selected is None else outcome.selected
    loss, expected = float(outcome.loss), float(oracle.loss.detach())
    errors = {
        "hidden gradient": _relative(heads.student_hidden.grad, exact.student_hidden.grad),
        "weight gradient": _relative(heads.student_weight.grad, exact.student_weight.grad),
    }
    reasons = [f"{what} is off by {error:.1e}" for what, error in errors.items() if not error <= GRADIENT_RTOL]
    if not abs(loss - expected) <= LOSS_ATOL + LOSS_RTOL * abs(expected):
        reasons.append(f"loss is {loss:.6g}, the oracle's {expected:.6g}")
    if not torch.equal(chosen, rows):
        missed = len(set(rows.tolist()) - set(chosen.tolist()))
        reasons.append(f"selection misses {missed} of the oracle's {len(rows)} positions")
    return {
        "passed": not reasons,
        "reasons": reasons,
        "selector": method.selector,
        "loss": loss,
        "oracle_loss": expected,
        "n_selected": len(chosen),
        **{f"{what.replace(' ', '_')}_error": error for what, error in errors.items()},
    }


def _relative(value: Tensor | None, expected: Tensor | None) -> float:
    assert expected is not None
    if value is None:
        return float("nan")
    return float((value.double() - expected).norm() / expected.norm())


def count_units(name: str, sizes: Sizes, settings: Settings) -> float:
    """Head-matmul units of one call, forward and backward, counted at a smaller N and V with the same hidden sizes."""
    small = replace(sizes, n=COUNT_N, vocab=min(sizes.vocab, COUNT_VOCAB))
    heads: Heads = build_heads(small)
    with FlopCounterMode(display=False) as counter:
        METHODS[METHODS[name].counted_by or name].run(heads, settings)
    return counter.get_total_flops() / small.unit_flops
