"""The calls whose host time is measured: forward and backward of a batch so small that work on its numbers takes little time.

  N = 64 positions, V = 512, one tile; a share of 5 % by teachability, entropy or tip; reverse KL on it
  ours      `selective_opd_loss` on a backend: all statistics of TokenStats, metrics and checks
  by hand   plain PyTorch with the same selection; statistics: those of benchmarks/cpu/methods.py
  TRL, Liger   on heads alone, as benchmarks/cpu/methods.py calls them: TRL selects by reverse KL, Liger trains on all positions

Inputs are dense logits, or two heads. Each call gets fresh leaves.
Not here: the clock (bench_calls.py), calls of real sizes (benchmarks/cpu/compare.py, benchmarks/gpu).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.cpu.heads import Heads
from benchmarks.cpu.methods import METHODS, Settings, best, normalised, reverse_kl, statistics
from opd_ops import LinearHead, selective_opd_loss
from tests.support.cases import head_pair, leaf, logit_pair

POSITIONS, VOCAB, STUDENT_DIM, TEACHER_DIM = 64, 512, 48, 64
SELECTORS = ("teachability", "entropy", "tip")
BACKENDS = ("torch", "eager", "triton")
PEERS = {"TRL twice": "trl-twice", "Liger": "liger"}
SETTINGS = Settings()


@dataclass(frozen=True)
class Call:
    """One line of the benchmark."""

    name: str
    inputs: str  # "dense" or "heads"
    selector: str
    run: Callable[[Heads | tuple[Tensor, Tensor]], Tensor | None]  # the selected positions; None: the method does not say
    modules: tuple[str, ...] = ()  # of the peer
    backend: str | None = None  # of ours


def inputs(kind: str, device: str = "cpu") -> Heads | tuple[Tensor, Tensor]:
    """Fresh leaves."""
    if kind == "dense":
        student, teacher = logit_pair(POSITIONS, VOCAB, device=device)
        return leaf(student), teacher
    student, teacher = head_pair((POSITIONS,), VOCAB, student_dim=STUDENT_DIM, teacher_dim=TEACHER_DIM, device=device)
    return Heads(leaf(student.hidden), leaf(student.weight), teacher.hidden, teacher.weight)


def ours(sides: Heads | tuple[Tensor, Tensor], *, selector: str, backend: str) -> Tensor:
    student, teacher = sides if isinstance(sides, tuple) else _linear_heads(sides)
    out = selective_opd_loss(student, teacher, selector=selector, fraction=SETTINGS.fraction, backend=backend)
    out.loss.backward()
    return out.selected


def by_hand(sides: Heads | tuple[Tensor, Tensor], *, selector: str) -> Tensor:
    s, u = sides if isinstance(sides, tuple) else (sides.student_hidden @ sides.student_weight.T, None)
    with torch.no_grad():
        if u is None:
            u = sides.teacher_hidden @ sides.teacher_weight.T
        rows = best(_SCORES[selector](statistics(s, u)), SETTINGS.fraction)
    reverse_kl(s[rows].log_softmax(-1), u[rows].log_softmax(-1)).mean().backward()
    return rows


def _linear_heads(heads: Heads) -> tuple[LinearHead, LinearHead]:
    return LinearHead(heads.student_hidden, heads.student_weight), LinearHead(heads.teacher_hidden, heads.teacher_weight)


def _minmax(z: Tensor) -> Tensor:
    return (z - z.min()) / (z.max() - z.min())


def _tip(stats: dict[str, Tensor]) -> Tensor:
    entropy = stats["student_entropy"]
    h, d = _minmax(entropy.clamp_max(torch.quantile(entropy, 0.98))), _minmax(stats["reverse_kl"])
    return h + d - h * d


_SCORES: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "teachability": lambda stats: normalised(stats["union_kl"]) * normalised(stats["support_mass"]),
    "entropy": lambda stats: stats["student_entropy"],
    "tip": _tip,
}


def _peer(name: str, heads: Heads | tuple[Tensor, Tensor]) -> None:
    assert isinstance(heads, Heads)
    METHODS[name].run(heads, SETTINGS)


def calls() -> dict[str, Call]:
    """By a name for the report."""
    every = []
    for kind in ("dense", "heads"):
        for selector in SELECTORS:
            every.append(Call("by hand", kind, selector, partial(by_hand, selector=selector)))
            for backend in BACKENDS:
                run = partial(ours, selector=selector, backend=backend)
                every.append(Call(f"ours, {backend}", kind, selector, run, backend=backend))
    for title, name in PEERS.items():
        selector = METHODS[name].selector or "all"
        every.append(Call(title, "heads", selector, partial(_peer, name), modules=METHODS[name].requires))
    return {f"{call.inputs}, {call.selector}, {call.name}": call for call in every}
