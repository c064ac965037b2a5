"""The calls of one process whose loss is a member of a family: lists and tails, ratios, weightings, several teachers.

Kernels run in Triton's interpreter: they get logits alone, and one member of each kind of code.
Not here: one call of each named divergence and selector, and the inputs (calls.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from opd_ops import JSD, ImportanceWeighted, Mixture, Reading, Routed, SampledToken, TopK, TopKLogprobs
from opd_ops.divergences.top_k import DIRECTIONS, NO_TAIL, TAILS
from opd_ops.selection.weighting import MEANS, WEIGHTINGS
from tests.support.recorded.calls import BACKENDS, SHAPE, dense, options, sides, tokens
from tests.support.recorded.case import Call

SUPPORTS = ("teacher", "student", "union", "intersection")
RATIOS = {
    **{f"sampled-{kind}": SampledToken(ratio=kind) for kind in ("is", "tis", "icepop", "ppo")},
    **{f"jsd-{kind}": ImportanceWeighted(JSD(0.3), ratio=kind) for kind in ("is", "tis", "icepop")},
    "list-tis": ImportanceWeighted(TopK("reverse", "union", "bucket", 8), ratio="tis"),
    "sampled-bounds": SampledToken(ratio="tis", bounds=(0.9, 1.1)),
}
WEIGHTED: dict[str, dict[str, Any]] = {
    **{name: {"weighting": name} for name in WEIGHTINGS},
    **{f"iw-{mean}": {"weighting": "iw", "weight_mean": mean} for mean in MEANS},
    "iw-share": {"weighting": "iw", "weighting_share": 0.4},
    "selector": {"weighting": "entropy", "weight_mean": "selected"},
    "reading": {"weighting": Reading(lambda stats: 1 / stats.teacher_rank, {"teacher_rank"})},
}
ON_KERNELS = {
    "support": ("teacher/drop", "student/bucket", "union/mass", "intersection/sampled"),
    "ratio": ("sampled-ppo", "jsd-tis"),
    "weighting": ("iw-valid", "fire"),
    "ensemble": ("geometric", "arithmetic", "routed"),
}


def cases() -> Iterator[Call]:
    for backend in BACKENDS:
        for kind in ("logits",) if backend == "triton" else ("logits", "heads"):
            student, teacher = sides(kind)
            for label, divergence in lists_and_tails(backend).items():
                more = {"divergence": divergence, "tokens": tokens()}
                yield Call(f"support/{label}/{kind}/{backend}", student, teacher, options(backend, **more))
            for label in members(backend, "ratio", RATIOS):
                more = {"divergence": RATIOS[label], "tokens": tokens(), "old_logprobs": old_logprobs()}
                yield Call(f"ratio/{label}/{kind}/{backend}", student, teacher, options(backend, **more))
            for label in members(backend, "weighting", WEIGHTED):
                more = WEIGHTED[label] | {"tokens": tokens()}
                yield Call(f"weighting/{label}/{kind}/{backend}", student, teacher, options(backend, **more))
            teachers = ensembles(kind)
            for label in members(backend, "ensemble", teachers):
                yield Call(f"ensemble/{label}/{kind}/{backend}", student, teachers[label], options(backend))
            if backend != "triton":
                yield from students_own_ids(kind, backend)
                given = options(backend, divergence=RATIOS["sampled-tis"], tokens=tokens(), old_logprobs=old_logprobs())
                given |= WEIGHTED["iw-share"]
                yield Call(f"ratio/token_losses/{kind}/{backend}", student, teacher, given, "selective_opd_token_losses")


def members(backend: str, group: str, every: dict[str, Any]) -> tuple[str, ...]:
    return ON_KERNELS[group] if backend == "triton" else tuple(every)


def lists_and_tails(backend: str) -> dict[str, TopK]:
    """Every direction with every support and tail; on kernels the supports and tails of reverse KL, in pairs."""
    every = {
        f"{direction}/{support}/{tail}": TopK(direction, support, tail, 8)
        for direction in DIRECTIONS
        for support in SUPPORTS
        for tail in TAILS
        if (direction, tail) not in NO_TAIL
    }
    return {f"reverse/{pair}": every[f"reverse/{pair}"] for pair in ON_KERNELS["support"]} if backend == "triton" else every


def students_own_ids(kind: str, backend: str) -> Iterator[Call]:
    """A teacher that sends the log-probabilities of the student's ids."""
    student, teacher = sides(kind)
    ids = dense(student).topk(12).indices
    sent = TopKLogprobs(ids, torch.log_softmax(dense(teacher).float(), -1).gather(-1, ids), of="student")
    for tail in TAILS:
        more = {"divergence": TopK("reverse", "student", tail, 8), "selector": "entropy", "tokens": tokens()}
        yield Call(f"support/sent/{tail}/{kind}/{backend}", student, sent, options(backend, **more))


def ensembles(kind: str) -> dict[str, Mixture | Routed]:
    one, two = sides(kind)[1], sides(kind, seed=7)[1]
    mixtures = {
        "geometric": Mixture((one, two), (0.7, 0.6)),
        "arithmetic": Mixture((one, two), (0.25, 0.75), "arithmetic"),
    }
    index = torch.arange(SHAPE[0] * SHAPE[1]).view(SHAPE) % 2
    routed = Routed((one, two), index)
    return {**mixtures, "routed": routed, "routed-mixture": Routed((one, mixtures["geometric"]), index)}


@cache
def old_logprobs() -> Tensor:
    """Of a student near the present one: some ratios are beyond the bounds of each kind."""
    log_p = torch.log_softmax(sides("logits")[0], -1).gather(-1, tokens().unsqueeze(-1)).squeeze(-1)
    return (log_p + 0.8 * torch.linspace(-1, 1, log_p.numel()).view(SHAPE)).clamp_max(0)
