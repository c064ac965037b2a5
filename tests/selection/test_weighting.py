"""Weights against their equations in NumPy, and the loss with them against the same weights passed by the caller.

  Compared: weights, losses and gradients in fp64; means under accumulation and over ranks against one call.
  Run: make test ARGS=tests/selection/test_weighting.py

Not here: the lines of the documentation (tests/divergences/test_methods.py), selectors (test_selectors.py).
"""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist

from opd_ops import (
    IW,
    FiRe,
    LogRatio,
    Multinomial,
    Reading,
    SampledLogprobs,
    Settings,
    TopKLogprobs,
    score_positions,
    selective_opd_loss,
    selective_opd_token_losses,
)
from opd_ops.inputs.rollout import StudentStats
from opd_ops.selection.selectors import SELECTORS, why_no_weights
from opd_ops.selection.weighting import WEIGHTINGS
from tests.support.cases import generator, leaf, logit_pair
from tests.support.ranks import SIZE

SHAPE, VOCAB = (4, 9), 67


def sides(dtype=torch.float64):
    return [x.view(*SHAPE, VOCAB) for x in logit_pair(36, VOCAB, scale=2.5, seed=3, dtype=dtype)]


def tokens():
    return torch.randint(0, VOCAB, SHAPE, generator=generator(5))


def mask():
    valid = torch.rand(SHAPE, generator=generator(6)) > 0.3
    valid[2] = False
    return valid


def distributions():
    """log p, log q, both at y, and both entropies, in NumPy."""
    log_p, log_q = (torch.log_softmax(x, -1) for x in sides())
    at = [x.gather(-1, tokens().unsqueeze(-1)).squeeze(-1).numpy() for x in (log_p, log_q)]
    return *at, *(-(x.exp() * x).sum(-1).numpy() for x in (log_p, log_q))


def iw(valid):
    log_p, log_q, _, _ = distributions()
    want = np.ones(SHAPE)
    for row in range(SHAPE[0]):
        d, places = np.abs(log_q - log_p)[row], np.flatnonzero(valid[row])
        for t in places:
            earlier = sum(d[k] for k in places if k < t)
            want[row, t] = 1 + (1.5 - 1) * (1 - earlier / (sum(d[places]) + 1e-8))
    return want


def fire(valid):
    _, _, h_p, h_q = distributions()
    return (2 - h_q / h_q[valid].max()) * (1 + h_p / h_p[valid].max())


EQUATIONS = {"iw": iw, "fire": fire}


def run(weighting, *, backend="torch", dtype=torch.float64, function=selective_opd_loss, **options):
    student, teacher = sides(dtype)
    student = leaf(student)
    given = {"mask": mask(), "tokens": tokens(), "selector": "entropy", "fraction": 0.5, "backend": backend} | options
    out = function(student, teacher, weighting=weighting, **given)
    (out.loss if function is selective_opd_loss else out.losses.sum()).backward()
    return out, student.grad


def test_every_named_weighting_has_an_equation_here():
    assert set(EQUATIONS) == set(WEIGHTINGS)


# The released selector also scores masked positions of the responses, which no weight may read.
@pytest.mark.parametrize("selector", ["entropy", "teachability-released"])
@pytest.mark.parametrize("function", [selective_opd_loss, selective_opd_token_losses])
@pytest.mark.parametrize("name", sorted(EQUATIONS))
def test_weights_are_their_equation_and_multiply_the_callers_and_the_gradient(name, function, selector):
    valid, given = mask(), 0.5 + torch.rand(SHAPE, generator=generator(7))
    w = torch.from_numpy(EQUATIONS[name](valid.numpy()))
    got, gradient = run(name, weights=given, function=function, selector=selector)
    want, wanted = run(None, weights=given * w, function=function, selector=selector)
    assert torch.equal(got.selected, want.selected)
    value = "loss" if function is selective_opd_loss else "losses"
    torch.testing.assert_close(getattr(got, value), getattr(want, value), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(got.metrics["weight"], w[got.selected].mean(), rtol=1e-9, atol=0)


def test_iw_counts_an_infinite_disagreement_as_none():
    student, teacher = logit_pair(5, 31)
    agreeing = teacher.clone()
    teacher[1, 3], agreeing[1] = -math.inf, student[1]  # the teacher masks the sampled token
    options = {"tokens": torch.full((5,), 3), "selector": "entropy", "fraction": 1.0, "divergence": "forward_kl"}
    got, want = (selective_opd_loss(student, x, weighting="iw", **options) for x in (teacher, agreeing))
    assert got.loss.isfinite()
    torch.testing.assert_close(got.metrics["weight"], want.metrics["weight"])


@pytest.mark.parametrize("kind", ["valid", "selected", "sequence"])
def test_a_mean_of_finite_weights_is_one_over_what_it_names(kind):
    weights = 0.1 + torch.rand(SHAPE, generator=generator(1), dtype=torch.float64)
    valid = mask()
    valid[0, 0] = False
    selected = run(None, mask=valid)[0].selected
    weights[0, 0] = weights[tuple((valid & ~selected).nonzero()[0])] = math.inf
    got, _ = run(lambda stats: weights, weight_mean=kind, mask=valid)
    assert torch.equal(got.selected, selected)
    among = (selected if kind == "selected" else valid) & weights.isfinite()
    mean = weights.masked_fill(~among, 0).sum() / among.sum()
    if kind == "sequence":
        mean = (weights.masked_fill(~among, 0).sum(1) / among.sum(1).clamp_min(1)).unsqueeze(1)
    want, _ = run(None, weights=(weights / mean).masked_fill(~valid, 1), mask=valid)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=0)
    if kind == "selected":
        torch.testing.assert_close(got.metrics["weight"], torch.ones_like(got.loss), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [None, "valid"])
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_share_of_the_weighting_moves_its_factors_towards_one(share, kind):
    whole, _ = run("fire", weight_mean=kind)
    got, gradient = run("fire", weight_mean=kind, weighting_share=share)
    w = torch.from_numpy(EQUATIONS["fire"](mask().numpy()))
    w = w if kind is None else w / w[mask()].mean()
    want, wanted = run(None, weights=1 + share * (w - 1))
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-15)
    assert abs(got.loss - whole.loss) > 1e-3 * whole.loss
    if share:
        torch.testing.assert_close(got.metrics["weight"], (1 + share * (w - 1))[got.selected].mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("weighting", ["iw", "fire", "teachability"])
def test_backends_agree_and_kernels_take_the_sums(weighting):
    want, wanted = run(weighting, backend="eager", weight_mean="selected", mask=None)
    for backend in ("torch", "triton"):
        got, gradient = run(weighting, backend=backend, dtype=torch.float32, weight_mean="selected", mask=None)
        assert torch.equal(got.selected, want.selected)
        torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(got.metrics["loss_sum"].double(), want.metrics["loss_sum"], rtol=1e-5, atol=0)
        assert float((gradient - wanted).norm() / wanted.norm()) < 2e-5


@pytest.mark.parametrize("kind", [None, "sequence"])
@pytest.mark.parametrize("denominator", ["valid", "sequence"])
def test_micro_batches_have_the_gradient_of_the_batch(denominator, kind):
    options = {"scope": "sequence", "denominator": denominator, "weight_mean": kind}
    n = int(mask().sum()) if denominator == "valid" else 3
    want, wanted = run("iw", num_items_in_batch=n, **options)
    student, teacher = sides()
    total, gradient = 0, torch.zeros_like(student)
    for part in (slice(0, 1), slice(1, 4)):
        mine = leaf(student[part])
        given = {"mask": mask()[part], "tokens": tokens()[part], "selector": "entropy", "fraction": 0.5}
        out = selective_opd_loss(mine, teacher[part], weighting="iw", num_items_in_batch=n, **given, **options)
        out.loss.backward()
        total, gradient[part] = total + out.loss.detach(), mine.grad
    torch.testing.assert_close(total, want.loss.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-15)


def together(kinds):
    """Ranks with a sequence each, or with columns of every sequence, against one process."""
    rank = dist.get_rank()
    columns = [slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 9)][rank]
    student, teacher = sides()
    for scope, kind in kinds:
        weighting = "fire" if scope == "global" else "entropy"
        options = {"selector": "entropy", "fraction": 0.5, "weighting": weighting, "weight_mean": kind}
        alone = "batch" if scope == "global" else scope
        want = selective_opd_loss(student, teacher, mask=mask(), scope=alone, **options)
        where = (slice(rank, rank + 1), slice(None)) if scope == "global" else (slice(None), columns)
        given = {"mask": mask()[where], "selection_group": dist.group.WORLD, "scope": scope}
        got = selective_opd_loss(student[where], teacher[where], **given, **options)
        assert torch.equal(got.selected, want.selected[where])
        total = got.loss.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, want.loss, rtol=1e-9, atol=0)
    return len(kinds)


def test_weights_and_their_means_over_ranks_are_those_of_one_process(ranks):
    kinds = [(scope, kind) for scope in ("global", "sequence") for kind in (None, "valid", "selected", "sequence")]
    assert ranks.run(together, kinds) == [len(kinds)] * SIZE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "iws"}, "weighting: got 'iws', expected None, a callable, or one of: iw, fire, teachability"),
        ({"weighting": Multinomial()}, "weighting: got Multinomial.*whose scores are drawn"),
        ({"weighting": "random"}, "weighting: got 'random', whose scores are drawn, expected None, .*: iw, fire, teachability"),
        ({"weighting": "all"}, "weighting: got 'all', whose scores are all 0"),
        ({"weighting": LogRatio("both")}, "weighting: got LogRatio.*whose scores may be negative"),
        ({"weighting": "prefix"}, "weighting: got 'prefix', whose scores read no statistic"),
        ({"weight_mean": "valid"}, "weight_mean: got 'valid' without a weighting, expected None"),
        ({"weighting_share": 0.5}, "weighting_share: got 0.5 without a weighting, expected 1"),
        ({"weighting": "iw", "weighting_share": 1.5}, r"weighting_share: got 1.5, expected a number in \[0, 1\]"),
        ({"weighting": "iw", "weight_mean": "mean"}, "weight_mean: got 'mean', expected one of"),
    ],
)
def test_a_wrong_weighting_is_refused_when_settings_are_made(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_that_may_weight_has_weights_and_the_others_are_refused(name):
    with pytest.raises(ValueError, match=f"got {name!r}") if why_no_weights(SELECTORS[name]) else nullcontext():
        Settings(weighting=name)
        scores, _ = score_positions(*sides(), mask=mask(), tokens=tokens(), selector=name, top_k=6)
        assert scores[mask()].min() >= 0
        assert 0 < scores[mask()].mean() < math.inf


def test_a_weighting_that_reads_what_a_call_does_not_have_is_refused():
    student, teacher = sides()
    with pytest.raises(ValueError, match="tokens: got None, but the weighting reads the sampled token"):
        selective_opd_loss(student, teacher, weighting="iw")
    sent = SampledLogprobs(tokens(), torch.full(SHAPE, -1.0))
    with pytest.raises(ValueError, match="weighting: got FiRe, which reads statistics of whole rows that SampledLogprobs"):
        selective_opd_loss(student, sent, divergence="sampled", selector="entropy", weighting="fire")
    for weighting in ("tip", "teachability", "teachability-released", "ier"):
        with pytest.raises(ValueError, match=f"weighting: got '{weighting}', which needs the teacher's row.* entropy, dial;"):
            selective_opd_loss(student, sent, divergence="sampled", selector="entropy", weighting=weighting)
    top = teacher.log_softmax(-1).topk(8)
    with pytest.raises(ValueError, match="weighting: got 'tip', which needs the teacher's whole row"):
        selective_opd_loss(
            student, TopKLogprobs(top.indices, top.values), divergence="local_support", selector="entropy", weighting="tip"
        )
    with pytest.raises(ValueError, match=r"weighting: returned \(36,\), expected"):
        selective_opd_loss(student, teacher, weighting=lambda stats: stats.reverse_kl.flatten())
    for needs in ({"jds"}, "jsd", None):
        with pytest.raises(ValueError, match=r"Reading\.needs: got .*, expected names of columns"):
            Reading(lambda stats: stats.jsd, needs)
    with pytest.raises(ValueError, match=r"IW\.w_max: got 0\.5"):
        IW(0.5)
    with pytest.raises(ValueError, match=r"FiRe\.beta: got -1"):
        FiRe(beta=-1)


@pytest.mark.parametrize("known", ["student_stats", "TopKLogprobs"])
def test_a_callable_that_reads_a_kl_which_the_call_does_not_know_is_refused(known):
    student, teacher = sides()
    best = teacher.log_softmax(-1).topk(8)
    options = {"student_stats": StudentStats.from_logits(student)} if known == "student_stats" else {"divergence": "tail_aware"}
    given = teacher if known == "student_stats" else TopKLogprobs(best.indices, best.values)
    with pytest.raises(ValueError, match=r"weighting: returned NaN at a selected position, .*forward_kl are NaN"):
        selective_opd_loss(student, given, weighting=lambda stats: stats.reverse_kl, **options)
    with pytest.raises(ValueError, match=r"selector: returned NaN at a valid position, .*forward_kl are NaN"):
        selective_opd_loss(student, given, selector=lambda stats: stats.reverse_kl, **options)
    assert selective_opd_loss(student, given, weighting=lambda stats: stats.union_kl, **options).metrics["weight"] > 0


def test_a_weighting_of_ones_own_may_change_its_statistics_and_read_optional_columns():
    def rule(stats):
        stats.reverse_kl.zero_()
        return stats.jsd + stats.top1_agreement

    got, _ = run(Reading(rule, (name for name in ("jsd", "top1_agreement"))))
    assert got.metrics["kl_all"] > 0
    assert got.metrics["weight"] > 0


def test_flags_are_weights_of_one_and_zero():
    def rule(stats):
        return stats.union_kl > stats.union_kl.quantile(0.8)

    flags = run(rule, weighting_share=0.5)[0]
    numbers = run(lambda stats: rule(stats).double(), weighting_share=0.5)[0]
    assert flags.loss == numbers.loss
    assert 0.5 < flags.metrics["weight"] < 1
