"""A run of 500 steps whose server of the teacher is restarted, too slow, busy, broken, cut off in an answer, and renamed.

  Compared: log and final weights with those of the run that nothing disturbed, to the bit; what was logged with the faults;
  memory, threads and files after a fifth of the steps with those at the end.
  Run: make test ARGS=tests/trainer/servers/test_soak.py      (half a minute on two idle cores: the two runs share them)

Not here: each fault alone (test_faults.py).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from opd_ops.trainer import loop
from opd_ops.trainer.servers import retries
from opd_ops.trainer.servers.retries import ServerError
from tests.support.servers import StandIn, prompt_logprobs, scripted
from tests.trainer.runs import trainer

STEPS = 500
OPTIONS = {"taught_by": None, "divergence": "tail_aware", "teacher_top_k": 4, "gradient_accumulation_steps": 1}
OPTIONS |= {
    "max_new_tokens": 2,
    "eval_size": 2,
    "eval_every": STEPS // 5,
    "save_every": 2 * STEPS // 5,
    "server_retry_seconds": 5,
}

TIMEOUT, DOWN = 1.0, 0.4  # seconds: of the client, and of a restart
PASSING = {  # a fault that a run outlives -> what its warning says
    "500": "answered 500: engine",
    "429": "answered 429: busy",
    "half": "the connection broke before the answer was whole",
    "restart": "cannot be reached",
    "slow": "no answer within 1 s",
}
ENDING = {  # a fault that ends the run, which is then resumed -> what its error says
    "gone": "answered 503: gone",
    "renamed": "answered 404: The model `tiny` does not exist",
    "no JSON": "expected JSON",
}
# Fault by the number of the request that meets it; a step has two requests, an evaluation as many.
PLACES = [STEPS * i // 16 for i in range(1, 31)]
AT = dict(zip(PLACES, ["500", "half", "429", "restart", "slow"] * 6, strict=True))
AT |= dict(zip(PLACES[7::8], ENDING, strict=True))


class Faulty:
    """A server at one port, which meets the faults of AT and can be closed and opened again."""

    def __init__(self):
        self.answer, self.lock = StandIn(prompt_logprobs), threading.Lock()
        self.at, self.n, self.is_gone, self.port = dict(AT), 0, False, 0
        self.open()

    def open(self):
        handler = type("BoundHandler", (Handler,), {"faulty": self})
        self.server = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 64})(("127.0.0.1", self.port), handler)
        self.port = self.server.server_port
        threading.Thread(target=partial(self.server.serve_forever, poll_interval=0.02), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def meet(self, body):
        """The fault that this request meets, None for most; a server that closes does so here."""
        if "prompt_logprobs" not in body or self.is_gone:
            return None
        with self.lock:
            self.n += 1
            kind = self.at.pop(self.n, None)
            if kind == "restart":
                self.close()
                threading.Timer(DOWN, self.open).start()
            self.is_gone |= kind == "gone"
            if kind == "renamed":
                self.answer.models = ("small",)
        return kind


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        kind = self.faulty.meet(body)
        if kind == "restart":
            return
        if kind == "slow":
            time.sleep(1.5 * TIMEOUT)
        code, content = self.faulty.answer(self.path, body)
        if kind in ("500", "429"):
            code, content = int(kind), {"error": {"message": {"500": "engine", "429": "busy"}[kind]}}
        if self.faulty.is_gone and body:
            code, content = 503, {"error": {"message": "gone"}}
        content = json.dumps(content).encode()
        if kind == "no JSON":
            content = content[: len(content) // 2]
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            self.wfile.write(content[: len(content) // 2] if kind == "half" else content)
        except OSError:  # a client that did not wait
            self.close_connection = True

    def log_message(self, *_):
        return


def undisturbed(folder):
    """What the other process does."""
    with scripted(StandIn(prompt_logprobs)) as (url, _):
        trainer(folder, steps=STEPS, teacher_url=url, **OPTIONS).train()


def used():
    """Resident memory in MiB, threads and open files of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, threading.active_count(), len(os.listdir("/proc/self/fd"))


@pytest.mark.full
def test_a_long_run_with_a_server_that_fails_in_every_way_is_the_run_without_faults(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(retries, "LONGEST_WAIT", 0.1)
    other = multiprocessing.get_context("fork").Process(target=undisturbed, args=(tmp_path / "undisturbed",))
    other.start()
    use, advance = {}, loop.RunLog.advance

    def advance_and_measure(log, status):
        advance(log, status)
        use[len(use) + 1] = used()

    monkeypatch.setattr(loop.RunLog, "advance", advance_and_measure)
    faulty, ended = Faulty(), []
    for _ in range(len(ENDING) + 1):
        run = trainer(tmp_path / "run", steps=STEPS, teacher_url=f"http://127.0.0.1:{faulty.port}", resume=True, **OPTIONS)
        run.teacher.server.client.timeout = TIMEOUT
        try:
            run.train()
            break
        except ServerError as error:
            ended.append(str(error))
            faulty.is_gone, faulty.answer.models = False, ("tiny",)  # a name stands for the teacher's weights
    faulty.close()
    other.join(120)

    assert faulty.at == {}  # each fault was met
    assert [kind for kind, said in ENDING.items() for text in ended if said in text] == list(ENDING), ended
    assert all("Saved after step" in text for text in ended)
    warnings = [record.getMessage() for record in caplog.records if record.name == "opd_ops"]
    for kind, n in Counter(AT.values()).items():
        if kind in PASSING:
            assert sum(PASSING[kind] in text for text in warnings) >= n, (kind, warnings)

    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("run", "undisturbed")]
    assert logs[0] == logs[1]
    assert [row["step"] for row in map(json.loads, logs[0].splitlines()) if "loss" in row] == list(range(1, STEPS + 1))
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "undisturbed")]
    assert weights[0] == weights[1]

    early, late = use[STEPS // 5], use[STEPS]
    assert late[0] < early[0] + 16, (early, late)
    assert late[1] <= early[1] + 2, (early, late)  # threads of requests that are answered at this moment
    assert late[2] <= early[2] + 4, (early, late)  # and their connections
