"""Calls on four ranks over gloo: vocabularies that they share out, and one selection over all of their positions.

  vocabulary   every rank has a part of the logits' columns, or of the heads' rows
  selection    every rank has a part of the positions, one of them an empty one

A child process finds a call by its name, so `ON_RANKS` is a table: name -> (words, function).
Not here: the processes (tests/support/ranks.py), what one process calls (calls.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist

from opd_ops import JSD, Extrapolated, LinearHead, StudentStats, TotalVariation, select_positions
from tests.support.cases import generator, head_pair
from tests.support.ranks import SIZE, Processes, own_pair
from tests.support.recorded.calls import (
    DIVERGENCES,
    LISTS,
    OF_TOKENS,
    SELECTORS,
    dense,
    options,
    sampled_logprobs,
    sides,
    tokens,
    top_k_logprobs,
    weights,
)
from tests.support.recorded.case import REFUSALS, Custom, as_leaf, called, gradients, in_words, loss

CUTS = {"uneven": (30, 7, 41, 19), "empty": (60, 0, 37, 0), "narrow": (5, 86, 3, 3)}
ON_RANKS: dict[str, tuple[str, Callable[[], Any]]] = {}


@cache
def processes() -> Processes:
    return Processes()


def close() -> None:
    if processes.cache_info().currsize:
        processes().close()
        processes.cache_clear()


def cases() -> Iterator[Custom]:
    for name, (words, _) in ON_RANKS.items():
        yield Custom(name, f"on 4 ranks: {words}", partial(on_all, name))


def on_all(name: str) -> dict[str, Any]:
    return {f"rank{rank}": answer for rank, answer in enumerate(processes().run(on_one, name))}


def on_one(name: str) -> Any:
    torch.manual_seed(0)
    try:
        return ON_RANKS[name][1]()
    except REFUSALS as error:  # on every rank, before any of them waits
        return {"error": f"{type(error).__name__}: {error}"}


# --- vocabulary ------------------------------------------------------------------------------------------------------


def part(side: Any, widths: tuple[int, ...], rank: int) -> Any:
    columns = slice(sum(widths[:rank]), sum(widths[: rank + 1]))
    if isinstance(side, torch.Tensor):
        return side[..., columns].clone()
    bias = None if side.bias is None else side.bias[columns].clone()
    return replace(side, weight=side.weight[columns].clone(), bias=bias)


def shared_out(
    kind: str,
    backend: str,
    *,
    function: str = "selective_opd_loss",
    widths: tuple[int, ...] = CUTS["uneven"],
    dtype: str = "fp32",
    teacher: str = "parts",
    **more: Any,
) -> dict[str, Any]:
    group = own_pair() if len(widths) == 2 else dist.group.WORLD
    student, whole = sides(kind, dtype)
    cut = partial(part, widths=widths, rank=dist.get_rank(group))
    logits = dense(whole)
    taught = {"parts": cut(whole), "whole": whole, "top_k": top_k_logprobs(logits), "sampled": sampled_logprobs(logits)}[
        teacher
    ]
    if more.pop("rollout", False):
        more["student_stats"] = StudentStats.from_logits(dense(student), top_k=8)
    if more.get("divergence") == "extrapolated":
        more["divergence"] = TotalVariation()
        taught = Extrapolated(1.25, taught, cut(sides(kind, dtype, seed=7)[1]))
    given = options(backend, process_group=group, **more)
    if function == "score_positions":
        del given["fraction"]
    return called(cut(student), taught, given, function)


def dtensors(kind: str) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (SIZE,))

    def share(side: Any) -> Any:
        if isinstance(side, torch.Tensor):
            return distribute_tensor(side.clone(), mesh, [Shard(side.dim() - 1)])
        hidden, weight = (
            distribute_tensor(x.clone(), mesh, [at]) for x, at in ((side.hidden, Replicate()), (side.weight, Shard(0)))
        )
        return replace(side, hidden=hidden, weight=weight)

    student, teacher = sides(kind)
    trained = as_leaf(share(student))
    return loss(trained, share(teacher), options("torch")) | gradients(trained)


def _vocabulary() -> Iterator[tuple[str, str, Callable[[], Any]]]:
    def case(label: str, kind: str, backend: str, **more: Any) -> tuple[str, str, Callable[[], Any]]:
        name = f"ranks/vocabulary/{label}/{kind}/{backend}"
        words = f"a vocabulary of 97 shared out, {kind}, backend {backend}, {in_words(more)}"
        return name, words, partial(shared_out, kind, backend, **more)

    for kind in ("logits", "heads"):
        for name in DIVERGENCES:
            yield case(name, kind, "torch", divergence=LISTS.get(name, name), tokens=tokens())
        for name in ("reverse_kl", "jsd", "entropy_aware", "tail_aware"):
            yield case(name, kind, "eager", divergence=LISTS.get(name, name))
        for cut in ("empty", "narrow"):
            for name in ("reverse_kl", "jsd", "local_support"):
                yield case(f"{cut}/{name}", kind, "torch", divergence=LISTS.get(name, name), widths=CUTS[cut])
        on_kernels = "reverse_kl" if kind == "logits" else "tail_aware"  # seconds each
        yield case(on_kernels, kind, "triton", divergence=LISTS.get(on_kernels, on_kernels))
        yield case("extrapolated", kind, "torch", divergence="extrapolated")
        yield case("two", kind, "torch", widths=(40, 57))
        yield case("whole-teacher", kind, "torch", teacher="whole")
        yield case("top_k", kind, "torch", teacher="top_k", divergence=LISTS["tail_aware"])
        yield case("sampled", kind, "torch", teacher="sampled", divergence="sampled", selector="entropy")
        yield case("student_stats", kind, "torch", rollout=True)
        yield case("token_losses", kind, "torch", function="selective_opd_token_losses", divergence=JSD(0.3), weights=weights())
        yield case("small", kind, "torch", workspace_bytes=20_000, temperature=0.7, divergence="jsd")
        yield case("bf16", kind, "torch", dtype="bf16")
        yield case("cut", kind, "torch", vocab_size=70)
        yield f"ranks/vocabulary/DTensor/{kind}/torch", f"{kind} as DTensors sharded on the vocabulary", partial(dtensors, kind)
    yield case("jsd", "softcap", "torch", divergence="jsd")
    for selector in SELECTORS:
        yield case(f"scores/{selector}", "logits", "torch", function="score_positions", selector=selector)


# --- selection -------------------------------------------------------------------------------------------------------


def positions_of(scope: str, rank: int) -> Any:
    """Sequences whole, or columns of every sequence."""
    rows = [slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 6)]
    columns = [slice(0, 4), slice(4, 4), slice(4, 5), slice(5, 9)]
    return rows[rank] if scope == "global" else (slice(None), columns[rank])


def selected_together(scope: str, backend: str, kind: str, function: str = "selective_opd_loss", **more: Any) -> dict[str, Any]:
    student, teacher = head_pair((6, 9), 43, student_dim=8, teacher_dim=12)
    valid = torch.rand((6, 9), generator=generator(0)) > 0.3
    where = positions_of(scope, dist.get_rank())
    pair = [LinearHead(x.hidden[where], x.weight) for x in (student, teacher)]
    pair = [dense(x) for x in pair] if kind == "logits" else pair
    given = {"mask": valid[where], "top_k": 6, "backend": backend, "selection_group": dist.group.WORLD} | more
    if more.get("selector") in OF_TOKENS:
        given["tokens"] = torch.randint(0, 43, (6, 9), generator=generator(5))[where]
    if function == "score_positions":
        return called(*pair, given, function)
    return called(*pair, {"fraction": 0.3, "scope": scope} | given, function)


def positions_alone(scope: str, **more: Any) -> Any:
    scores = (8 * torch.rand((6, 9), generator=generator(2))).round()
    where = positions_of(scope, dist.get_rank())
    return select_positions(scores[where], fraction=0.3, scope=scope, selection_group=dist.group.WORLD, **more)


def both_ways(divergence: Any, selector: str) -> dict[str, Any]:
    """A vocabulary over ranks 2i and 2i + 1, positions over the ranks across."""
    rank = dist.get_rank()
    student, teacher = sides("heads", seed=3 + rank // 2)
    first = sides("heads", seed=3)
    pair = [replace(x, weight=y.weight) for x, y in zip((student, teacher), first, strict=True)]
    student, teacher = (part(x, (40, 57), rank % 2) for x in pair)
    more = {"divergence": divergence, "selector": selector, "scope": "global"}
    return called(student, teacher, options("torch", process_group=own_pair(), selection_group=across()[rank % 2], **more))


@cache
def across() -> list[Any]:
    return [dist.new_group([i, i + 2]) for i in range(2)]


def _selection() -> Iterator[tuple[str, str, Callable[[], Any]]]:
    settings: dict[str, dict[str, Any]] = {
        "forward_kl": {"divergence": "forward_kl", "selector": "entropy"},
        "denominator-valid": {"denominator": "valid"},
        "num_items": {"num_items_in_batch": 11},
        "threshold": {"selector": "tip", "threshold": 0.6},
        "tail_aware": {"divergence": LISTS["tail_aware"]},
    }
    for scope in ("global", "sequence"):
        for selector in SELECTORS:
            words = f"one selection of 54 positions, scope {scope}, heads, backend torch, selector {selector}"
            yield (
                f"ranks/selection/{scope}/{selector}",
                words,
                partial(selected_together, scope, "torch", "heads", selector=selector),
            )
        for kind in ("logits", "heads"):
            for label, more in settings.items():
                words = f"one selection of 54 positions, scope {scope}, {kind}, backend torch, {in_words(more)}"
                name = f"ranks/selection/{scope}/{label}/{kind}"
                yield name, words, partial(selected_together, scope, "torch", kind, **more)
        for function in ("selective_opd_token_losses", "score_positions"):
            words = f"{function} over 54 positions, parts as of scope {scope}, heads, backend torch"
            yield f"ranks/selection/{scope}/{function}", words, partial(selected_together, scope, "torch", "heads", function)
        yield (
            f"ranks/selection/{scope}/eager",
            f"scope {scope}, logits, backend eager",
            partial(selected_together, scope, "eager", "logits"),
        )
        for label, more in {
            "budget": {},
            "one-per-sequence": {"keep_one_per_sequence": True},
            "threshold": {"threshold": 6.0},
        }.items():
            words = f"select_positions of 54 scores with ties, scope {scope}, {more}"
            yield f"ranks/select_positions/{scope}/{label}", words, partial(positions_alone, scope, **more)
    for divergence, selector in (("reverse_kl", "teachability"), ("jsd", "tip"), ("reverse_kl", "random")):
        words = f"a vocabulary over two ranks and one selection over the two across, heads, {divergence}, selector {selector}"
        yield f"ranks/both/{divergence}/{selector}", words, partial(both_ways, divergence, selector)


for _name, _words, _function in (*_vocabulary(), *_selection()):
    ON_RANKS[_name] = _words, _function
