"""A teacher and rollouts behind a server, over real HTTP on this machine: a small server with a tiny model, and one that
follows a script and keeps what it was asked.

  Compared: what the served teacher sends with the model's own log-softmax; the loss and gradient from it with those from
  lists made here; served answers with `generate`; requests with vLLM's format.
  Run: make test ARGS=tests/trainer/servers/test_teacher_and_rollouts.py

Not here: how requests are sent (test_requests.py), faults of servers in a run (test_faults.py),
the training with a served teacher (examples/test_demo.py).
"""

import re

import pytest
import torch

from examples.serve_teacher import MAX_LOGPROBS, Served, Server, draw, running
from opd_ops import TailAware, TopKLogprobs, selective_opd_loss
from opd_ops.trainer.servers.client import WHOLE_DISTRIBUTION, ServerClient
from opd_ops.trainer.servers.retries import ServerError
from opd_ops.trainer.servers.rollouts import ServedRollouts
from opd_ops.trainer.servers.teacher import ServedTeacher
from tests.integrations.models import VOCAB, language_model, tokenizer
from tests.support.cases import generator, leaf
from tests.support.servers import Clock, StandIn, listed, prompt_logprobs, scripted

CONTEXTS, ANSWERS = [[5, 6, 7], [9], [4, 8]], [[10, 11], [12, 13, 14, 15], []]
END = 1


@pytest.fixture(scope="module")
def model():
    return language_model(3).eval()


@pytest.fixture(scope="module")
def url(model):
    with running(Served(model, tokenizer(), "tiny")) as address:
        yield address


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Seconds waited between tries; none is, in a test."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return Clock(monkeypatch).waits


def client_of(address):
    return ServerClient(address, role="teacher", timeout=5.0, retry_seconds=0, concurrency=1, api_key=None)


def log_q(model, context, answer):
    """(len(answer), V), from one plain forward."""
    with torch.no_grad():
        return model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1].log_softmax(-1)


# --- the teacher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 4, MAX_LOGPROBS])
def test_score_is_the_model_s_own_log_softmax(model, url, top_k):
    result = ServedTeacher(url, top_k=top_k).score(CONTEXTS, ANSWERS)
    assert result.ids.shape == result.logprobs.shape == (3, 4, top_k + 1)
    assert result.temperature == 1.0
    for row, (context, answer) in enumerate(zip(CONTEXTS, ANSWERS, strict=True)):
        want = log_q(model, context, answer) if answer else []
        for i, token in enumerate(answer):
            top = want[i].topk(top_k)
            got = {k: v for k, v in zip(result.ids[row, i].tolist(), result.logprobs[row, i].tolist(), strict=True) if k >= 0}
            assert set(got) == {token, *top.indices.tolist()}
            for k, v in got.items():
                assert v == pytest.approx(want[i, k].item(), abs=1e-5)
        assert (result.ids[row, len(answer) :] == -1).all()
        assert (result.logprobs[row, len(answer) :] == -torch.inf).all()


def test_score_without_any_answer_asks_for_none():
    with scripted(StandIn(prompt_logprobs)) as (address, asked):
        assert ServedTeacher(address, top_k=2).score([[1], [2]], [[], []]).ids.shape == (2, 0, 3)
    assert [path for path, _, _ in asked] == ["/v1/models"]


def test_the_loss_is_that_of_lists_made_here(model, url):
    logits = torch.randn(2, 4, VOCAB, generator=generator(0))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    served = ServedTeacher(url, top_k=4).score(CONTEXTS[:2], ANSWERS[:2])
    ids, logprobs = torch.zeros(2, 4, 4, dtype=torch.long), torch.full((2, 4, 4), -torch.inf)
    for row in range(2):
        top = log_q(model, CONTEXTS[row], ANSWERS[row]).topk(4)
        ids[row, : len(top.indices)], logprobs[row, : len(top.values)] = top.indices, top.values
    results = []
    for teacher in (served, TopKLogprobs(ids, logprobs)):
        x = leaf(logits)
        out = selective_opd_loss(x, teacher, mask=mask, fraction=0.5, divergence=TailAware(top_k=4), top_k=4)
        out.loss.backward()
        results.append((out, x.grad))
    (got, got_gradient), (want, want_gradient) = results
    assert torch.equal(got.selected, want.selected)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
    assert (got_gradient - want_gradient).norm() < 1e-5 * want_gradient.norm()
    with pytest.raises(ValueError, match=r"temperature: got 0.7, but .* holds log-probabilities at 1"):
        selective_opd_loss(logits, served, mask=mask, divergence=TailAware(top_k=4), temperature=0.7)


def test_what_vllm_sends_for_minus_infinity_is_missing():
    with scripted(StandIn(lambda body: {"prompt_logprobs": listed(body["prompt"], -9999.0)})) as (address, _):
        got = ServedTeacher(address, top_k=2).score([[3]], [[4]])
    assert got.ids.tolist() == [[[-1, -1, -1]]]
    assert (got.logprobs == -torch.inf).all()


def test_a_request_is_what_vllm_reads():
    with scripted(StandIn(prompt_logprobs)) as (address, asked):
        ServedTeacher(f"{address}/v1/", top_k=2, api_key="secret").score([[3, 5]], torch.tensor([[4]]))
    assert [(path, key) for path, _, key in asked] == [("/v1/models", "Bearer secret"), ("/v1/completions", "Bearer secret")]
    expected = {"model": "tiny", "prompt": [3, 5, 4], "max_tokens": 1, "prompt_logprobs": 2, **WHOLE_DISTRIBUTION}
    assert asked[1][1] == expected
    assert WHOLE_DISTRIBUTION["temperature"] == WHOLE_DISTRIBUTION["top_p"] == WHOLE_DISTRIBUTION["repetition_penalty"] == 1
    assert WHOLE_DISTRIBUTION["top_k"] == -1  # all of them, for every version of vLLM


def test_check_finds_the_only_model(url):
    teacher = ServedTeacher(url, top_k=4)
    teacher.check()
    assert teacher.model == "tiny"
    with pytest.raises(ServerError, match=rf"{url}: serves 'tiny', asked for 'large'; pass model= as one of these"):
        ServedTeacher(url, model="large").check()
    with pytest.raises(
        ServerError, match="answered 400: Requested prompt logprobs of 21, which is greater than max allowed: 20"
    ):
        ServedTeacher(url, top_k=21).check()


def test_check_asks_which_of_several_models():
    with scripted(StandIn(prompt_logprobs, models=("a", "b"))) as (address, _):
        with pytest.raises(ServerError, match="serves 'a', 'b', asked for None"):
            ServedTeacher(address).check()
        ServedTeacher(address, model="b").check()


def test_check_refuses_what_is_no_distribution():
    def choice(body):
        row = {str(i): {"logprob": -0.1 - i / 100} for i in range(3)}
        return {"prompt_logprobs": [None, row]}

    with (
        scripted(StandIn(choice)) as (address, _),
        pytest.raises(ServerError, match=r"holds a mass of 2.6\d+, expected at most 1; start the server with --logprobs-mode"),
    ):
        ServedTeacher(address, top_k=2).check()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "answered without prompt_logprobs; serve the teacher with vLLM: .*--max-logprobs 2"),
        ({"prompt_logprobs": [None, {}]}, "answered 2 prompt_logprobs for 3 tokens, expected one each"),
        ({"prompt_logprobs": [None, None, None]}, r"prompt_logprobs\[2\] is None, expected {token id"),
        ({"prompt_logprobs": [None, None, {"5": -1.0}]}, r"prompt_logprobs\[2\] is {'5': -1.0}, expected {token id"),
        ({"prompt_logprobs": [None, None, {"w": {"logprob": -1}}]}, r"prompt_logprobs\[2\] is {'w'"),
        ({"prompt_logprobs": [None, None, {"6": {"logprob": -1}}]}, r"lists 1 tokens, \[6\] …, expected the top 2 and token 5"),
        (
            {"prompt_logprobs": [None, None, {"5": {"logprob": float("nan")}}]},
            r"lists 1 tokens, \[5\] …, .* each once and with a number",
        ),
        ({"prompt_logprobs": [None, None, {"5": {"logprob": -9}, "05": {"logprob": -8}}]}, r"lists 2 tokens, \[5, 5\] …"),
        ({"prompt_logprobs": [None, None, {"5": {"logprob": -9}, "-7": {"logprob": -8}}]}, r"lists 2 tokens, \[-7, 5\] …"),
        ({"prompt_logprobs": [None, None, {"5": {"logprob": -9}, str(2**33): {"logprob": -8}}]}, r"\[5, 8589934592\] …"),
        ({"prompt_logprobs": [None, None, {str(i): {"logprob": -9} for i in range(2, 6)}]}, "lists 4 tokens"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(choice, message):
    with scripted(StandIn(lambda _: choice)) as (address, _), pytest.raises(ServerError, match=message):
        ServedTeacher(address, top_k=2).score([[3, 4]], [[5]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "/v1/models: answered <html>, expected JSON; is this the API's address"),
        ({"object": "list"}, "/v1/models: answered .*, expected a list of models"),
        ([], "/v1/models: answered .*, expected a list of models"),
        ({"data": ["tiny"]}, "/v1/models: answered .*, expected a list of models"),
    ],
)
def test_an_address_of_something_else_is_refused(content, message):
    with scripted(lambda *_: (200, content)) as (address, _), pytest.raises(ServerError, match=message):
        ServedTeacher(address).check()


@pytest.mark.parametrize("content", [{}, {"choices": []}, {"choices": [{}, {}]}, [1]])
def test_more_or_less_than_one_choice_is_refused(content):
    with (
        scripted(lambda *_: (200, content)) as (address, _),
        pytest.raises(ServerError, match=r"/v1/completions: answered .*, expected one choice"),
    ):
        client_of(address).complete([{}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url: got 'localhost:8000', expected an address as 'http://teacher:8000'"),
        *(
            ({"url": url}, f"^url: got {re.escape(repr(url))}, expected an address as")
            for url in ("http://", "http://x:80a0", "http://x:0", "http://x:70000", "http://a b:1", "http://x\n", "http://[::1")
        ),
        ({"url": "http://user:secret@x:8000"}, "^url: got an address with '@', expected one without user and password"),
        ({"top_k": 0}, "top_k: got 0, expected an integer of at least 1"),
        ({"timeout": 0.0}, "timeout: got 0.0, expected a number of seconds > 0"),
        ({"retry_seconds": -1}, "retry_seconds: got -1, expected a finite number of seconds >= 0"),
        ({"concurrency": 0}, "concurrency: got 0, expected an integer of at least 1"),
        ({"api_key": "SECRET\n"}, "^api_key: got 7 characters, expected visible ASCII alone; .* teacher_api_key_env"),
        ({"api_key": "schlüssel"}, "^api_key: got 9 characters"),
        ({"api_key": ""}, "^api_key: got 0 characters"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ServedTeacher(**{"url": "http://x", **options})


def test_contexts_must_fit_the_answers():
    with pytest.raises(ValueError, match="answers: got 1, expected one for each of the 2 contexts"):
        ServedTeacher("http://x").score([[1], [2]], [[3]])
    with pytest.raises(ValueError, match="contexts: number 1 is empty, expected a token at least"):
        ServedTeacher("http://x").score([[1], []], [[3], [4]])


# --- rollouts --------------------------------------------------------------------------------------------------------


def sampled(*tokens, reason="length"):
    return lambda _: {"token_ids": list(tokens), "finish_reason": reason}


def test_greedy_answers_are_those_of_generate(model, url):
    prompts = [[5, 6, 7], [9, 4]]
    got = ServedRollouts(url, end_ids=[END]).sample(prompts, max_new_tokens=12, temperature=0.0)
    for prompt, answer in zip(prompts, got, strict=True):
        want = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert answer == want.tolist()
    cut = got[0].index(got[0][3]) + 1
    assert ServedRollouts(url, end_ids=[END, got[0][3]]).sample(prompts[:1], max_new_tokens=12, temperature=0.0) == [
        got[0][:cut]
    ]


def test_a_seed_decides_the_answers_and_every_row_has_its_own(url):
    rollouts = ServedRollouts(url, end_ids=[END])
    first, again, other = (rollouts.sample([[5, 6]] * 3, max_new_tokens=8, seed=seed) for seed in (7, 7, 70))
    assert first == again != other
    assert first[0] != first[1]


def test_draw_takes_the_fewest_tokens_that_hold_top_p():
    p = torch.tensor([0.1, 0.5, 0.05, 0.35])
    got = [{int(draw(p, top_p, generator(i))) for i in range(200)} for top_p in (0.4, 0.8, 1.0)]
    assert got == [{1}, {1, 3}, {0, 1, 2, 3}]


def test_a_sampling_request_is_what_vllm_reads():
    with scripted(StandIn(sampled(4, END, reason="stop"))) as (address, asked):
        rollouts = ServedRollouts(address, end_ids={END, 0})
        assert rollouts.sample([[3], [5]], max_new_tokens=9, temperature=0.5, top_p=0.9, seed=11) == [[4, END]] * 2
        rollouts.sample([[3]], max_new_tokens=9)
    bodies = sorted((body for path, body, _ in asked if path == "/v1/completions"), key=lambda body: body.get("seed", 0))
    common = {
        "model": "tiny",
        "n": 1,
        "max_tokens": 9,
        "return_token_ids": True,
        "stop_token_ids": [0, END],
        **WHOLE_DISTRIBUTION,
    }
    assert bodies[0] == {**common, "prompt": [3]}
    assert bodies[1:] == [{**common, "temperature": 0.5, "top_p": 0.9, "prompt": [3 + 2 * i], "seed": 11 + i} for i in range(2)]


def adapter(folder):
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    return folder


def test_every_adapter_gets_a_name_of_its_own_and_the_last_is_unloaded(tmp_path):
    with scripted(StandIn(sampled(4))) as (address, asked):
        rollouts = ServedRollouts(address, end_ids=[END])
        for _ in range(2):
            rollouts.sample([[3]], max_new_tokens=1)
            rollouts.update(adapter(tmp_path))
        rollouts.sample([[3]], max_new_tokens=1)
        another = ServedRollouts(address, end_ids=[END])
        another.update(tmp_path)
    assert [path.removeprefix("/v1/") for path, _, _ in asked] == [
        "models", "completions", "load_lora_adapter", "completions", "unload_lora_adapter", "load_lora_adapter", "completions",
        "models", "load_lora_adapter",
    ]  # fmt: skip
    (_, first, _), (_, gone, _), (_, second, _), (_, third, _) = [asked[i] for i in (2, 4, 5, 8)]
    assert first == {"lora_name": first["lora_name"], "lora_path": str(tmp_path.resolve())}
    assert gone == {"lora_name": first["lora_name"]}
    assert len({first["lora_name"], second["lora_name"], third["lora_name"], "tiny"}) == 4
    assert [asked[i][1]["model"] for i in (1, 3, 6)] == ["tiny", first["lora_name"], second["lora_name"]]


def test_an_adapter_that_is_not_loaded_is_not_sampled_around(tmp_path, waits):
    with scripted(StandIn(sampled(4), fails=[500])) as (address, asked):
        rollouts = ServedRollouts(address, end_ids=[END])
        with pytest.raises(
            ServerError, match=r"answered 500: no room. Loading adapters needs .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        ):
            rollouts.update(adapter(tmp_path))
        assert [path for path, _, _ in asked] == ["/v1/models", "/v1/load_lora_adapter"]  # 500 to a command: sent once
        assert not waits
        with pytest.raises(ServerError, match="the student's last adapter was not loaded; call update"):
            rollouts.sample([[3]], max_new_tokens=1)
        rollouts.update(tmp_path)
        assert rollouts.sample([[3]], max_new_tokens=1) == [[4]]


def test_full_fine_tuning_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"adapter_folder: .* has no adapter_config.json, expected a LoRA adapter. The whole weights"
    ):
        ServedRollouts("http://x", end_ids=[END]).update(tmp_path)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"text": "hm", "finish_reason": "length"}, "answered without token_ids; serve the student with vLLM 0.10.2 or newer"),
        ({"token_ids": ["4"], "finish_reason": "length"}, "answered without token_ids"),
        ({"token_ids": [4, True], "finish_reason": "length"}, "answered without token_ids"),
        ({"token_ids": [4, -4], "finish_reason": "length"}, "answered without token_ids"),
        ({"token_ids": [END, 4], "finish_reason": "length"}, r"or at most so many that end with the first of \[1\]"),
        (
            {"token_ids": [4], "finish_reason": "stop"},
            r"answered 1 tokens with finish_reason 'stop', the last \[4\]; expected 2, cut off by",
        ),
        ({"token_ids": [4], "finish_reason": "abort"}, "with finish_reason 'abort'"),
        ({"token_ids": [], "finish_reason": "stop"}, "answered 0 tokens"),
        (
            {"token_ids": [4, 5, 6], "finish_reason": "length"},
            r"answered 3 tokens .* cut off by length, or at most so many that end with the first of \[1\]",
        ),
    ],
)
def test_an_answer_without_its_tokens_is_refused(choice, message):
    with scripted(StandIn(lambda _: choice)) as (address, _), pytest.raises(ServerError, match=message):
        ServedRollouts(address, end_ids=[END]).sample([[3]], max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, expected an integer of at least 1"),
        ({"temperature": -1.0}, "temperature: got -1.0, expected a number >= 0"),
        ({"top_p": 0.0}, r"top_p: got 0.0, expected a number in \(0, 1\]"),
    ],
)
def test_sampling_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ServedRollouts("http://x", end_ids=[END]).sample([[3]], **{"max_new_tokens": 2, **options})
    with pytest.raises(ValueError, match="end_ids: got none"):
        ServedRollouts("http://x", end_ids=[])


# --- the small server ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/chat", {}, "answered 404: no route /v1/chat"),
        ("/v1/completions", {"model": "large"}, "answered 404: The model `large` does not exist"),
        (
            "/v1/completions",
            {"model": "tiny", "prompt": []},
            "answered 400: prompt: expected a text or a list of token ids below",
        ),
        ("/v1/completions", {"model": "tiny", "prompt": [VOCAB]}, f"answered 400: prompt: .* ids below {VOCAB}, not empty"),
    ],
)
def test_the_small_server_refuses_as_openai_does(url, path, body, message):
    client = client_of(url)
    with pytest.raises(ServerError, match=message):
        client.command(path, body)


def test_the_small_server_reads_text_too(url):
    client = client_of(url)
    body = {"model": "tiny", "max_tokens": 3, "temperature": 0, "return_token_ids": True}
    by_text, by_ids = client.complete([{**body, "prompt": "w5 w6"}, {**body, "prompt": [5, 6]}])
    assert by_text["token_ids"] == by_ids["token_ids"]
    assert by_text["text"].startswith("w")
    assert Server.request_queue_size > 64  # requests that `ServedRollouts` sends at once, not refused
