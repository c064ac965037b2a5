"""`opd-train` as a user runs it: models and prompts in files, a YAML file, a SIGTERM in the middle, a continuation; against the
run that nothing stopped, number by number.

Command: make test ARGS=tests/trainer/test_cli.py
Not here: which options are refused (test_config.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from opd_ops.trainer import cli
from opd_ops.trainer.loop import OPDTrainer
from opd_ops.trainer.servers.retries import ServerError
from tests.integrations.models import llama_model, tokenizer
from tests.trainer.runs import SMALL

STEPS = 12


def _write(folder):
    """Two models, prompts and a configuration."""
    for name, seed in (("student", 0), ("teacher", 1)):
        llama_model(seed).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": " ".join(f"w{3 + (7 * i + j) % 50}" for j in range(4))} for i in range(12)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = SMALL | {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "save_every": 4,
        "completions": 1,
    }
    options |= {"prompts": str(folder / "prompts.jsonl"), "steps": STEPS, "learning_rate": "1e-3"}
    (folder / "run.yaml").write_text("\n".join(f"{name}: {value}" for name, value in options.items()))


def _flags(folder, output, *more):
    return ["--config", str(folder / "run.yaml"), f"--output_dir={output}", *more]


def _start(folder, output):
    command = [sys.executable, "-m", "opd_ops.trainer.cli", *_flags(folder, output)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on how many share them
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | threads)


@pytest.mark.full
def test_sigterm_saves_and_resume_continues_bit_for_bit(tmp_path, capsys):
    _write(tmp_path)
    cli.main(_flags(tmp_path, tmp_path / "whole"))
    assert "held out" in capsys.readouterr().out

    stopped = _start(tmp_path, tmp_path / "cut")
    log = tmp_path / "cut" / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and '"step": 1,' in log.read_text()) and time.monotonic() < deadline and stopped.poll() is None:
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    said, _ = stopped.communicate(timeout=300)
    assert stopped.returncode == 143, said
    assert "SIGTERM: saved after step" in said
    assert json.loads(log.read_text().splitlines()[-1])["step"] < STEPS
    assert not (tmp_path / "cut" / "model").exists()

    cli.main(_flags(tmp_path, tmp_path / "cut", "--resume"))
    assert log.read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut")]
    assert weights[0].keys() == weights[1].keys()
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])


def test_the_flags_that_a_blow_up_advises_are_taken(tmp_path):
    _write(tmp_path)
    flags = _flags(tmp_path, tmp_path / "out", "--save_every=1", "--steps=4", "--warmup_steps=3")
    with pytest.raises(SystemExit, match=r"error: step 2: .*step-000001 is good: lower learning_rate, .* and pass resume to"):
        cli.main([*flags, "--learning_rate=1e20"])
    cli.main([*flags, "--learning_rate=1e-3", "--resume"])
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("error", "raised"),
    [(ServerError("gone"), SystemExit), (ValueError("no shape"), ValueError), (OSError("full"), OSError)],
)
def test_an_unexpected_error_of_the_training_keeps_its_traceback(error, raised, tmp_path, monkeypatch):
    _write(tmp_path)

    def fail(_):
        raise error

    monkeypatch.setattr(OPDTrainer, "train", fail)
    with pytest.raises(raised, match=str(error)):
        cli.main(_flags(tmp_path, tmp_path / "out"))


def test_what_is_found_late_is_said_in_one_line(tmp_path):
    _write(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"question": "w5"}')
    with pytest.raises(SystemExit, match=r"error: .*row 1: got .*, expected 'prompt' \(text\) or 'messages'"):
        cli.main(_flags(tmp_path, tmp_path / "out"))
