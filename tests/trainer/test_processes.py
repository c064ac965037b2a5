# Several processes: two of the reference trainer, by torch's launcher over gloo, against one with twice the micro-batches; and
# its pieces on a model that FSDP2 has sharded, against the same model whole.
#
# Command: make test ARGS=tests/trainer/test_processes.py
# Not here: selection over several processes, sharded vocabularies.
from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.trainer.runs import trainer

TRAIN = """
import sys
from pathlib import Path
from tests.trainer.runs import trainer
trainer(Path(sys.argv[1]), steps=3, gradient_accumulation_steps=2).train()
"""
SHARD = """
import sys, torch
from torch.distributed import init_process_group, destroy_process_group, get_rank
from torch.distributed.fsdp import fully_shard
from opd_ops import selective_opd_loss
from opd_ops.trainer.rollouts import head_over, sample
from tests.integrations.models import language_model, tokenizer
from tests.trainer.runs import prompts
init_process_group("gloo")
words, grads = tokenizer(), []
for is_sharded in (False, True):
    model, teacher = language_model(0), language_model(1)
    if is_sharded:
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    rollouts = sample(model, words, prompts(4), max_new_tokens=5, seed=0, synced_gpus=is_sharded)
    with torch.no_grad():
        taught = head_over(teacher, words, rollouts)
    out = selective_opd_loss(head_over(model.train(), words, rollouts), taught, mask=rollouts.mask, fraction=0.5)
    out.loss.backward()
    found = [p.grad.full_tensor() if is_sharded else p.grad for p in model.parameters()]
    grads.append((rollouts.tokens, out.selected, found))
(tokens, selected, whole), (tokens_2, selected_2, sharded) = grads
assert torch.equal(tokens, tokens_2) and torch.equal(selected, selected_2)
error = max(((x - y).norm() / y.norm()).item() for x, y in zip(sharded, whole, strict=True))
if get_rank() == 0:
    print("error", error)
destroy_process_group()
"""


def _launch(script, folder, *arguments):
    path = folder / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(path), *arguments]
    here = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": here}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_are_one_with_twice_the_micro_batches(tmp_path):
    _launch(TRAIN, tmp_path, str(tmp_path / "two"))
    trainer(tmp_path / "one", steps=3, gradient_accumulation_steps=4).train()
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=2e-5), name
    assert any(row.get("n_valid", 0) > 24 for row in logs[1])  # more than one process's share


def test_a_model_sharded_by_fsdp2_samples_and_learns_alike(tmp_path):
    said = _launch(SHARD, tmp_path)
    assert float(said.split("error")[1]) < 1e-5
