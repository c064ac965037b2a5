# Selectors against the papers' equations, written once more over the valid positions alone with NumPy.
#
#   Compared: scores at valid positions. Run: make test ARGS=tests/test_selectors.py
#
# Not here: which positions the scores keep (tests/test_selection.py), the statistics (tests/test_token_stats.py).
import math

import numpy as np
import pytest
import torch

from opd_ops import Multinomial, score_positions
from opd_ops.selectors import SELECTORS, minmax_norm, quantile_norm, released_norm
from tests.cases import generator, logit_pair

N = 60


@pytest.fixture(scope="module")
def case():
    student, teacher = logit_pair(N, 211, scale=2.5, seed=7)
    return student.view(4, 15, 211), teacher.view(4, 15, 211), torch.rand(4, 15, generator=generator(8)) > 0.3


def norm(z, epsilon=1e-8):
    low, high = np.quantile(z, 0.05), np.quantile(z, 0.95)
    return np.clip((z - low) / (high - low + epsilon), 0, 1)


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
    "all": lambda x: np.zeros_like(x.reverse_kl),
    "teachability-released": lambda x: norm(x.released_kl, 0) * norm(x.overlap_mass, 0),
}


@pytest.mark.parametrize("selector", sorted(EQUATIONS))
def test_selector_matches_the_paper(selector, case):
    student, teacher, mask = case
    scores, stats = score_positions(student, teacher, mask=mask, selector=selector)
    valid = type(stats)(*(None if c is None else c[mask].double().numpy() for c in stats))
    np.testing.assert_allclose(scores[mask].numpy(), EQUATIONS[selector](valid), rtol=2e-6, atol=1e-7)
    assert bool((scores[~mask] == -math.inf).all())


def test_every_named_selector_has_a_test():
    assert {*EQUATIONS, "random", "multinomial", "prefix"} == set(SELECTORS)


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
    for normaliser in (quantile_norm, released_norm, minmax_norm):
        scaled = normaliser(z, valid)
        torch.testing.assert_close(scaled[:4], normaliser(z[:4], valid[:4]))
        assert scaled[4] == 1
    assert quantile_norm(torch.tensor([math.inf]), valid[:1]).item() == 1


def test_teachability_released_ranks_differently_from_the_paper(case):
    student, teacher, mask = case
    released, _ = score_positions(student, teacher, mask=mask, selector="teachability-released", top_k=4)
    exact, _ = score_positions(student, teacher, mask=mask, top_k=4)
    assert not torch.equal(released[mask].argsort(), exact[mask].argsort())


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
    entropy_only, stats = score_positions(student, teacher, selector=Multinomial(alpha=1e6, gamma=0.0, generator=generator(0)))
    assert torch.equal(entropy_only.argsort(), stats.student_entropy.argsort())


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
