"""Answers sampled by a vLLM server that has the student's current weights as a LoRA adapter.

  POST /v1/completions with "return_token_ids": true (vLLM 0.10.2 and newer): the answer's token ids, including the end token,
  so that no text is tokenized a second time.
  POST /v1/load_lora_adapter after every optimizer step: the server must be started with --enable-lora and
  VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and must be able to read the adapter's folder.

Every version of the adapter gets a new name, and the previous version is unloaded. If it were loaded under the old name, vLLM
could use attention caches of the previous weights (vLLM issue 42125), and would read it again at every step (33791).
A server that was restarted has no adapter and answers 404 to its name: then the current adapter is loaded again.

Not here: HTTP (client.py), sampling on this machine (opd_ops/trainer/rollouts.py), the teacher (teacher.py).
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from opd_ops.trainer.servers.client import WHOLE_DISTRIBUTION, ServedModel, ServerClient
from opd_ops.trainer.servers.retries import RETRY_SECONDS, ServerError

ADAPTER = "adapter_config.json"
CLOSING = 10.0  # seconds to wait for a server at the end

_log = logging.getLogger("opd_ops")


class ServedRollouts:
    """Samples from the server's model until the first `update`, then from the adapter that was loaded last.

    Args:
        url: The server's address, with or without `/v1`.
        end_ids: Ids of the tokens that end an answer, like the student's generation_config.eos_token_id; at least one.
        model: The server's name for the student's base model; None: its only model that is no adapter.
        timeout: Longest time without data from the server, in seconds.
        retry_seconds: How long a failed request is sent again, in seconds; 0: never.
        concurrency: Number of requests at the same time.
        api_key: Sent as a bearer token, if the server needs one.
    Raises: ValueError: an argument out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        end_ids: Collection[int],
        model: str | None = None,
        timeout: float = 600.0,
        retry_seconds: float = RETRY_SECONDS,
        concurrency: int = 64,
        api_key: str | None = None,
    ) -> None:
        if not end_ids:
            raise ValueError("end_ids: got none, expected the ids of the tokens that end an answer")
        self.client = ServerClient(
            url, role="rollout", timeout=timeout, retry_seconds=retry_seconds, concurrency=concurrency, api_key=api_key
        )
        self.end_ids, self.model = sorted(end_ids), model
        self.adapter: str | None = None
        # Names are new in every run: the server may still have the adapters of an earlier run.
        self._run, self._n_updates, self._folder = f"opd-{uuid.uuid4().hex[:8]}", 0, Path()
        self._chosen: ServedModel | None = None

    def update(self, adapter_folder: str | Path) -> None:
        """Use this adapter for sampling from now on. Returns when the server has read it.

        Args: adapter_folder: A folder written by PEFT's `save_pretrained`, at a path that the server can read too.
        Raises:
            ValueError: no adapter is there; a fully fine-tuned model cannot be served.
            ServerError: the server refuses the adapter.
        """
        folder = Path(adapter_folder).resolve()
        if not (folder / ADAPTER).is_file():
            raise ValueError(
                f"adapter_folder: {folder} has no {ADAPTER}, expected a LoRA adapter. The whole weights of a fully fine-tuned "
                "student cannot be sent to a server over this API, and its old ones would not be on-policy: train a LoRA "
                "adapter, or sample on this machine"
            )
        self._base()  # before the server lists this adapter too
        # Unload first: a server with room for one adapter would drop the old one itself, and then fail to unload it.
        if self.adapter is not None:
            previous, self.adapter = self.adapter, None  # old weights are not sampled from, also if the next lines fail
            self._unload(previous)
        self._n_updates += 1
        self._folder = folder
        self.adapter = self._load()

    def close(self) -> None:
        """Unload the last adapter. A server that cannot do it, or cannot be reached now, is only a warning."""
        if self.adapter is None:
            return
        previous, self.adapter = self.adapter, None
        client = self.client
        self.client = ServerClient(
            client.url,
            role="rollout",
            timeout=min(client.timeout, CLOSING),
            retry_seconds=0,
            concurrency=client.concurrency,
            api_key=client.api_key,
        )
        try:
            self._unload(previous)
        except ServerError as error:
            _log.warning("%s. The adapter %r may still be loaded", error, previous)
        finally:
            self.client = client

    def _base(self) -> ServedModel:
        if self._chosen is None:
            self._chosen = self.client.choose(self.model)
            self.model = self._chosen.name
        return self._chosen

    def _load(self) -> str:
        """Load the current folder's adapter. Returns the adapter's name."""
        name = f"{self._run}-{self._n_updates}"
        try:
            self.client.command("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self._folder)})
        except ServerError as error:
            # The server refuses a name that it has. No other run uses this name: the answer to an earlier try was lost.
            if error.code == 400 and self._has(name):
                return name
            raise ServerError(
                f"{error}. Loading adapters needs a server started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora, "
                f"--max-lora-rank of at least the adapter's, and {self._folder} visible to it",
                code=error.code,
            ) from error
        return name

    def _unload(self, name: str) -> None:
        """Unload an adapter, if the server has it: a restarted one has not, and the answer to an earlier try may be lost."""
        try:
            self.client.command("/v1/unload_lora_adapter", {"lora_name": name})
        except ServerError as error:
            if error.code != 404 or self._has(name):
                raise

    def _has(self, name: str) -> bool:
        return any(model.name == name for model in self.client.models())

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[list[int]]:
        """One answer to each prompt, as token ids up to and including the end token.

        Args:
            prompts: Token ids; none empty. A prompt may be repeated: each row has its own seed.
            max_new_tokens: Greatest length of an answer, >= 1.
            temperature: >= 0; 0 is greedy. On-policy training needs the whole distribution: 1, with `top_p` 1.
            top_p: In (0, 1].
            seed: Row i is drawn with seed + i; None: with the server's own generator. Pass another seed in every step.
        Raises:
            ValueError: a number out of range.
            ServerError: the server fails, answers without token ids, ends an answer in another way than requested, or cuts it
                short because prompt and answer are longer than its model takes.
        """
        if not max_new_tokens >= 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, expected an integer of at least 1")
        if not temperature >= 0:
            raise ValueError(f"temperature: got {temperature!r}, expected a number >= 0")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: got {top_p!r}, expected a number in (0, 1]")
        if self.adapter is None and self._n_updates:
            raise ServerError(f"{self.client.url}: the student's last adapter was not loaded; call update() with one that is")
        body: dict[str, object] = {**WHOLE_DISTRIBUTION, "temperature": temperature, "top_p": top_p}
        body |= {"max_tokens": max_new_tokens, "n": 1, "stop_token_ids": self.end_ids, "return_token_ids": True}
        seeds = [{} if seed is None else {"seed": (seed + i) % 2**63} for i in range(len(prompts))]
        bodies = [
            {**body, **row_seed, "prompt": [int(token) for token in prompt]}
            for prompt, row_seed in zip(prompts, seeds, strict=True)
        ]
        choices = zip(prompts, self._complete(bodies), strict=True)
        return [self._tokens(choice, len(prompt), max_new_tokens) for prompt, choice in choices]

    def _complete(self, bodies: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
        """The choices of the current adapter, which is loaded again once if the server has forgotten it."""
        base = self._base().name
        try:
            return self.client.complete([{**body, "model": self.adapter or base} for body in bodies])
        except ServerError as error:
            if error.code != 404 or self.adapter is None or self._has(self.adapter):
                raise
            _log.warning("%s. The server was restarted: loading the adapter again", error)
        self.adapter = self._load()
        return self.client.complete([{**body, "model": self.adapter} for body in bodies])

    def _tokens(self, choice: Mapping[str, object], n_prompt: int, most: int) -> list[int]:
        where, tokens, reason = f"{self.client.url}/v1/completions", choice.get("token_ids"), choice.get("finish_reason")
        if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
            raise ServerError(f"{where}: answered without token_ids; serve the student with vLLM 0.10.2 or newer")
        if reason == "length" and len(tokens) < most:
            length = self._base().max_length
            known = "which /v1/models does not say" if length is None else str(length)
            raise ServerError(
                f"{where}: cut the answer after {len(tokens)} of {most} tokens; expected prompt ({n_prompt}) + answer ({most}) "
                f"= {n_prompt + most} tokens to fit its max_model_len, {known}. Serve it with a larger --max-model-len, pass "
                "shorter prompts or answers (opd-train: max_new_tokens), or, if the model's generation_config.json has a "
                "max_new_tokens, serve it with --generation-config vllm"
            )
        ended = bool(tokens) and tokens[-1] in self.end_ids
        goes_on = any(token in self.end_ids for token in tokens[:-1])
        if not 1 <= len(tokens) <= most or goes_on or not (reason == "length" or (reason == "stop" and ended)):
            raise ServerError(
                f"{where}: answered {len(tokens)} tokens with finish_reason {reason!r}, the last {tokens[-1:]}; expected "
                f"{most}, cut off by length, or at most so many that end with the first of {self.end_ids} (end_ids)"
            )
        return tokens
