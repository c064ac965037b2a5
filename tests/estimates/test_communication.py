"""`estimate_communication` against what real calls send: kind, bytes, group and order of every collective, forward and
backward, on 1, 2 and 4 ranks over gloo; and what `estimate` says of a rank's part of a vocabulary.

  Run: make test ARGS=tests/estimates/test_communication.py

Each process runs the kernels on the CPU, so they get three rows.
Not here: whether what is sent is right (inputs/test_vocabulary.py, selection/test_budget_over_ranks.py).
"""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cpu import communication as paper
from opd_ops import (
    IER,
    JSD,
    EntropyAware,
    ImportanceWeighted,
    LinearHead,
    LocalSupport,
    LogRatio,
    Mixture,
    ReverseKL,
    SampledToken,
    TailAware,
    TopK,
    estimate,
    estimate_communication,
    selective_opd_loss,
)
from opd_ops.distributed.ranks import Ranks
from opd_ops.selection.normalisers import quantile_norm
from tests.support.cases import generator, head_pair, leaf, leaf_head, logit_pair
from tests.support.meters import LiveBytes
from tests.support.ranks import SIZE, own_pair

VOCAB, SHAPE, DS, DT = 97, (3, 9), 24, 40
CUTS = {1: (97,), 2: (60, 37), 4: (60, 0, 37, 0)}
EVEN = {1: (97,), 2: (49, 48), 4: (25, 24, 24, 24)}
KINDS = {"sum": "all_reduce", "gather": "all_gather", "first": "broadcast"}


def noisy(stats):
    """A selector of a user's own, which draws and normalises."""
    return quantile_norm(stats.union_kl, stats.valid).float() + torch.rand(stats.valid.shape)


DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "jsd": JSD(0.3),
    "total_variation": "total_variation",
    "tail_aware": TailAware(top_k=8),
    "local_support": LocalSupport(top_k=8),
    "forward_kl_topk": "forward_kl_topk",
    "sampled": SampledToken(clip=3.0),
    "sampled, ppo": SampledToken(baseline="kl", ratio="ppo"),
    "reverse_kl, tis": ImportanceWeighted(ReverseKL()),
    "entropy_aware": EntropyAware(tau=0.1, top_k=5, divergence=JSD()),
    "topk_student": TopK("reverse", "student", "sampled", 8),
    "topk_union": TopK("jsd", "union", "bucket", 8),
}


def case(**options):
    return pytest.param(options, id=" ".join(f"{name}={getattr(x, '__name__', x)}" for name, x in options.items()))


SHARED = ({"dp": 2, "scope": "global"}, {"cp": 2, "scope": "sequence"})
CASES = [
    case(kind="heads", scope="batch"),  # one rank of each: nothing
    case(kind="heads", scope="global"),
    *(case(kind=kind, tp=2, divergence=name) for name in DIVERGENCES for kind in ("logits", "heads")),
    *(case(kind="heads", tp=4, divergence=name) for name in ("reverse_kl", "jsd", "tail_aware", "sampled")),
    *(
        case(kind="logits", tp=2, selector=name)
        for name in ("tip", "entropy", "random", "multinomial", "teachability-released", "dial", "ratio-variance", "ier")
    ),
    case(kind="logits", tp=4, selector=noisy),
    *(case(kind="logits", tp=2, divergence="total_variation", mixture=kind) for kind in ("geometric", "arithmetic")),
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
    case(kind="logits", dp=2, scope="global", weighting="fire", weight_mean="selected"),
    case(kind="logits", tp=2, cp=2, scope="sequence", weighting="entropy", weight_mean="sequence"),
    case(kind="logits", tp=2, weighting="iw"),
    case(kind="logits", dp=2, scope="global", weighting="fire", weighting_share=0.0),
    case(kind="logits", dp=2, scope="global", count=3, selector=LogRatio("both")),
    case(kind="logits", dp=2, scope="global", selector=IER("teachability")),
    case(kind="logits", cp=2, scope="sequence"),
    *(case(kind="logits", **shared, denominator="sequence") for shared in SHARED),
    case(kind="logits", cp=4, scope="sequence", selector="entropy"),
    case(kind="logits", dp=2, cp=2, scope="sequence", selector="random"),
    case(kind="logits", dp=2, cp=2, scope="global", selector="entropy"),
    case(kind="heads", tp=2, dp=2, scope="global"),
    case(kind="heads", tp=2, dp=2, scope="global", divergence="jsd", selector="multinomial"),
    case(kind="logits", tp=2, dp=2, scope="global", divergence="tail_aware", selector=noisy),
    case(kind="heads", tp=2, dp=2, scope="batch", selector="random"),
    case(kind="heads", tp=2, cp=2, scope="sequence", divergence="sampled", selector="tip"),
    *(case(kind="heads", tp=2, **shared, selector="teachability-released") for shared in SHARED),
    *(case(kind="logits", **shared, selector="teachability-released") for shared in (*SHARED, {"cp": 4, "scope": "sequence"})),
    case(kind="logits", tp=4, backend="triton", divergence="jsd", selector="multinomial"),
    case(kind="heads", tp=2, dp=2, scope="global", backend="triton", dtype=torch.bfloat16),
    case(kind="logits", tp=2, backend="triton", divergence="sampled, ppo"),
    case(kind="heads", tp=2, backend="triton", divergence="reverse_kl, tis"),
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


def mask_of(backend, seed, none_valid):
    if backend == "triton":
        return (torch.arange(27) % 9 == 0).view(SHAPE)
    got = torch.rand(SHAPE, generator=generator(seed)) < 0.8
    return got & ~(none_valid and dist.get_rank() < 2)


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
    mixture=None,
    **options,
):
    """What the call and its backward sent, and what was to be: (group, kind, bytes) of each."""
    vocabulary, selection, i = groups(tp, dp, cp, scope)
    widths = (EVEN if backend == "eager" else CUTS)[tp]
    student, teacher = sides(kind, widths, i, dtype)
    mixture_options = {}
    if mixture is not None:
        teacher = Mixture((teacher, teacher + 0.1 * student.detach()), (0.75, 0.25), mixture)
        mixture_options = {"n_teachers": 2, "mixture": mixture}
    options = {"workspace_bytes": 2**22, "top_k": 6, "fraction": 0.3, "selector": "teachability"} | options
    tokens = torch.randint(0, VOCAB, SHAPE, generator=generator(5))
    old_logprobs = -torch.ones(SHAPE) if "," in divergence else None
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
            old_logprobs=old_logprobs,
            divergence=DIVERGENCES[divergence],
            backend=backend,
            scope=scope,
            selection_group=selection,
            process_group=vocabulary,
            **options,
        )
        forward = list(calls)
        out.loss.backward()
    got = estimate_communication(
        int(out.metrics["n_valid"] if out.stats.response_place is None else (out.stats.response_place > 0).sum()),
        VOCAB,
        DS if kind == "heads" else None,
        dtype=dtype,
        tp=tp,
        dp=dp,
        cp=cp,
        scope=scope,
        divergence=DIVERGENCES[divergence],
        backend=backend,
        n_sequences=SHAPE[0],
        n_selected=int(out.metrics["n_selected"]),
        n_positions=27,
        **mixture_options,
        **options,
    )
    assert (tp == 1 and dp * cp == 1) or scope == "batch" or calls
    return [(part, listed(got.only(phase=name))) for part, name in ((forward, "forward"), (calls[len(forward) :], "backward"))]


def listed(got):
    return [(x.group, x.kind, x.bytes) for x in got.collectives for _ in range(x.count)]


@pytest.mark.parametrize("options", CASES)
def test_what_is_sent_is_what_was_estimated(ranks, options):
    for rank in ranks.run(functools.partial(sent, **options)):
        for counted, estimated in rank:
            assert counted == estimated


# --- a rank's part of a vocabulary -----------------------------------------------------------------------------------


def worked(backend):
    """FLOP and peak of a call of two ranks, and those on paper."""
    n, vocab, dims, dtype = *((3, 96, (16, 24)) if backend == "triton" else (17, 600, (DS, DT))), torch.bfloat16
    student, teacher = head_pair((n,), vocab, student_dim=dims[0], teacher_dim=dims[1], dtype=dtype)
    part = slice(vocab // 2) if dist.get_rank() % 2 == 0 else slice(vocab // 2, vocab)
    student, teacher = (LinearHead(x.hidden, x.weight[part]) for x in (student, teacher))
    student, workspace = leaf_head(student), 2**18
    options = {"fraction": paper.FRACTION, "backend": backend, "workspace_bytes": workspace, "process_group": own_pair()}
    with FlopCounterMode(display=False) as counter, LiveBytes() as meter:
        selective_opd_loss(student, teacher, **options).loss.backward()
    got = estimate(n, vocab // 2, *dims, fraction=paper.FRACTION, dtype=dtype, workspace_bytes=workspace, backend=backend)
    work = paper.work_of(n, vocab, *dims, 2, workspace_bytes=workspace)
    flops, most = work if backend == "triton" else (got.flops, got.peak_bytes)
    return counter.get_total_flops(), flops, meter.peak, got.gradient_bytes, most


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_rank_computes_and_holds_what_its_part_of_the_vocabulary_costs(ranks, backend):
    for flops, expected, peak, gradients, most in ranks.run(worked, backend):
        assert flops == expected
        assert gradients < peak <= most


# --- on paper --------------------------------------------------------------------------------------------------------


def test_rings_move_what_is_not_there_yet():
    def of(kind, ranks):
        scope = {"tp": ranks} if kind == "vocabulary" else {"dp": ranks, "scope": "global"}
        return estimate_communication(100, 500, 32, fraction=0.1, dtype=torch.float32, backend="torch", **scope)

    for p in (2, 8, 1024):
        got = of("vocabulary", p)
        gathered, reduced = (got.only(kind=kind) for kind in ("all_gather", "all_reduce"))
        assert gathered.wire_bytes == (p - 1) * gathered.bytes
        assert reduced.bytes == 10 * 32 * 4
        assert reduced.wire_bytes * p == 2 * (p - 1) * reduced.bytes  # each p-th goes round the ring twice
        assert got.wire_bytes == gathered.wire_bytes + reduced.wire_bytes
        assert got.wire_bytes_per_token == got.wire_bytes / 100
        assert of("selection", p).only(kind="all_gather").bytes == 8
    draws = estimate_communication(100, 500, 32, tp=4, selector="random", n_positions=130).only(kind="broadcast")
    assert draws.wire_bytes == draws.bytes == 130 * 8


def test_what_selection_sends_depends_on_sizes_of_groups_alone():
    def of(N, V, **options):
        return estimate_communication(N, V, 64, dp=16, scope="global", **options)

    got = of(10, 100)
    assert got == replace(of(10**6, 10**5), N=10)
    # docs/guides/vocabulary-parallel.md
    assert (got.only(kind="all_reduce").count, got.only(kind="all_gather").count) == (10, 1)
    assert got.only(kind="all_reduce").bytes == 2 * 69_632 + 20_480 + 16
    assert of(10, 100, selector="entropy").only(kind="all_reduce").bytes == 20_480 + 16
    assert of(10, 100, selector="tip").only(purpose="scores").bytes == 2 * 69_632


def test_what_a_vocabulary_sends_does_not_depend_on_its_size():
    got = [estimate_communication(1000, V, 64, tp=8, divergence="tail_aware") for V in (100, 10**6)]
    assert got[0] == got[1]
    sent = {purpose: got[0].only(purpose=purpose).bytes for purpose in ("widths", "statistics", "loss", "gradient")}
    K, M, c = 16, 50, 4  # the equations of docs/scaling.md
    on_list = M * (16 + K * (4 + c)) + c * M * K + 2 * 8 * M
    assert sent == {
        "widths": 2 * 16 + 8,
        "statistics": 1000 * (56 + 2 * K * (4 + 2 * c)),
        "loss": on_list,
        "gradient": c * M * 64,
    }


def test_estimating_draws_nothing():
    torch.manual_seed(0)
    estimate_communication(100, 500, 32, dp=4, scope="global", selector="random")
    got = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(got, torch.rand(3))


def test_what_does_not_fit_is_refused():
    for options, message in (
        ({"N": -1}, "N: got -1, expected at least 0"),
        ({"tp": 0}, "tp: got 0, expected at least 1"),
        ({"n_selected": -1}, "n_selected: got -1, expected at least 0"),
        ({"fraction": 2}, r"fraction: got 2, expected a number in \(0, 1\]"),
        ({"scope": "all"}, "scope: got 'all', expected one of: batch, sequence, global"),
        ({"backend": "cuda"}, "backend: got 'cuda', expected one of: auto, eager, torch, triton"),
        ({"top_k": 100}, "top_k: got 100, expected at most the vocabulary size, 99"),
        ({"divergence": LocalSupport(top_k=100)}, "'local_support' has top_k 100, expected at most the vocabulary size, 99"),
        ({"dtype": torch.float64}, "dtype: got torch.float64, which backend 'triton' does not take"),
        ({"selector": "best"}, "selector: got 'best', expected a callable or one of"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate_communication(**{"N": 4, "V": 99, "Ds": 8, **options})
    with pytest.raises(TypeError, match=r"dtype: got 'bf16', expected a floating-point torch\.dtype"):
        estimate_communication(4, 99, 8, dtype="bf16")


def test_the_page_holds_what_the_command_prints(capsys):
    paper.main()
    printed = capsys.readouterr().out
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    assert page.endswith("\n\n" + printed)
