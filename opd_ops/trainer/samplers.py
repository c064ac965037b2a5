"""Samplers of a step's answers: `generate` on this machine, or a vLLM server that first loads the student's adapters.

  sampler(step, micro_batch) -> Rollouts, a function of the run's seed, the step and the micro-batch (order.py)

Not here: the sampling itself (rollouts.py), the server's protocol (servers/rollouts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from opd_ops.trainer.config import OPDConfig
from opd_ops.trainer.order import prompt_indices, seed_of
from opd_ops.trainer.prompts import Prompt
from opd_ops.trainer.rollouts import Rollouts, SamplingOptions, encode, end_tokens, sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from opd_ops.trainer.rollouts import GenerationOptions
    from opd_ops.trainer.servers.rollouts import ServedRollouts

PromptsOf = Callable[[int, int], list[Prompt]]  # (step, micro-batch) -> prompts


def prompts_by_step(prompts: Sequence[Prompt], config: OPDConfig, n_micro_batches: int) -> PromptsOf:
    """The function (step, micro-batch) -> prompts of a run (order.py)."""
    sizes = {"n_micro_batches": n_micro_batches, "batch_size": config.batch_size, "n_prompts": len(prompts)}
    return lambda step, number: [prompts[i] for i in prompt_indices(step, number, seed=config.seed, **sizes)]


def check_rollout_server(config: OPDConfig, n_processes: int) -> None:
    """Check that the options' rollout server, if there is one, answers and has the model.

    Raises: ValueError: several processes. ServerError: the server cannot be reached, or does not have the model.
    """
    if config.rollout_url is None:
        return
    if n_processes > 1:
        raise ValueError(f"rollout_url: got {n_processes} processes, expected one, since the adapter is one")
    from opd_ops.trainer.servers.client import ServerClient

    key = config.api_key("rollout")
    ServerClient(config.rollout_url, timeout=60, retries=3, concurrency=1, api_key=key).choose(config.rollout_model)


def rollout_server(config: OPDConfig, end_ids: Sequence[int]) -> ServedRollouts:
    """The rollout server that the options name."""
    from opd_ops.trainer.servers.rollouts import ServedRollouts

    assert config.rollout_url is not None
    key = config.api_key("rollout")
    return ServedRollouts(config.rollout_url, end_ids=end_ids, model=config.rollout_model, api_key=key)


def sampling_options(config: OPDConfig) -> SamplingOptions:
    return {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "top_p": config.top_p}


class LocalSampler:
    """Answers of the current student by `generate`; `options` are those of `sample`."""

    def __init__(
        self,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts_of: PromptsOf,
        seed: int,
        **options: Unpack[GenerationOptions],
    ) -> None:
        self.student, self.tokenizer, self.prompts_of, self.seed, self.options = student, tokenizer, prompts_of, seed, options

    def __call__(self, step: int, micro_batch: int) -> Rollouts:
        seed = seed_of(self.seed, "sample", step, micro_batch)
        return sample(self.student, self.tokenizer, self.prompts_of(step, micro_batch), seed=seed, **self.options)


class ServerSampler:
    """Answers of a server with the student's base model. In every step it first loads the current adapters."""

    def __init__(
        self,
        server: ServedRollouts,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts_of: PromptsOf,
        config: OPDConfig,
        folder: Path,
    ) -> None:
        self.server, self.student, self.tokenizer, self.prompts_of = server, student, tokenizer, prompts_of
        self.config, self.folder, self.step = config, folder, -1

    def __call__(self, step: int, micro_batch: int) -> Rollouts:
        if step != self.step:
            self.student.save_pretrained(self.folder)
            self.server.update(self.folder)
            self.step = step
        prompts = self.prompts_of(step, micro_batch)
        ids = [encode(self.tokenizer, [prompt.conversation()])["input_ids"][0].tolist() for prompt in prompts]
        seed = seed_of(self.config.seed, "sample", step, micro_batch)
        answers = [torch.tensor(row) for row in self.server.sample(ids, seed=seed, **sampling_options(self.config))]
        pad = self.tokenizer.pad_token_id
        tokens = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=pad).to(self.student.device)
        return _without_padding(
            Rollouts.of(prompts, tokens, end_tokens(self.student, self.tokenizer)), [len(row) for row in answers]
        )


def _without_padding(rollouts: Rollouts, lengths: Sequence[int]) -> Rollouts:
    """Mask the padding by the answers' lengths: an answer of the greatest length may have no end token before its padding."""
    places = torch.arange(rollouts.tokens.shape[1], device=rollouts.tokens.device)
    return rollouts._replace(mask=rollouts.mask & (places < torch.tensor(lengths, device=places.device).unsqueeze(1)))
