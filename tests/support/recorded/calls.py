"""The calls of one process: every divergence, selector, kind of teacher, scope and setting, on every backend.

Kernels run in Triton's interpreter, about 0.3 s a row on one core: they get three rows, of which one or two are selected, and
fewer combinations than the backends in plain torch.
Not here: members of families (family.py), ranks (ranks.py), trainers of others (hosts.py), functions that are not of two models
(pieces.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from opd_ops import (
    JSD,
    EntropyAware,
    Extrapolated,
    ForwardKL,
    LinearHead,
    LocalSupport,
    SampledLogprobs,
    SampledToken,
    SkewKL,
    StudentStats,
    TailAware,
    TopKForwardKL,
    TopKLogprobs,
)
from tests.support.cases import generator, head_pair, logit_pair
from tests.support.recorded.case import DTYPES, Call

SHAPE, VOCAB, TOP_K = (3, 9), 97, 6
BACKENDS = ("eager", "torch", "triton")
KINDS = ("logits", "heads", "softcap")
DIVERGENCES = (
    "reverse_kl",
    "forward_kl",
    "jsd",
    "total_variation",
    "skew_kl",
    "power",
    "local_support",
    "tail_aware",
    "forward_kl_topk",
    "sampled",
    "entropy_aware",
)
SELECTORS = (
    "teachability",
    "teachability+entropy",
    "teachability-released",
    "teachability+entropy-released",
    "tip-released",
    "entropy-released",
    "incompatibility",
    "compatibility",
    "entropy",
    "divergence",
    "divergence-reverse-kl",
    "tip",
    "overconfident",
    "ier",
    "multinomial",
    "random",
    "dial",
    "log-ratio",
    "ratio-variance",
    "all",
    "prefix",
)
OF_TOKENS = ("dial", "log-ratio")
LISTS = {"local_support": LocalSupport(8), "tail_aware": TailAware(8), "forward_kl_topk": TopKForwardKL(8)}
PARAMETERS = {
    **{f"{name}-8": instance for name, instance in LISTS.items()},
    "jsd-0.3": JSD(0.3),
    "jsd-0": JSD(0.0),
    "jsd-1": JSD(1.0),
    "jsd-clip": JSD(0.3, entry_clip=0.05),
    "skew_kl-forward": SkewKL(0.3, "forward"),
    "sampled-clip": SampledToken(clip=3.0),
    "entropy_aware-jsd": EntropyAware(alpha=0.5, tau=0.1, top_k=8, divergence=JSD(0.3)),
}


def cases() -> Iterator[Call]:
    yield from divergences()
    yield from token_losses()
    yield from selectors()
    yield from sparse_teachers()
    yield from rollouts()
    yield from settings()


# --- inputs ----------------------------------------------------------------------------------------------------------


@cache
def sides(kind: str, dtype: str = "fp32", seed: int = 0) -> tuple[Any, Any]:
    """Student and teacher: dense logits, heads, heads with bias, scale and soft-cap, or one of each."""
    if kind == "logits":
        student, teacher = logit_pair(math.prod(SHAPE), VOCAB, noise=1.5, seed=seed, dtype=DTYPES[dtype])
        return student.view(*SHAPE, VOCAB), teacher.view(*SHAPE, VOCAB)
    if kind == "softcap":
        return head_pair(SHAPE, VOCAB, bias=True, scale=0.9, softcap=20.0, seed=seed, dtype=DTYPES[dtype])
    student, teacher = head_pair(SHAPE, VOCAB, seed=seed, dtype=DTYPES[dtype])
    student = dense(student) if kind == "logits, head" else student
    return student, dense(teacher) if kind == "head, logits" else teacher


def dense(side: Tensor | LinearHead) -> Tensor:
    """The logits of a head without soft-cap."""
    if isinstance(side, Tensor):
        return side
    logits = side.hidden @ side.weight.T
    return logits if side.bias is None else logits + side.bias


@cache
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, SHAPE, generator=generator(5))


@cache
def mask(backend: str) -> Tensor:
    """Which positions are valid: 22 of 27, and three for the interpreter, of two sequences."""
    valid = torch.ones(SHAPE, dtype=torch.bool)
    valid[0, 5:] = valid[2, 0] = False
    if backend == "triton":
        valid[:] = False
        valid[0, 1] = valid[2, 3] = valid[2, 4] = True
    return valid


def options(backend: str, **more: Any) -> dict[str, Any]:
    share = 0.5 if backend == "triton" else 0.3
    if more.get("selector") in OF_TOKENS:
        more = {"tokens": tokens()} | more
    return {"mask": mask(backend), "fraction": share, "top_k": TOP_K, "backend": backend} | more


def top_k_logprobs(logits: Tensor, k: int = 12) -> TopKLogprobs:
    best = torch.log_softmax(logits.float(), -1).topk(k)
    return TopKLogprobs(best.indices, best.values)


def sampled_logprobs(logits: Tensor) -> SampledLogprobs:
    log_q = torch.log_softmax(logits.float(), -1)
    return SampledLogprobs(tokens(), log_q.gather(-1, tokens().unsqueeze(-1)).squeeze(-1))


# --- divergences -----------------------------------------------------------------------------------------------------


def divergences() -> Iterator[Call]:
    for backend in BACKENDS:
        for kind in KINDS:
            for dtype in DTYPES:
                for label, divergence in divergences_of(backend, kind, dtype).items():
                    student, teacher = sides(kind, dtype)
                    if label.startswith("extrapolated"):
                        lam = 1.5 if label.endswith("tv") else 1.25
                        teacher = Extrapolated(lam, teacher, sides(kind, dtype, seed=7)[1])
                    more = {"tokens": tokens()} if label.startswith("sampled") else {}
                    yield Call(
                        f"divergence/{label}/{kind}/{dtype}/{backend}",
                        student,
                        teacher,
                        options(backend, divergence=divergence, **more),
                    )


def divergences_of(backend: str, kind: str, dtype: str) -> dict[str, Any]:
    extrapolated = {"extrapolated": "reverse_kl"}
    if backend != "triton":
        variation = {"extrapolated-tv": "total_variation"}
        return {name: name for name in DIVERGENCES} | PARAMETERS | extrapolated | variation
    if dtype == "fp64":  # which kernels do not take
        return {"reverse_kl": "reverse_kl"}
    if kind == "softcap" or dtype == "fp16":
        few = {"reverse_kl": "reverse_kl", "jsd": "jsd", "tail_aware-8": LISTS["tail_aware"]}
        return few if dtype != "bf16" and (kind, dtype) != ("softcap", "fp16") else {"reverse_kl": "reverse_kl"}
    all_kinds = {name: LISTS.get(name, name) for name in DIVERGENCES} | extrapolated
    return all_kinds | {"entropy_aware": EntropyAware(tau=0.1, top_k=8)}


def token_losses() -> Iterator[Call]:
    for backend in BACKENDS:
        for kind in ("logits", "heads"):
            few = ("reverse_kl", "tail_aware") if kind == "logits" else ("jsd",)
            for label in few if backend == "triton" else DIVERGENCES:
                divergence = LISTS.get(label, label) if backend == "triton" else label
                more = {"divergence": divergence, "weights": weights(), "tokens": tokens()}
                yield Call(
                    f"token_losses/{label}/{kind}/{backend}",
                    *sides(kind),
                    options(backend, **more),
                    "selective_opd_token_losses",
                )


@cache
def weights() -> Tensor:
    factors = torch.rand(SHAPE, generator=generator(3)) + 0.5
    factors[0, 2] = 0
    return factors


# --- selectors -------------------------------------------------------------------------------------------------------


def selectors() -> Iterator[Call]:
    for backend in BACKENDS:
        for kind in ("logits", "heads"):
            for selector in SELECTORS:
                if backend != "triton":
                    yield Call(f"selector/{selector}/{kind}/{backend}", *sides(kind), options(backend, selector=selector))
                if backend != "triton" or kind == "logits" or selector in ("teachability-released", "multinomial"):
                    given = {name: x for name, x in options(backend, selector=selector).items() if name != "fraction"}
                    yield Call(f"scores/{selector}/{kind}/{backend}", *sides(kind), given, "score_positions")
    for dtype in ("bf16", "fp64"):
        for selector in SELECTORS:
            yield Call(
                f"selector/{selector}/logits/{dtype}/torch", *sides("logits", dtype), options("torch", selector=selector)
            )


# --- what is known of a model in the place of its logits -------------------------------------------------------------


def sparse_teachers() -> Iterator[Call]:
    for kind in ("logits", "heads"):
        student, teacher = sides(kind)
        lists = {"top_k": top_k_logprobs(dense(teacher)), "sampled": sampled_logprobs(dense(teacher))}
        loose = lists["top_k"].ids.flip(-1).clone(), lists["top_k"].logprobs.flip(-1).clone()
        loose[0][0, 0, 3], loose[1][1, 2, 4], loose[0][2, 3] = -1, -math.inf, -1
        loose[0][2, 4, 1] = loose[0][2, 4, 0]  # twice the same
        for backend in BACKENDS:
            for label, sent in lists.items():
                own = "tail_aware" if label == "top_k" else "sampled"
                names = (own,) if backend == "triton" else DIVERGENCES
                for name in names:  # what the list cannot give is refused in words
                    more = {"divergence": LISTS.get(name, name), "selector": "entropy"}
                    yield Call(f"teacher/{label}/{name}/{kind}/{backend}", student, sent, options(backend, **more))
                for selector in () if backend == "triton" else SELECTORS:
                    more = {"divergence": LISTS.get(own, own), "selector": selector}
                    yield Call(f"teacher/{label}/{selector}/{kind}/{backend}", student, sent, options(backend, **more))
            if backend != "triton":
                more = {"divergence": LISTS["tail_aware"], "eos_ids": [3, 17, 40]}
                yield Call(f"teacher/top_k/loose/{kind}/{backend}", student, TopKLogprobs(*loose), options(backend, **more))
                given = options(backend, divergence=LISTS["forward_kl_topk"])
                yield Call(
                    f"teacher/top_k/token_losses/{kind}/{backend}", student, lists["top_k"], given, "selective_opd_token_losses"
                )


def rollouts() -> Iterator[Call]:
    """The student's statistics come from the rollout."""
    for kind in ("logits", "heads", "logits, head", "head, logits"):
        student, teacher = sides(kind)
        stats = StudentStats.from_logits(dense(student), top_k=8)
        for backend in BACKENDS:
            if backend == "triton":
                divergence = {"logits": "forward_kl", "heads": "reverse_kl"}.get(kind)
                pairs = [("teachability", divergence)] if divergence else []
            else:
                pairs = [(selector, "reverse_kl") for selector in SELECTORS]
                pairs += [("teachability", name) for name in DIVERGENCES[1:]]
            for selector, divergence in pairs:
                more = {"selector": selector, "divergence": divergence, "student_stats": stats, "tokens": tokens()}
                yield Call(
                    f"student_stats/{selector}/{divergence}/{kind}/{backend}", student, teacher, options(backend, **more)
                )
        if kind in ("logits", "heads"):
            sent = top_k_logprobs(dense(teacher))
            for backend in ("eager", "torch"):
                more = {"divergence": LISTS["tail_aware"], "student_stats": stats}
                yield Call(f"student_stats/top_k/{kind}/{backend}", student, sent, options(backend, **more))


# --- scopes and other settings ---------------------------------------------------------------------------------------


def union_of_entropy_and_divergence(stats: Any) -> Tensor:
    """A selector of a user's own."""
    return stats.student_entropy + stats.union_kl


CU_SEQLENS = torch.tensor([0, 4, 4, 13, 27])
LABELS = torch.where(torch.rand(SHAPE, generator=generator(4)) < 0.2, -100, tokens())
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "scope-sequence": {"scope": "sequence"},
    "scope-global": {"scope": "global"},  # one process alone
    "scope-sequence-packed": {"scope": "sequence", "cu_seqlens": CU_SEQLENS},
    "prefix-packed": {"selector": "prefix", "cu_seqlens": CU_SEQLENS},
    "count": {"count": 5},
    "count-sequence": {"count": 2, "scope": "sequence"},
    "threshold": {"threshold": 0.2},
    "threshold-tensor": {"threshold": torch.tensor(0.2), "selector": "tip"},
    "weights": {"weights": weights()},
    "labels": {"mask": None, "labels": LABELS},
    "shift_labels": {"shift_labels": LABELS},
    "ignore_index": {"mask": None, "labels": LABELS.masked_fill(LABELS == -100, -7), "ignore_index": -7},
    "special_ids": {"tokens": tokens(), "special_ids": [int(x) for x in tokens()[0, :3]]},
    "eos_ids": {"eos_ids": [3, 17, 40]},
    "eos_ids-sampled": {"eos_ids": [3, 17, 40], "divergence": "sampled", "tokens": tokens().masked_fill(tokens() < 30, 17)},
    "num_items": {"num_items_in_batch": 100},
    "num_items-tensor": {"num_items_in_batch": torch.tensor(70.0)},
    "num_items-valid": {"num_items_in_batch": 100, "denominator": "valid"},
    "denominator-valid": {"denominator": "valid"},
    "denominator-sequence": {"denominator": "sequence"},
    "temperature": {"temperature": 0.7},
    "temperature-jsd": {"temperature": 1.6, "divergence": JSD(0.3)},
    "vocab_size": {"vocab_size": 70},
    "workspace-small": {"workspace_bytes": 20_000},
    "workspace-tiny-forward_kl": {"workspace_bytes": 1, "divergence": ForwardKL()},
    "workspace-small-tail_aware": {"workspace_bytes": 20_000, "divergence": LISTS["tail_aware"]},
    "score_dtype-float32": {"score_dtype": "float32"},
    "fraction-all": {"fraction": 1.0, "selector": "all"},
    "fraction-smallest": {"fraction": 1e-6},
    "top_k-1": {"top_k": 1},
    "none-valid": {"mask": torch.zeros(SHAPE)},
    "callable": {"selector": union_of_entropy_and_divergence},
    "check_finite": {"check_finite": True},
    # refused, in words
    "refused-fraction": {"fraction": 1.5},
    "refused-selector": {"selector": "best"},
    "refused-divergence": {"divergence": "l2"},
    "refused-top_k": {"top_k": 98},
    "refused-mask": {"mask": torch.ones(2, 9)},
    "refused-float8": {"score_dtype": "float8", "threshold": 0.5},
    "refused-tokens": {"divergence": "sampled"},
    "refused-inplace": {"inplace_backward": True},
}
ON_KERNELS = (  # the first five for heads too
    "weights",
    "temperature-jsd",
    "vocab_size",
    "workspace-small",
    "workspace-small-tail_aware",
    "scope-sequence",
    "shift_labels",
    "eos_ids",
    "num_items-valid",
    "temperature",
    "none-valid",
    "callable",
)


def settings() -> Iterator[Call]:
    for backend in BACKENDS:
        for kind in ("logits", "heads", "logits, head", "head, logits"):
            for label in settings_of(backend, kind):
                yield Call(f"setting/{label}/{kind}/{backend}", *sides(kind), options(backend, **SETTINGS[label]))
        for label, (student, teacher, more) in unusual_inputs().items():
            yield Call(f"input/{label}/{backend}", student, teacher, options(backend, **more))
        yield Call(f"input/frozen-head/{backend}", *sides("heads", "bf16"), options(backend), is_frozen=True)
    for label, dtypes in {"fp32, bf16": ("fp32", "bf16"), "bf16, fp64": ("bf16", "fp64")}.items():
        for kind in ("logits", "heads"):
            pair = sides(kind, dtypes[0])[0], sides(kind, dtypes[1])[1]
            for backend in ("eager", "torch"):
                yield Call(f"input/dtypes-{label}/{kind}/{backend}", *pair, options(backend))


def settings_of(backend: str, kind: str) -> list[str]:
    refused = [label for label in SETTINGS if label.startswith("refused")]
    if "," in kind:  # one of each
        return ["weights", "temperature-jsd"] if backend == "triton" else list(ON_KERNELS)
    if backend == "triton":
        return [*(ON_KERNELS if kind == "logits" else ON_KERNELS[:5]), *refused]
    return list(SETTINGS)


def unusual_inputs() -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    student, teacher = sides("logits")
    heads = sides("softcap")

    def changed(*changes: tuple[int, Any, float]) -> tuple[Tensor, Tensor]:
        pair = student.clone(), teacher.clone()
        for side, index, value in changes:
            pair[side][index] = value
        return pair

    masked = slice(0, 40)
    two = (2, 3)  # a position that is valid on every backend
    return {
        "no-mask": (student[:1, :3], teacher[:1, :3], {"mask": None}),
        "one-position": (student[0, 0], teacher[0, 0], {"mask": None}),
        "no-position": (student[:0], teacher[:0], {"mask": None}),
        "vocabularies-differ": (student, torch.nn.functional.pad(teacher, (0, 5)), {}),
        "heads-vocabularies-differ": (heads[0], replace(heads[1], weight=heads[1].weight[:90], bias=heads[1].bias[:90]), {}),
        "strided": (student.transpose(0, 1).contiguous().transpose(0, 1), teacher, {}),
        "masked-entries": (*changed((0, (..., masked), -math.inf), (1, (..., masked), -math.inf)), {}),
        "finfo-min": (*changed((0, (..., masked), torch.finfo(torch.float32).min), (1, (..., masked), -math.inf)), {}),
        "infinite": (*changed((1, (*two, student[two].argmax()), -math.inf)), {"selector": "all", "fraction": 1.0}),
        "infinite-late": (
            *changed((0, (*two, teacher[two].argmax()), -math.inf)),
            {"selector": "all", "fraction": 1.0, "divergence": LISTS["forward_kl_topk"]},
        ),
        "student-nan": (*changed((0, (*two, 4), math.nan)), {}),
        "teacher-nan": (*changed((1, (*two, 4), math.nan)), {}),
        "refused-nan": (*changed((1, (*two, 4), math.nan)), {"check_finite": True}),
        "shifted": (student + 1000, teacher - 500, {}),
        "large": (student * 15, teacher * 15, {"divergence": "jsd"}),
    }
