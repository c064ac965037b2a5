"""The study's runs and report on a tiny model: what arms of one seed share, and tables against means computed once more.

Command: make test ARGS=tests/benchmarks/study/test_run.py
Not here: the diagnostics (diagnostics/test_diagnostics.py), the study itself on real weights (benchmarks/results/study/).
"""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.study import report as study_report
from benchmarks.study import run as study
from tests.integrations.models import language_model, tokenizer
from tests.trainer.runs import prompts

PLAN = study.Plan(steps=2, batch_size=3, max_new_tokens=5, learning_rate=1e-3, eval_every=1, seeds=2)
ARMS = (study.Arm("all", 1.0), study.Arm("random", 0.2), study.Arm("teachability", 0.2))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three arms of two seeds, saved as the workers save them."""
    folder = tmp_path_factory.mktemp("runs")
    task = study.Task(
        language_model(0).requires_grad_(False), tokenizer(), "w5 w6 w7", tuple(prompts(9)), tuple(prompts(12)[9:])
    )
    for arm in ARMS:
        for seed in range(PLAN.seeds):
            torch.save(study.run_arm(task, PLAN, arm, seed), study.path_of(folder, arm, seed))
    return folder


def test_arms_of_a_seed_share_their_contexts_and_learn(runs):
    got = {(arm.name, seed): torch.load(study.path_of(runs, arm, seed)) for arm in ARMS for seed in range(PLAN.seeds)}
    for (_, seed), run in got.items():
        reference = got["all", seed]
        assert run["tokens"] == reference["tokens"]
        assert torch.equal(run["forward_kl"][0], reference["forward_kl"][0])
        valid = run["before"]["valid"]
        assert run["forward_kl"][2][valid].mean() < run["forward_kl"][0][valid].mean()
    assert got["all", 0]["tokens"] != got["all", 1]["tokens"]
    assert got["all", 0]["n_trained"] > 3 * got["random 20%", 0]["n_trained"]


def test_the_report_has_the_means_of_the_runs(runs, tmp_path):
    study_report.write(runs, tmp_path)
    numbers = json.loads((tmp_path / "study.json").read_text())
    rows = {row["arm"]: row for row in numbers["arms"]}
    assert numbers["steps"] == [0, 1, 2]
    tokens = {}
    for arm in ARMS:
        saved = [torch.load(study.path_of(runs, arm, seed)) for seed in range(PLAN.seeds)]
        tokens[arm.name] = torch.cat([run["forward_kl"][2][run["before"]["valid"]] for run in saved]).double()
        assert rows[arm.name]["kl"][-1] == pytest.approx(tokens[arm.name].mean().item())
        each = [run["forward_kl"][2][run["before"]["valid"]].double().mean().item() for run in saved]
        assert rows[arm.name]["by_seed"] == pytest.approx(each)
    of_random = (tokens["teachability 20%"] - tokens["random 20%"]).mean().item()
    assert rows["teachability 20%"]["against_random"]["value"] == pytest.approx(of_random)
    text = (tmp_path / "study.md").read_text()
    assert f"| teachability 20% | {rows['teachability 20%']['n_trained']} | " in text
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("kl.png", "gains.png"))


def test_runs_of_another_plan_are_refused(runs):
    with pytest.raises(ValueError, match=r"runs: .* has steps 2 for 3; pass the plan it was made with, or another folder"):
        study.run_all(runs, study.Plan(**{**PLAN.__dict__, "steps": 3}), ARMS, workers=1)
    study.run_all(runs, PLAN, ARMS, workers=1)  # nothing left to do


def test_a_missing_run_is_named(runs, tmp_path):
    torch.save(torch.load(study.path_of(runs, ARMS[0], 0)), study.path_of(tmp_path, ARMS[0], 0))
    torch.save(torch.load(study.path_of(runs, ARMS[0], 1)), study.path_of(tmp_path, ARMS[0], 1))
    torch.save(torch.load(study.path_of(runs, ARMS[1], 0)), study.path_of(tmp_path, ARMS[1], 0))
    with pytest.raises(ValueError, match="without random 20% seed 1"):
        study_report.load(tmp_path)
