"""The reference trainer with servers: a teacher that sends lists against the same model here; answers sampled elsewhere, which
must come from the adapters as they are at every step.

Command: make test ARGS=tests/trainer/servers/test_runs.py
Not here: the protocols (test_teacher_and_rollouts.py), faults of servers (test_faults.py).
"""

from __future__ import annotations

import json

import pytest
import torch

from examples.serve_teacher import Served, running
from opd_ops.trainer import loop
from opd_ops.trainer.privileged import PrivilegedContext
from opd_ops.trainer.rollouts import encode
from opd_ops.trainer.servers.retries import ServerError
from opd_ops.trainer.servers.rollouts import ServedRollouts
from opd_ops.trainer.servers.teacher import ServedTeacher
from opd_ops.trainer.teachers import LocalTeacher, ServerTeacher
from tests.integrations.models import language_model, tokenizer
from tests.support.servers import Clock, StandIn, prompt_logprobs, scripted
from tests.trainer.runs import prompts, trainer


def _rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_teacher_behind_a_server_sends_what_the_model_at_hand_says(tmp_path):
    words, model = tokenizer(), language_model(1).eval()
    with running(Served(model, words, "tiny")) as url:
        run = trainer(tmp_path, steps=2, taught_by=None, teacher_url=url, teacher_top_k=8, divergence="tail_aware")
        batch = run.sampler(0, 0)
        batch = batch._replace(mask=batch.mask & (torch.arange(batch.mask.shape[1]) < 4))  # columns that nobody asks about
        lists = ServerTeacher(ServedTeacher(url, top_k=8), words, PrivilegedContext("w5 w6"))(batch)
        run.train()
    head = LocalTeacher(model, words, PrivilegedContext("w5 w6"))(batch)
    log_q = torch.log_softmax(head.hidden @ head.weight.T, -1)
    assert lists.ids.shape[:2] == batch.mask.shape
    assert (lists.ids[~batch.mask] == -1).all()
    kept = batch.mask.unsqueeze(2) & (lists.ids >= 0)
    assert kept.sum() >= 8 * batch.mask.sum()
    expected = log_q.gather(2, lists.ids.clamp_min(0))
    assert (lists.logprobs - expected)[kept].abs().max() < 1e-4
    rows = _rows(tmp_path)
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]


def test_rollouts_of_a_server_come_from_the_adapters_of_the_step(tmp_path, monkeypatch):
    loaded, asked = [], []

    def update(self, folder):
        loaded.append((folder / "adapter_model.safetensors").read_bytes())

    def sampled(self, ids, *, seed, **options):
        asked.append((ids, seed, options))
        return [[10, 11, 1], [12, 13]]  # one that ended, one that was cut off

    monkeypatch.setattr(ServedRollouts, "update", update)
    monkeypatch.setattr(ServedRollouts, "sample", sampled)
    with scripted(StandIn(None)) as (url, _):
        run = trainer(tmp_path, steps=3, lora_rank=2, rollout_url=url, fraction=1.0)
        run.train()
    assert len(loaded) == 3  # once a step, for both of its micro-batches
    assert len(set(loaded)) == 3  # other weights every time
    assert len(asked) == 6
    assert len({seed for _, seed, _ in asked}) == 6
    assert asked[0][2] == {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0}
    texts = {tuple(encode(run.tokenizer, [p.conversation()])["input_ids"][0].tolist()) for p in prompts()}
    assert {tuple(row) for row in asked[0][0]} <= texts
    assert [row["n_valid"] for row in _rows(tmp_path) if "loss" in row] == [10, 10, 10]  # padding of the second does not count


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may be made trainable; waits between tries are skipped."""
    monkeypatch.setattr(loop, "make_trainable", lambda *_: pytest.fail("the student was prepared"))
    Clock(monkeypatch)


SERVED = {"teacher": {"divergence": "tail_aware", "taught_by": None}, "rollout": {"lora_rank": 2}}


@pytest.mark.parametrize("role", ["teacher", "rollout"])
def test_a_server_is_asked_before_the_student_loads(role, tmp_path, no_model):
    with (
        scripted(StandIn(prompt_logprobs, models=("a", "b"))) as (url, _),
        pytest.raises(ServerError, match=rf"{url}: serves 'a', 'b', asked for 'c'; pass model= .*{role}_model"),
    ):
        trainer(tmp_path, steps=1, **SERVED[role], **{f"{role}_url": url, f"{role}_model": "c"})
    with pytest.raises(ServerError, match=rf"{url}/v1/models: cannot be reached .*refused"):
        trainer(tmp_path, steps=1, **SERVED[role], **{f"{role}_url": url})


def test_keys_and_names_of_servers_reach_them_and_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_TEACHER", "sk-teacher")
    monkeypatch.setenv("OPD_ROLLOUT", "sk-rollout")

    def choice(body):
        if "prompt_logprobs" in body:
            return prompt_logprobs(body)
        return {"token_ids": [10, 11, 1], "finish_reason": "stop"}

    roles = ("teacher", "rollout")
    options = {f"{role}_api_key_env": f"OPD_{role.upper()}" for role in roles} | {f"{role}_model": role for role in roles}
    with scripted(StandIn(choice, models=roles)) as (url, asked):
        options |= {"teacher_url": url, "rollout_url": url, "divergence": "tail_aware", "taught_by": None}
        trainer(tmp_path, steps=1, lora_rank=2, teacher_top_k=1, report_to="tensorboard", **options).train()
    completions = [(body, key) for path, body, key in asked if path == "/v1/completions"]
    teacher_requests = [(body["model"], key) for body, key in completions if "prompt_logprobs" in body]
    rollout_keys = [key for body, key in completions if "return_token_ids" in body]
    assert set(teacher_requests) == {("teacher", "Bearer sk-teacher")}
    assert set(rollout_keys) == {"Bearer sk-rollout"}
    assert {key for path, _, key in asked if path != "/v1/completions"} == {"Bearer sk-teacher", "Bearer sk-rollout"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "run.json" for path in files)
    for path in files:
        assert b"sk-" not in path.read_bytes(), path


def test_a_teacher_of_another_vocabulary_is_refused_before_the_student_loads(tmp_path, no_model, monkeypatch):
    other = tokenizer().backend_tokenizer.to_str().replace('"w7":7', '"w7":8').replace('"w8":8,', '"w8":7,')
    tokenizer().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(other, encoding="utf-8")
    with pytest.raises(ValueError, match="teacher: its tokenizer differs from the student's at 2 of 61 ids"):
        trainer(tmp_path / "out", steps=1, taught_by=None, teacher=str(tmp_path / "other"))


def test_rollouts_of_a_server_need_lora():
    with pytest.raises(ValueError, match=r"rollout_url: .* set lora_rank"):
        trainer(None, steps=1, rollout_url="http://nowhere")
