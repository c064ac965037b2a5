"""Answers sampled by a vLLM server that has the student's current weights as a LoRA adapter.

  POST /v1/completions with "return_token_ids": true (vLLM 0.10.2 and newer): the answer's token ids, including the end token,
  so that no text is tokenized a second time.
  POST /v1/load_lora_adapter after every optimizer step: the server must be started with --enable-lora and
  VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and must be able to read the adapter's folder.

Every version of the adapter gets a new name, and the previous version is unloaded. If it were loaded under the old name, vLLM
could use attention caches of the previous weights (vLLM issue 42125), and would read it again at every step (33791).

Tested with a server that records the requests, since vLLM needs a GPU (tests/trainer/test_served.py); not yet tested with vLLM
itself. Not here: HTTP (client.py), sampling on this machine (opd_ops/trainer/rollouts.py), the teacher (teacher.py).
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from opd_ops.trainer.servers.client import WHOLE_DISTRIBUTION, ServerClient, ServerError

ADAPTER = "adapter_config.json"


class ServedRollouts:
    """Samples from the server's model until the first `update`, then from the adapter that was loaded last.

    Args:
        url: The server's address, with or without `/v1`.
        end_ids: Ids of the tokens that end an answer, like the student's generation_config.eos_token_id; at least one.
        model: The server's name for the student's base model; None: its only model.
        timeout, retries, concurrency, api_key: As in `ServerClient`.
    Raises: ValueError: an argument out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        end_ids: Collection[int],
        model: str | None = None,
        timeout: float = 600.0,
        retries: int = 3,
        concurrency: int = 64,
        api_key: str | None = None,
    ) -> None:
        if not end_ids:
            raise ValueError("end_ids: got none, expected the ids of the tokens that end an answer")
        self.client = ServerClient(url, timeout=timeout, retries=retries, concurrency=concurrency, api_key=api_key)
        self.end_ids, self.model = sorted(end_ids), model
        self.adapter: str | None = None
        # Names are new in every run: the server may still have the adapters of an earlier run.
        self._run, self._n_updates, self._is_known = f"opd-{uuid.uuid4().hex[:8]}", 0, False

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
        # Unload first: a server with room for one adapter would drop the old one itself, and then fail to unload it.
        if self.adapter is not None:
            previous, self.adapter = self.adapter, None
            self.client.command("/v1/unload_lora_adapter", {"lora_name": previous})
        self._n_updates += 1
        name = f"{self._run}-{self._n_updates}"
        try:
            self.client.command("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except ServerError as error:
            raise ServerError(
                f"{error}. Loading adapters needs a server started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora, "
                f"--max-lora-rank of at least the adapter's, and {folder} visible to it"
            ) from error
        self.adapter = name

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
            ServerError: the server fails, answers without token ids, or ends an answer in another way than requested.
        """
        if not max_new_tokens >= 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, expected an integer of at least 1")
        if not temperature >= 0:
            raise ValueError(f"temperature: got {temperature!r}, expected a number >= 0")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: got {top_p!r}, expected a number in (0, 1]")
        if self.adapter is None and self._n_updates:
            raise ServerError(f"{self.client.url}: the student's last adapter was not loaded; call update() with one that is")
        if not self._is_known:
            self.model, self._is_known = self.client.choose(self.model), True
        body: dict[str, object] = {
            "model": self.adapter or self.model,
            **WHOLE_DISTRIBUTION,
            "temperature": temperature,
            "top_p": top_p,
        }
        body |= {"max_tokens": max_new_tokens, "n": 1, "stop_token_ids": self.end_ids, "return_token_ids": True}
        seeds = [{} if seed is None else {"seed": (seed + i) % 2**63} for i in range(len(prompts))]
        bodies = [
            {**body, **row_seed, "prompt": [int(token) for token in prompt]}
            for prompt, row_seed in zip(prompts, seeds, strict=True)
        ]
        return [self._tokens(choice, max_new_tokens) for choice in self.client.complete(bodies)]

    def _tokens(self, choice: Mapping[str, object], most: int) -> list[int]:
        where, tokens, reason = f"{self.client.url}/v1/completions", choice.get("token_ids"), choice.get("finish_reason")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise ServerError(f"{where}: answered without token_ids; serve the student with vLLM 0.10.2 or newer")
        ended = bool(tokens) and tokens[-1] in self.end_ids
        if not 1 <= len(tokens) <= most or not (reason == "length" or (reason == "stop" and ended)):
            raise ServerError(
                f"{where}: answered {len(tokens)} tokens with finish_reason {reason!r}, the last {tokens[-1:]}; expected 1 to "
                f"{most}, cut off by length or ended by one of {self.end_ids} (end_ids)"
            )
        return tokens
