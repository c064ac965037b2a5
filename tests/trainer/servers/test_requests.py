"""How requests reach a server, over real HTTP on this machine: several at once, tried again, redirected, never answered.

  Run: make test ARGS=tests/trainer/servers/test_requests.py

Not here: requests and answers themselves (test_teacher_and_rollouts.py), runs that outlive faults (test_faults.py).
"""

import socket
import threading
import time

import pytest

from opd_ops.trainer.servers.client import ServerClient
from opd_ops.trainer.servers.retries import ServerError
from opd_ops.trainer.servers.teacher import ServedTeacher
from tests.support.servers import Clock, StandIn, listed, prompt_logprobs, scripted


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Seconds waited between tries; none is, in a test."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return Clock(monkeypatch).waits


def test_several_at_once_keep_their_order():
    lock, under_way, most = threading.Lock(), 0, 0

    def choice(body):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02 * (8 - body["prompt"][0]))  # the first is answered last
        with lock:
            under_way -= 1
        return {"prompt_logprobs": listed(body["prompt"], -float(body["prompt"][0]))}

    with scripted(StandIn(choice)) as (address, _):
        got = ServedTeacher(address, top_k=1, concurrency=4).score([[i] for i in range(1, 9)], [[20]] * 8)
    assert got.logprobs[:, 0, 0].tolist() == [-float(i) for i in range(1, 9)]
    assert 1 < most <= 4


@pytest.mark.parametrize("code", [503, 500, 429])
def test_it_tries_again_after_a_failure_that_passes(waits, code):
    with scripted(StandIn(prompt_logprobs, fails=[code, code])) as (address, asked):
        got = ServedTeacher(address, top_k=1).score([[3]], [[4]])
    assert got.ids[0, 0, 0] == 4
    assert len(asked) == 4
    assert waits == [0.5, 1.0]


def test_it_gives_up_and_says_where(waits):
    with (
        scripted(StandIn(prompt_logprobs, fails=[503] * 9)) as (address, asked),
        pytest.raises(ServerError, match=rf"{address}/v1/completions: answered 503: no room \(tried 4 times in 3 s\)"),
    ):
        ServedTeacher(address, top_k=1, retry_seconds=3).score([[3]], [[4]])
    assert len(asked) == 5
    assert waits == [0.5, 1.0, 1.5]  # the last try is at the end of the three seconds


def test_what_the_request_is_to_blame_for_is_not_tried_again(waits):
    with (
        scripted(StandIn(prompt_logprobs, fails=[400])) as (address, asked),
        pytest.raises(ServerError, match="answered 400: no room"),
    ):
        ServedTeacher(address, top_k=1).score([[3]], [[4]])
    assert len(asked) == 2
    assert not waits


@pytest.mark.parametrize("code", [301, 302, 307])
def test_a_redirect_is_refused_and_its_target_gets_no_key(code, waits):
    with scripted(StandIn(prompt_logprobs)) as (target, asked):
        there = ("Location", f"{target}/v1/completions")
        with scripted(lambda *_: (code, b"", there)) as (address, _):
            client = ServerClient(address, role="teacher", timeout=5.0, retry_seconds=9, concurrency=1, api_key="secret")
            message = rf"{address}/v1/.*: answered {code}: .*; it redirects to '{target}/v1/completions', .* teacher_url"
            for send in (client.models, lambda: client.complete([{}])):
                with pytest.raises(ServerError, match=message):
                    send()
    assert not asked
    assert not waits


def test_a_silent_server_is_not_waited_for():
    held = threading.Event()

    def silent(*_):
        held.wait(10)
        return 200, {}

    with scripted(silent) as (address, _):
        start = time.perf_counter()
        with pytest.raises(ServerError, match=rf"{address}/v1/models: no answer within 0.2 s .*timed out.*the server is up"):
            ServedTeacher(address, timeout=0.2, retry_seconds=0.5).check()
        assert time.perf_counter() - start < 5
        held.set()


def test_requests_under_way_are_not_waited_for_where_one_is_refused():
    """The server answers the second request only once the error has come, or after 5 s."""
    has_failed, is_asked, waited = threading.Event(), threading.Event(), []

    def answer(_, body):
        if body["number"] == 0:
            is_asked.wait(5)
            return 400, {"error": {"message": "no"}}
        is_asked.set()
        waited.append(has_failed.wait(5))
        return 200, {}

    client = ServerClient("http://x", role="teacher", timeout=60.0, retry_seconds=0, concurrency=2, api_key=None)
    with scripted(answer) as (client.url, _):
        with pytest.raises(ServerError, match="answered 400: no"):
            client.post("/x", [{"number": 0}, {"number": 1}])
        has_failed.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(5)
    assert waited == [True]


def test_an_address_where_nothing_is(waits):
    with scripted(StandIn(prompt_logprobs)) as (address, _):
        pass
    with pytest.raises(ServerError, match=rf"{address}/v1/models: cannot be reached .*refused.*; check that") as caught:
        ServedTeacher(address).check()
    assert "timeout" not in str(caught.value)
    assert waits[:6] == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0]
    assert sum(waits) == 120
    assert max(waits) == 10


def test_a_server_that_breaks_the_connection(waits):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up():
            for _ in range(2):
                connection, _ = server.accept()
                connection.recv(65536)
                connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ServerError, match=rf"{address}/v1/models: the connection broke .*; see the server's log"):
            ServedTeacher(address, retry_seconds=0.5).check()
        thread.join()
    assert waits == [0.5]
