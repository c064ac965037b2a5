# `estimate_communication` against what real calls send: kind, bytes, group and order of every collective, forward and backward,
# on 1, 2 and 4 ranks over gloo; and what `estimate` says of a rank's part of a vocabulary.
#
#   Run: make test ARGS=tests/test_communication.py
#
# The interpreter takes a third of a second for a row, so kernels get five rows.
# Not here: whether what is sent is right (test_vocabulary_parallel.py, test_global_selection.py).
import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from opd_ops import (
    JSD,
    EntropyAware,
    Extrapolated,
    LocalSupport,
    SampledToken,
    TailAware,
    TotalVariation,
    estimate_communication,
    selective_opd_loss,
)
from opd_ops.ranks import Ranks
from opd_ops.selectors import quantile_norm
from tests.cases import generator, head_pair, leaf, leaf_head, logit_pair
from tests.ranks import SIZE, own_pair

VOCAB, SHAPE, DS, DT = 97, (3, 9), 24, 40
CUTS = {1: (97,), 2: (60, 37), 4: (60, 0, 37, 0)}
EVEN = {1: (97,), 2: (49, 48), 4: (25, 24, 24, 24)}
KINDS = {"sum": "all_reduce", "gather": "all_gather", "first": "broadcast"}


def noisy(stats):
    """A selector of a user's own, which draws and normalises."""
    return quantile_norm(stats.union_kl, stats.valid).float() + torch.rand(stats.valid.shape)


def extrapolated():
    return Extrapolated(1.25, logit_pair(27, VOCAB, seed=7)[1].view(*SHAPE, VOCAB), TotalVariation())


DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "jsd": JSD(0.3),
    "total_variation": "total_variation",
    "tail_aware": TailAware(top_k=8),
    "local_support": LocalSupport(top_k=8),
    "forward_kl_topk": "forward_kl_topk",
    "sampled": SampledToken(clip=3.0),
    "entropy_aware": EntropyAware(tau=0.1, top_k=5, divergence=JSD()),
}


def case(**options):
    return pytest.param(options, id=" ".join(f"{name}={getattr(x, '__name__', x)}" for name, x in options.items()))


CASES = [
    case(kind="heads", scope="batch"),  # one rank of each: nothing
    case(kind="heads", scope="global"),
    *(case(kind=kind, tp=2, divergence=name) for name in DIVERGENCES for kind in ("logits", "heads")),
    *(case(kind="heads", tp=4, divergence=name) for name in ("reverse_kl", "jsd", "tail_aware", "sampled")),
    *(
        case(kind="logits", tp=2, selector=name)
        for name in ("tip", "entropy", "random", "multinomial", "teachability-released")
    ),
    case(kind="logits", tp=4, selector=noisy),
    case(kind="logits", tp=2, divergence="extrapolated"),
    case(kind="heads", tp=4, dtype=torch.bfloat16),
    case(kind="heads", tp=2, dtype=torch.float64, divergence="tail_aware", selector="multinomial"),
    case(kind="heads", tp=4, workspace_bytes=2**17, divergence="sampled"),  # statistics in several slices
    case(kind="heads", tp=2, workspace_bytes=1, divergence="tail_aware"),
    case(kind="logits", tp=2, none_valid=True),
    case(kind="heads", tp=2, backend="eager"),
    case(kind="logits", tp=4, backend="eager", divergence="sampled", selector="multinomial"),
    *(
        case(kind="logits", dp=dp, scope="global", selector=name)
        for dp in (2, 4)
        for name in ("teachability", "tip", "entropy", "random", "multinomial", noisy)
    ),
    case(kind="heads", dp=4, scope="batch"),
    case(kind="heads", dp=4, scope="global", none_valid=True),
    case(kind="logits", dp=2, scope="global", dtype=torch.float64),
    case(kind="logits", cp=2, scope="sequence"),
    case(kind="logits", cp=4, scope="sequence", selector="entropy"),
    case(kind="logits", dp=2, cp=2, scope="sequence", selector="random"),
    case(kind="logits", dp=2, cp=2, scope="global", selector="entropy"),
    case(kind="heads", tp=2, dp=2, scope="global"),
    case(kind="heads", tp=2, dp=2, scope="global", divergence="jsd", selector="multinomial"),
    case(kind="logits", tp=2, dp=2, scope="global", divergence="tail_aware", selector=noisy),
    case(kind="heads", tp=2, dp=2, scope="batch", selector="random"),
    case(kind="heads", tp=2, cp=2, scope="sequence", divergence="sampled", selector="tip"),
    case(kind="heads", tp=2, backend="triton"),
    case(kind="logits", tp=4, backend="triton", divergence="jsd", selector="multinomial"),
    case(kind="logits", tp=2, dp=2, scope="global", backend="triton", divergence="tail_aware"),
]


# --- in each process -------------------------------------------------------------------------------------------------


@functools.cache
def across():
    """The group of this rank and the one of the other pair that has its part of the vocabulary."""
    return [dist.new_group([i, i + 2]) for i in range(2)][dist.get_rank() % 2]


def groups(tp, dp, cp, scope):
    """process_group, selection_group, and this rank's number among those that hold other positions."""
    everyone, rank = dist.group.WORLD, dist.get_rank()
    other = across()
    sizes = {1: None, 2: own_pair(), 4: everyone}
    vocabulary = sizes[tp]
    selecting = {"batch": 1, "sequence": cp, "global": dp * cp}[scope]
    selection = other if tp > 1 and selecting > 1 else sizes[selecting]
    if scope == "global" and selection is None and not tp > 1:
        selection = own_alone()
    return vocabulary, selection, rank // tp


@functools.cache
def own_alone():
    return [dist.new_group([i]) for i in range(SIZE)][dist.get_rank()]


def sides(kind, widths, seed, dtype):
    """Student and teacher with this rank's part of the vocabulary; `widths` of one rank: all of it."""
    place = dist.get_rank() % len(widths)
    part = slice(sum(widths[:place]), sum(widths[: place + 1]))
    if kind == "logits":
        student, teacher = (x.view(*SHAPE, VOCAB)[..., part] for x in logit_pair(27, VOCAB, seed=seed, dtype=dtype))
        return leaf(student), teacher.clone()
    student, teacher = (
        replace(x, weight=x.weight[part])
        for x in head_pair(SHAPE, VOCAB, student_dim=DS, teacher_dim=DT, seed=seed, dtype=dtype)
    )
    return leaf_head(student), teacher


def divergence_of(name, widths):
    if name != "extrapolated":
        return DIVERGENCES[name]
    found, place = extrapolated(), dist.get_rank() % len(widths)
    return replace(found, reference=found.reference[..., sum(widths[:place]) : sum(widths[: place + 1])].clone())


def mask_of(backend, seed, none_valid):
    if backend == "triton":
        return (torch.arange(27) % 6 == 0).view(SHAPE)
    found = torch.rand(SHAPE, generator=generator(seed)) < 0.8
    return found & ~(none_valid and dist.get_rank() < 2)


def sent(
    kind,
    tp=1,
    dp=1,
    cp=1,
    scope="batch",
    divergence="reverse_kl",
    backend="torch",
    dtype=torch.float32,
    none_valid=False,
    **options,
):
    """What the call and its backward sent, and what was to be: (group, kind, bytes) of each."""
    vocabulary, selection, i = groups(tp, dp, cp, scope)
    widths = (EVEN if backend == "eager" else CUTS)[tp]
    student, teacher = sides(kind, widths, i, dtype)
    options = {"workspace_bytes": 2**22, "top_k": 6, "fraction": 0.3, "selector": "teachability"} | options
    tokens = torch.randint(0, VOCAB, SHAPE, generator=generator(5))
    calls = []

    def counting(name, method):
        def call(ranks, x):
            if ranks.size > 1 and x.numel():
                # One group alone may be meant, though both may have two ranks.
                calls.append(("vocabulary" if ranks.group is vocabulary else "selection", KINDS[name], x.nbytes))
            return method(ranks, x)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in KINDS:
            patch.setattr(Ranks, name, counting(name, getattr(Ranks, name)))
        out = selective_opd_loss(
            student,
            teacher,
            mask=mask_of(backend, i, none_valid),
            tokens=tokens,
            divergence=divergence_of(divergence, widths),
            backend=backend,
            scope=scope,
            selection_group=selection,
            process_group=vocabulary,
            **options,
        )
        forward = list(calls)
        out.loss.backward()
    found = estimate_communication(
        int(out.metrics["n_valid"]),
        VOCAB,
        DS if kind == "heads" else None,
        dtype=dtype,
        tp=tp,
        dp=dp,
        cp=cp,
        scope=scope,
        divergence=divergence_of(divergence, widths),
        backend=backend,
        n_sequences=SHAPE[0],
        n_selected=int(out.metrics["n_selected"]),
        n_positions=27,
        **options,
    )
    assert (tp == 1 and dp * cp == 1) or scope == "batch" or calls
    return [
        (part, listed(found.only(phase=name))) for part, name in ((forward, "forward"), (calls[len(forward) :], "backward"))
    ]


def listed(found):
    return [(x.group, x.kind, x.bytes) for x in found.collectives for _ in range(x.count)]


@pytest.mark.parametrize("options", CASES)
def test_what_is_sent_is_what_was_estimated(ranks, options):
    for rank in ranks.run(functools.partial(sent, **options)):
        for counted, estimated in rank:
            assert counted == estimated
