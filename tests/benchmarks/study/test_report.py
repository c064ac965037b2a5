"""The study's statistics and page on made-up runs: against textbooks, hand-made means, and known spreads.

  D_sp = n_sp (difference + seed_s + prompt_p), so the true standard error is known

Command: make test ARGS=tests/benchmarks/study/test_report.py
Not here: the runs (test_run.py), the diagnostics' equations (tests/diagnostics/).
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from scipy.special import stdtrit

from benchmarks.study import report
from benchmarks.study.arms import Runs, rows_of
from benchmarks.study.gains import contexts_at, gains_of
from benchmarks.study.plan import ARMS, SEEDS, SELECTORS, SIZES, Job
from benchmarks.study.records import COLUMNS, RUNS, Frozen, Run, frozen_name, to_integers, write
from benchmarks.study.statistics import estimate, holm, visible_difference
from benchmarks.study.train import ROOT
from tests.support.cases import generator

STEPS = [0, 2, 4, 8]
N_PROMPTS, LENGTH = 6, 12
DIFFERENCES = {
    "all": 0.0,
    "random-5": 0.05,
    "entropy-5": -0.1,
    "random-20": 0.0,
    "teachability-20": 0.0,
    "weights-teachability": 0.02,
    "all-sampled": 0.03,
    "random-20-sampled": 0.04,
    "entropy-20-sampled": 0.06,
    "teachability-20-sampled": 0.05,
}
BASES = {
    "all": {},
    "random-5": {"all": "all"},
    "entropy-5": {"all": "all", "random": "random-5"},
    "random-20": {"all": "all"},
    "teachability-20": {"all": "all", "random": "random-20"},
    "weights-teachability": {"all": "all", "teachability": "teachability-20"},
    "all-sampled": {"all": "all"},
    "random-20-sampled": {"all": "all-sampled"},
    "entropy-20-sampled": {"all": "all-sampled", "random": "random-20-sampled", "teachability": "teachability-20-sampled"},
    "teachability-20-sampled": {"all": "all-sampled", "random": "random-20-sampled"},
}


def frozen_answers(pair: str, seed: int) -> Frozen:
    g = generator(10 + seed)
    n_tokens = torch.randint(4, LENGTH + 1, (N_PROMPTS,), generator=g)
    valid = torch.arange(LENGTH) < n_tokens.unsqueeze(1)
    columns = {name: torch.rand(valid.shape, generator=g, dtype=torch.float64).pow(4) for name in COLUMNS}
    columns["forward_kl"] = columns["forward_kl"] + 0.2
    return Frozen(pair, seed, n_tokens.tolist(), {name: to_integers(x, valid) for name, x in columns.items()}, 1.0)


def made_up_run(frozen: Frozen, arm: str) -> Run:
    """KL halves with the steps; an arm differs from "all" after the last step, by seed and prompt."""
    g = generator(100 * frozen.seed + list(DIFFERENCES).index(arm))
    n = torch.tensor(frozen.n_tokens, dtype=torch.float64)
    sums = [n * kl for kl in (0.8, 0.6, 0.4, 0.2)]
    if arm != "all":
        noise = 0.01 * torch.randn(1, generator=g, dtype=torch.float64) + 0.01 * torch.randn(N_PROMPTS, generator=g)
        sums[-1] = sums[-1] + n * (DIFFERENCES[arm] + noise)
    share = next(planned.fraction for planned in ARMS if planned.name == arm)
    before = torch.tensor(frozen.columns["forward_kl"])
    teachable = torch.tensor(frozen.columns["union_kl"]) * torch.tensor(frozen.columns["support_mass"]) / 1e4
    after = {str(step): (before - teachable * step / 8).round().long().tolist() for step in STEPS[1:]}
    worse = {str(step): [2 * x for x in frozen.columns["reverse_kl"]] for step in STEPS[1:]}
    return Run(
        pair=frozen.pair,
        arm=arm,
        seed=frozen.seed,
        sizes={},
        steps=STEPS,
        forward_kl=[(2 * x).tolist() for x in sums],
        reverse_kl=[x.tolist() for x in sums],
        n_valid=1000,
        n_trained=round(1000 * share),
        losses=[1.0] * 8,
        multiply_adds={"sampling": 300, "teacher": 400, "student": 700, "head": 100},
        cpu_seconds=dict.fromkeys(("sampling", "teacher", "student", "loss", "backward", "update", "copy"), 8.0),
        wall_seconds=1.0,
        peak_gib=1.0,
        after={"forward_kl": after, "reverse_kl": worse} if arm == "all" else None,
        environment={},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("study")
    for seed in range(4):
        frozen = frozen_answers("shallow", seed)
        write(frozen, path / frozen_name("shallow", seed))
        for arm in (arm for arm in ARMS if arm.name in DIFFERENCES):
            write(made_up_run(frozen, arm.name), path / Job(seed, "shallow", arm).file_name)
    return path


@pytest.fixture(scope="module")
def runs(folder):
    done = report.finished(folder, 4)
    return Runs(done.runs["shallow"], {seed: frozen.n_tokens for seed, frozen in done.frozen["shallow"].items()})


def test_holm_is_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_the_standard_error_holds_the_spread_over_seeds_and_over_prompts():
    """Of many studies with spreads .02 over seeds and .03 over prompts: the mean squared error is the mean's variance."""
    g, n_seeds, n_prompts = generator(0), 8, 20
    counts = torch.full((n_seeds, n_prompts), 10.0, dtype=torch.float64)
    errors, values = [], []
    for _ in range(200):
        seeds = 0.02 * torch.randn(n_seeds, 1, generator=g, dtype=torch.float64)
        prompts = 0.03 * torch.randn(1, n_prompts, generator=g, dtype=torch.float64)
        estimated = estimate(counts * (0.1 + seeds + prompts), counts)
        errors.append(estimated.error**2)
        values.append(estimated.value)
    true = 0.02**2 / n_seeds + 0.03**2 / n_prompts
    assert torch.tensor(values).var().item() == pytest.approx(true, rel=0.25)
    # Resampling n values shows (n - 1) / n of their variance.
    expected = 0.02**2 / n_seeds * (n_seeds - 1) / n_seeds + 0.03**2 / n_prompts * (n_prompts - 1) / n_prompts
    assert sum(errors) / len(errors) == pytest.approx(expected, rel=0.1)


def test_the_visible_difference_is_seen_with_its_power():
    """Normal differences of that size: four of five studies are beyond the corrected bound."""
    deviation, n_seeds, n_comparisons = 0.01, 9, 27
    difference = visible_difference(deviation / math.sqrt(n_seeds), n_seeds, n_comparisons)
    draws = difference + deviation * torch.randn(4000, n_seeds, generator=generator(1), dtype=torch.float64)
    t = draws.mean(1) / (draws.std(1) / math.sqrt(n_seeds))
    seen = (t > stdtrit(n_seeds - 1, 1 - 0.025 / n_comparisons)).double().mean().item()
    assert 0.7 < seen < 0.9


def test_an_arm_is_compared_at_the_same_tokens(runs):
    rows = {row.arm: row for row in rows_of(runs)}
    counts = runs.counts(range(4))
    entropy, everything = runs.sums("entropy-5", range(4)), runs.sums("all", range(4))
    expected = (entropy[:, -1] - everything[:, -1]).sum() / counts.sum()
    compared = rows["entropy-5"].compared
    assert compared["all"].difference.value == pytest.approx(expected.item())
    against_random = (entropy - runs.sums("random-5", range(4)))[:, -1].sum() / counts.sum()
    assert compared["random"].difference.value == pytest.approx(against_random.item())
    learned = (entropy[:, -1] - entropy[:, 0]).sum() / counts.sum()
    assert compared["before"].difference.value == pytest.approx(learned.item())
    assert compared["forward_before"].difference.value == pytest.approx(2 * learned.item())
    assert compared["all"].adjusted_p < 0.05 < rows["teachability-20"].compared["random"].adjusted_p


def test_p_values_are_corrected_among_the_comparisons_of_a_kind(runs):
    rows = [row for row in rows_of(runs) if "random" in row.compared]
    raw = [row.compared["random"].difference.p_value for row in rows]
    assert len(raw) == 4
    assert [row.compared["random"].adjusted_p for row in rows] == holm(raw)


def test_equal_units_stop_the_base_where_it_has_cost_as_much(runs):
    """14 units of passes: 16.2 of 20 units a step, so 6.48 of 8 steps; log KL of "all" is linear from .4 at 4 to .2 at 8."""
    row = {row.arm: row for row in rows_of(runs)}["entropy-5"]
    assert (row.loss_units, row.units, row.seconds) == pytest.approx((2.2, 16.2, 6.0))
    reached = 0.4 * 0.5 ** ((6.48 - 4) / 4)
    later, equal = (row.compared[kind].difference.value for kind in ("all_at_equal_units", "all"))
    assert later - equal == pytest.approx(0.2 - reached)


def test_equal_seconds_divide_the_seconds_of_each_seed(folder):
    """The seconds of entropy-5: a half and three quarters of those of "all", so 5 of 8 steps."""
    done = report.finished(folder, 2)
    ratios = {0: 0.5, 1: 0.75}
    slow = {0: 3.0, 1: 1.0}  # a busy machine slows a seed's runs alike
    changed = []
    for run in done.runs["shallow"]:
        factor = slow[run.seed] * (ratios[run.seed] if run.arm == "entropy-5" else 1.0)
        changed.append(replace(run, cpu_seconds={name: factor * x for name, x in run.cpu_seconds.items()}))
    n_tokens = {seed: done.frozen["shallow"][seed].n_tokens for seed in ratios}
    row = {row.arm: row for row in rows_of(Runs(changed, n_tokens))}["entropy-5"]
    assert row.relative_seconds == pytest.approx(0.625)
    later, equal = (row.compared[kind].difference.value for kind in ("all_at_equal_seconds", "all"))
    assert later - equal == pytest.approx(0.2 - 0.4 * 0.5**0.25)


def test_gains_are_those_of_the_frozen_tokens(folder):
    done = report.finished(folder, 4)
    everything = {run.seed: run for run in done.runs["shallow"] if run.arm == "all"}
    gains = gains_of(done.frozen["shallow"], everything)
    assert [(at.measure, at.step) for at in gains] == [(m, s) for m in ("forward_kl", "reverse_kl") for s in (2, 4, 8)]
    lost = -1e-4 * sum(sum(frozen.columns["reverse_kl"]) for frozen in done.frozen["shallow"].values())
    assert gains[-1].by_selector[0].gain.value == pytest.approx(lost / gains[-1].n_tokens)
    gains = gains[:3]
    pairs = [(done.frozen["shallow"][seed], everything[seed]) for seed in range(4)]
    measured = contexts_at("forward_kl", 8, pairs)
    expected = [
        1e-4 * (b - a)
        for frozen, run in pairs
        for b, a in zip(frozen.columns["forward_kl"], run.after["forward_kl"]["8"], strict=True)
    ]
    assert gains[-1].n_tokens == len(expected) == int(measured.measured.sum())
    assert gains[-1].by_selector[0].gain.value == pytest.approx(sum(expected) / len(expected))
    # The gain was made from D C, so teachability explains it.
    assert gains[-1].regression.teachability.value > 0.7 > 0.3 > gains[-1].regression.incompatibility.value
    assert gains[-1].correlations["teachability"] > 0.8 > gains[-1].correlations["incompatibility"]
    tenths = gains[-1].tenths["teachability"]
    assert tenths[-1] > 5 * abs(tenths[0])


def test_the_page_tells_which_runs_are_missing(folder, tmp_path):
    report.write(folder, tmp_path, 4)
    text = (tmp_path / "report.md").read_text()
    n_planned = 4 * len(ARMS) * len(SIZES)
    assert f"**40 of {n_planned} runs**" in text
    assert "* shallow-prefix-5: seeds 0, 1, 2, 3" in text
    assert "shallow-entropy-5: seeds" not in text
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert len(numbers["missing"]) == n_planned - 40
    rows = {row["arm"]: row for row in numbers["arms"]["shallow"]}
    assert f"{rows['entropy-5']['compared']['all']['difference']['value']:+.3f}" in text
    assert [environment["runs"] for environment in numbers["environments"]] == [40]
    assert "| incompatibility | highest 5% |" in text
    for name in ("arms.png", "cost.png", "fixed_contexts.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_documentation_has_the_committed_report_s_short_table():
    lines = (RUNS.parent / "report.md").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| selector |"))
    table = "\n".join(lines[first : lines.index("", first)])
    assert table.count("\n") == len(SELECTORS) + 3
    assert table in (ROOT / "docs" / "study.md").read_text(encoding="utf-8")


def test_the_committed_report_is_that_of_the_whole_plan():
    numbers = json.loads((RUNS.parent / "report.json").read_text(encoding="utf-8"))
    assert numbers["missing"] == []
    planned = {(pair, f"{arm.name} seed {seed}") for pair in SIZES for arm in ARMS for seed in range(SEEDS)}
    assert {(pair, run) for pair, runs in numbers["sums"]["reverse_kl"].items() for run in runs} == planned
    assert all(row["seeds"] == list(range(SEEDS)) for rows in numbers["arms"].values() for row in rows)


def test_one_seed_alone_has_values_and_no_intervals(runs, folder):
    done = report.finished(folder, 1)
    rows = rows_of(Runs(done.runs["shallow"], {0: done.frozen["shallow"][0].n_tokens}))
    text = report.page(done, {"shallow": rows}, {})
    assert "No diagnostic on fixed contexts" in text
    rows = [line for line in text.splitlines() if line.startswith("| `entropy-5`")]
    assert len(rows) == 2
    assert "[" not in "".join(rows)


def test_no_run_at_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"runs: got none in .*; python -m benchmarks.study.run makes them"):
        report.finished(tmp_path)


def test_every_arm_has_bases_of_its_own_loss(runs):
    bases = {
        row.arm: {kind: row.compared[kind].base for kind in ("all", "random", "teachability") if kind in row.compared}
        for row in rows_of(runs)
    }
    assert bases == BASES
