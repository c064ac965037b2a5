"""A server that follows a script and keeps what it was asked, answers in vLLM's format, and a clock for its clients.

Not here: what is asked of it (tests/trainer/servers/), a server with a model (examples/serve_teacher.py).
"""

import json
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opd_ops.trainer.servers import retries


@contextmanager
def scripted(answer):
    """A server that answers `answer(path, body) -> (code, content, *headers)`; a header is a pair.

    Yields its address, and (path, body, key) of requests.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
            asked.append((self.path, body, self.headers["Authorization"]))
            code, content, *headers = answer(self.path, body)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
            for header in headers:
                self.send_header(*header)
            self.end_headers()
            try:
                self.wfile.write(content)
            except BrokenPipeError:  # a client that did not wait, as one test wants it
                self.close_connection = True

        def log_message(self, *_):
            return

    server = type("Scripted", (ThreadingHTTPServer,), {"request_queue_size": 64})(("127.0.0.1", 0), Handler)
    threading.Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def listed(prompt, logprob=-1.0):
    """prompt_logprobs that hold the prompt's own tokens alone."""
    return [None, *({str(token): {"logprob": logprob, "rank": 1, "decoded_token": "x"}} for token in prompt[1:])]


def prompt_logprobs(body):
    """Top-K lists as vLLM sends them: K entries where the prompt's token is one of them, else K + 1; -9999.0 for -inf."""
    k, rows = body["prompt_logprobs"], [None]
    for position, token in enumerate(body["prompt"][1:], start=1):
        best = [(token + 1 + j) % 64 for j in range(k)]
        logprobs = [-2.5 - j for j in range(k)]
        if position % 2:  # the token is the best one
            best, logprobs = [token, *best[1:]], [-1.0, *logprobs[1:]]
        else:
            best, logprobs = [token, *best], [-6.0, *logprobs]
        if position % 3 == 0 and k > 1:
            logprobs[-1] = -9999.0
        pairs = zip(best, logprobs, strict=True)
        rows.append({str(i): {"logprob": logprob, "rank": 1, "decoded_token": "x"} for i, logprob in pairs})
    return {"prompt_logprobs": rows}


class StandIn:
    """An answer for `scripted` with what vLLM's server does besides completions, which are `choice(body)`.

    It lists loaded adapters among its models, each with the `parent` that base models do not have, and only base models with a
    `max_model_len`; it answers 404 to a model or an adapter that it does not have, and 400 to a name that is loaded already;
    it cuts an answer at the context length, with finish_reason "length"; it answers 403 to scores of given ids, as without
    --enable-scale-out.

    Args:
        fails: Codes that it answers first, to whatever is asked but /v1/models.
        models: Names of its base models.
    """

    def __init__(self, choice, *, fails=(), models=("tiny",), max_model_len=1024):
        self.choice, self.fails, self.models, self.max_model_len = choice, iter(fails), models, max_model_len
        self.adapters = []

    def restart(self):
        """Forget the adapters, as a new process does."""
        self.adapters.clear()

    def __call__(self, path, body):
        if path == "/v1/models":
            bases = [{"id": name, "parent": None, "max_model_len": self.max_model_len} for name in self.models]
            return 200, {"data": bases + [{"id": name, "parent": self.models[0]} for name in self.adapters]}
        code, name = next(self.fails, 200), body.get("lora_name")
        if code != 200:
            return _error(code, "no room")
        if path == "/v1/load_lora_adapter":
            if name in self.adapters:
                return _error(400, f"The lora adapter '{name}' has already been loaded.")
            self.adapters.append(name)
            return 200, f"Success: LoRA adapter '{name}' added successfully.".encode()
        if path == "/v1/unload_lora_adapter":
            if name not in self.adapters:
                return _error(404, f"The lora adapter '{name}' cannot be found.")
            self.adapters.remove(name)
            return 200, f"Success: LoRA adapter '{name}' removed successfully.".encode()
        if path == "/inference/v1/generate":
            return _error(403, "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them.")
        if path != "/v1/completions":
            return _error(404, "Not Found")
        if body["model"] not in (*self.models, *self.adapters):
            return _error(404, f"The model `{body['model']}` does not exist.")
        room = self.max_model_len - len(body["prompt"])
        if room < 1:
            return _error(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        choice = self.choice(body)
        tokens = choice.get("token_ids")
        if tokens is not None and len(tokens) > room:
            choice = choice | {"token_ids": tokens[:room], "finish_reason": "length"}
        return 200, {"choices": [choice]}


def _error(code, message):
    return code, {"error": {"message": message, "type": "x", "param": None, "code": code}}


class Clock:
    """Stands for the time in retries.py: a wait takes none, and is kept in `waits`."""

    def __init__(self, monkeypatch):
        self.now, self.waits = 0.0, []
        monkeypatch.setattr(retries, "time", self)
        monkeypatch.setattr(retries, "pause", self.pause)

    def monotonic(self):
        return self.now

    def pause(self, seconds, _):
        self.now += seconds
        self.waits.append(seconds)
