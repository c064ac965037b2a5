"""A small OpenAI-compatible server for a teacher, on the standard library: GET /v1/models, POST /v1/completions.

  Beside plain sampling it answers vLLM's "prompt_logprobs": K, which distillation reads: for every token of the prompt but
  the first, log q of the K likeliest tokens and of the token itself, -9999 for -inf; and "return_token_ids". As vLLM does, it
  cuts an answer where the model's context ends.

You will see: the address, and a line for every request. It serves SmolLM2-135M on a CPU, from about 15 s after the start; one
  request after another, well under a second each: for real work serve the teacher with vLLM.
Run: python -m examples.serve_teacher [PORT]; then python -m examples.served_teacher --url http://127.0.0.1:8000

Not here: the client (opd_ops/trainer/servers/teacher.py), the training (served_teacher.py), the weights (smollm2.py).
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from examples import smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "SmolLM2-135M-Instruct"
MAX_LOGPROBS = 20  # vLLM's default too
LEAST_LOGPROB = -9999.0  # JSON has no -inf


class Served(NamedTuple):
    """The served model, its tokenizer and its name."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def prompt_logprobs(logits: Tensor, prompt: list[int], k: int) -> list[dict[str, Any] | None]:
    """For every token of the prompt but the first: the K likeliest in its place, and itself."""
    log_q = logits[:-1].float().log_softmax(-1)
    rows: list[dict[str, Any] | None] = [None]
    for row, token, best in zip(log_q, prompt[1:], log_q.topk(k).indices.tolist(), strict=True):
        listed = dict.fromkeys([token, *best])  # each once, in this order
        rows.append(
            {str(i): {"logprob": max(row[i].item(), LEAST_LOGPROB), "rank": int((row > row[i]).sum()) + 1} for i in listed}
        )
    return rows


def sample(served: Served, out: Any, body: dict[str, Any], end_ids: set[int]) -> list[int]:
    """An answer up to and including its end token, from the model's outputs over the prompt; temperature 0 is greedy."""
    temperature, top_p = body.get("temperature", 1.0), body.get("top_p", 1.0)
    # A generator of its own: a shared one would make answers depend on the other requests, and those who train on them.
    generator = torch.Generator()
    _ = generator.manual_seed(body["seed"]) if body.get("seed") is not None else generator.seed()
    tokens: list[int] = []
    while True:
        logits = out.logits[0, -1].float()
        chosen = logits.argmax() if temperature == 0 else draw((logits / temperature).softmax(-1), top_p, generator)
        tokens.append(int(chosen))
        if len(tokens) == body["max_tokens"] or tokens[-1] in end_ids:
            return tokens
        out = served.model(chosen.view(1, 1), past_key_values=out.past_key_values, use_cache=True)


def draw(p: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """From the fewest likeliest tokens that hold a mass of `top_p`."""
    sorted_p, ids = p.sort(descending=True)
    kept = sorted_p.cumsum(0) - sorted_p < top_p
    return ids[torch.multinomial(sorted_p * kept, 1, generator=generator)]


def context_length(served: Served) -> int:
    """Most tokens of a prompt and its answer."""
    return int(served.model.config.max_position_embeddings)


@torch.no_grad()
def complete(served: Served, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to POST /v1/completions. LookupError: another model; ValueError: what cannot be answered."""
    if body.get("model") != served.name:
        raise LookupError(f"The model `{body.get('model')}` does not exist.")
    prompt, k = body.get("prompt"), body.get("prompt_logprobs")
    tokens = served.tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt
    vocabulary = range(served.model.config.vocab_size)
    if not isinstance(tokens, list) or not tokens or not all(token in vocabulary for token in tokens):
        raise ValueError(f"prompt: expected a text or a list of token ids below {len(vocabulary)}, not empty")
    if k is not None and not 0 <= k <= MAX_LOGPROBS:
        raise ValueError(f"Requested prompt logprobs of {k}, which is greater than max allowed: {MAX_LOGPROBS}")
    room = context_length(served) - len(tokens)
    if room < 1:
        raise ValueError(
            f"This model's maximum context length is {context_length(served)} tokens, the prompt has {len(tokens)}"
        )
    ends = served.model.generation_config.eos_token_id
    end_ids = {*(ends if isinstance(ends, list) else [ends]), *body.get("stop_token_ids", [])}
    out = served.model(torch.tensor([tokens]), use_cache=True)
    answer = sample(served, out, body | {"max_tokens": min(body.get("max_tokens", 16), room)}, end_ids)
    choice = {
        "index": 0,
        "text": served.tokenizer.decode(answer, skip_special_tokens=True),
        "finish_reason": "stop" if end_ids.intersection(answer[-1:]) else "length",
        "prompt_logprobs": None if k is None else prompt_logprobs(out.logits[0], tokens, k),
        "token_ids": answer if body.get("return_token_ids") else None,
    }
    usage = {"prompt_tokens": len(tokens), "completion_tokens": len(answer), "total_tokens": len(tokens) + len(answer)}
    return {"object": "text_completion", "model": served.name, "choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    """The two routes; errors have OpenAI's shape."""

    served: Served
    lock: threading.Lock  # one request computes at a time: torch uses all cores for one as it is

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            return self.reply(404, error=f"no route {self.path}")
        model = {"id": self.served.name, "object": "model", "parent": None, "max_model_len": context_length(self.served)}
        return self.reply(200, object="list", data=[model])

    def do_POST(self) -> None:
        if self.path != "/v1/completions":
            return self.reply(404, error=f"no route {self.path}")
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with self.lock:
                return self.reply(200, **complete(self.served, body))
        except LookupError as error:
            return self.reply(404, error=str(error))
        except ValueError as error:
            return self.reply(400, error=str(error))

    def reply(self, code: int, error: str | None = None, **answer: Any) -> None:
        answer = answer if error is None else {"error": {"message": error, "type": "BadRequestError", "code": code}}
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections that wait: a client sends many requests at once


def make_server(served: Served, port: int = 0) -> Server:
    """Bound to this machine alone; port 0: a free one."""
    handler = type("BoundHandler", (Handler,), {"served": served, "lock": threading.Lock()})
    return Server(("127.0.0.1", port), handler)


@contextmanager
def running(served: Served) -> Iterator[str]:
    """The address of a server in a thread, until the block's end."""
    server = make_server(served)
    server.RequestHandlerClass.log_message = lambda *_: None  # the address is for one program, which has its own log
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    with make_server(Served(*smollm2.load_model(), NAME), int(sys.argv[1]) if len(sys.argv) > 1 else 8000) as server:
        print(f"serving {NAME} at http://127.0.0.1:{server.server_port}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
