"""Losses of positions that several processes select together, against one process that holds all of them.

  Compared: losses and gradients, added up over ranks, within 1e-5; the number of collectives and their bytes with what
  docs/guides/several-gpus.md states. Ranks hold unequal parts, some of them none.
  Run: make test ARGS=tests/loss/test_loss_over_ranks.py

A function that `ranks.run` calls makes the whole data on every rank, from a seed, and compares its own part.
Not here: budgets, ties and normalisers (selection/test_budget_over_ranks.py), ranks that share out the vocabulary
(inputs/test_vocabulary.py).
"""

import math

import pytest
import torch
import torch.distributed as dist

from opd_ops import (
    LinearHead,
    Routed,
    StudentStats,
    TokenStats,
    score_positions,
    select_positions,
    selective_opd_loss,
    selective_opd_token_losses,
)
from opd_ops.distributed.ranks import Ranks
from opd_ops.selection.normalisers import over_ranks
from opd_ops.selection.selectors import SELECTORS
from tests.support import released_oracle
from tests.support.cases import generator, head_pair, leaf, logit_pair
from tests.support.ranks import SIZE, own_pair
from tests.support.selecting_ranks import assert_sent, collectives, parts
from tests.support.tolerances import assert_gradient

WIDTH = 8

SHAPE, VOCAB = (6, 9), 43  # sequences, positions


def heads(seed=0):
    """Two heads and a mask."""
    student, teacher = head_pair(SHAPE, VOCAB, student_dim=WIDTH, teacher_dim=12, seed=seed)
    return student, teacher, torch.rand(SHAPE, generator=generator(seed)) > 0.3


def part_of(scope):
    """This rank's: sequences whole, or columns of every sequence; one rank holds nothing."""
    rows = [slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 6)]
    columns = [slice(0, 4), slice(4, 4), slice(4, 5), slice(5, 9)]
    return rows[dist.get_rank()] if scope == "global" else (slice(None), columns[dist.get_rank()])


def cut(head, part, weight=None):
    return LinearHead(head.hidden[part], head.weight if weight is None else weight)


def added_up(x):
    return Ranks.world().sum(x.detach().clone())


def compared(scope, options, *, in_rank=None):
    """One call on every rank against one on all positions; returns what this rank sent."""
    student, teacher, mask = heads()
    mask = mask if in_rank is None else in_rank(mask)
    part = part_of(scope)
    hidden, weight = leaf(student.hidden), leaf(student.weight)
    local = {"scope": "sequence"} if scope == "sequence" else {}
    want = selective_opd_loss(LinearHead(hidden, weight), teacher, mask=mask, **local, **options)
    want.loss.backward()
    own_hidden, own_weight = leaf(student.hidden[part]), leaf(student.weight)
    with collectives() as sent:
        out = selective_opd_loss(
            LinearHead(own_hidden, own_weight),
            cut(teacher, part),
            mask=mask[part],
            scope=scope,
            selection_group=dist.group.WORLD,
            **options,
        )
        out.loss.backward()
    assert torch.equal(out.selected, want.selected[part])
    assert added_up(out.loss).item() == pytest.approx(want.loss.item(), rel=1e-5)
    assert want.selected.any()
    assert_gradient(added_up(own_weight.grad), weight.grad, 1e-5)
    assert (own_hidden.grad - hidden.grad[part]).norm() <= 1e-5 * hidden.grad.norm()
    assert added_up(out.metrics["n_selected"]) == want.metrics["n_selected"]
    assert added_up(out.metrics["loss_sum"]).item() == pytest.approx(want.metrics["loss_sum"].item(), rel=1e-5)
    if not out.selected.any():
        assert out.loss == 0
        assert not own_weight.grad.any()
    return sent


def losses(scope):
    n = 1 if scope == "global" else SHAPE[0]
    selection = {"gathered": [8] if scope == "global" else [8, 8 * n], "summed": [16]}
    search = torch.float32, n, 1
    quantiles = torch.float32, 1, 4
    for options in (
        {},
        {"denominator": "valid"},
        {"num_items_in_batch": 11},
        {"num_items_in_batch": torch.tensor(7.0), "fraction": 0.2},
    ):
        sent = compared(scope, {"fraction": 0.3} | options)
        assert_sent(sent, quantiles, quantiles, search, **selection)
    sent = compared(scope, {"fraction": 0.3, "selector": "entropy", "denominator": "sequence"})
    assert_sent(sent, search, **selection | {"summed": [16 * n] * 2})
    sent = compared(scope, {"fraction": 0.3, "selector": "entropy", "divergence": "forward_kl"})
    assert_sent(sent, search, **selection)
    sent = compared(scope, {"selector": "tip", "threshold": 0.6})
    assert_sent(sent, quantiles, quantiles, summed=[16])
    sent = compared(scope, {"selector": "teachability-released", "fraction": 0.1})
    if scope == "global":
        assert_sent(sent, *[quantiles] * 4, search, search, **selection)
    else:
        assert_sent(sent, *[quantiles] * 4, search, summed=[16], gathered=[8, 24 * n, 8, 8 * n])
    # Nothing valid on one more rank.
    compared(scope, {"fraction": 0.3}, in_rank=lambda mask: mask & (torch.arange(9) > 3) & (torch.arange(6).view(6, 1) > 2))
    return True


@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_losses_and_gradients_of_the_ranks_add_up(ranks, scope):
    assert ranks.run(losses, scope) == [True] * SIZE


def released(seeds, scope):
    """Against the oracle, but for budgets of sequences, which the released code does not have: there against one process."""
    options = {"selector": "teachability-released", "top_k": 5, "backend": "torch", "scope": scope}
    for seed in seeds:
        case = released_oracle.case(seed, size=(6, 11))
        if scope == "global":  # the ranks hold sequences, one of them none; in another order by seed
            sequences = [torch.arange(*rows) for rows in ((0, 3), (3, 3), (3, 4), (4, 6))]
            sequences = sequences[seed % SIZE :] + sequences[: seed % SIZE]
            part = parts([len(x) for x in sequences], dist.get_rank())
            case = [x[torch.cat(sequences)] for x in case]
        else:  # columns of every sequence, often none
            cuts = [0, *torch.randint(0, 12, (SIZE - 1,), generator=generator(seed)).sort().values.tolist(), 11]
            part = slice(None), slice(*cuts[dist.get_rank() : dist.get_rank() + 2])
        student, teacher, responses, mask = case
        own = {"mask": mask[part], "selection_group": dist.group.WORLD} | options
        for budget in ({"fraction": 0.05}, {"fraction": 0.4}, {"threshold": 0.6}):
            if scope == "global" or "threshold" in budget:
                want = torch.from_numpy(released_oracle.released(*case, top_k=5, **{"fraction": 1.0} | budget).selected)
            else:
                want = selective_opd_loss(student, teacher, mask=mask, **options, **budget).selected
            got = selective_opd_loss(student[part], teacher[part], **own, **budget)
            assert torch.equal(got.selected, want[part]), (seed, budget)
            assert torch.equal(got.stats.response_place > 0, responses[part])
    return len(seeds)


@pytest.mark.parametrize("scope", [pytest.param("global", marks=pytest.mark.full), "sequence"])
def test_teachability_released_over_ranks_selects_what_the_released_code_does(ranks, scope):
    assert ranks.run(released, range(3), scope) == [3] * SIZE


def late_infinities():
    """Rows whose loss is known to be infinite only when it is computed leave the count of all ranks."""
    student, teacher = (x.view(8, 4, 31) for x in logit_pair(32, 31))
    student = student.clone()
    student[:3, 1].scatter_(-1, teacher[:3, 1].argmax(-1, keepdim=True), -math.inf)  # all on the first ranks
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for divergence, stats in (("forward_kl_topk", False), ("forward_kl", True)):
        options = {"divergence": divergence, "selector": "all" if stats else "entropy", "fraction": 1.0}
        whole, own = leaf(student), leaf(student[rows])
        known = {"student_stats": StudentStats.from_logits(student)} if stats else {}
        want = selective_opd_loss(whole, teacher, **options, **known)
        want.loss.backward()
        known = {"student_stats": StudentStats.from_logits(student[rows])} if stats else {}
        with collectives() as sent:
            out = selective_opd_loss(own, teacher[rows], scope="global", **options, **known)
        out.loss.backward()
        assert want.metrics["n_infinite"] == 3
        assert want.selected.sum() == 29
        assert_sent(sent, (torch.float32, 1, 1), gathered=[8], summed=[16])
        assert torch.equal(out.selected, want.selected[rows])
        assert added_up(out.loss).item() == pytest.approx(want.loss.item(), rel=1e-5)
        assert_gradient(own.grad, whole.grad[rows], 1e-5)
    options = {"divergence": "forward_kl_topk", "selector": "entropy", "fraction": 1.0, "denominator": "sequence"}
    whole, own = leaf(student), leaf(student[rows])
    selective_opd_loss(whole, teacher, **options).loss.backward()
    selective_opd_loss(own, teacher[rows], scope="global", **options).loss.backward()
    assert_gradient(own.grad, whole.grad[rows], 1e-5)
    return True


def test_infinite_losses_leave_the_count_of_all_ranks(ranks):
    assert ranks.run(late_infinities) == [True] * SIZE


def routed():
    student, teacher, mask = heads()
    teachers, part = (teacher, LinearHead(0.8 * teacher.hidden, teacher.weight)), part_of("global")
    index = torch.arange(SHAPE[0]) % 2
    weight, own_weight, options = leaf(student.weight), leaf(student.weight), {"fraction": 0.3, "selector": "entropy"}
    want = selective_opd_loss(LinearHead(student.hidden, weight), Routed(teachers, index), mask=mask, **options)
    want.loss.backward()
    mine = Routed([cut(x, part) for x in teachers], index[part])
    out = selective_opd_loss(cut(student, part, own_weight), mine, mask=mask[part], scope="global", **options)
    out.loss.backward()
    assert torch.equal(out.selected, want.selected[part])
    assert_gradient(added_up(own_weight.grad), weight.grad, 1e-5)
    for name in ("n_selected_teacher_0", "n_valid_teacher_1", "loss_teacher_1_sum"):
        torch.testing.assert_close(added_up(out.metrics[name]), want.metrics[name], rtol=1e-5, atol=1e-6)
    return True


def test_routed_teachers_share_one_budget_over_ranks(ranks):
    assert ranks.run(routed) == [True] * SIZE


def token_losses():
    student, teacher, mask = heads()
    part = part_of("global")
    want = selective_opd_token_losses(student, teacher, mask=mask, fraction=0.2)
    with collectives() as sent:
        out = selective_opd_token_losses(cut(student, part), cut(teacher, part), mask=mask[part], fraction=0.2, scope="global")
    assert_sent(sent, *[(torch.float32, 1, 4)] * 2, (torch.float32, 1, 1), gathered=[8])
    assert torch.equal(out.selected, want.selected[part])
    torch.testing.assert_close(out.losses, want.losses[part], rtol=1e-5, atol=1e-7)
    return True


def test_token_losses_are_those_of_the_whole_batch(ranks):
    assert ranks.run(token_losses) == [True] * SIZE


def scores_alone():
    student, teacher, mask = heads()
    part = part_of("global")
    want, _ = score_positions(student, teacher, mask=mask)
    with collectives() as sent:
        got, _ = score_positions(cut(student, part), cut(teacher, part), mask=mask[part], selection_group=dist.group.WORLD)
    assert_sent(sent, *[(torch.float32, 1, 4)] * 2)
    torch.testing.assert_close(got, want[part], rtol=1e-5, atol=1e-6)
    with collectives() as sent:
        score_positions(cut(student, part), cut(teacher, part), mask=mask[part])
    return not sent


def test_score_positions_normalises_over_the_group(ranks):
    assert ranks.run(scores_alone) == [True] * SIZE


def shortlists():
    student, teacher = head_pair((8,), 67, student_dim=32, teacher_dim=48)
    rank = dist.get_rank(own_pair())
    part = slice(0, 5) if rank == 0 else slice(5, 8)
    options = {"fraction": 0.25, "backend": "triton", "score_dtype": "float8", "selector": "divergence"}
    want = selective_opd_loss(student, teacher, **options)
    with collectives() as sent:
        out = selective_opd_loss(cut(student, part), cut(teacher, part), scope="global", selection_group=own_pair(), **options)
    assert_sent(sent, *[(torch.float32, 1, 1)] * 2, gathered=[8, 8], summed=[16])
    assert torch.equal(out.selected, want.selected[part])
    assert torch.equal(out.scores > -math.inf, want.scores[part] > -math.inf)  # the shortlist
    assert (want.scores > -math.inf).sum() == 4
    return True


def test_the_shortlist_of_eight_bits_is_one_of_all_ranks(ranks):
    assert ranks.run(shortlists) == [True] * SIZE


def window(selector):
    """docs/guides/several-gpus.md: several micro-batches on every rank are scored, then selected from once."""
    student, teacher, mask = heads(3)
    rank = dist.get_rank(own_pair())
    micro = [slice(0, 1), slice(1, 3)] if rank == 0 else [slice(3, 4), slice(4, 6)]
    weight, whole = leaf(student.weight), leaf(student.weight)
    want = selective_opd_loss(LinearHead(student.hidden, whole), teacher, mask=mask, selector=selector, fraction=0.1)
    want.loss.backward()

    scored = [score_positions(cut(student, b), cut(teacher, b), mask=mask[b], selector="entropy") for b in micro]
    stats = TokenStats(
        *(None if x[0] is None else torch.cat([y.flatten() for y in x]) for x in zip(*(s for _, s in scored), strict=True))
    )
    with over_ranks(Ranks(own_pair())):
        scores = SELECTORS[selector](stats)
    selected = select_positions(scores, mask=stats.valid, fraction=0.1, scope="global", selection_group=own_pair())
    n_selected = Ranks(own_pair()).sum(selected.sum())
    for b, chosen in zip(micro, selected.split([s.valid.numel() for _, s in scored]), strict=True):
        out = selective_opd_loss(
            cut(student, b, weight),
            cut(teacher, b),
            mask=chosen.view(mask[b].shape),
            fraction=1.0,
            selector="all",
            denominator="valid",
            num_items_in_batch=n_selected,
        )
        out.loss.backward()
    assert n_selected == want.metrics["n_selected"]
    assert_gradient(Ranks(own_pair()).sum(weight.grad), whole.grad, 1e-5)
    return True


@pytest.mark.parametrize("selector", ["entropy", "teachability"])
def test_one_budget_for_an_accumulation_window(ranks, selector):
    assert ranks.run(window, selector) == [True] * SIZE


# --- refusals --------------------------------------------------------------------------------------------------------


def refusals():
    student, teacher = logit_pair(12, 31)
    student, teacher = student.view(3, 4, 31), teacher.view(3, 4, 31)
    parts_of = {"scope": "sequence", "selection_group": dist.group.WORLD}
    ids = torch.ones(3, 4, dtype=torch.long)
    for options, error, message in (
        ({"selection_group": dist.group.WORLD}, ValueError, "selection_group: got a group, but scope 'batch'"),
        ({"selection_group": 3, "scope": "global"}, TypeError, "selection_group: got int, expected a ProcessGroup"),
        ({"selector": "prefix", **parts_of}, ValueError, "selector: got 'prefix', which counts"),
        ({"special_ids": [1], "tokens": ids, **parts_of}, ValueError, "special_ids: got ids, whose first"),
        ({"labels": ids, **parts_of}, ValueError, "labels: got unshifted labels"),
    ):
        for call in (selective_opd_loss, selective_opd_token_losses):
            with pytest.raises(error, match=message), collectives() as sent:
                call(student, teacher, **options)
            assert not sent
    with pytest.raises(ValueError, match="selection_group: got a group, but scope 'batch'"):
        select_positions(student[..., 0], selection_group=dist.group.WORLD)
    few = slice(0, 2 if dist.get_rank() == 1 else 3)
    with pytest.raises(ValueError, match="selection_group: its ranks hold parts of 3, 2, 3, 3 sequences"):
        selective_opd_loss(student[few], teacher[few], selector="entropy", **parts_of)
    out = selective_opd_loss(student, teacher, shift_labels=ids, **parts_of)  # the same on all ranks: ties
    assert int(out.selected.sum()) == (3 if dist.get_rank() == 0 else 0)

    teacher[0, dist.get_rank(), 2] = math.nan if dist.get_rank() == 2 else 0.0
    message = r"position \(0, 2\)" if dist.get_rank() == 2 else "got 1 positions without a finite softmax on other ranks"
    with pytest.raises(ValueError, match="teacher: .*" + message):
        selective_opd_loss(student, teacher, scope="global", check_finite=True)
    return True


def test_what_would_be_wrong_is_refused_before_anything_is_sent(ranks):
    assert ranks.run(refusals) == [True] * SIZE
