"""Correctness of every divergence on the device, from logits and from heads, against the float64 oracle on the same device.

  Each with its default parameters, on every position; a top-K (to 128) and a sampled teacher; a mixed one.
  Bounds: tests/support/tolerances.py; 16-bit gradients 5e-3, the rounding of operands and results.

Not here: the kernels one by one (check.py), reverse and forward KL of logits (check_logits.py), the path from heads
itself (check_heads.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.check import attempt
from benchmarks.gpu.timing import Bench
from opd_ops import Extrapolated, LinearHead, SampledLogprobs, TopKLogprobs, selective_opd_loss
from opd_ops.divergences import DIVERGENCES, Divergence
from tests.support.cases import gradients, head_pair, leaf, leaf_head, logit_pair, to_double
from tests.support.tolerances import assert_gradient, assert_within

GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
Check = Callable[[Bench], None]


def _sizes(bench: Bench) -> tuple[int, int]:
    return (3, 131) if bench.dry else (16, 151_936)


def _compare(divergence: str | Divergence, sides: tuple[Any, Any], double: tuple[Any, Any], dtype: torch.dtype, n: int) -> None:
    tokens = torch.arange(n, device=sides[0].hidden.device if isinstance(sides[0], LinearHead) else sides[0].device)
    common = {"divergence": divergence, "fraction": 1.0, "selector": "all", "tokens": tokens}
    actual = selective_opd_loss(*sides, backend="triton", **common)
    expected = selective_opd_loss(*double, backend="eager", **common)
    actual.loss.backward()
    expected.loss.backward()
    assert_within(actual.loss[None], expected.loss[None], absolute=1e-5, relative=1e-4, name="loss")
    pairs = [(x.grad, y.grad) for x, y in [(sides[0], double[0])] if isinstance(x, Tensor)]
    for result, wanted in pairs or zip(gradients(sides[0]), gradients(double[0]), strict=True):
        assert_gradient(result, wanted, GRADIENT[dtype])


def check_logits(name: str, dtype: torch.dtype) -> Check:
    def check(bench: Bench) -> None:
        n, vocab = _sizes(bench)
        s, u = logit_pair(n, vocab, dtype=dtype, seed=1, device=bench.device)
        _compare(name, (leaf(s), u), (leaf(s, torch.float64), u.double()), dtype, n)

    return check


def check_heads(name: str, dtype: torch.dtype) -> Check:
    def check(bench: Bench) -> None:
        n, vocab = _sizes(bench)
        student, teacher = head_pair((n,), vocab, student_dim=32, teacher_dim=48, dtype=dtype, device=bench.device)
        sides = leaf_head(student), teacher
        _compare(name, sides, (leaf_head(student, torch.float64), to_double(teacher)), dtype, n)

    return check


def check_lists(name: str, top_k: int = 32) -> Check:
    def check(bench: Bench) -> None:
        n, vocab = _sizes(bench)
        s, u = logit_pair(n, vocab, seed=1, device=bench.device)
        log_q = u.double().log_softmax(1)
        if name == "sampled":
            ids = torch.arange(n, device=s.device)
            teacher: Any = SampledLogprobs(ids, log_q.gather(1, ids.unsqueeze(1)).squeeze(1).float())
        else:
            best = log_q.topk(top_k, dim=1)
            teacher = TopKLogprobs(best.indices, best.values.float())
        _compare(name, (leaf(s), teacher), (leaf(s, torch.float64), teacher), torch.float32, n)

    return check


def mixed(bench: Bench) -> None:
    n, vocab = _sizes(bench)
    s, u = logit_pair(n, vocab, seed=1, device=bench.device)
    reference = s + 0.5 * (u - s).flip(0)
    mixed = Extrapolated(1.25, u, reference), Extrapolated(1.25, u.double(), reference.double())
    _compare("reverse_kl", (leaf(s), mixed[0]), (leaf(s, torch.float64), mixed[1]), torch.float32, n)


NAMES = sorted(set(DIVERGENCES) - {"reverse_kl", "forward_kl"})
CHECKS: dict[str, Check] = {
    "mixed teacher": mixed,
    **{f"{name}, logits, {dtype}": check_logits(name, dtype) for name in NAMES for dtype in GRADIENT},
    **{f"{name}, heads, {dtype}": check_heads(name, dtype) for name in NAMES for dtype in GRADIENT},
    **{f"{name}, lists": check_lists(name) for name in ("tail_aware", "local_support", "forward_kl_topk", "sampled")},
    "tail_aware, lists of 128": check_lists("tail_aware", 128),
}
DRY = 11  # a dry run proves the program, not the divergences: every so many checks


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """One row per case."""
    for name, check in list(CHECKS.items())[:: DRY if bench.dry else 1]:
        yield attempt(bench, "divergences", name, lambda check=check: check(bench))
