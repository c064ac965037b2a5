"""Runs that blow up: what is saved, what the error says, and whether the program takes its own advice; options that change when
a run continues, against the update that AdamW's equation gives.

  The blow-up is real: a warm-up whose first rate is 0 and whose second is so large that the next gradient is not finite.

Command: make test ARGS=tests/trainer/test_blow_up.py
Not here: damaged files (test_checkpoints.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch

from opd_ops.trainer.checkpoints import FREE, LOGGED, SETTINGS, check_resume
from opd_ops.trainer.config import OPDConfig
from tests.trainer.runs import trainer

pytestmark = pytest.mark.full  # runs of the whole trainer
EXPLODING = {"learning_rate": 1e20, "warmup_steps": 3, "save_every": 1, "eval_every": 100}


def _rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def _names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def _weights(run):
    return [parameter.detach().clone() for parameter in run.unwrapped.parameters()]


@pytest.mark.parametrize(
    ("eval_every", "seen"),
    [
        (100, "step 3: the gradient's norm is nan, expected a finite number; nothing was updated"),
        (1, "step 2: the held-out loss is nan, expected a finite number"),
    ],
)
def test_a_run_that_blew_up_goes_on_as_its_error_says(eval_every, seen, tmp_path, capsys):
    options = EXPLODING | {"eval_every": eval_every}
    good = tmp_path / "checkpoints" / "step-000001"
    with pytest.raises(FloatingPointError) as error:
        trainer(tmp_path, steps=5, **options).train()
    assert str(error.value) == (
        f"{seen}. {good} is good: lower learning_rate, or set a smaller max_grad_norm, and pass resume to continue from it"
    )
    assert _names(tmp_path) == [good.name]  # step 2 left the weights that gave it
    run = trainer(tmp_path, steps=5, resume=True, **options | {"learning_rate": 1e-3})
    run.train()
    assert "from step 2: learning_rate was 1e+20 and is 0.001" in capsys.readouterr().out
    rows = _rows(tmp_path)
    rates = [row["learning_rate"] for row in rows if "loss" in row]
    assert rates == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    assert [row for row in rows if "changed" in row] == [{"step": 2, "changed": {"learning_rate": [1e20, 1e-3]}}]
    assert all(bool(x.isfinite().all()) for x in _weights(run))
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]


def test_a_checkpoint_of_a_sigterm_whose_weights_blew_up_is_set_aside(tmp_path):
    """It cannot wait for the next gradient, so it must not take the place of the one before."""
    options = EXPLODING | {"keep_checkpoints": 1}
    run = trainer(tmp_path, steps=5, **options)
    updates = []

    def stop(*_):
        updates.append(1)
        if len(updates) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    run.optimizer.optimizer.register_step_pre_hook(stop)
    with pytest.raises(SystemExit, match="143"):
        run.train()
    assert _names(tmp_path) == ["step-000001", "step-000002"]
    with pytest.raises(FloatingPointError) as error:
        trainer(tmp_path, steps=5, resume=True, **options).train()
    bad, good = (tmp_path / "checkpoints" / name for name in ("step-000002", "step-000001"))
    assert f"{bad} holds these weights and is now not-finite-step-000002. {good} is good" in str(error.value)
    assert _names(tmp_path) == ["not-finite-step-000002", "step-000001"]
    trainer(tmp_path, steps=3, resume=True, **options | {"learning_rate": 1e-3}).train()
    assert _names(tmp_path) == ["not-finite-step-000002", "step-000003"]


@pytest.mark.parametrize("without", ["save_every", "updates"])
def test_a_blow_up_without_a_good_checkpoint_begins_anew_as_its_error_says(without, tmp_path):
    options = EXPLODING | {"save_every": 0, "eval_size": 0}
    run = trainer(tmp_path, steps=4, **options)
    if without == "updates":
        run.unwrapped.get_output_embeddings().weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(FloatingPointError) as error:
        run.train()
    lower = "There is no good checkpoint: lower learning_rate, or set a smaller max_grad_norm, and pass resume to begin anew"
    change = "No update was made yet: change student, teacher or dtype, and pass resume to begin anew"
    assert str(error.value).endswith(f"nothing was updated. {lower if without == 'save_every' else change}")
    assert not (tmp_path / "checkpoints").exists()
    trainer(tmp_path, steps=3, resume=True, **options | {"learning_rate": 1e-3}).train()
    assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 3]


def test_weights_that_the_last_update_left_infinite_are_not_saved(tmp_path):
    run = trainer(tmp_path, steps=2, save_every=1, eval_size=0)
    updates = []

    def overflow(optimizer, *_):
        updates.append(1)
        if len(updates) == 2:
            optimizer.param_groups[0]["params"][0].data[0, 0] = torch.inf

    run.optimizer.optimizer.register_step_post_hook(overflow)
    with pytest.raises(FloatingPointError, match=r"step 2: its update left weights that are not finite. .*step-000001 is good"):
        run.train()
    assert _names(tmp_path) == ["step-000001"]
    assert not (tmp_path / "model").exists()


def test_resume_with_another_learning_rate_or_weight_decay_is_the_update_of_adamw(tmp_path):
    """w' = w - rate (m / (sqrt(v) + eps) + weight_decay w), the moments being those of the checkpoint."""
    first = trainer(tmp_path / "run", steps=1, eval_size=0)
    first.train()
    before, after = _weights(first), {}
    for name, changed in (("same", {}), ("rate", {"learning_rate": 3e-3}), ("decay", {"weight_decay": 0.5})):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        run = trainer(tmp_path / name, steps=2, eval_size=0, resume=True, **changed)
        run.train()
        after[name] = _weights(run)
    for i, weights in enumerate(before):
        step = after["same"][i] - weights
        assert bool(step.any())
        torch.testing.assert_close(after["rate"][i] - weights, 3 * step, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after["decay"][i] - after["same"][i], -1e-3 * 0.5 * weights, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("changed", [{"max_grad_norm": 0.01}, {"gradient_checkpointing": True}, {"workspace_bytes": 2**20}])
def test_resume_takes_other_clipping_and_memory_and_logs_them(changed, tmp_path, capsys):
    trainer(tmp_path, steps=1, eval_size=0).train()
    run = trainer(tmp_path, steps=2, eval_size=0, resume=True, **changed)
    run.train()
    ((name, value),) = changed.items()
    was = getattr(OPDConfig(), name)
    assert f"from step 2: {name} was {was} and is {value}" in capsys.readouterr().out
    assert {"step": 2, "changed": {name: [was, value]}} in _rows(tmp_path)
    saved = json.loads((tmp_path / "checkpoints" / "step-000002" / SETTINGS).read_text())
    assert saved["config"][name] == value


def test_resume_refuses_every_other_option(tmp_path):
    config = OPDConfig(lr_scheduler="linear")  # a schedule that depends on the number of steps
    path = tmp_path / "step-000001"
    path.mkdir()
    (path / SETTINGS).write_text(json.dumps({"step": 1, "config": dataclasses.asdict(config), "prompts": {}}))
    assert check_resume(path, config, {}, 1) == {}
    for name in {field.name for field in dataclasses.fields(config)} - FREE - LOGGED | {"steps"}:
        value = getattr(config, name)
        other = dataclasses.replace(config, **{name: "other" if value is None or isinstance(value, str) else value + 1})
        with pytest.raises(ValueError, match=f"resume: .* is of another run: {name} was .* and is .*; pass the same options"):
            check_resume(path, other, {}, 1)
