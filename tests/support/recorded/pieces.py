"""What is not one plain call of two models: selection alone, statistics of a rollout, 8 bits, ways to call, estimates.

Not here: calls of two models (calls.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from opd_ops import (
    Float8Rows,
    LinearHead,
    RolloutRecorder,
    StudentStats,
    estimate,
    estimate_communication,
    select_positions,
    selective_opd_loss,
)
from tests.support.cases import generator, head_pair
from tests.support.recorded.calls import CU_SEQLENS, SHAPE, mask, options, sides
from tests.support.recorded.case import Custom, as_leaf, called, gradients


def cases() -> Iterator[Custom]:
    yield from selections()
    yield from rollouts()
    yield from float8()
    yield from ways()
    yield from estimates()


def selections() -> Iterator[Custom]:
    scores = torch.rand(SHAPE, generator=generator(1))
    wild = scores.clone()
    wild[0, :3] = torch.tensor([math.nan, -math.inf, math.inf])
    kinds = {
        "distinct": scores,
        "ties": (4 * scores).round(),
        "equal": torch.zeros(SHAPE),
        "not-finite": wild,
        "bf16": scores.bfloat16(),
    }
    settings: dict[str, dict[str, Any]] = {
        "batch": {},
        "sequence": {"scope": "sequence"},
        "packed": {"scope": "sequence", "cu_seqlens": CU_SEQLENS},
        "global": {"scope": "global"},
        "one-per-sequence": {"keep_one_per_sequence": True},
        "threshold": {"threshold": 0.6},
        "threshold-one-per-sequence": {"threshold": 0.6, "keep_one_per_sequence": True},
    }
    for kind, given in kinds.items():
        for label, more in settings.items():
            for fraction in (0.1, 0.5):
                arguments = {"mask": mask("torch"), "fraction": fraction} | more
                yield Custom(
                    f"select_positions/{kind}/{label}/{fraction:g}",
                    f"select_positions of scores {kind}, fraction={fraction:g}, {more or 'scope batch'}",
                    partial(select_positions, given, **arguments),
                )


def rollouts() -> Iterator[Custom]:
    for dtype in ("fp32", "bf16", "fp64"):
        logits = sides("logits", dtype)[0]
        yield Custom(
            f"StudentStats/{dtype}",
            f"StudentStats.from_logits of {dtype} logits, top_k=8, temperature=0.8",
            partial(StudentStats.from_logits, logits, top_k=8, temperature=0.8),
        )

    def recorded() -> StudentStats:
        recorder = RolloutRecorder(top_k=4)
        for step in sides("logits")[0].unbind(1):
            recorder(torch.zeros(SHAPE[0], 1, dtype=torch.long), step)
        return recorder.stats()

    yield Custom("RolloutRecorder", "RolloutRecorder(top_k=4) called once a step with logits of three sequences", recorded)


def float8() -> Iterator[Custom]:
    """The vendor's matmul in 8 bits runs on a CPU, for tests."""
    student, teacher = head_pair((4,), 97, student_dim=32, teacher_dim=48)
    yield Custom("Float8Rows", "Float8Rows.of the student's weight (97, 32)", partial(Float8Rows.of, student.weight))
    given = {"backend": "triton", "score_dtype": "float8", "selector": "divergence", "top_k": 4}
    yield Custom(
        "float8/loss",
        "selective_opd_loss of heads of 4 positions on triton, score_dtype float8: a shortlist, ranked again",
        partial(called, student, teacher, {"fraction": 0.25} | given),
    )
    kept = LinearHead(teacher.hidden, teacher.weight, float8=Float8Rows.of(teacher.weight))
    yield Custom(
        "float8/scores",
        "score_positions of heads of 4 positions on triton, score_dtype float8, the teacher's 8-bit copy kept",
        partial(called, student, kept, given, "score_positions"),
    )


def ways() -> Iterator[Custom]:
    for backend in ("eager", "torch", "triton"):
        for kind in ("logits", "heads"):
            yield Custom(
                f"way/two-backwards/{kind}/{backend}",
                f"selective_opd_loss of {kind} on {backend}; backward of the loss, and once more of 3 times the loss",
                partial(two_backwards, kind, backend),
            )
        yield Custom(
            f"way/generator/{backend}",
            f"selective_opd_loss of logits on {backend}, selector random with a generator of seed 5",
            partial(drawn, backend),
        )
    for divergence in ("reverse_kl", "forward_kl"):
        yield Custom(
            f"way/inplace_backward/{divergence}",
            f"selective_opd_loss of logits on triton, {divergence}: the gradient overwrites the student's logits",
            partial(in_place, divergence),
        )
    for kind in ("logits", "heads"):
        yield Custom(
            f"way/compiled/{kind}",
            f"selective_opd_loss of {kind} (1, 3 positions) on triton under torch.compile(fullgraph=True), backend aot_eager",
            partial(compiled, kind),
        )


def two_backwards(kind: str, backend: str) -> dict[str, Any]:
    student, teacher = sides(kind)
    trained = as_leaf(student)
    out = selective_opd_loss(trained, teacher, **options(backend))
    out.loss.backward(retain_graph=True)
    first = {name: x.clone() for name, x in gradients(trained, "first").items()}
    (3 * out.loss).backward()
    return first | gradients(trained, "sum")


def drawn(backend: str) -> dict[str, Any]:
    given = options(backend, selector="random", generator=torch.Generator().manual_seed(5))
    return called(*sides("logits"), given)


def in_place(divergence: str) -> dict[str, Any]:
    student, teacher = sides("logits", "bf16")
    trained = as_leaf(student)
    given = options("triton", divergence=divergence, inplace_backward=True)
    out = selective_opd_loss(trained.clone(), teacher, **given)
    out.loss.backward()
    return {"loss": out.loss, "selected": out.selected, **gradients(trained)}


def compiled(kind: str) -> dict[str, Any]:
    student, teacher = sides(kind)
    if kind == "heads":
        student, teacher = (LinearHead(x.hidden[:1, :3], x.weight) for x in (student, teacher))
        trained = as_leaf(student)
        tensors = trained.hidden, trained.weight
    else:
        teacher = teacher[:1, :3]
        trained = as_leaf(student[:1, :3])
        tensors = (trained,)

    def step(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = LinearHead(*tensors) if kind == "heads" else tensors[0]
        out = selective_opd_loss(given, teacher, fraction=0.5, top_k=6, backend="triton")
        return out.loss, out.selected, out.scores

    torch._dynamo.reset()
    loss, selected, scores = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")(*tensors)
    loss.backward()
    return {"loss": loss, "selected": selected, "scores": scores, **gradients(trained)}


def estimates() -> Iterator[Custom]:
    sizes = 8192, 151_936, 1024, 4096
    for label, more in {
        "triton": {},
        "torch": {"backend": "torch"},
        "fp32": {"dtype": torch.float32},
        "frozen": {"trainable_head": False},
        "small": {"workspace_bytes": 2**24},
        "float8": {"score_dtype": "float8"},
        "student_stats": {"student_stats": True, "fraction": 0.2},
    }.items():
        yield Custom(f"estimate/{label}", f"estimate{sizes}, {more or 'defaults'}", partial(estimate, *sizes, **more))
    for label, more in {
        "vocabulary": {"tp": 8},
        "positions": {"dp": 4, "scope": "global"},
        "sequences": {"cp": 4, "scope": "sequence", "n_sequences": 3},
        "both": {"tp": 2, "dp": 4, "scope": "global", "divergence": "tail_aware", "selector": "tip"},
        "torch": {"tp": 4, "backend": "torch", "divergence": "jsd"},
    }.items():
        words = f"estimate_communication{sizes[:3]}, {more}"
        yield Custom(f"estimate_communication/{label}", words, partial(estimate_communication, *sizes[:3], **more))
