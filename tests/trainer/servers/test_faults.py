"""What a real vLLM server does and a kind one does not: adapters among its models, restarts that forget them, answers cut at
the context length, logits for log-probabilities, refused keys, minutes without an answer; clients alone, and whole runs.

  Compared: what was asked of the server; a run that its server interrupted with the run that nothing interrupted, line by line.
  Run: make test ARGS=tests/trainer/servers/test_faults.py

Not here: the protocols (test_teacher_and_rollouts.py), runs without faults (test_runs.py).
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import traceback

import pytest
import torch

from examples.serve_teacher import Served, running
from opd_ops.trainer import loop
from opd_ops.trainer.checkpoints import complete
from opd_ops.trainer.server_faults import JointTeacher
from opd_ops.trainer.servers import retries
from opd_ops.trainer.servers.retries import ServerError
from opd_ops.trainer.servers.rollouts import ServedRollouts
from opd_ops.trainer.servers.teacher import ServedTeacher
from tests.integrations.models import language_model, tokenizer
from tests.support.servers import Clock, StandIn, prompt_logprobs, scripted
from tests.trainer.runs import prompts, trainer

END = 1
LISTS = {"taught_by": None, "divergence": "tail_aware", "teacher_top_k": 4, "lora_rank": 2}


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return Clock(monkeypatch)


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    return tmp_path


def answered(body):
    """Lists for a teacher, an ended answer for rollouts."""
    return prompt_logprobs(body) if "prompt_logprobs" in body else {"token_ids": [10, 11, END], "finish_reason": "stop"}


def paths(asked):
    return [path.removeprefix("/v1/") for path, _, _ in asked]


# --- adapters --------------------------------------------------------------------------------------------------------


def test_a_loaded_adapter_is_not_the_only_model_s_rival(adapter):
    """Also one that another run left behind: vLLM lists both, each with its parent."""
    server = StandIn(answered)
    with scripted(server) as (address, asked):
        first, second = (ServedRollouts(address, end_ids=[END]) for _ in range(2))
        for rollouts in (first, second):
            rollouts.update(adapter)
            assert rollouts.sample([[3]], max_new_tokens=9) == [[10, 11, END]]
        ServedTeacher(address, top_k=2).check()
    assert len(server.adapters) == 2
    assert paths(asked)[:3] == ["models", "load_lora_adapter", "completions"]  # the model is chosen before the first adapter
    assert {body["model"] for path, body, _ in asked if path.endswith("completions")} == {*server.adapters, "tiny"}


def test_an_adapter_may_be_asked_for_by_name_and_has_its_base_model_s_length():
    server = StandIn(answered, max_model_len=6)
    server.adapters.append("tuned")
    with scripted(server) as (address, asked):
        ServedTeacher(address, model="tuned", top_k=2).score([[1, 2, 3]], [[4, 5]])
        with pytest.raises(ServerError, match=r"context \(3\) \+ answer \(3\) \+ 1 = 7 tokens, expected at most 6"):
            ServedTeacher(address, model="tuned", top_k=2).score([[1, 2, 3]], [[4, 5, 6]])
    assert [body["model"] for path, body, _ in asked if path.endswith("completions")] == ["tuned"]


def test_close_unloads_the_last_adapter_once(adapter):
    server = StandIn(answered)
    with scripted(server) as (address, asked):
        rollouts = ServedRollouts(address, end_ids=[END])
        rollouts.close()
        assert asked == []
        rollouts.update(adapter)
        rollouts.close()
        rollouts.close()
        with pytest.raises(ServerError, match="the student's last adapter was not loaded; call update"):
            rollouts.sample([[3]], max_new_tokens=1)
    assert paths(asked) == ["models", "load_lora_adapter", "unload_lora_adapter"]
    assert server.adapters == []


def test_close_waits_for_no_server_that_has_gone(adapter, clock, caplog):
    with scripted(StandIn(answered)) as (address, _):
        rollouts = ServedRollouts(address, end_ids=[END])
        rollouts.update(adapter)
        name = rollouts.adapter
    rollouts.close()
    assert clock.waits == []
    assert "cannot be reached" in caplog.text
    assert f"The adapter '{name}' may still be loaded" in caplog.text


def test_a_restarted_server_takes_the_next_adapter(adapter):
    server = StandIn(answered)
    with scripted(server) as (address, asked):
        rollouts = ServedRollouts(address, end_ids=[END])
        rollouts.update(adapter)
        server.restart()
        rollouts.update(adapter)
        assert rollouts.sample([[3]], max_new_tokens=9) == [[10, 11, END]]
    assert server.adapters == [rollouts.adapter]
    assert paths(asked) == ["models", "load_lora_adapter", "unload_lora_adapter", "models", "load_lora_adapter", "completions"]


def test_a_restarted_server_loads_the_current_adapter_again(adapter, caplog):
    server = StandIn(answered)
    with scripted(server) as (address, asked):
        rollouts = ServedRollouts(address, end_ids=[END])
        rollouts.update(adapter)
        server.restart()
        assert rollouts.sample([[3], [4]], max_new_tokens=9) == [[10, 11, END]] * 2
        assert server.adapters == [rollouts.adapter]
        rollouts.close()
    assert [body for path, body, _ in asked if path.endswith("/load_lora_adapter")] == [
        {"lora_name": "x", "lora_path": str(adapter.resolve())} | {"lora_name": body["lora_name"]}
        for path, body, _ in asked
        if path.endswith("/load_lora_adapter")
    ]
    assert paths(asked).count("load_lora_adapter") == 2
    assert "The server was restarted: loading the adapter again" in caplog.text


def test_a_404_that_is_not_a_forgotten_adapter_is_an_error(adapter):
    server = StandIn(answered, fails=[200, 404])
    with scripted(server) as (address, asked):
        rollouts = ServedRollouts(address, end_ids=[END])
        rollouts.update(adapter)
        with pytest.raises(ServerError, match="answered 404: no room"):
            rollouts.sample([[3]], max_new_tokens=9)
    assert paths(asked).count("load_lora_adapter") == 1


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_a_command_whose_answer_was_lost_was_done(path, adapter):
    """The second try is refused, by 400 for a loaded name and by 404 for an unloaded one."""
    server, lost = StandIn(answered), []

    def answer(asked_path, body):
        code, content = server(asked_path, body)
        if asked_path == path and not lost:
            lost.append(path)
            return 503, {"error": {"message": "proxy: no answer in time"}}
        return code, content

    with scripted(answer) as (address, _):
        rollouts = ServedRollouts(address, end_ids=[END])
        rollouts.update(adapter)
        rollouts.update(adapter)
        assert rollouts.sample([[3]], max_new_tokens=9) == [[10, 11, END]]
    assert lost
    assert server.adapters == [rollouts.adapter]


def test_a_name_that_the_server_refuses_for_another_reason_is_an_error(adapter):
    with (
        scripted(StandIn(answered, fails=[400])) as (address, _),
        pytest.raises(ServerError, match=r"answered 400: no room\. Loading adapters needs"),
    ):
        ServedRollouts(address, end_ids=[END]).update(adapter)


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_an_answer_that_the_server_cut_short_is_refused():
    def eight(_):
        return {"token_ids": [10] * 8, "finish_reason": "length"}

    with scripted(StandIn(eight, max_model_len=10)) as (address, _):
        rollouts = ServedRollouts(address, end_ids=[END])
        assert rollouts.sample([[3, 4]], max_new_tokens=8) == [[10] * 8]
        with pytest.raises(ServerError) as error:
            rollouts.sample([[3, 4, 5]], max_new_tokens=8)
    assert (
        "cut the answer after 7 of 8 tokens; expected prompt (3) + answer (8) = 11 tokens to fit its max_model_len, 10"
        in str(error.value)
    )


def test_the_small_server_cuts_answers_as_vllm_does():
    model = language_model(3).eval()
    model.config.max_position_embeddings = 10
    with running(Served(model, tokenizer(), "tiny")) as url:
        rollouts = ServedRollouts(url, end_ids=[END])
        assert len(rollouts.sample([[3, 4]], max_new_tokens=8, temperature=0.0)[0]) == 8
        with pytest.raises(ServerError, match=r"cut the answer after 7 of 8 tokens"):
            rollouts.sample([[3, 4, 5]], max_new_tokens=8, temperature=0.0)
        with pytest.raises(ServerError, match="answered 400: This model's maximum context length is 10 tokens"):
            rollouts.sample([[3] * 10], max_new_tokens=1)


@pytest.mark.parametrize(
    ("role", "what"),
    [
        ("teacher", r"context \(10\) \+ answer \(6\) \+ 1 = 17 tokens, expected at most 16, the max_model_len of 'tiny'"),
        ("rollout", r"longest prompt \(8\) \+ max_new_tokens \(9\) = 17 tokens, expected at most 16"),
    ],
)
def test_prompts_that_do_not_fit_the_server_are_refused_before_the_student_loads(role, what, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_trainable", lambda *_: pytest.fail("the student was prepared"))
    options = (
        LISTS | {"teacher_system": "w5 w6", "max_new_tokens": 6} if role == "teacher" else {"lora_rank": 2, "max_new_tokens": 9}
    )
    with (
        scripted(StandIn(answered, max_model_len=16)) as (url, _),
        pytest.raises(ServerError, match=rf"{url}: {what}.* --max-model-len.*max_new_tokens"),
    ):
        trainer(tmp_path, steps=1, **options, **{f"{role}_url": url})


# --- answers that say what to do -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logprob", "what"), [(14.25, "has 14.25, expected log-probabilities, at most 0"), (-30.0, "a mass of")]
)
def test_check_refuses_logits_and_says_which_flag_is_missing(logprob, what):
    def logits(body):
        return {
            "prompt_logprobs": [
                None,
                *({str(i): {"logprob": logprob - j} for j, i in enumerate((t, t + 1))} for t in body["prompt"][1:]),
            ]
        }

    with scripted(StandIn(logits)) as (address, _), pytest.raises(ServerError) as error:
        ServedTeacher(address, top_k=2).check()
    assert what in str(error.value)
    assert "start the server with --logprobs-mode raw_logprobs" in str(error.value)


@pytest.mark.parametrize(
    ("role", "make"), [("teacher", ServedTeacher), ("rollout", lambda url, **o: ServedRollouts(url, end_ids=[END], **o))]
)
@pytest.mark.parametrize(("key", "sent"), [(None, "no key was sent"), ("wrong", "the key that was sent is not accepted")])
def test_a_refused_key_names_its_option(role, make, key, sent):
    with scripted(lambda *_: (401, {"error": "Unauthorized"})) as (address, asked):
        server = make(address, api_key=key)
        with pytest.raises(ServerError) as error:
            server.score([[1]], [[2]]) if role == "teacher" else server.sample([[1]], max_new_tokens=1)
    assert "answered 401: " in str(error.value)
    assert f"; {sent}, pass api_key= (opd-train: {role}_api_key_env" in str(error.value)
    assert len(asked) == 1
    assert key is None or key not in str(error.value)


# --- retries ---------------------------------------------------------------------------------------------------------


def test_a_server_that_needs_a_minute_to_restart_is_waited_for(clock, caplog):
    server, answers = StandIn(answered), []

    def answer(path, body):
        answers.append(path)
        return server(path, body) if path == "/v1/models" or clock.now > 60 else (503, {"error": {"message": "loading"}})

    with scripted(answer) as (address, _):
        lists = ServedTeacher(address, top_k=2).score([[3]], [[4]])
    assert lists.ids[0, 0, 0] == 4
    warnings = [record.getMessage() for record in caplog.records if record.name == "opd_ops"]
    assert len(warnings) == len(clock.waits) == len(answers) - 2
    assert warnings[0].endswith("answered 503: loading. Trying again for 120 s")
    assert caplog.records[0].levelno == logging.WARNING


def test_the_last_error_has_the_first_failure_and_no_private_exception():
    codes = iter([500, *[503] * 99])

    def answer(path, _):
        code = next(codes)
        return code, {"error": {"message": "CUDA out of memory" if code == 500 else "no engine"}}

    with scripted(answer) as (address, _), pytest.raises(ServerError) as error:
        ServedTeacher(address, top_k=2).check()
    said = str(error.value)
    assert said.startswith(f"{address}/v1/models: answered 503: no engine (tried 17 times in 120 s; the first failure: ")
    assert said.endswith("answered 500: CUDA out of memory)")
    assert (error.value.code, error.value.is_temporary) == (503, True)
    text = "".join(traceback.format_exception(error.value))
    assert not re.search(r"\b_\w+Error", text)
    assert ".ServerError: " in text


def test_requests_that_fail_together_are_one_warning_and_end_together(monkeypatch, caplog):
    """With the real time: one request of eight is refused for good, while the others wait for a server that is busy."""
    monkeypatch.setattr(retries, "time", time)
    monkeypatch.setattr(retries, "pause", lambda seconds, stop: stop.wait(seconds))
    monkeypatch.setattr(retries, "FIRST_WAIT", 30.0)
    monkeypatch.setattr(retries, "LONGEST_WAIT", 30.0)
    all_asked = threading.Barrier(8)

    def answer(path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny"}]}
        all_asked.wait(2)
        if body["prompt"][0] != 8:
            return 503, {"error": {"message": "busy"}}
        time.sleep(0.2)
        return 400, {"error": {"message": "bad token"}}

    start = time.perf_counter()
    with scripted(answer) as (address, asked), pytest.raises(ServerError, match="answered 400: bad token"):
        ServedTeacher(address, top_k=1, concurrency=8).score([[i] for i in range(1, 17)], [[20]] * 16)
    assert time.perf_counter() - start < 5
    assert len(asked) == 9  # the requests that had not begun are not sent
    assert len([record for record in caplog.records if record.name == "opd_ops"]) == 1


# --- whole runs ------------------------------------------------------------------------------------------------------


class Down:
    """The server of a run, which stops answering completions at the `at`-th of them, until `ends`."""

    def __init__(self, at):
        self.server, self.at, self.n, self.is_back = StandIn(answered), at, 0, False

    def __call__(self, path, body):
        self.n += "prompt_logprobs" in body
        if path == "/v1/completions" and self.n > self.at and not self.is_back:
            return 503, {"error": {"message": "gone"}}
        return self.server(path, body)


def test_a_run_whose_server_has_gone_in_the_last_evaluation_saves_and_finishes(tmp_path):
    """One step: a request of `check`, four of the first evaluation, four of the step, four of the last evaluation."""
    options = LISTS | {"server_retry_seconds": 0, "eval_every": 1}
    down = Down(9)
    with scripted(down) as (url, _):
        with pytest.raises(ServerError, match=r"answered 503: gone\. Saved after step 1: pass resume to continue"):
            trainer(tmp_path, steps=1, teacher_url=url, **options).train()
        assert [path.name for path in complete(tmp_path / "checkpoints")] == ["step-000001"]
        down.is_back = True
        after = trainer(tmp_path, steps=1, teacher_url=url, resume=True, **options).train()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], "loss" in row, "eval_loss" in row) for row in rows] == [
        (0, False, True),
        (1, True, False),
        (1, False, True),
    ]
    assert after["loss"] == rows[-1]["eval_loss"]
    assert (tmp_path / "model" / "adapter_model.safetensors").is_file()


def test_a_run_continues_with_its_teacher_at_another_address_and_from_a_folder(tmp_path):
    def run(**options):
        trainer(tmp_path / "run", resume=True, eval_size=0, **LISTS | {"teacher_model": None} | options).train()

    store = {"teacher_store": str(tmp_path / "store")}
    with scripted(StandIn(answered)) as (url, _):
        run(steps=1, teacher_url=url)
    with scripted(StandIn(answered)) as (url, _):
        run(steps=2, teacher_url=url, teacher_model="tiny", **store)
    with scripted(StandIn(answered, models=("other",))) as (url, _), pytest.raises(ValueError) as error:
        run(steps=2, teacher_url=url)
    assert re.search(
        "the teacher's weights are not those that .*step-000002 .*; let the server serve the same model", str(error.value)
    )
    run(steps=2, **store)


@pytest.mark.full
@pytest.mark.parametrize(
    ("at", "done"),
    [
        (3, 0),  # in the first evaluation, of four prompts, after the request of `check`
        (5, 0),  # in the first step
        (10, 1),  # in the second step
        (14, 2),  # in the evaluation after it
    ],
)
def test_a_run_whose_server_has_gone_saves_and_resumes_as_if_nothing_had_been(at, done, tmp_path, clock):
    def run(folder, url, **options):
        return trainer(tmp_path / folder, steps=3, teacher_url=url, save_every=0, **LISTS, **options)

    down = Down(at)
    with scripted(down) as (url, _):
        with pytest.raises(ServerError) as error:
            run("cut", url).train()
        saved = [path.name for path in complete(tmp_path / "cut" / "checkpoints")]
        assert saved == ([f"step-{done:06}"] if done else [])
        advice = (
            f"Saved after step {done}: pass resume to continue" if done else "No update was made yet: pass resume to begin anew"
        )
        assert re.search(
            rf"answered 503: gone \(tried \d+ times in 1\d\d s\)\. {advice} when the server is back", str(error.value)
        )
        assert sum(clock.waits) >= 120
        if done:  # it fails again after the request of `check`: nothing is lost
            down.n = down.at - 1
            with pytest.raises(ServerError, match=rf"Saved after step {done}"):
                run("cut", url, resume=True, server_retry_seconds=0).train()
            assert [path.name for path in complete(tmp_path / "cut" / "checkpoints")] == saved
        down.is_back = True
        run("cut", url, resume=True).train()
        run("whole", url).train()
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("cut", "whole")
    ]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0] if "eval_loss" in row] == [0, 2, 3]


def test_a_run_without_rollout_model_trains_and_leaves_no_adapter(tmp_path, monkeypatch):
    """And with a server that restarts in between; the teacher is the same server, whose lists do not determine a KL."""
    server, said = StandIn(answered), []
    monkeypatch.setattr(loop.RunLog, "advance", lambda _, status: said.append(status))

    def answer(path, body):
        if body.get("lora_name", "").endswith("-2") and path.endswith("/load_lora_adapter"):
            server.restart()
        return server(path, body)

    with scripted(answer) as (url, asked):
        trainer(tmp_path, steps=3, teacher_url=url, rollout_url=url, **LISTS).train()
    loaded = [body["lora_name"] for path, body, _ in asked if path.endswith("/load_lora_adapter")]
    assert [name[-2:] for name in loaded] == ["-1", "-2", "-3"]
    assert server.adapters == []
    sampled = [body["model"] for path, body, _ in asked if "return_token_ids" in body]
    assert sampled == [name for name in loaded for _ in range(4)]  # two micro-batches of two
    assert len(said) == 3
    assert all(re.fullmatch(r"loss \d\.\d+, 33\.3% of 12 tokens, \d+ tokens/s", line) for line in said)


def test_a_run_that_ends_in_an_error_leaves_no_adapter(tmp_path):
    server = StandIn(lambda body: {"token_ids": [10, 11], "finish_reason": "length"})
    with scripted(server) as (url, _), pytest.raises(ServerError, match="cut the answer after 2 of 6 tokens"):
        trainer(tmp_path, steps=3, rollout_url=url, lora_rank=2).train()
    assert server.adapters == []


class OneOfTwo:
    """An accelerator of two processes, of which the other one reports `failures`."""

    device = torch.device("cpu")

    def __init__(self, failures):
        self.failures = failures

    def reduce(self, x, reduction):
        assert reduction == "sum"
        return x + self.failures


def test_a_teacher_that_fails_in_one_process_fails_in_all():
    def fails(_):
        raise ServerError("http://teacher: gone")

    batch = prompts(1)
    assert JointTeacher(lambda x: x, OneOfTwo(0))(batch) is batch
    with pytest.raises(ServerError, match="http://teacher: gone"):
        JointTeacher(fails, OneOfTwo(0))(batch)
    with pytest.raises(ServerError, match="failed in another process"):
        JointTeacher(lambda x: x, OneOfTwo(1))(batch)
