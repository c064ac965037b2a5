"""The example of a self-teacher: its file of options and its rows, on a tiny model and on the real weights.

  Compared: the held-out divergence from the teacher after the run with that before it.
Command: make test ARGS=tests/examples/test_self_teacher.py

Not here: the teacher (tests/trainer/test_self_teacher.py, test_privileged.py).
"""

from __future__ import annotations

import json

import pytest
from accelerate.state import AcceleratorState

from examples import self_teacher
from tests.integrations.models import llama_model, tokenizer


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _held_out(folder, *flags):
    """The held-out forward KL before the first and after the last step."""
    self_teacher.main([f"--output_dir={folder}", *flags])
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kls = [row["eval_forward_kl"] for row in rows if "eval_forward_kl" in row]
    return kls[0], kls[-1]


def test_a_tiny_model_comes_closer_to_itself_with_a_demonstration(tmp_path):
    llama_model(0).save_pretrained(tmp_path / "tiny")
    words = tokenizer()  # it knows none of the words, so the teacher reads a longer prompt, and not another one
    words.save_pretrained(tmp_path / "tiny")
    flags = ["--steps=4", "--max_new_tokens=4", "--eval_size=4", "--learning_rate=1e-2", "--completions=0"]
    before, after = _held_out(tmp_path / "run", f"--student={tmp_path / 'tiny'}", *flags)
    assert after < 0.9 * before
    assert "moving average of the student's own weights" in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.mark.full
def test_the_real_model_comes_closer_to_itself_with_a_demonstration(tmp_path):
    flags = ["--steps=2", "--max_new_tokens=8", "--eval_size=2", "--completions=0", "--batch_size=4"]
    before, after = _held_out(tmp_path / "run", *flags)
    assert after < before
