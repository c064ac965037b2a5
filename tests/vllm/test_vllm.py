"""A served teacher and served rollouts against vLLM itself, which serves SmolLM2-135M on this machine's CPUs.

  Compared: served log-probabilities with the log-softmax of the same model in transformers; the tokens selected and the loss
  from served lists with those from lists made here; greedy answers under an adapter with PEFT's; and a run whose server is
  killed and started again.
  Run: make test-vllm. Each figure goes to out/vllm/report.json; benchmarks/results/vllm/ has those of one run.

Not here: the server (server.py), speed (test_speed.py), faults that need a server with a script (tests/trainer/servers/).
"""

import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model

from examples.prompts import INSTRUCTION, TRAINING
from opd_ops import TailAware, TopKLogprobs, selective_opd_loss
from opd_ops.trainer.rollouts import context_ids, end_tokens, sample
from opd_ops.trainer.servers.client import ServerClient
from opd_ops.trainer.servers.retries import ServerError
from opd_ops.trainer.servers.rollouts import ServedRollouts
from opd_ops.trainer.servers.teacher import ServedTeacher

K = 16
CLOSE = 1e-3  # nats


@pytest.fixture(scope="module")
def taught(server, smollm):
    """(the student's contexts, the teacher's, sampled answers), lists of token ids: 8 answers of at most 32 tokens."""
    model, tokenizer = smollm
    plain = [context_ids(tokenizer, prompt, None) for prompt in TRAINING[:8]]
    told = [context_ids(tokenizer, prompt, INSTRUCTION) for prompt in TRAINING[:8]]
    rollouts = ServedRollouts(server.url, end_ids=end_tokens(model, tokenizer), concurrency=16)
    return plain, told, rollouts.sample(plain, max_new_tokens=32, seed=1)


def logits_of(model, context, answer):
    """(len(answer), V), from one plain forward."""
    with torch.no_grad():
        return model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]


@pytest.fixture(scope="module")
def log_q(smollm, taught):
    """The teacher's log-softmax at each answer's tokens, (len(answer), V)."""
    _, told, answers = taught
    return [logits_of(smollm[0], context, answer).log_softmax(-1) for context, answer in zip(told, answers, strict=True)]


@pytest.fixture(scope="module")
def student_logits(smollm, taught):
    """The same at the student's contexts, as logits; padded, (8, L, V)."""
    plain, _, answers = taught
    rows = [logits_of(smollm[0], context, answer) for context, answer in zip(plain, answers, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def dense_lists(log_q, answers):
    """What a server should send: log q of the K likeliest tokens, and of the answer's own."""
    longest = max(map(len, answers))
    ids = torch.full((len(answers), longest, K + 1), -1)
    logprobs = torch.full(ids.shape, -torch.inf)
    for b, (rows, answer) in enumerate(zip(log_q, answers, strict=True)):
        own, top = torch.tensor(answer).unsqueeze(1), rows.topk(K).indices
        ids[b, : len(answer)] = torch.cat((top, own.where((top != own).all(1, keepdim=True), torch.tensor(-1))), 1)
        logprobs[b, : len(answer)] = rows.gather(1, ids[b, : len(answer)].clamp_min(0))
    return TopKLogprobs(ids, logprobs.where(ids >= 0, -torch.inf))


def models_of(server):
    return ServerClient(server.url, role="teacher", timeout=60, retry_seconds=0, concurrency=1, api_key=None).models()


# --- the teacher -----------------------------------------------------------------------------------------------------


def test_log_probabilities_are_transformers_log_softmax(server, taught, log_q, report):
    _, told, answers = taught
    teacher = ServedTeacher(server.url, top_k=K)
    teacher.check()
    served = teacher.score(told, answers)
    worst, n = 0.0, 0
    for b, (rows, answer) in enumerate(zip(log_q, answers, strict=True)):
        for i, token in enumerate(answer):
            ids = served.ids[b, i][served.ids[b, i] >= 0]
            assert len(ids) == len(set(ids.tolist())) in (K, K + 1)
            assert token in ids
            # Only near ties may be listed in another order.
            assert rows[i, ids].topk(K).values[-1] > rows[i].topk(K).values[-1] - CLOSE
            worst = max(worst, (served.logprobs[b, i, : len(ids)] - rows[i, ids]).abs().max().item())
        n += len(answer)
    report["log-probabilities"] = {"answer tokens": n, "top_k": K, "largest error, nats": worst, "limit": CLOSE}
    assert n > 100
    assert worst < CLOSE


@pytest.mark.parametrize("selector", ["teachability", "entropy"])
def test_served_lists_select_what_dense_lists_select(server, taught, log_q, student_logits, report, selector):
    _, told, answers = taught
    teachers = ServedTeacher(server.url, top_k=K).score(told, answers), dense_lists(log_q, answers)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(answer)) for answer in answers], batch_first=True)
    outs = [
        selective_opd_loss(student_logits, lists, mask=mask, selector=selector, fraction=0.2, divergence=TailAware(top_k=K))
        for lists in teachers
    ]
    served, dense = outs
    error = abs(served.loss.item() / dense.loss.item() - 1)
    n_selected = int(dense.selected.sum())
    report[f"selection by {selector}"] = {
        "of tokens": int(mask.sum()),
        "selected": n_selected,
        "relative error of the loss": error,
    }
    assert 0 < n_selected < mask.sum()
    assert torch.equal(served.selected, dense.selected)
    assert error < 1e-4


def test_scores_of_given_ids_are_log_softmax_or_a_clear_error(server, taught, log_q, student_logits, report):
    """vLLM's V2 model runner has them; it needs Triton, and is not used without it."""
    _, told, answers = taught
    ids = student_logits.topk(K).indices
    teacher = ServedTeacher(server.url, top_k=K)
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1":
        with pytest.raises(ServerError, match=r"answered 400: .*V2 model runner.*; scores of given ids need a vLLM") as error:
            teacher.score_ids(told, answers, ids)
        report["scores of given ids"] = {"error": str(error.value).replace(server.url, "")}
        return
    served = teacher.score_ids(told, answers, ids)
    worst = 0.0
    for b, (rows, answer) in enumerate(zip(log_q, answers, strict=True)):
        want = rows.gather(1, ids[b, : len(answer)])
        worst = max(worst, (served.logprobs[b, : len(answer)] - want).abs().max().item())
    report["scores of given ids"] = {"answer tokens": sum(map(len, answers)), "ids": K, "largest error, nats": worst}
    assert worst < CLOSE


# --- the student -----------------------------------------------------------------------------------------------------


def test_greedy_answers_are_peft_s_after_two_updates_at_one_path(server, smollm, report, tmp_path):
    """Without `model`: the base model is found beside an adapter that another client has loaded, and left loaded."""
    model, tokenizer = smollm
    prompts, length = list(TRAINING[:4]), 24
    contexts = [context_ids(tokenizer, prompt, None) for prompt in prompts]
    ends = end_tokens(model, tokenizer)
    student = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")).eval()
    other, rollouts = (ServedRollouts(server.url, end_ids=ends, concurrency=16) for _ in range(2))
    try:
        student.save_pretrained(tmp_path)
        other.update(tmp_path)
        ServedTeacher(server.url, top_k=K).check()
        answers = [rollouts.sample(contexts, max_new_tokens=length, temperature=0.0)]
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in student.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02, generator=generator)
            student.save_pretrained(tmp_path)
            rollouts.update(tmp_path)
            answers.append(rollouts.sample(contexts, max_new_tokens=length, temperature=0.0))
            here = sample(student, tokenizer, prompts, max_new_tokens=length, temperature=0.0)
            assert answers[-1] == [row[mask].tolist() for row, mask in zip(here.tokens, here.mask, strict=True)]
        assert {model.name: model.parent for model in models_of(server)} == {
            "smollm2": None,
            other.adapter: "smollm2",
            rollouts.adapter: "smollm2",
        }
    finally:
        other.close()
        rollouts.close()
        student.unload()
    n_equal = sum(map(len, answers[1] + answers[2]))
    report["greedy answers under two updates"] = {"answers": 2 * len(prompts), "tokens, all equal to PEFT's": n_equal}
    assert answers[0] != answers[1] != answers[2] != answers[0]
    assert [model.name for model in models_of(server)] == ["smollm2"]


def test_an_answer_cut_at_the_context_length_is_refused(server, smollm, report):
    model, tokenizer = smollm
    rollouts = ServedRollouts(server.url, end_ids=end_tokens(model, tokenizer))
    prompt = (tokenizer("one two three four five six seven")["input_ids"] * 200)[:1000]
    with pytest.raises(ServerError) as cut:
        rollouts.sample([prompt], max_new_tokens=64, temperature=0.0)
    with pytest.raises(ServerError) as long:
        rollouts.sample([prompt + prompt], max_new_tokens=1)
    with pytest.raises(ServerError, match=r"context \(1000\) \+ answer \(24\) \+ 1 = 1025 tokens, expected at most 1024"):
        ServedTeacher(server.url, top_k=K).score([prompt], [prompt[:24]])
    report["truncation"] = {"cut": str(cut.value), "too long": str(long.value)}
    assert "answered 400" in str(cut.value) or "cut the answer after 24 of 64 tokens" in str(cut.value)
    assert "1024" in str(cut.value)
    assert "answered 400" in str(long.value)


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_a_run_outlives_a_server_that_is_killed_and_started_again(server, folder, report, tmp_path):
    servers = f"--teacher_url {server.url} --rollout_url {server.url} --server_retry_seconds 420"
    size = "--steps 2 --batch_size 2 --gradient_accumulation_steps 2 --max_new_tokens 16 --eval_size 2 --eval_every 2"
    loss = "--lora_rank 8 --learning_rate 1e-4 --divergence tail_aware --fraction 0.25 --completions 1"
    command = [
        sys.executable,
        "-m",
        "opd_ops.trainer.cli",
        *f"{servers} {size} {loss} --prompts examples/training.jsonl".split(),
    ]
    command += ["--student", str(folder), "--teacher_system", INSTRUCTION, "--output_dir", str(tmp_path / "run")]
    began, log = time.monotonic(), tmp_path / "run" / "log.jsonl"
    with (tmp_path / "printed").open("w+", encoding="utf-8") as printed:
        run = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            while run.poll() is None and not (log.is_file() and '"loss"' in log.read_text(encoding="utf-8")):
                time.sleep(0.05)
            assert run.poll() is None
            server.kill()
            seconds = server.start()
            code = run.wait(timeout=300)
        finally:
            run.kill()
            printed.seek(0)
            text = printed.read()
            print(text)  # pytest shows it with a failure
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    report["a run of two steps, the server killed after the first"] = {
        "losses": losses,
        "seconds until the server answered again": round(seconds, 1),
        "seconds in all": round(time.monotonic() - began, 1),
    }
    assert code == 0
    assert "Trying again" in text
    assert list(losses) == [1, 2]
    assert all(map(math.isfinite, losses.values()))
    assert [model.name for model in models_of(server)] == ["smollm2"]
