"""The diagnostics of frozen answers: gains, regression and quadrants.

  Compared: G with hand-computed distributions; gains by selector with the same in NumPy; bootstrap weights with data that is
  repeated as often; intervals with the known spread of simulated prompts; the regression with numpy.linalg.lstsq and with
  coefficients that were planted. Run: make test ARGS=tests/diagnostics/test_diagnostics.py

Not here: the page (test_report.py), opd-inspect (test_inspect.py), the scores (selection/test_selectors.py).
"""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from opd_ops import score_positions, select_positions
from opd_ops.diagnostics import Contexts, study
from opd_ops.diagnostics.fixed_context import gain, relative_gain
from opd_ops.diagnostics.intervals import Interval, draw_weights, mean_intervals, quantiles
from opd_ops.diagnostics.quadrants import quadrant_numbers, quadrants
from opd_ops.diagnostics.regression import DegenerateError, ols, regress
from opd_ops.selection.selectors import SELECTORS, selection_options
from tests.support.cases import generator
from tests.support.diagnostics_cases import frozen_contexts


@pytest.fixture(scope="module")
def contexts():
    return frozen_contexts()


def hand_contexts(before: list[float], after: list[float] | None = None, **options) -> Contexts:
    """One token an answer: over two words the teacher gives (1/2, 1/2), the student (p, 1 - p)."""

    def stats(probabilities):
        p = torch.tensor(probabilities, dtype=torch.float64).view(-1, 1)
        student = torch.stack((p, 1 - p), -1).log()
        return score_positions(student, torch.zeros_like(student), top_k=1)[1]

    n = len(before)
    prompts = [f"prompt {i}" for i in range(n)]
    return Contexts(stats(before), None if after is None else stats(after).forward_kl, [["x"]] * n, prompts, **options)


# --- gains -----------------------------------------------------------------------------------------------------------


def test_gain_is_the_fall_of_forward_kl_by_hand():
    got = hand_contexts([0.9, 0.5, 0.6], [0.6, 0.8, 0.6])

    def kl(p):
        return 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))

    expected = [kl(0.9) - kl(0.6), kl(0.5) - kl(0.8), 0.0]
    assert gain(got).tolist() == pytest.approx(expected, abs=1e-12)
    assert expected[1] < 0


def test_relative_gain_is_winsorised(contexts):
    before, after = (x[contexts.measured].numpy() for x in (contexts.before.forward_kl, contexts.after_forward_kl))
    ratio = (before - after) / before
    cut = np.clip(ratio, np.quantile(ratio, 0.01), np.quantile(ratio, 0.99))
    np.testing.assert_allclose(relative_gain(contexts).numpy(), cut, rtol=1e-9)
    assert (cut != ratio).any()


def numpy_scores(contexts):
    s = {name: x[contexts.measured].double().numpy() for name, x in contexts.before._asdict().items() if x is not None}

    def norm(z):
        low, high = np.quantile(z, 0.05), np.quantile(z, 0.95)
        return np.clip((z - low) / (high - low + 1e-8), 0, 1)

    d, c = norm(s["union_kl"]), norm(s["support_mass"])
    return {"teachability": d * c, "incompatibility": d * (1 - c), "entropy": s["student_entropy"], "divergence": s["union_kl"]}


@pytest.mark.parametrize("fraction", [0.03, 0.05, 0.2])
def test_gains_by_selector_match_numpy(contexts, fraction):
    scores = numpy_scores(contexts)
    got = study(contexts, list(scores), [fraction], resamples=2).gains
    g, relative = gain(contexts).numpy(), relative_gain(contexts).numpy()
    kl = contexts.before.forward_kl[contexts.measured].numpy()
    n = math.ceil(fraction * len(g) - 1e-9)
    assert [row.selector for row in got] == ["all", *scores]
    for row in got:
        best = slice(None) if row.selector == "all" else np.argsort(-scores[row.selector], kind="stable")[:n]
        assert row.n_selected == len(g[best])
        assert row.gain.value == pytest.approx(g[best].mean(), rel=1e-12)
        assert row.relative_gain.value == pytest.approx(relative[best].mean(), rel=1e-12)
        assert row.kl_before == pytest.approx(kl[best].mean(), rel=1e-12)


def test_selection_does_not_look_at_the_gain(contexts):
    reversed_ = dataclasses.replace(contexts, after_forward_kl=2 * contexts.before.forward_kl - contexts.after_forward_kl)
    rows, mirrored = (study(x, ["teachability", "tip"], [0.1], resamples=2).gains for x in (contexts, reversed_))
    assert [row.gain.value for row in rows] == pytest.approx([-row.gain.value for row in mirrored], rel=1e-9)


def test_study_takes_callables_and_the_released_selector(contexts):
    own = {"mine": lambda stats: stats.teacher_entropy, "teachability-released": "teachability-released"}
    got = study(contexts, own, [0.02], resamples=2)
    n = math.ceil(0.02 * got.n_positions)
    assert got.gains[1].n_selected == n
    assert got.gains[2].n_selected >= len(contexts.prompts) > n  # its released code keeps one of every answer
    released, stats = SELECTORS["teachability-released"], contexts.stats
    options = {"mask": contexts.measured, "fraction": 0.02, **selection_options(released, stats)}
    chosen = select_positions(released(stats).to(stats.reverse_kl.dtype), **options)[contexts.measured]
    assert got.gains[2].gain.value == pytest.approx(gain(contexts)[chosen].mean().item(), rel=1e-12)
    best = contexts.before.teacher_entropy[contexts.measured].numpy().argsort()[::-1][:n]
    assert got.gains[1].gain.value == pytest.approx(gain(contexts).numpy()[best].mean(), rel=1e-12)


def test_prefix_and_random_are_per_answer_and_seeded(contexts):
    got = [study(contexts, ["random", "prefix"], [0.2], resamples=20, seed=seed) for seed in (3, 3, 4)]
    assert got[0].to_json() == got[1].to_json()
    assert got[0].gains[1] != got[2].gains[1]
    assert got[0].gains[2].gain.value == got[2].gains[2].gain.value
    prefix = study(contexts, ["prefix"], [0.2]).shown.selected
    assert bool((prefix[:, :-1] >= prefix[:, 1:]).all())
    assert bool(prefix.any(1).all())


# --- intervals -------------------------------------------------------------------------------------------------------


def test_resampling_is_repeating_whole_prompts(contexts):
    g, clusters = gain(contexts), contexts.measured_clusters
    among = (torch.arange(len(g)) % 3 != 0).unsqueeze(1)
    times = torch.tensor([2, 0, 1, 0, 3, 0])
    (got,) = mean_intervals(g, among, clusters, times.double().unsqueeze(0))
    repeated = g.repeat_interleave(times[clusters] * among[:, 0])
    assert got.value == pytest.approx(g[among[:, 0]].mean().item(), rel=1e-12)
    assert got.low == got.high == pytest.approx(repeated.mean().item(), rel=1e-12)


def test_weights_draw_prompts_with_replacement():
    weights = draw_weights(40, 2000, seed=1)
    assert (weights.sum(1) == 40).all()
    assert weights.mean().item() == pytest.approx(1)
    assert weights.var().item() == pytest.approx(1 - 1 / 40, rel=0.03)  # binomial(40, 1/40)
    assert torch.equal(weights, draw_weights(40, 2000, seed=1))
    assert not torch.equal(weights, draw_weights(40, 2000, seed=2))


def test_more_tokens_of_the_same_prompts_do_not_shrink_an_interval():
    values, clusters = torch.randn(50, generator=generator(0)).double(), torch.arange(50)
    weights = draw_weights(50, 1000, seed=0)
    once = mean_intervals(values, torch.ones(50, 1, dtype=torch.bool), clusters, weights)[0]
    ten = mean_intervals(values.repeat(10), torch.ones(500, 1, dtype=torch.bool), clusters.repeat(10), weights)[0]
    assert dataclasses.astuple(ten) == pytest.approx(dataclasses.astuple(once), rel=1e-9)
    alone = mean_intervals(
        values.repeat(10), torch.ones(500, 1, dtype=torch.bool), torch.arange(500), draw_weights(500, 1000, 0)
    )
    assert (alone[0].high - alone[0].low) < 0.4 * (once.high - once.low)  # what ignoring prompts would claim: 1 / sqrt(10)


def test_intervals_have_the_known_width_and_coverage():
    """Means of prompts are N(0, 1), tokens equal their prompt's mean: the mean of C prompts spreads by 1 / sqrt(C)."""
    c, simulated = 60, 200
    means = torch.randn(simulated, c, generator=generator(5), dtype=torch.float64)
    clusters, weights = torch.arange(c).repeat_interleave(4), draw_weights(c, 400, seed=0)
    everywhere = torch.ones(4 * c, 1, dtype=torch.bool)
    got = [mean_intervals(row.repeat_interleave(4), everywhere, clusters, weights)[0] for row in means]
    widths = torch.tensor([x.high - x.low for x in got])
    assert widths.mean().item() == pytest.approx(2 * 1.96 / math.sqrt(c), rel=0.05)
    covered = sum(x.low <= 0 <= x.high for x in got) / simulated
    assert 0.89 <= covered <= 0.99


def test_an_interval_of_tokens_of_one_prompt_is_not_made_up():
    clusters = torch.arange(8).repeat_interleave(3)
    among = torch.stack((clusters == 0, clusters < 6, clusters > 9), 1)
    one, six, none = mean_intervals(torch.arange(24.0), among, clusters, draw_weights(8, 500, 0))
    assert one.value == 1.0
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert six.low < six.value < six.high
    assert math.isnan(none.value)


# --- regression ------------------------------------------------------------------------------------------------------


def lstsq(columns: np.ndarray) -> tuple[float, float, float]:
    z = (columns - columns.mean(0)) / columns.std(0)
    b, residual = np.linalg.lstsq(z[:, :2], z[:, 2], rcond=None)[:2]
    return b[0], b[1], 1 - residual[0] / len(z)


def test_regression_matches_lstsq_on_standardised_columns(contexts):
    scores = numpy_scores(contexts)
    columns = np.stack((scores["teachability"], scores["incompatibility"], gain(contexts).numpy()), 1)
    result = regress(contexts, weights=draw_weights(contexts.n_clusters, 200, 0))
    got = (result.teachability, result.incompatibility, result.r_squared)
    assert [x.value for x in got] == pytest.approx(lstsq(columns), rel=1e-9)
    assert all(x.low < x.value < x.high for x in got[:2])
    assert result.n_positions == len(columns)


def test_a_resample_of_the_regression_is_repeated_data(contexts):
    columns, clusters = torch.randn(60, 3, generator=generator(2)).double() + 5, torch.arange(60) % 6
    times = torch.tensor([2, 0, 1, 0, 3, 0])
    got = ols(columns, clusters, times.double().unsqueeze(0))
    expected = lstsq(columns.repeat_interleave(times[clusters], 0).numpy())
    assert [x.low for x in (got.teachability, got.incompatibility, got.r_squared)] == pytest.approx(expected, rel=1e-9)


def test_regression_recovers_planted_coefficients():
    g = generator(3)
    x = torch.rand(6000, 2, generator=g, dtype=torch.float64) * torch.tensor([2.0, 0.5])
    y = 0.8 * x[:, 0] - 1.6 * x[:, 1] + 0.1 * torch.randn(6000, generator=g, dtype=torch.float64)
    got = ols(torch.cat((x, y.unsqueeze(1)), 1), torch.arange(6000) % 100, draw_weights(100, 300, 0))
    spread = y.std().item()
    assert got.teachability.value == pytest.approx(0.8 * x[:, 0].std().item() / spread, rel=0.02)
    assert got.incompatibility.value == pytest.approx(-1.6 * x[:, 1].std().item() / spread, rel=0.02)
    assert got.r_squared.value == pytest.approx(1 - 0.01 / spread**2, abs=0.01)


def test_regression_refuses_what_has_no_answer():
    g, weights, clusters = generator(4), draw_weights(5, 10, 0), torch.arange(50) % 5
    columns = torch.randn(50, 3, generator=g).double()
    for column, name in enumerate(("teachability", "incompatibility", "gain")):
        flat = columns.clone()
        flat[:, column] = 0.3
        with pytest.raises(DegenerateError, match=f"regression: {name} is the same at all 50 positions"):
            ols(flat, clusters, weights)
    columns[:, 1] = -2 * columns[:, 0]
    with pytest.raises(DegenerateError, match="multiples of each other"):
        ols(columns, clusters, weights)


def test_study_of_a_student_equal_to_its_teacher_says_why_there_is_no_regression():
    got = study(hand_contexts([0.5] * 4, [0.5] * 4), ["entropy"], [0.5], resamples=5)
    assert got.regression is None
    assert "teachability is the same at all 4 positions" in got.regression_refused
    assert got.gains[0].gain == Interval(0.0, 0.0, 0.0)
    assert [q.share_of_tokens for q in got.quadrants.quadrants] == [0, 0, 0, 1]
    assert json.loads(json.dumps(got.to_json(), allow_nan=False))["quadrants"]["quadrants"][3]["share_of_kl"] is None


# --- quadrants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 6, 101])
def test_quantiles_are_torch_s_to_the_bit(n):
    x, levels = torch.randn(n, generator=generator(n), dtype=torch.float64), [0.0, 0.01, 0.025, 0.5, 0.7, 1.0]
    assert torch.equal(quantiles(x, levels), torch.quantile(x, torch.tensor(levels, dtype=torch.float64)))
    x[n // 2] = torch.nan
    assert quantiles(x, levels).isnan().all()


def test_quantiles_take_more_values_than_torch_s():
    x = torch.arange(2**24 + 3, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="too large"):
        x.quantile(0.25)
    assert quantiles(x, [0.25]).item() == 2**22 + 0.5


def test_quadrants_split_at_the_medians():
    entropy, kl = torch.tensor([1.0, 2, 3, 4, 5, 2.5]), torch.tensor([9.0, 1, 2, 8, 3, 1])
    # medians 2.75 and 2.5
    assert quadrant_numbers(entropy, kl).tolist() == [2, 3, 1, 0, 0, 3]
    assert quadrant_numbers(torch.ones(4), torch.ones(4)).tolist() == [3] * 4


def test_quadrants_share_tokens_kl_and_gain(contexts):
    got = quadrants(contexts, weights=draw_weights(contexts.n_clusters, 50, 0))
    m = contexts.measured
    h, kl, g = contexts.before.student_entropy[m].numpy(), contexts.before.reverse_kl[m].numpy(), gain(contexts).numpy()
    texts = np.array([contexts.tokens[b][i] for b, i in m.nonzero().tolist()])
    assert got.entropy_median == pytest.approx(np.median(h))
    assert got.kl_median == pytest.approx(np.median(kl))
    high_h, high_kl = h > np.median(h), kl > np.median(kl)
    regions = (high_h & high_kl, high_h & ~high_kl, ~high_h & high_kl, ~(high_h | high_kl))
    for quadrant, where in zip(got.quadrants, regions, strict=True):
        assert quadrant.n == where.sum() > 0
        assert quadrant.share_of_tokens == pytest.approx(where.mean())
        assert quadrant.share_of_kl == pytest.approx(kl[where].sum() / kl.sum())
        assert quadrant.gain.value == pytest.approx(g[where].mean())
        assert dict(quadrant.frequent).items() <= {text: (texts[where] == text).sum() for text in texts}.items()
        counts = [n for _, n in quadrant.frequent]
        assert counts == sorted(counts, reverse=True)
    assert sum(q.share_of_kl for q in got.quadrants) == pytest.approx(1)


# --- contexts and what is refused ------------------------------------------------------------------------------------


def test_infinite_divergences_are_left_out_and_counted(contexts):
    after = contexts.after_forward_kl.clone()
    best = study(contexts, ["teachability"], [0.05]).shown.selected.nonzero()[0].unbind()
    after[best] = math.inf
    got = study(dataclasses.replace(contexts, after_forward_kl=after), ["teachability"], [0.05], resamples=10)
    assert got.n_left_out == 1
    assert got.n_positions == int(contexts.measured.sum()) - 1
    assert not got.shown.selected[best]
    after[: len(after) // 2] = math.inf  # the budget is a share of what is measured
    got = study(dataclasses.replace(contexts, after_forward_kl=after), ["teachability"], [0.05], resamples=10)
    assert got.gains[1].n_selected == math.ceil(0.05 * got.n_positions) < math.ceil(0.05 * int(contexts.measured.sum()))
    assert all(math.isfinite(row.gain.value) for row in got.gains)


def test_answers_to_one_prompt_are_one_cluster(contexts):
    assert contexts.n_clusters == 6
    assert contexts.clusters.tolist() == [i // 2 for i in range(12)]
    named = dataclasses.replace(contexts, clusters=torch.tensor([7, -3] * 6))
    assert named.clusters.tolist() == [1, 0] * 6


def test_study_without_a_trained_student_has_quadrants_alone():
    got = study(hand_contexts([0.9]), ["entropy"], [0.5])
    assert got.gains is None
    assert got.regression is None
    assert got.quadrants.quadrants[3].gain is None
    json.dumps(got.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [["a"]]}, "tokens: got 1, expected one per answer, 12"),
        ({"tokens": [["a"]] * 12}, r"tokens\[0\]: got 1 texts, expected 1\d to 20"),
        ({"prompts": ["a"]}, "prompts: got 1, expected one per answer, 12"),
        (
            {"clusters": torch.zeros(3)},
            r"clusters: got torch.float32 of shape \(3,\), expected one integer per answer, \(12,\)",
        ),
        ({"after_forward_kl": torch.zeros(2, 2)}, r"after_forward_kl: got shape \(2, 2\), expected that of before, \(12, 20\)"),
        ({"after_forward_kl": torch.full((12, 20), math.nan)}, r"after_forward_kl: got NaN at \d+ valid positions"),
        ({"after_forward_kl": torch.full((12, 20), math.inf)}, r"Contexts: got \d+ valid positions, none with finite KLs"),
    ],
)
def test_contexts_reject_what_does_not_fit(contexts, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(contexts, **change)


def test_contexts_reject_flat_columns_and_statistics_without_kl(contexts):
    before = contexts.before
    flat = type(before)(*(None if x is None else x.flatten() for x in before))
    with pytest.raises(ValueError, match=r"before: got columns of shape \(240,\), expected \(B, L\)"):
        dataclasses.replace(contexts, before=flat)
    unknown = before._replace(forward_kl=before.forward_kl * math.nan)
    with pytest.raises(ValueError, match=r"before.forward_kl: got NaN at \d+ valid positions"):
        dataclasses.replace(contexts, before=unknown)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"selectors": ["best"]}, ValueError, "selector: got 'best', expected a callable or one of: teachability"),
        ({"selectors": []}, ValueError, r"selectors: got \[\], expected a list of names"),
        ({"selectors": "tip"}, ValueError, "selectors: got 'tip', expected a list of names"),
        ({"selectors": [min]}, TypeError, "selectors: got .* in a list, expected names; pass a mapping"),
        ({"selectors": ["multinomial"]}, ValueError, "selectors: 'multinomial' needs the column jsd, which before lacks"),
        ({"selectors": {"x": lambda stats: 1}}, ValueError, r"selectors: 'x' returned int, expected a tensor .* \(12, 20\)"),
        ({"fractions": [1.5]}, ValueError, r"fraction: got 1.5, expected a number in \(0, 1\]"),
        ({"fractions": []}, ValueError, "fractions: got none"),
        ({"resamples": 0}, ValueError, "resamples: got 0, expected at least 1"),
    ],
)
def test_study_rejects_bad_arguments(contexts, arguments, error, message):
    with pytest.raises(error, match=message):
        study(contexts, **arguments)


def test_study_rejects_a_single_prompt():
    with pytest.raises(ValueError, match="clusters: got 1, expected at least 2 different prompts"):
        study(hand_contexts([0.9, 0.8], [0.6, 0.7], clusters=torch.zeros(2, dtype=torch.long)), ["entropy"])
    with pytest.raises(ValueError, match="after_forward_kl: got None"):
        gain(hand_contexts([0.9]))
