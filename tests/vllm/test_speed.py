"""How fast vLLM on this machine's CPUs scores answers for `ServedTeacher`, and where the time goes: in its engine, in its HTTP
process, which writes the JSON, or in the client, which reads it.

  16 contexts of 64 tokens with answers of 256, K = 16, one thread each for server and client; CPU seconds by process.
  Run: make test-vllm ARGS=tests/vllm/test_speed.py

Not here: limits for these times: the machine may be busy. What is asserted is what was asked for.
"""

import json
import time

import torch

from opd_ops.trainer.servers import client
from opd_ops.trainer.servers.teacher import ServedTeacher

N, CONTEXT, ANSWER, K = 16, 64, 256, 16


def random_tokens(seed, length):
    return torch.randint(1000, 40_000, (N, length), generator=torch.Generator().manual_seed(seed)).tolist()


class Reading:
    """Stands for the client's `json`: bytes that came, and the CPU seconds of their `loads`."""

    def __init__(self):
        self.seconds, self.n_bytes = 0.0, 0

    dumps = staticmethod(json.dumps)

    def loads(self, content):
        start = time.thread_time()
        value = json.loads(content)
        self.seconds += time.thread_time() - start
        self.n_bytes += len(content)
        return value


def measured(server, call):
    """(what `call` returns, wall and CPU seconds of client, HTTP process and engine)."""
    before, start, cpu = server.cpu_seconds(), time.perf_counter(), time.process_time()
    result = call()
    seconds = {"wall": time.perf_counter() - start, "client": time.process_time() - cpu}
    return result, seconds | {name: value - before[name] for name, value in server.cpu_seconds().items()}


def test_tokens_a_second_of_a_served_teacher(server, report, monkeypatch):
    teacher = ServedTeacher(server.url, top_k=K, concurrency=N)
    teacher.score(random_tokens(0, 8), random_tokens(1, 8))  # what the first call allocates
    reading = Reading()
    monkeypatch.setattr(client, "json", reading)
    contexts, answers = random_tokens(2, CONTEXT), random_tokens(3, ANSWER)
    lists, scored = measured(server, lambda: teacher.score(contexts, answers))
    monkeypatch.undo()
    # The same work of the model, without lists: other tokens, so that no cache has them.
    body = {"model": "smollm2", **client.WHOLE_DISTRIBUTION, "max_tokens": 1}
    bodies = [{**body, "prompt": tokens} for tokens in random_tokens(4, CONTEXT + ANSWER)]
    _, plain = measured(server, lambda: teacher.client.complete(bodies))
    n, n_sent = N * ANSWER, N * (CONTEXT + ANSWER)
    report["speed"] = {
        "requests": N,
        "context": CONTEXT,
        "answer": ANSWER,
        "top_k": K,
        "answer tokens a second": round(n / scored["wall"], 1),
        "tokens a second, with the context": round(n_sent / scored["wall"], 1),
        "tokens a second without lists": round(n_sent / plain["wall"], 1),
        "KB of JSON a token": round(reading.n_bytes / n_sent / 1000, 3),
        "seconds": {name: round(value, 3) for name, value in scored.items()},
        "seconds without lists": {name: round(value, 3) for name, value in plain.items()},
        "seconds of json.loads in the client": round(reading.seconds, 3),
    }
    assert lists.ids.shape == (N, ANSWER, K + 1)
    assert (lists.ids[:, :, :K] >= 0).all()
    assert reading.n_bytes > n_sent * K
