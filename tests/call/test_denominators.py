"""One batch, cut into micro-batches or spread over ranks, gives the gradient of the whole; and what does not.

  Invariant with `num_items_in_batch`: scope "sequence" with a selector that does not normalise over the batch
    denominator "valid"      for any lengths
    denominator "selected"   where rho N_i is whole for every sequence; else rounding up changes a sequence's share
    denominator "sequence"   for any lengths, with the number of responses as `num_items_in_batch`
  Not invariant: scope "batch" (one budget per call) and selectors that normalise over the call's positions. For these a host
  scores the whole step first: scores by a callable, the cut by `threshold=`.

Run: make test ARGS=tests/call/test_denominators.py. Not here: denominators of one call (tests/loss/test_loss.py).
"""

import itertools
import math

import pytest
import torch

from opd_ops import (
    LinearHead,
    Settings,
    score_positions,
    select_positions,
    selective_opd_loss,
    selective_opd_token_losses,
)
from tests.support.cases import generator, head_pair, leaf, logit_pair
from tests.support.tolerances import assert_gradient, relative_error

SEQUENCES, LENGTH, VOCAB = 16, 30, 61
# Unequal micro-batches of the sequences.
CUTS = {2: [5], 4: [1, 4, 9], 8: [1, 2, 4, 5, 9, 12, 13]}
INVARIANT = ["entropy", "divergence", "divergence-reverse-kl", "prefix", "all"]


def batch(whole_budgets, seed=0):
    """Hidden states of right-padded sequences of unequal length; lengths a multiple of 5 make a fifth of them whole."""
    student, teacher = head_pair((SEQUENCES, LENGTH), VOCAB, student_dim=8, teacher_dim=12, seed=seed)
    lengths = torch.randint(1, 7 if whole_budgets else LENGTH + 1, (SEQUENCES,), generator=generator(seed))
    lengths = lengths * 5 if whole_budgets else lengths
    return student, teacher, torch.arange(LENGTH) < lengths.unsqueeze(1)


def part(head, rows):
    return LinearHead(head.hidden[rows], head.weight)


def pieces(cuts):
    return [slice(*edges) for edges in itertools.pairwise([0, *cuts, SEQUENCES])]


def gradient(student, teacher, mask, cuts, *, num_items, selector="entropy", extra=lambda rows: {}, **options):
    """The weight's gradient, accumulated over micro-batches."""
    weight = leaf(student.weight)
    for rows in pieces(cuts):
        row_options = {"selector": selector[rows] if isinstance(selector, list) else selector, **options, **extra(rows)}
        got = LinearHead(student.hidden[rows], weight)
        out = selective_opd_loss(got, part(teacher, rows), mask=mask[rows], num_items_in_batch=num_items, **row_options)
        out.loss.backward()
    return weight.grad


@pytest.mark.parametrize("selector", INVARIANT)
@pytest.mark.parametrize("n_parts", CUTS)
def test_micro_batches_add_up_to_the_whole_batch(n_parts, selector):
    student, teacher, mask = batch(whole_budgets=True)
    for denominator in ("selected", "valid"):
        options = {
            "scope": "sequence", "fraction": 0.2, "denominator": denominator, "num_items": int(mask.sum()), "selector": selector
        }  # fmt: skip
        got, want = (gradient(student, teacher, mask, cuts, **options) for cuts in (CUTS[n_parts], []))
        assert_gradient(got, want, 1e-5)


@pytest.mark.parametrize("n_parts", CUTS)
def test_micro_batches_of_any_lengths_add_up_with_the_valid_denominator(n_parts):
    student, teacher, mask = batch(whole_budgets=False)
    options = {"scope": "sequence", "fraction": 0.07, "denominator": "valid", "num_items": torch.tensor(int(mask.sum()))}
    got, want = (gradient(student, teacher, mask, cuts, **options) for cuts in (CUTS[n_parts], []))
    assert_gradient(got, want, 1e-5)


def mean_of_responses(losses, selected, valid):
    """The mean over the selected positions of each row, then over the rows with a valid position."""
    means = [losses[i][selected[i]].mean() for i in range(len(losses)) if selected[i].any()]
    return torch.stack(means).sum() / int(valid.any(1).sum())


@pytest.mark.parametrize("backend", ["torch", "eager", pytest.param("triton", marks=pytest.mark.full)])
def test_the_sequence_denominator_is_a_mean_over_responses(backend):
    student, teacher, mask = batch(whole_budgets=False)
    student, teacher, mask = part(student, slice(0, 5)), part(teacher, slice(0, 5)), mask[:5].clone()
    mask[3] = False  # a prompt without a response
    weights = 0.5 + torch.rand(mask.shape, generator=generator(2))
    options = {"mask": mask, "weights": weights, "selector": "entropy", "fraction": 0.1, "backend": backend}
    got, want = leaf(student.hidden), leaf(student.hidden)
    out = selective_opd_loss(LinearHead(got, student.weight), teacher, denominator="sequence", **options)
    per_token = selective_opd_token_losses(LinearHead(want, student.weight), teacher, **options)
    assert torch.equal(out.selected, per_token.selected)
    assert not out.selected.any(1).all()  # in scope "batch" some responses have none
    loss = mean_of_responses(per_token.losses, per_token.selected, mask)
    out.loss.backward()
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-7)
    assert_gradient(got.grad, want.grad, 1e-5)
    torch.testing.assert_close(out.metrics["loss_sum"], per_token.metrics["loss_sum"], rtol=1e-5, atol=1e-6)
    packed = selective_opd_loss(
        LinearHead(student.hidden[mask], student.weight),
        LinearHead(teacher.hidden[mask], teacher.weight),
        denominator="sequence",
        cu_seqlens=torch.cat((torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0))),
        **options | {"mask": None, "weights": weights[mask]},
    )
    torch.testing.assert_close(packed.loss, out.loss, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n_parts", CUTS)
def test_micro_batches_of_any_lengths_add_up_with_the_sequence_denominator(n_parts):
    student, teacher, mask = batch(whole_budgets=False)
    options = {"scope": "sequence", "fraction": 0.2, "denominator": "sequence", "num_items": SEQUENCES}
    got, want = (gradient(student, teacher, mask, cuts, **options) for cuts in (CUTS[n_parts], []))
    assert_gradient(got, want, 1e-5)
    counted = gradient(student, teacher, mask, [], **options | {"num_items": None})
    assert_gradient(counted, want, 1e-5)


@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_rows_that_turn_out_infinite_leave_the_mean_of_their_response(backend):
    s, u = (x.view(4, 5, 31) for x in logit_pair(20, 31))
    s[1, 2].scatter_(-1, u[1, 2].argmax(-1, keepdim=True), -math.inf)
    s[2].scatter_(-1, u[2].argmax(-1, keepdim=True), -math.inf)  # a whole response
    options = {"divergence": "forward_kl_topk", "selector": "entropy", "fraction": 1.0, "backend": backend}
    x, y = leaf(s), leaf(s)
    out = selective_opd_loss(x, u, denominator="sequence", **options)
    assert out.selected.sum(1).tolist() == [5, 4, 0, 5]
    out.loss.backward()
    per_token = selective_opd_token_losses(y, u, **options)
    mean_of_responses(per_token.losses, per_token.selected, torch.ones(4, 5)).backward()
    assert_gradient(x.grad, y.grad, 1e-5)


def test_the_sequence_denominator_is_not_for_hosts_that_count_tokens():
    with pytest.raises(ValueError, match="denominator: got 'sequence', a mean over responses, but this host divides"):
        Settings(denominator="sequence").for_host(passes_tokens=True)
    student, teacher, mask = batch(whole_budgets=False)
    with pytest.raises(ValueError, match="num_items_in_batch: got 0"):
        selective_opd_loss(student, teacher, mask=mask, denominator="sequence", num_items_in_batch=0)


def test_rounding_up_is_all_that_moves_the_selected_denominator():
    """Each micro-batch is weighted by its own share n_selected / n_valid, which rounding up makes unequal."""
    student, teacher, mask = batch(whole_budgets=False)
    options = {"scope": "sequence", "fraction": 0.2, "denominator": "selected", "num_items": int(mask.sum())}
    got, want = (gradient(student, teacher, mask, cuts, **options) for cuts in (CUTS[4], []))
    counts = [math.ceil(n / 5) for n in mask.sum(1).tolist()]
    shares = [sum(counts[rows]) / int(mask[rows].sum()) for rows in [slice(None), *pieces(CUTS[4])]]
    most = max(abs(shares[0] / share - 1) for share in shares[1:])
    assert 1e-3 < relative_error(got, want) <= 2 * most


@pytest.mark.parametrize("n_parts", CUTS)
def test_full_distillation_is_invariant_with_every_denominator(n_parts):
    student, teacher, mask = batch(whole_budgets=False)
    for denominator in ("selected", "valid"):
        options = {"fraction": 1.0, "selector": "all", "denominator": denominator, "num_items": int(mask.sum())}
        got, want = (gradient(student, teacher, mask, cuts, **options) for cuts in (CUTS[n_parts], []))
        assert_gradient(got, want, 1e-5)


@pytest.mark.parametrize("denominator", ["selected", "valid"])
def test_two_ranks_average_to_one(denominator):
    """Data parallelism averages gradients over ranks; hosts that count globally pass the count per rank (TRL, Hugging Face)."""
    student, teacher, mask = batch(whole_budgets=True)
    options = {"scope": "sequence", "fraction": 0.2, "denominator": denominator}
    want = gradient(student, teacher, mask, [], num_items=int(mask.sum()), **options)
    ranks = []
    for rows in (slice(0, 7), slice(7, SEQUENCES)):
        weight = leaf(student.weight)
        for half in (slice(rows.start, rows.start + 3), slice(rows.start + 3, rows.stop)):  # two micro-batches a rank
            out = selective_opd_loss(
                LinearHead(student.hidden[half], weight),
                part(teacher, half),
                mask=mask[half],
                selector="entropy",
                num_items_in_batch=int(mask.sum()) / 2,
                **options,
            )
            out.loss.backward()
        ranks.append(weight.grad)
    assert_gradient((ranks[0] + ranks[1]) / 2, want, 1e-5)


def step_scores(student, teacher, mask, selector):
    """What a host computes once per step: statistics of every micro-batch, the selector on all of them together."""
    scores, _ = score_positions(student, teacher, mask=mask, selector=selector)
    return scores


@pytest.mark.parametrize("selector", ["teachability", "tip", "entropy"])
@pytest.mark.parametrize("n_parts", CUTS)
def test_scores_and_threshold_of_the_step_make_scope_batch_invariant(n_parts, selector):
    student, teacher, mask = batch(whole_budgets=False)
    scores = step_scores(student, teacher, mask, selector)
    chosen = select_positions(scores, mask=mask, fraction=0.1)
    cut = scores[chosen].min()
    weight = leaf(student.weight)
    selected = []
    for rows in pieces(CUTS[n_parts]):
        out = selective_opd_loss(
            LinearHead(student.hidden[rows], weight),
            part(teacher, rows),
            mask=mask[rows],
            selector=lambda stats, rows=rows: scores[rows],
            threshold=cut,
            denominator="valid",
            num_items_in_batch=int(mask.sum()),
        )
        out.loss.backward()
        selected.append(out.selected)
    assert torch.equal(torch.cat(selected), chosen)
    want = leaf(student.weight)
    whole = selective_opd_loss(
        LinearHead(student.hidden, want), teacher, mask=mask, selector=selector, fraction=0.1, denominator="valid"
    )
    whole.loss.backward()
    assert_gradient(weight.grad, want.grad, 1e-5)


def test_scope_batch_gives_every_micro_batch_its_own_budget():
    student, teacher, mask = batch(whole_budgets=False)
    scores, _ = score_positions(student, teacher, mask=mask, selector="entropy")
    whole = select_positions(scores, mask=mask, fraction=0.1)
    cut = torch.cat([select_positions(scores[rows], mask=mask[rows], fraction=0.1) for rows in pieces(CUTS[4])])
    assert not torch.equal(cut, whole)
    assert whole.sum() <= cut.sum() <= whole.sum() + 4  # rounded up once for each


def test_normalised_scores_depend_on_the_call_s_positions():
    student, teacher, mask = batch(whole_budgets=False)
    whole, _ = score_positions(student, teacher, mask=mask)
    alone, _ = score_positions(part(student, slice(0, 4)), part(teacher, slice(0, 4)), mask=mask[:4])
    assert relative_error(alone[mask[:4]], whole[:4][mask[:4]]) > 1e-2


@pytest.mark.parametrize("threshold", [0.5, torch.tensor(0.5)])
def test_threshold_keeps_every_valid_position_at_or_above_it(threshold):
    scores = torch.tensor([0.5, 0.4, 0.9, math.nan, 0.7, -math.inf])
    mask = torch.tensor([1, 1, 1, 1, 0, 1])
    assert select_positions(scores, mask=mask, threshold=threshold).tolist() == [True, False, True, False, False, False]
    assert not select_positions(scores, threshold=1.0).any()
    assert select_positions(scores, threshold=-math.inf).tolist() == [True, True, True, False, True, False]


def test_threshold_rejects():
    student, teacher, mask = batch(whole_budgets=False)
    for bad in (math.nan, "0.5", True):
        with pytest.raises(ValueError, match=r"threshold: got .*, expected a number or a 0-dim tensor"):
            selective_opd_loss(student, teacher, mask=mask, threshold=bad)
    with pytest.raises(ValueError, match="threshold: score_dtype='float8' scores only a shortlist"):
        selective_opd_loss(student, teacher, mask=mask, threshold=0.5, score_dtype="float8")
