"""Scores of given ids from vLLM, and all of SGLang's, by recorded answers of their documented shapes, made from a real model's
logits, and by answers that do not fit.

  Compared: scores with the model's own log-softmax at these ids; the loss on the student's top-K with that of lists made here;
  the requests with the servers' documented fields.
  Run: make test ARGS=tests/trainer/servers/test_scoring.py

Not here: lists of a server's own tokens (test_teacher_and_rollouts.py), faults (test_faults.py); the servers themselves.
"""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch

from opd_ops import LocalSupport, TopKLogprobs, selective_opd_loss
from opd_ops.trainer.servers import sglang
from opd_ops.trainer.servers.retries import ServerError
from opd_ops.trainer.servers.sglang import SGLangTeacher
from opd_ops.trainer.servers.teacher import ServedTeacher
from tests.integrations.models import VOCAB, language_model
from tests.support.cases import generator, leaf
from tests.support.servers import Clock, StandIn, scripted
from tests.trainer.runs import trainer

CONTEXTS, ANSWERS = [[5, 6, 7], [9], [4, 8]], [[10, 11], [12, 13, 14, 15, 12], []]
TEACHERS = pytest.mark.parametrize("teacher", [ServedTeacher, SGLangTeacher])


@pytest.fixture(scope="module")
def model():
    return language_model(3).eval()


@pytest.fixture(autouse=True)
def local(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Clock(monkeypatch)


def log_q(model, tokens):
    """(len(tokens) - 1, V): row i predicts token i + 1; id 20 is impossible everywhere."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    logits[:, 20] = -torch.inf
    return logits.log_softmax(-1)


def npy(matrix):
    file = io.BytesIO()
    np.save(file, matrix)
    return base64.b64encode(file.getvalue()).decode()


def recorded(model, change=lambda answer: answer):
    """vLLM's /inference/v1/generate and SGLang's /generate, as their documents describe them."""

    def triples(row, ids):
        return [[None if row[i] == -torch.inf else row[i].item(), i, None] for i in ids]

    def answer(path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny", "parent": None, "max_model_len": 64}]}
        if path == "/inference/v1/generate":
            options, tokens = body["sampling_params"], body["token_ids"]
            ids = torch.tensor(options["prompt_logprob_token_ids"])
            scores = log_q(model, tokens)[options["prompt_logprob_start"] :].gather(1, ids.clamp_min(0))
            matrix = scores.masked_fill(ids < 0, -torch.inf).numpy()
            return 200, change({"request_id": "x", "choices": [{"index": 0}], "prompt_token_id_logprobs": npy(matrix)})
        assert path == "/generate"
        tokens, start = body["input_ids"], body["logprob_start_len"]
        rows = log_q(model, tokens)[start:]
        own = [[None, tokens[start], None], *(triples(row, [i])[0] for row, i in zip(rows, tokens[start + 1 :], strict=True))]
        meta = {"input_token_logprobs": own, "output_token_logprobs": []}
        if "top_logprobs_num" in body:
            meta["input_top_logprobs"] = [
                None,
                *(triples(row, row.topk(body["top_logprobs_num"]).indices.tolist()) for row in rows),
            ]
        if "token_ids_logprob" in body:
            meta["input_token_ids_logprobs"] = [None, *(triples(row, body["token_ids_logprob"]) for row in rows)]
        return 200, change({"text": "", "meta_info": meta})

    return answer


def given(seed=0, k=4):
    """Ids of three answers, some positions with fewer, one impossible id, and ids after the ends of the answers."""
    ids = torch.randint(0, 20, (3, 6, k), generator=generator(seed))
    ids[0, 0] = torch.arange(k) + 30
    ids[1, 1, 1:], ids[1, 2] = -1, -1
    ids[1, 3, 0] = 20
    return ids


@pytest.mark.parametrize(
    ("teacher", "block"), [(ServedTeacher, 16), (SGLangTeacher, 1), (SGLangTeacher, 2), (SGLangTeacher, 16)]
)
def test_scores_of_given_ids_are_the_model_s_own_log_softmax(teacher, block, model, monkeypatch):
    monkeypatch.setattr(sglang, "BLOCK", block)
    ids = given()
    with scripted(recorded(model)) as (url, _):
        scored = teacher(url).score_ids(CONTEXTS, ANSWERS, ids)
    assert scored.ids.shape == scored.logprobs.shape == (3, 6, 4)
    for b, (context, answer) in enumerate(zip(CONTEXTS, ANSWERS, strict=True)):
        n = len(answer)
        assert (scored.ids[b, n:] == -1).all()
        assert (scored.logprobs[b, n:] == -torch.inf).all()
        assert torch.equal(scored.ids[b, :n], ids[b, :n])
        if n:
            want = log_q(model, context + answer)[len(context) - 1 :].gather(1, ids[b, :n].clamp_min(0))
            want = want.masked_fill(ids[b, :n] < 0, -torch.inf)
            torch.testing.assert_close(scored.logprobs[b, :n], want, rtol=0, atol=1e-5)
    assert scored.logprobs[1, 3, 0] == -torch.inf
    assert scored.logprobs.isfinite().sum() == 4 * 7 - 3 - 4 - 1


@TEACHERS
def test_a_loss_on_the_student_s_top_k_is_that_of_lists_made_here(teacher, model):
    logits = 3 * torch.randn(2, 5, VOCAB, generator=generator(1))
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    ids = logits.topk(4).indices
    with scripted(recorded(model)) as (url, _):
        served = teacher(url).score_ids(CONTEXTS[:2], ANSWERS[:2], ids)
    here = torch.full(ids.shape, -torch.inf)
    for b in range(2):
        rows = log_q(model, CONTEXTS[b] + ANSWERS[b])[len(CONTEXTS[b]) - 1 :]
        here[b, : len(rows)] = rows.gather(1, ids[b, : len(rows)])
    results = []
    for lists in (served, TopKLogprobs(ids, here)):
        x = leaf(logits)
        out = selective_opd_loss(x, lists, mask=mask, fraction=0.5, divergence=LocalSupport(top_k=4), top_k=4)
        out.loss.backward()
        results.append((out.loss, x.grad))
    (loss, grad), (expected_loss, expected_grad) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert (grad - expected_grad).norm() < 1e-5 * expected_grad.norm()
    assert grad.norm() > 0


def test_a_request_for_given_ids_is_what_vllm_documents(model):
    with scripted(recorded(model)) as (url, asked):
        ServedTeacher(url, api_key="secret").score_ids([[3, 5]], [[4, 6]], torch.tensor([[[7, 8], [9, -1]]]))
    (_, _, _), (path, body, key) = asked
    assert (path, key) == ("/inference/v1/generate", "Bearer secret")
    options = body.pop("sampling_params")
    assert body == {"model": "tiny", "token_ids": [3, 5, 4, 6], "stream": False}
    assert options["prompt_logprob_token_ids"] == [[7, 8], [9, -1]]
    assert (options["prompt_logprob_start"], options["max_tokens"], options["temperature"]) == (1, 1, 1.0)


def test_requests_to_sglang_are_what_it_documents(model):
    with scripted(recorded(model)) as (url, asked):
        teacher = SGLangTeacher(url, top_k=3)
        teacher.score([[3, 5]], [[4, 6]])
        teacher.score_ids([[3, 5]], [[4, 6]], torch.tensor([[[9, 8], [7, 9]]]))
    common = {
        "input_ids": [3, 5, 4, 6],
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 1,
        "return_text_in_logprobs": False,
    }
    assert [path for path, _, _ in asked] == ["/v1/models", "/generate", "/generate"]
    assert asked[1][1] == common | {"top_logprobs_num": 3}
    assert asked[2][1] == common | {"token_ids_logprob": [7, 8, 9]}  # all ids of the block, each once


@pytest.mark.parametrize("top_k", [1, 5])
def test_sglang_s_lists_are_the_model_s_top_k_and_the_token(top_k, model):
    with scripted(recorded(model)) as (url, _):
        teacher = SGLangTeacher(url, top_k=top_k)
        teacher.check()
        lists = teacher.score(CONTEXTS, ANSWERS)
    assert lists.ids.shape == (3, 5, top_k + 1)
    for b, (context, answer) in enumerate(zip(CONTEXTS, ANSWERS, strict=True)):
        for i, token in enumerate(answer):
            row = log_q(model, context + answer)[len(context) - 1 + i]
            listed = {k: v for k, v in zip(lists.ids[b, i].tolist(), lists.logprobs[b, i].tolist(), strict=True) if k >= 0}
            assert set(listed) == {token, *row.topk(top_k).indices.tolist()}
            assert listed == pytest.approx({k: row[k].item() for k in listed}, abs=1e-5)
        assert (lists.ids[b, len(answer) :] == -1).all()


def test_the_trainer_learns_from_an_sglang_teacher(tmp_path, model):
    with scripted(recorded(model)) as (url, asked):
        options = {"taught_by": None, "divergence": "tail_aware", "teacher_top_k": 4, "teacher_url": url}
        trainer(tmp_path, steps=1, eval_size=0, teacher_api="sglang", **options).train()
    assert {path for path, _, _ in asked} == {"/v1/models", "/generate"}
    with pytest.raises(ValueError, match="teacher_api: got one without teacher_url"):
        trainer(tmp_path, steps=1, teacher_api="sglang")
    with pytest.raises(ValueError, match="teacher_api: got 'SGLang', expected one of: 'vllm', 'sglang'"):
        trainer(tmp_path, steps=1, **options | {"teacher_api": "SGLang"})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (404, {"error": {"message": "Not Found"}}),
            r"answered 404: Not Found; scores of given ids need a vLLM .*V2_MODEL_RUNNER=1",
        ),
        ((400, {"error": {"message": "unknown field"}}), "answered 400: unknown field; scores of given ids need"),
        (
            StandIn(None)("/inference/v1/generate", {}),
            r"answered 403: Scale-out .* if this is about a key: .*; scores of given ids",
        ),
        ((200, {"choices": []}), "answered without prompt_token_id_logprobs; scores of given ids need .* prefix cache"),
        ((200, {"prompt_token_id_logprobs": None}), "answered without prompt_token_id_logprobs"),
        ((200, {"prompt_token_id_logprobs": "not base64"}), r"cannot be read .*, expected base64 of a .npy array"),
        ((200, {"prompt_token_id_logprobs": base64.b64encode(b"text").decode()}), "cannot be read"),
        ((200, {"prompt_token_id_logprobs": npy(np.array([None]))}), "cannot be read"),  # an object, which needs pickle
        ((200, {"prompt_token_id_logprobs": npy(np.zeros((2, 1), np.float32))}), r"are \(2, 1\) .*, expected fp32 \(1, 2\)"),
        ((200, {"prompt_token_id_logprobs": npy(np.zeros((1, 2), np.int32))}), r"torch.int32, expected fp32 \(1, 2\)"),
        ((200, {"prompt_token_id_logprobs": npy(np.array([[np.nan, -1]], np.float32))}), "have a NaN"),
        (
            (200, {"prompt_token_id_logprobs": npy(np.array([[9.5, -1]], np.float32))}),
            r"has 9.5, .* not logits; .*raw_logprobs",
        ),
    ],
)
def test_an_answer_of_vllm_that_does_not_fit_is_refused(answer, message):
    def server(path, _):
        return (200, {"data": [{"id": "tiny"}]}) if path == "/v1/models" else answer

    with scripted(server) as (url, asked), pytest.raises(ServerError, match=message):
        ServedTeacher(url).score_ids([[3]], [[4]], torch.tensor([[[5, 6]]]))
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (None, r"expected 2 input_token_logprobs and input_token_ids_logprobs in meta_info; is this an SGLang server"),
        ({"input_token_logprobs": [[None, 3, None]]}, r"answered lists of \[1\] entries, expected 2"),
        ({"input_token_ids_logprobs": [None, None]}, r"answered lists of \[2\] entries, expected 2"),
        (
            {"own": [[None, 3, None], [-1.0, 9, None]], "ids": [None, []]},
            r"are of the tokens \[9\] …, expected those of the answer, \[4\]",
        ),
        ({"ids": [None, [[-1.0, 5, None]]]}, r"lists \[5\] …, expected a number for each id asked for, as for \[6\]"),
        ({"ids": [None, [[-1.0, 5, None], [float("nan"), 6, None]]]}, r"expected a number for each id"),
        ({"ids": [None, [[-1.0, 5, None], [3.25, 6, None]]]}, r"has 3.25, expected log-probabilities, at most 0"),
        ({"ids": [None, [[-1.0, "5", None]]]}, r"has \[-1.0, '5', None\], expected \[log-probability, id, text\]"),
        ({"ids": [None, [5]]}, r"has 5, expected \[log-probability, id, text\]"),
        ({"ids": [None, None]}, r"expected \[log-probability, id, text\]"),
    ],
)
def test_an_answer_of_sglang_that_does_not_fit_is_refused(meta, message):
    if meta is not None and {"own", "ids"} & meta.keys():
        own = meta.get("own", [[None, 3, None], [-1.0, 4, None]])
        meta = {"input_token_logprobs": own, "input_token_ids_logprobs": meta["ids"]}

    def server(path, _):
        return (200, {"data": [{"id": "tiny"}]}) if path == "/v1/models" else (200, {"text": "", "meta_info": meta})

    with scripted(server) as (url, _), pytest.raises(ServerError, match=message):
        SGLangTeacher(url).score_ids([[3]], [[4]], torch.tensor([[[5, 6]]]))


@TEACHERS
@pytest.mark.parametrize(
    "ids", [torch.zeros(2, 1, 3), torch.zeros(1, 2, 3).long(), torch.zeros(2, 1, 3).long(), torch.zeros(2, 2).long()]
)
def test_given_ids_of_another_shape_are_refused(teacher, ids):
    with pytest.raises(ValueError, match=r"ids: got \(.*\) torch\.\w+, expected int64 \(2, 2 or more, K\)"):
        teacher("http://x").score_ids([[1], [2]], [[3], [4, 5]], ids)
