"""A server that follows a script and keeps what it was asked, and answers in vLLM's format.

Not here: what is asked of it (trainer/test_served.py), a server with a model (examples/serve_teacher.py).
"""

import json
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def scripted(answer):
    """A server that answers `answer(path, body) -> (code, content)`; yields its address, and (path, body, key) of requests."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
            asked.append((self.path, body, self.headers["Authorization"]))
            code, content = answer(self.path, body)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
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


def serving(choice, *, fails=(), models=("tiny",)):
    """An answer for `scripted`: its models, then `choice(body)` for completions, after the codes of `fails`."""
    codes = iter(fails)

    def answer(path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": name} for name in models]}
        code = next(codes, 200)
        if code != 200:
            return code, {"error": {"message": "no room", "type": "x", "code": code}}
        return (200, {"choices": [choice(body)]}) if path == "/v1/completions" else (200, b"Success: LoRA adapter added")

    return answer


def prompt_logprobs(body):
    return {"prompt_logprobs": listed(body["prompt"])}
