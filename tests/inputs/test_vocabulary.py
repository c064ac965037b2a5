"""Vocabularies that ranks share out, over gloo: every statistic, selection and gradient against one process that has it all,
for every backend, divergence and teacher; uneven and empty parts.

Each of four processes runs the kernels on the CPU, so they get few rows, and each part is scored once.
Command: make test ARGS=tests/inputs/test_vocabulary.py
Not here: DTensors, both kinds of groups at once, what is refused and sent (backends/shared/test_joined.py); selection over the
positions of several ranks (selection/test_budget_over_ranks.py).
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from opd_ops import (
    IER,
    JSD,
    ImportanceWeighted,
    LinearHead,
    Mixture,
    Reading,
    Routed,
    SampledLogprobs,
    SampledToken,
    TopKLogprobs,
    score_positions,
    selective_opd_loss,
    selective_opd_token_losses,
)
from opd_ops.distributed.ranks import Ranks
from opd_ops.inputs.rollout import StudentStats
from opd_ops.selection.stats import REFERENCE_COLUMNS
from tests.support import hard_rows
from tests.support.cases import generator, to_double
from tests.support.hard_rows import assert_gradients, drawn_rows, kl
from tests.support.ranks import own_pair
from tests.support.shards import CUTS, DIVERGENCES, SHAPE, cut, gradients_of, leaf_side, options_of, sides_of
from tests.support.tolerances import assert_stats, assert_within, relative_error

LIST_ALONE = ("local_support", "tail_aware", "forward_kl_topk")


def _assert_known(got, want, *, alone):
    """Every column but where it is not known, NaN in both; `alone`: a column that `got` need not know."""
    unread = {name for name in REFERENCE_COLUMNS if getattr(got, name) is None}
    without = {name: None for name, x in want._asdict().items() if x is None or name == alone or name in unread}
    for name, column in want._asdict().items():
        if name not in without:
            assert torch.equal(getattr(got, name).isnan(), column.isnan()), name
    filled = (
        {name: x.nan_to_num(0.0, torch.inf) for name, x in s._asdict().items() if name not in without} for s in (got, want)
    )
    assert_stats(*(got._replace(**(without | columns)) for columns in filled), absolute=2e-6)


def _agree(student, teacher, widths, group, *, teacher_part=None, loss=selective_opd_loss, **options):
    """The loss on shared-out sides is that on whole ones: statistics, selection, gradients of every part."""
    rank = dist.get_rank(group)
    whole, mine = leaf_side(student), cut(student, widths, rank, requires_grad=True)
    taught = cut(teacher, widths, rank) if teacher_part is None else teacher_part
    want = loss(whole, teacher, **(options | {"backend": "eager" if options["backend"] == "eager" else "torch"}))
    got = loss(mine, taught, process_group=group, **options)
    assert torch.equal(got.selected, want.selected)
    assert int(want.selected.sum()) > 1
    # Statistics from the rollout: kernels find the selected rows' own divergence alone.
    _assert_known(got.stats, want.stats, alone="forward_kl" if "student_stats" in options else None)
    if loss is selective_opd_loss:
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
        want.loss.backward()
        got.loss.backward()
        for name, value in want.metrics.items():
            torch.testing.assert_close(got.metrics[name], value, rtol=2e-5, atol=2e-6, equal_nan=True, msg=name)
    else:
        factors = torch.randn(SHAPE, generator=generator(8))
        assert relative_error(got.losses, want.losses) < 1e-5
        (want.losses * factors).sum().backward()
        (got.losses * factors).sum().backward()
    first = sum(widths[:rank])
    part = slice(first, first + widths[rank])
    if isinstance(student, torch.Tensor):
        pairs = [(mine.grad, whole.grad[..., part])]
    else:
        (dh, dw, db), (wh, ww, wb) = gradients_of(mine), gradients_of(whole)
        pairs = [(dh, wh), (dw, ww[part]), (db, wb[part])]
    norm = max(float(x.norm()) for x in gradients_of(whole) if x is not None)
    assert norm > 0
    for got_gradient, wanted in pairs:
        assert got_gradient.shape == wanted.shape
        # A part with few entries has few to average its rounding over: in units of the whole gradient.
        error = float((got_gradient.double() - wanted.double()).norm())
        assert error <= 1e-5 * max(float(wanted.norm()), norm / 4), (error, float(wanted.norm()), norm)
    return got


# --- what runs on every rank -----------------------------------------------------------------------------------------


def _divergence(name, kind, cut, backend):
    _agree(*sides_of(kind), CUTS[cut], dist.group.WORLD, divergence=DIVERGENCES[name], **options_of(backend=backend))


def _divergences_by_kernels(kind):
    """All of them after one score pass: what kernels find of a part and some rows does not depend on the divergence."""
    from opd_ops.backends.triton import shards as triton_shards

    got, part = {}, triton_shards._part

    def once(student, teacher, sent, score_dtype, rows, top_k, workspace):
        key = (*rows.tolist(), top_k, *sorted(sent))
        if key not in got:
            got[key] = part(student, teacher, sent, score_dtype, rows, top_k, workspace)
        return got[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_shards, "_part", once)
        for name in DIVERGENCES:
            _divergence(name, kind, "uneven", "triton")


def _two_ranks(kind, backend):
    _agree(*sides_of(kind, seed=3), (40, 57), own_pair(), **options_of(backend=backend))


def _mixed(kind, backend, mixture, divergence):
    student, teacher = sides_of(kind)
    members = teacher, sides_of(kind, seed=7)[1]
    rank, widths = dist.get_rank(), CUTS["uneven"]
    weights = (1.25, -0.25) if mixture == "geometric" else (0.75, 0.25)
    index = torch.tensor([0, 1, 0])

    def several(members):
        mixed = Mixture(members, weights, mixture)
        return mixed if mixture == "geometric" else Routed((mixed, members[0]), index)

    whole, mine = leaf_side(student), cut(student, widths, rank, requires_grad=True)
    options = options_of(backend=backend, divergence=divergence)
    want = selective_opd_loss(whole, several(members), **(options | {"backend": "torch"}))
    parts = several([cut(x, widths, rank) for x in members])
    got = selective_opd_loss(mine, parts, process_group=dist.group.WORLD, **options)
    assert torch.equal(got.selected, want.selected)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    want.loss.backward()
    got.loss.backward()
    part_gradient, whole_gradient = gradients_of(mine)[0], gradients_of(whole)[0]  # logits, or hidden states
    if kind == "logits":
        whole_gradient = cut(whole_gradient, widths, rank)
    assert float(whole_gradient.norm()) > 0
    assert relative_error(part_gradient, whole_gradient) < 1e-5


def _pieces(kind, name):
    """Many gathers a call, and a temperature."""
    options = options_of(divergence=DIVERGENCES[name], workspace_bytes=20_000, temperature=0.7)
    _agree(*sides_of(kind), CUTS["uneven"], dist.group.WORLD, **options)


def _weightings(kind, backend):
    """By names, and by a callable that draws: all ranks take the weights that the first one draws, as one process does."""
    draws = iter((generator(0), generator(dist.get_rank())))
    drawn = Reading(lambda stats: torch.rand(stats.valid.shape, generator=next(draws)))
    for weighting in ("iw", "fire", drawn):
        options = options_of(backend=backend, weighting=weighting, weight_mean="selected")
        _agree(*sides_of(kind), CUTS["uneven"], dist.group.WORLD, **options)


def _agreement(stats):
    return stats.teacher_rank - stats.top1_agreement


def _selectors(kind, backend, selectors):
    student, teacher = sides_of(kind)
    for selector in selectors:
        torch.manual_seed(dist.get_rank())  # draws of different ranks: the first one's count
        options = options_of(backend=backend, selector=selector)
        options.pop("fraction")
        rank = dist.get_rank()
        parts = cut(student, CUTS["uneven"], rank), cut(teacher, CUTS["uneven"], rank)
        got, stats = score_positions(*parts, process_group=dist.group.WORLD, **options)
        torch.manual_seed(0)
        want, whole_stats = score_positions(student, teacher, **(options | {"backend": "torch"}))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
        assert (stats.jsd is None) == (whole_stats.jsd is None)
        assert len({tuple(x.flatten().tolist()) for x in Ranks.world().gather(got)}) == 1  # to the last bit


def _sparse(kind, backend, name):
    student, teacher = sides_of(kind)
    logits = teacher if isinstance(teacher, torch.Tensor) else teacher.hidden @ teacher.weight.T + teacher.bias
    log_q, options = torch.log_softmax(logits, -1), options_of(backend=backend)
    if name == "sampled":
        tokens = options["tokens"]
        sent = SampledLogprobs(tokens, log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))
        options |= {"selector": "entropy"}
    elif name == "topk_student":
        logits = student if isinstance(student, torch.Tensor) else student.hidden @ student.weight.T + student.bias
        ids = torch.cat((logits.topk(8).indices, options["tokens"].unsqueeze(-1)), -1)
        sent = TopKLogprobs(ids, log_q.gather(-1, ids), of="student")
    else:
        best = log_q.topk(12)
        sent = TopKLogprobs(best.indices, best.values)
    options["divergence"] = DIVERGENCES[name]
    _agree(student, sent, CUTS["empty"], dist.group.WORLD, teacher_part=sent, **options)


def _ratios(kind, backend):
    """Losses weighted by the ratio to old probabilities, and a token's loss that reads a KL of whole rows."""
    old_logprobs = -1.0 - torch.rand(SHAPE, generator=generator(6))
    for divergence in (SampledToken(baseline="kl", ratio="ppo"), ImportanceWeighted(JSD(0.3), "is")):
        options = options_of(backend=backend, divergence=divergence, old_logprobs=old_logprobs)
        got = _agree(*sides_of(kind), CUTS["uneven"], dist.group.WORLD, **options)
        assert got.metrics["ratio_max"] > 0


def _student_stats(kind, backend):
    student, teacher = sides_of(kind)
    logits = student if isinstance(student, torch.Tensor) else student.hidden @ student.weight.T + student.bias
    options = options_of(backend=backend, student_stats=StudentStats.from_logits(logits, top_k=6))
    _agree(student, teacher, CUTS["uneven"], dist.group.WORLD, **options)


def _token_losses(kind, backend, name):
    options = options_of(backend=backend, divergence=DIVERGENCES[name])
    _agree(*sides_of(kind), CUTS["uneven"], dist.group.WORLD, loss=selective_opd_token_losses, **options)


def _whole_teacher(kind):
    student, teacher = sides_of(kind)
    _agree(student, teacher, CUTS["uneven"], dist.group.WORLD, teacher_part=teacher, **options_of())


def _cut_vocabulary():
    student, teacher = sides_of("heads")
    _agree(student, teacher, CUTS["uneven"], dist.group.WORLD, vocab_size=70, **options_of())


def _not_finite(backend):
    student, teacher = (x.clone() for x in sides_of("logits"))
    student[1, 2, :30] = -math.inf  # all of the first rank's part
    teacher[1, 3, 30:37] = -math.inf  # the student has mass there: reverse KL is infinite
    teacher[2, 1, 50] = math.nan
    student[2, 2, 1:] = teacher[2, 2, 1:] = -math.inf  # one entry alone
    got = _agree(student, teacher, CUTS["uneven"], dist.group.WORLD, **options_of(backend=backend, fraction=0.6))
    assert got.stats.reverse_kl[1, 3] == math.inf
    assert int(got.metrics["n_infinite"]) == 1
    assert int(got.metrics["n_teacher_nonfinite"]) == 1
    student[0, 1, 96] = math.nan
    parts = (cut(x, CUTS["uneven"], dist.get_rank())[:1] for x in (student, teacher))
    options = {"top_k": 6, "backend": backend, "mask": torch.arange(SHAPE[1]).unsqueeze(0) < 2}
    assert selective_opd_loss(*parts, process_group=dist.group.WORLD, **options).loss.isnan()


def _hard_rows(name, kind, backend, n):
    """Every row keeps the contract, as on one process. "heads": the student's logits are its hidden states, times 1."""
    s, u = (x[:n] for x in drawn_rows(torch.float32, masks=hard_rows.MASKS[: 1 if kind == "heads" else None]))
    rank, widths = dist.get_rank(), (90, 40, 0, hard_rows.V - 130)
    mine = cut(s, widths, rank).clone().requires_grad_()
    student = mine
    if kind == "heads":
        mine = s.clone().requires_grad_()
        student = LinearHead(mine, cut(torch.eye(hard_rows.V), widths, rank).T.contiguous())
    options = {"selector": "entropy", "fraction": 1.0, "top_k": 6, "backend": backend, "divergence": name}
    out = selective_opd_loss(student, cut(u, widths, rank), process_group=dist.group.WORLD, **options)
    out.loss.backward()
    losses, want, (log_p, log_q) = hard_rows.wanted(s, u, name)
    assert torch.equal(out.selected, losses.isfinite())
    for column, expected in (("reverse_kl", kl(log_p, log_q)), ("forward_kl", kl(log_q, log_p))):
        assert_within(getattr(out.stats, column), expected, absolute=1e-6, relative=1e-4, name=column)
    gradient = mine.grad
    if kind == "logits":
        parts = torch.nn.functional.pad(mine.grad, (0, max(widths) - widths[rank]))
        everyone = Ranks.world().gather(parts.contiguous())
        gradient = torch.cat([part[:, :width] for part, width in zip(everyone, widths, strict=True)], 1)
    got = gradient.double() * int(losses.isfinite().sum())
    assert_gradients(got, want, losses, divergence=name, dtype=torch.float32)


def _probabilities_that_underflow():
    """e^-400 of a part's mass e^-400 is 0: what the teacher masks there makes no KL infinite."""
    s, u = torch.tensor([[0.0, -1, -400, -800, 0, 0]]), torch.tensor([[0.0, 1, 2, -math.inf, 0, 0]])
    want = selective_opd_loss(s, u, fraction=1.0, selector="entropy", top_k=2, backend="torch")
    parts = (cut(x, (2, 2, 1, 1), dist.get_rank()) for x in (s, u))
    options = {"fraction": 1.0, "selector": "entropy", "top_k": 2, "backend": "torch"}
    got = selective_opd_loss(*parts, process_group=dist.group.WORLD, **options)
    assert 1 < want.stats.reverse_kl < 2
    torch.testing.assert_close(got.stats.reverse_kl, want.stats.reverse_kl)


def _ties(backend):
    student, teacher = sides_of("logits", dtype=torch.bfloat16)
    coarse = (x.mul(0.5).round() for x in (student, teacher))
    student, teacher = (x.float() if backend == "eager" else x for x in coarse)
    rank, options = dist.get_rank(), options_of(backend=backend, fraction=1.0, selector="all")
    want = selective_opd_loss(student, teacher, **(options | {"backend": "eager"})).stats
    parts = (cut(x, CUTS["uneven"], rank) for x in (student, teacher))
    assert_stats(selective_opd_loss(*parts, process_group=dist.group.WORLD, **options).stats, want, absolute=2e-6)


def _no_valid_position():
    student, teacher = sides_of("heads")
    mine = cut(student, CUTS["empty"], dist.get_rank(), requires_grad=True)
    options = options_of(mask=torch.zeros(SHAPE), process_group=dist.group.WORLD)
    loss = selective_opd_loss(mine, cut(teacher, CUTS["empty"], dist.get_rank()), **options).loss
    loss.backward()
    assert loss == 0
    assert all(not x.any() for x in gradients_of(mine))


def _bf16_heads(backend):
    student, teacher = sides_of("heads", dtype=torch.bfloat16)
    rank, widths = dist.get_rank(), CUTS["uneven"]
    whole, mine = leaf_side(student), cut(student, widths, rank, requires_grad=True)
    options = options_of(backend=backend)
    oracle = leaf_side(
        replace(student, hidden=student.hidden.double(), weight=student.weight.double(), bias=student.bias.double())
    )
    want = selective_opd_loss(whole, teacher, **(options | {"backend": "torch"}))
    got = selective_opd_loss(mine, cut(teacher, widths, rank), process_group=dist.group.WORLD, **options)
    assert torch.equal(got.selected, want.selected)
    everything = options_of(backend="eager", mask=want.selected, fraction=1.0)
    exact = to_double(teacher)
    for loss in (selective_opd_loss(oracle, exact, **everything).loss, want.loss, got.loss):
        loss.backward()
    part = slice(sum(widths[:rank]), sum(widths[: rank + 1]))
    for i, index in ((0, slice(None)), (1, part)):
        wanted = gradients_of(oracle)[i][index]
        errors = [relative_error(x, wanted) for x in (gradients_of(mine)[i], gradients_of(whole)[i][index])]
        # Kernels round the logit gradient to 16 bits, as on one process.
        assert errors[0] <= (2.0 if backend == "triton" else 1.1) * errors[1] + 1e-5, errors


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_every_divergence_is_that_of_one_process(ranks, name, kind):
    ranks.run(_divergence, name, kind, "uneven", "torch")


@pytest.mark.full
@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_every_divergence_after_kernels_scored_the_parts(ranks, kind):
    ranks.run(_divergences_by_kernels, kind)


@pytest.mark.parametrize("cut", ["empty", "narrow"])
@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "tail_aware", "local_support"])
@pytest.mark.parametrize("kind", ["logits", pytest.param("softcap", marks=pytest.mark.full)])
def test_parts_may_be_empty_or_narrower_than_k(ranks, name, kind, cut):
    ranks.run(_divergence, name, kind, cut, "torch")


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "entropy_aware"])
@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_the_oracle_takes_parts_too(ranks, name, kind):
    ranks.run(_divergence, name, kind, "empty", "eager")


@pytest.mark.parametrize("cut", ["empty", "narrow"])
def test_kernels_score_parts_that_are_empty_or_narrower_than_k(ranks, cut):
    ranks.run(_divergence, "reverse_kl", "logits", cut, "triton")


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_two_ranks(ranks, kind):
    ranks.run(_two_ranks, kind, "torch")


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("logits", "torch"),
        ("heads", "torch"),
        ("logits", "triton"),
        ("heads", "triton"),
        ("logits", "eager"),
        ("heads", "eager"),
    ],
)
def test_the_models_of_a_mixture_have_the_same_parts(ranks, kind, backend):
    ranks.run(_mixed, kind, backend, "geometric", "total_variation")
    ranks.run(_mixed, kind, backend, "arithmetic", "reverse_kl")


def test_selectors_score_as_one_process_and_draw_alike_on_every_rank(ranks):
    names = ["teachability", "tip", "teachability-released", "overconfident", "random", "dial", "ratio-variance", "multinomial"]
    ranks.run(_selectors, "logits", "torch", names)
    list_selectors = ["log-ratio", "ier", IER("tip-released", "or"), Reading(_agreement, {"top1_agreement", "teacher_rank"})]
    for kind, backend in (("logits", "torch"), ("heads", "torch"), ("logits", "triton")):
        ranks.run(_selectors, kind, backend, list_selectors)
    ranks.run(_selectors, "logits", "triton", names[-2:])
    ranks.run(_selectors, "heads", "triton", ["ratio-variance"])


@pytest.mark.parametrize(("kind", "backend"), [("logits", "torch"), ("heads", "torch"), ("logits", "triton")])
def test_weights_are_those_of_one_process_and_drawn_alike_on_every_rank(ranks, kind, backend):
    ranks.run(_weightings, kind, backend)


@pytest.mark.parametrize("name", [*LIST_ALONE, "sampled", "topk_student"])
@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_a_teacher_that_sends_lists(ranks, kind, name):
    ranks.run(_sparse, kind, "torch", name)


def test_a_teacher_that_sends_lists_to_kernels(ranks):
    ranks.run(_sparse, "logits", "triton", "tail_aware")


@pytest.mark.parametrize(
    ("kind", "backend"), [("logits", "torch"), ("heads", "torch"), pytest.param("heads", "triton", marks=pytest.mark.full)]
)
def test_ratios_to_old_probabilities(ranks, kind, backend):
    ranks.run(_ratios, kind, backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_statistics_from_the_rollout(ranks, backend):
    ranks.run(_student_stats, "heads", backend)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "local_support"])
def test_losses_of_positions(ranks, name):
    ranks.run(_token_losses, "heads", "torch", name)


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_a_teacher_may_be_whole(ranks, kind):
    ranks.run(_whole_teacher, kind)


def test_the_common_vocabulary_may_end_inside_a_part(ranks):
    ranks.run(_cut_vocabulary)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_logits_that_are_not_finite(ranks, backend):
    ranks.run(_not_finite, backend)


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
def test_ties_go_to_the_lower_id_of_the_whole_vocabulary(ranks, backend):
    ranks.run(_ties, backend)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_every_row_keeps_the_contract(ranks, name):
    ranks.run(_hard_rows, name, "logits", "torch", hard_rows.N)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_every_row_keeps_the_contract_by_kernels(ranks, name, kind):
    ranks.run(_hard_rows, name, kind, "triton", 100)


def test_a_part_whose_mass_underflows_makes_nothing_infinite(ranks):
    ranks.run(_probabilities_that_underflow)


def test_no_valid_position(ranks):
    ranks.run(_no_valid_position)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_heads_in_bf16_are_as_exact_as_on_one_process(ranks, backend):
    ranks.run(_bf16_heads, backend)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "tail_aware"])
@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_a_small_workspace_takes_many_gathers(ranks, kind, name):
    ranks.run(_pieces, kind, name)
