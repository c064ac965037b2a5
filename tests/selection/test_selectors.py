"""Selectors against the papers' equations, written once more over the valid positions alone with NumPy; the released code's
against support/released_oracle.py.

  Compared: scores at valid positions. Run: make test ARGS=tests/selection/test_selectors.py

Not here: "ier" (test_ier.py), which positions the scores keep (test_budget.py), the statistics (tests/backends/).
"""

import math

import numpy as np
import pytest
import torch

from opd_ops import (
    Dial,
    LogRatio,
    Multinomial,
    Released,
    SampledLogprobs,
    StudentStats,
    TopKLogprobs,
    score_positions,
    selective_opd_loss,
)
from opd_ops.selection.normalisers import minmax_norm, quantile_norm, rank_norm, released_norm
from opd_ops.selection.selectors import SELECTORS
from tests.support import released_oracle
from tests.support.cases import generator, logit_pair

N = 60


@pytest.fixture(scope="module")
def case():
    student, teacher = logit_pair(N, 211, scale=2.5, seed=7)
    return student.view(4, 15, 211), teacher.view(4, 15, 211), torch.rand(4, 15, generator=generator(8)) > 0.3


def norm(z):
    low, high = np.quantile(z, 0.05), np.quantile(z, 0.95)
    return np.clip((z - low) / (high - low + 1e-8), 0, 1)


def minmax(z, clip=None):
    z = z if clip is None else np.minimum(z, np.quantile(z, clip))
    return (z - z.min()) / (z.max() - z.min())


def either(a, b):
    return a + b - a * b


EQUATIONS = {
    "teachability": lambda x: norm(x.union_kl) * norm(x.support_mass),
    "teachability+entropy": lambda x: either(norm(x.student_entropy), norm(x.union_kl) * norm(x.support_mass)),
    "incompatibility": lambda x: norm(x.union_kl) * (1 - norm(x.support_mass)),
    "compatibility": lambda x: norm(x.support_mass),
    "entropy": lambda x: x.student_entropy,
    "divergence": lambda x: x.union_kl,
    "divergence-reverse-kl": lambda x: x.reverse_kl,
    "tip": lambda x: either(minmax(x.student_entropy, 0.98), minmax(x.reverse_kl)),
    "overconfident": lambda x: x.forward_kl * (1 - minmax(x.student_entropy, 0.98)),
    "dial": lambda x: np.abs(np.exp(x.teacher_logprob) - np.exp(x.student_logprob)),
    "log-ratio": lambda x: x.teacher_logprob - x.student_logprob,
    "ratio-variance": lambda x: x.ratio_variance,
    "ier": lambda x: x.ier,
    "all": lambda x: np.zeros_like(x.reverse_kl),
}


@pytest.mark.parametrize("selector", sorted(EQUATIONS))
def test_selector_matches_the_paper(selector, case):
    student, teacher, mask = case
    tokens = torch.randint(0, 211, mask.shape, generator=generator(2))
    scores, stats = score_positions(student, teacher, mask=mask, tokens=tokens, selector=selector)
    valid = type(stats)(*(None if c is None else c[mask].double().numpy() for c in stats))
    np.testing.assert_allclose(scores[mask].numpy(), EQUATIONS[selector](valid), rtol=2e-6, atol=1e-7)
    assert bool((scores[~mask] == -math.inf).all())


def test_every_named_selector_has_a_test():
    assert {*EQUATIONS, *RELEASED_KINDS, "random", "multinomial", "prefix"} == set(SELECTORS)


def test_an_infinite_kl_at_the_largest_entropy_scores_zero():
    student, teacher = logit_pair(5, 31)
    student[2] *= 0.01  # 1 - h is 0
    student[2, 0] = -math.inf  # KL(q || p) is infinite
    out = selective_opd_loss(student, teacher, selector="overconfident")
    assert out.stats.forward_kl[2] == math.inf
    assert out.scores[2] == 0
    assert out.loss.isfinite()


def test_dial_is_its_equation_from_equal_models_to_an_unlikely_token(case):
    student, teacher, _ = case
    y = torch.randint(0, 211, (4, 15), generator=generator(3))
    teacher = torch.cat((student[:1], teacher[1:]))
    log_p, log_q = (x.double().log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1).numpy() for x in (student, teacher))
    a, p, q = log_q - log_p, np.exp(log_p), np.exp(log_q)
    for beta in (0.0, 0.5, 1.0, 1.2):
        scores, stats = score_positions(student.double(), teacher.double(), tokens=y, selector=Dial(beta))
        want = np.abs(a[1:]) ** (1 - beta) * np.abs(q - p)[1:] ** beta
        np.testing.assert_allclose(scores[1:].numpy(), want, rtol=1e-9)
        assert not scores[0].any()
    np.testing.assert_allclose(stats.student_logprob.numpy(), log_p, rtol=1e-12)
    np.testing.assert_allclose(stats.teacher_logprob.numpy(), log_q, rtol=1e-12)


def test_dial_of_a_token_that_the_teacher_masks():
    stats = score_positions(*logit_pair(3, 29), tokens=torch.zeros(3).long(), selector="dial")[1]
    stats = stats._replace(teacher_logprob=torch.full((3,), -math.inf))
    torch.testing.assert_close(Dial()(stats), stats.student_logprob.double().exp())
    assert bool((Dial(0.5)(stats) == math.inf).all())
    assert not Dial(1.2)(stats).any()


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
def test_selectors_of_the_sampled_token_agree_on_every_backend_and_on_what_servers_send(backend):
    student, teacher = (x.view(2, 4, 131) for x in logit_pair(8, 131, scale=2.5, seed=2))
    y = torch.randint(0, 131, (2, 4), generator=generator(4))
    log_p, log_q = (x.double().log_softmax(-1) for x in (student, teacher))
    at = [x.gather(-1, y.unsqueeze(-1)).squeeze(-1) for x in (log_p, log_q)]
    best = log_q.float().topk(16)
    ids = torch.cat((best.indices, y.unsqueeze(-1)), -1)
    sent = TopKLogprobs(ids, log_q.float().gather(-1, ids)), SampledLogprobs(y, at[1].float())
    for source in (teacher, *sent):
        scores, stats = score_positions(student, source, tokens=y, selector="log-ratio", backend=backend)
        torch.testing.assert_close(scores.double(), at[1] - at[0], rtol=0, atol=5e-6)
        torch.testing.assert_close(stats.student_logprob.double(), at[0], rtol=0, atol=3e-6)
    low, _ = score_positions(student, teacher, tokens=y, selector=LogRatio("low"), backend=backend)
    torch.testing.assert_close(low.double(), at[0] - at[1], rtol=0, atol=5e-6)
    scores, _ = score_positions(student, teacher, selector="ratio-variance", backend=backend)
    p, r = log_p.exp(), log_p - log_q
    torch.testing.assert_close(scores.double(), (p * r.square()).sum(-1) - (p * r).sum(-1).square(), rtol=1e-4, atol=1e-6)


def test_rank_norm_takes_the_earlier_of_equal_values_as_the_lower():
    z, valid = torch.tensor([4.0, 4.0, 9.0, 1.0, 4.0]), torch.tensor([True, True, False, True, True])
    assert rank_norm(z, valid)[valid].tolist() == pytest.approx([1 / 3, 2 / 3, 0, 1])
    assert rank_norm(z[:1], valid[:1]).tolist() == [0]


def test_ratio_variance_is_the_norm_of_the_reverse_kl_gradient_over_p():
    student, teacher = logit_pair(5, 97, dtype=torch.float64)
    leaf = student.clone().requires_grad_()
    out = selective_opd_loss(leaf, teacher, fraction=1.0, selector="ratio-variance", denominator="valid", num_items_in_batch=1)
    out.loss.backward()
    want = (leaf.grad.square() / student.softmax(-1)).sum(-1)
    torch.testing.assert_close(out.scores, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("selector", ["dial", "log-ratio"])
def test_a_selector_of_the_sampled_token_needs_tokens(selector, case):
    with pytest.raises(ValueError, match=f"tokens: got None, but the selector '{selector}' reads the sampled token"):
        selective_opd_loss(*case[:2], selector=selector)


@pytest.mark.parametrize("name", ["top1_agreement", "teacher_rank"])
def test_the_rank_of_the_student_s_choice_counts_no_id_that_the_teacher_masks(name):
    student, teacher = logit_pair(4, 33, scale=1.0, noise=0.0)
    teacher[0, student[0].argmax()] = -math.inf
    teacher[1, 3:] = -math.inf
    student[1, 7] = 50.0
    teacher[2, student[2].topk(3).indices[2]] += 20

    def column(stats):
        return getattr(stats, name)

    column.needs = frozenset({name})
    want = {"top1_agreement": [0, 0, 0, 1], "teacher_rank": [6, 6, 2, 1]}[name]
    for backend in ("eager", "torch", "triton"):
        _, stats = score_positions(student, teacher, selector=column, top_k=5, divergence="jsd", backend=backend)
        assert getattr(stats, name).tolist() == want, backend


@pytest.mark.parametrize("normaliser", [quantile_norm, released_norm, minmax_norm])
def test_a_constant_normalises_to_zero(normaliser):
    z, valid = torch.full((9,), 0.3), torch.arange(9) > 2
    assert not normaliser(z, valid)[valid].any()


@pytest.mark.parametrize("normaliser", [quantile_norm, minmax_norm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_with_the_noise_of_rounding_normalises_to_zero(normaliser, dtype):
    noise = torch.finfo(dtype).eps * torch.randint(-2, 3, (200,), generator=generator(0))
    z = (1 + noise.double()).to(dtype)
    assert len(z.unique()) > 2
    assert not normaliser(z, torch.ones(200, dtype=torch.bool)).any()


@pytest.mark.parametrize("normaliser", [quantile_norm, minmax_norm])
def test_a_range_of_more_than_rounding_normalises_to_one(normaliser):
    z = 1 + torch.finfo(torch.float32).eps * torch.arange(32.0)
    assert normaliser(z, torch.ones(32, dtype=torch.bool)).max() == 1


def test_outliers_of_a_constant_still_normalise_to_one():
    z = torch.full((200,), 0.3)
    z[7] = 0.3001
    assert quantile_norm(z, torch.ones(200, dtype=torch.bool)).nonzero().tolist() == [[7]]


def test_a_normaliser_keeps_nan():
    z = torch.tensor([0.3, 0.3, math.nan, 0.3])
    for normaliser in (quantile_norm, minmax_norm):
        assert normaliser(z, torch.ones(4, dtype=torch.bool)).isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("n", [1, 2, 3, 19, 100])
def test_quantiles_are_those_of_numpy(n):
    z = torch.randn(n + 5, generator=generator(n), dtype=torch.float64)
    valid = torch.arange(n + 5) < n
    z[~valid] = 1e9
    np.testing.assert_allclose(quantile_norm(z, valid)[valid].numpy(), norm(z[valid].numpy()), rtol=1e-12, atol=1e-15)


def test_infinite_statistics_stay_out_of_the_fit_and_rank_first():
    z = torch.tensor([0.0, 1.0, 2.0, 3.0, math.inf])
    valid = torch.ones(5, dtype=torch.bool)
    for normaliser in (quantile_norm, minmax_norm):
        scaled = normaliser(z, valid)
        torch.testing.assert_close(scaled[:4], normaliser(z[:4], valid[:4]))
        assert scaled[4] == 1
    assert quantile_norm(torch.tensor([math.inf]), valid[:1]).item() == 1


@pytest.mark.parametrize("n", [1, 2, 3, 19, 100])
def test_released_norm_matches_numpy_and_takes_what_is_not_finite_as_zero(n):
    z = 3 + torch.randn(n + 7, generator=generator(n), dtype=torch.float64)
    z[n // 2], z[n // 3] = math.nan, math.inf
    among = torch.arange(n + 7) < n
    got = released_norm(z, among)
    np.testing.assert_allclose(got[among].numpy(), released_oracle.norm(z[among].numpy()), rtol=1e-12, atol=1e-15)
    assert got[n // 2] == got[n // 3] == 0
    assert not released_norm(z, among & False).any()


@pytest.mark.parametrize(("step", "want"), [(9e-13, 0.0), (3e-12, 1.0)])
def test_released_norm_is_zero_where_the_range_is_below_its_least(step, want):
    z = torch.tensor([0.0, 0.0, step, step], dtype=torch.float64)
    assert released_norm(z, torch.ones(4, dtype=torch.bool)).max() == want


RELEASED = "teachability-released"
RELEASED_KINDS = {f"{kind}-released": kind for kind in ("teachability", "teachability+entropy", "tip", "entropy")}


def released_scores(student, teacher, selector=RELEASED, **options):
    """Scores of the selector and by which it keeps one."""
    scores, stats = score_positions(student, teacher, selector=selector, **options)
    return scores, SELECTORS.get(selector, selector).keep_scores(stats), stats


@pytest.mark.parametrize(("seed", "backend"), [(0, "eager"), (3, "eager"), (0, "torch"), (3, "torch"), (7, "triton")])
def test_teachability_released_matches_the_released_code(seed, backend):
    kernels = backend == "triton"
    student, teacher, responses, mask = released_oracle.case(
        seed, size=(2, 8) if kernels else (5, 12), dtype=torch.float32 if kernels else torch.float64
    )
    holes = responses & ~mask
    assert holes.any()
    want = released_oracle.released(student, teacher, responses, mask, fraction=0.1, top_k=5)
    scores, keep_scores, stats = released_scores(student, teacher, mask=mask, top_k=5, backend=backend)
    tolerance = {"rtol": 2e-4, "atol": 2e-6} if kernels else {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(scores[mask].numpy(), want.scores[mask.numpy()], **tolerance)
    np.testing.assert_allclose(keep_scores[mask].numpy(), want.keep_scores[mask.numpy()], **tolerance)
    assert bool((scores[~mask] == -math.inf).all())
    assert torch.equal(stats.valid, mask)
    assert torch.equal(stats.response_place > 0, responses)
    # Fitted on the valid rows alone it would be another ranking.
    other = released_oracle.released(student, teacher, mask, mask, fraction=0.1, top_k=5)
    assert np.abs(other.scores - want.scores)[mask.numpy()].max() > 3e-3


@pytest.mark.parametrize("exact_mass", [False, True])
@pytest.mark.parametrize("name", RELEASED_KINDS)
def test_the_released_code_s_relatives_match_it(name, exact_mass):
    student, teacher, responses, mask = released_oracle.case(3)
    kind = RELEASED_KINDS[name]
    want = released_oracle.released(student, teacher, responses, mask, fraction=0.1, top_k=5, kind=kind, exact_mass=exact_mass)
    selector = Released(kind, exact_mass=True) if exact_mass else name
    scores, keep_scores, _ = released_scores(student, teacher, selector, mask=mask, top_k=5, backend="torch")
    np.testing.assert_allclose(scores[mask].numpy(), want.scores[mask.numpy()], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(keep_scores[mask].numpy(), want.keep_scores[mask.numpy()], rtol=1e-9, atol=1e-12)
    # Fitted on the valid rows, as IER's copy does.
    want = released_oracle.released(student, teacher, mask, mask, fraction=0.1, top_k=5, kind=kind, exact_mass=exact_mass)
    fitted = Released(kind, fit="valid", exact_mass=exact_mass)
    got, keep_scores, _ = released_scores(student, teacher, fitted, mask=mask, top_k=5, backend="torch")
    np.testing.assert_allclose(got[mask].numpy(), want.scores[mask.numpy()], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(keep_scores[mask].numpy(), want.keep_scores[mask.numpy()], rtol=1e-9, atol=1e-12)
    assert (got - scores)[mask].abs().max() > 1e-4


@pytest.mark.parametrize("n", [190, 200, 201])
def test_teachability_and_entropy_at_five_percent_is_entropy_or_full_teachability(n):
    """Norm gives h = 1 to as many positions as a budget of 5 % has, so no score of the selected ones is below 1."""
    student, teacher = logit_pair(n, 211, scale=2.5, seed=n)
    both, entropy = (
        selective_opd_loss(student, teacher, selector=name, fraction=0.05).selected
        for name in ("teachability+entropy", "entropy")
    )
    teachability, _ = score_positions(student, teacher, selector="teachability")
    assert (both & entropy).sum() >= entropy.sum() - 1
    assert (teachability[both & ~entropy] > 1 - 1e-6).all()


def test_released_names_its_choices():
    assert SELECTORS[RELEASED] == Released()
    with pytest.raises(ValueError, match=r"Released.score: got 'ta', expected one of: teachability, .*, tip, entropy"):
        Released("ta")
    with pytest.raises(ValueError, match=r"Released.fit: got 'batch', expected one of: all, valid"):
        Released(fit="batch")
    s, u = logit_pair(3, 33)
    lists = SampledLogprobs(torch.zeros(3, dtype=torch.long), -torch.ones(3))
    with pytest.raises(ValueError, match="selector: got 'teachability-released', which needs the teacher's row"):
        selective_opd_loss(s, lists, selector=Released("entropy", fit="valid"), divergence="sampled")
    exact = {"selector": Released(exact_mass=True), "mask": torch.ones(3), "top_k": 4}
    by_student_ids = TopKLogprobs(s.topk(4).indices, u.log_softmax(1).gather(1, s.topk(4).indices), of="student")
    both = [score_positions(s, t, **exact)[1].support_mass for t in (u, by_student_ids)]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("known", ["lists", "rollout", "packed"])
def test_teachability_released_is_the_same_from_what_else_may_be_known(known):
    student, teacher, responses, mask = released_oracle.case(1, dtype=torch.float32)
    want = released_oracle.released(student, teacher, responses, mask, fraction=0.1, top_k=5)
    options = {"mask": mask, "top_k": 5, "backend": "torch"}
    if known == "lists":
        best = torch.log_softmax(teacher, -1).topk(8)
        teacher = TopKLogprobs(best.indices, best.values)
    elif known == "rollout":
        options["student_stats"] = StudentStats.from_logits(student, top_k=7)
    else:
        student, teacher, options["mask"] = student.flatten(0, 1), teacher.flatten(0, 1), mask.flatten()
        options["cu_seqlens"] = torch.tensor([0, 12, 12, 24, 36, 48, 60])
    scores, keep_scores, _ = released_scores(student, teacher, **options)
    np.testing.assert_allclose(scores.view(mask.shape)[mask].numpy(), want.scores[mask.numpy()], rtol=2e-4, atol=2e-6)
    np.testing.assert_allclose(keep_scores.view(mask.shape)[mask].numpy(), want.keep_scores[mask.numpy()], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_teachability_released_counts_masked_rows_that_are_no_numbers_as_zero(side):
    student, teacher, responses, mask = released_oracle.case(1)
    holes = responses & ~mask
    (student if side == "student" else teacher)[holes] = math.nan
    want = released_oracle.released(student, teacher, responses, mask, fraction=0.1, top_k=5)
    scores, keep_scores, stats = released_scores(student, teacher, mask=mask, top_k=5)
    np.testing.assert_allclose(scores[mask].numpy(), want.scores[mask.numpy()], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(keep_scores[mask].numpy(), want.keep_scores[mask.numpy()], rtol=1e-9, atol=1e-12)
    out = selective_opd_loss(student, teacher, mask=mask, selector=RELEASED, top_k=5, fraction=0.3)
    assert out.loss.isfinite()
    assert out.metrics["n_teacher_nonfinite"] == 0
    assert torch.equal(out.stats.valid, stats.valid)


def test_a_students_nan_at_a_valid_position_is_not_hidden_by_the_released_normaliser():
    student, teacher, _, mask = released_oracle.case(0)
    student[tuple(mask.nonzero()[3])] = math.nan
    assert selective_opd_loss(student, teacher, mask=mask, selector=RELEASED, top_k=5).loss.isnan()


def test_masked_rows_are_scored_only_where_a_selector_reads_whole_responses():
    student, teacher, responses, mask = released_oracle.case(1)
    for selector in sorted(SELECTORS):
        _, stats = score_positions(student, teacher, mask=mask, selector=selector, tokens=student.argmax(-1))
        read = responses if selector in RELEASED_KINDS else mask
        assert torch.equal(stats.student_entropy > 0, read), selector
        assert (stats.response_place is None) == (selector not in RELEASED_KINDS)
        assert selector not in RELEASED_KINDS or torch.equal(stats.present, responses)
        assert torch.equal(stats.valid, mask)


def test_prefix_counts_valid_positions_of_each_sequence():
    student, teacher = logit_pair(8, 33)
    mask = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 0]])
    scores, _ = score_positions(student.view(2, 4, 33), teacher.view(2, 4, 33), mask=mask, selector="prefix")
    torch.testing.assert_close(scores[mask != 0], torch.tensor([1, 2 / 3, 1 / 3, 1, 1 / 2]))
    packed, _ = score_positions(student, teacher, selector="prefix", cu_seqlens=torch.tensor([0, 2, 8]))
    torch.testing.assert_close(packed, torch.tensor([1, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]))


@pytest.mark.parametrize("selector", ["random", "multinomial", Multinomial(alpha=0.5)])
def test_drawing_selectors_follow_their_generator(selector, case):
    student, teacher, mask = case

    def draw(seed):
        return score_positions(student, teacher, mask=mask, selector=selector, generator=generator(seed))[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    # The draw at a position does not depend on which others are masked.
    everywhere = score_positions(student, teacher, selector=selector, generator=generator(1))[0]
    assert torch.equal(everywhere[mask], draw(1)[mask])


def test_multinomial_draws_by_weight_without_replacement():
    """The first position drawn has P(i) = w_i / sum w, and a second one P(j | i) = w_j / (sum w - w_i)."""
    student, teacher = logit_pair(4, 64, scale=2.0, seed=5)
    stats = score_positions(student, teacher, selector="multinomial", generator=generator(0))[1]
    weights = (stats.student_entropy.double() * stats.jsd.double()).numpy()
    weights /= weights.sum()
    draws = 20_000
    many = type(stats)(*(None if c is None else c.expand(draws, 4) for c in stats))
    order = Multinomial(generator=generator(9))(many).argsort(1, descending=True).numpy()
    first = np.bincount(order[:, 0], minlength=4) / draws
    np.testing.assert_allclose(first, weights, atol=4 * math.sqrt(0.25 / draws))
    leader = weights.argmax()
    after = order[order[:, 0] == leader, 1]
    want = np.where(np.arange(4) == leader, 0, weights) / (1 - weights[leader])
    np.testing.assert_allclose(np.bincount(after, minlength=4) / len(after), want, atol=4 * math.sqrt(0.25 / len(after)))


def test_multinomial_exponents_change_the_weights():
    student, teacher = logit_pair(50, 64, scale=2.0, seed=5)
    for exponents, column in (((1e6, 0.0), "student_entropy"), ((0.0, 1e6), "jsd")):
        scores, stats = score_positions(student, teacher, selector=Multinomial(*exponents, generator=generator(0)))
        assert torch.equal(scores.argsort(), getattr(stats, column).argsort())


@pytest.mark.parametrize(("gamma", "last"), [(0.0, [2]), (1.0, [1, 2])])
def test_multinomial_draws_positions_of_weight_zero_last(gamma, last):
    student, teacher = logit_pair(6, 31)
    teacher[1] = student[1]  # JSD is 0
    student[2, 1:] = teacher[2, 1:] = -math.inf  # H is 0 too
    selector = Multinomial(gamma=gamma, generator=generator(0))
    out = selective_opd_loss(student, teacher, selector=selector, fraction=1.0)
    assert out.selected.all()
    assert sorted(out.scores.argsort()[: len(last)].tolist()) == last


def test_a_callable_is_a_selector(case):
    student, teacher, mask = case
    scores, stats = score_positions(student, teacher, mask=mask, selector=lambda x: -x.teacher_entropy)
    assert torch.equal(scores[mask], -stats.teacher_entropy[mask])


def test_a_callable_may_ask_for_the_optional_columns(case):
    student, teacher, mask = case

    def by_jsd(stats):
        return stats.jsd

    by_jsd.needs = frozenset({"jsd"})
    scores, _ = score_positions(student, teacher, mask=mask, selector=by_jsd)
    assert bool((scores[mask] > 0).all())


def test_a_callable_that_returns_another_shape_is_rejected(case):
    student, teacher, mask = case
    with pytest.raises(ValueError, match=r"selector: returned \(4,\), expected a tensor of scores of shape \(4, 15\)"):
        score_positions(student, teacher, mask=mask, selector=lambda x: x.reverse_kl.sum(-1))


@pytest.mark.parametrize("selector", ["dial", "log-ratio"])
def test_a_token_that_both_models_mask_scores_nothing(selector):
    student, teacher = logit_pair(4, 31)
    student[1, 7] = teacher[1, 7] = -math.inf
    out = selective_opd_loss(student, teacher, tokens=torch.full((4,), 7), selector=selector, fraction=0.5, backend="torch")
    assert out.scores[1] == 0
    assert bool((out.scores[[0, 2, 3]] != 0).all())
    assert math.isfinite(out.loss)
