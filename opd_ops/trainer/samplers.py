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
from opd_ops.trainer.rollouts import Rollouts, SamplingOptions, context_ids, end_tokens, longest_context, sample

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


def check_rollout_server(
    config: OPDConfig, n_processes: int, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> None:
    """Check that the options' rollout server, if there is one, answers, and that its model takes the longest prompt and answer.

    Raises: ValueError: several processes. ServerError: the server cannot be reached, does not have the model, or the model is
        too short.
    """
    if config.rollout_url is None:
        return
    if n_processes > 1:
        raise ValueError(f"rollout_url: got {n_processes} processes, expected one, since the adapter is one")
    client = rollout_server(config, [0]).client  # the tokens that end an answer are those of a model that is not loaded yet
    chosen = client.choose(config.rollout_model)
    longest = longest_context(tokenizer, prompts)
    what = f"longest prompt ({longest}) + max_new_tokens ({config.max_new_tokens})"
    client.check_length(chosen, longest + config.max_new_tokens, what)


def rollout_server(config: OPDConfig, end_ids: Sequence[int]) -> ServedRollouts:
    """The rollout server that the options name."""
    from opd_ops.trainer.servers.rollouts import ServedRollouts

    assert config.rollout_url is not None
    return ServedRollouts(
        config.rollout_url,
        end_ids=end_ids,
        model=config.rollout_model,
        retry_seconds=config.server_retry_seconds,
        api_key=config.api_key("rollout"),
    )


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
        ids = [context_ids(self.tokenizer, prompt) for prompt in prompts]
        seed = seed_of(self.config.seed, "sample", step, micro_batch)
        answers = [torch.tensor(row) for row in self.server.sample(ids, seed=seed, **sampling_options(self.config))]
        pad = self.tokenizer.pad_token_id
        tokens = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=pad).to(self.student.device)
        return _without_padding(
            Rollouts.of(prompts, tokens, end_tokens(self.student, self.tokenizer)), [len(row) for row in answers]
        )

    def close(self) -> None:
        """Unload the last adapters from the server."""
        self.server.close()


def _without_padding(rollouts: Rollouts, lengths: Sequence[int]) -> Rollouts:
    """Mask the padding by the answers' lengths: an answer of the greatest length may have no end token before its padding."""
    places = torch.arange(rollouts.tokens.shape[1], device=rollouts.tokens.device)
    return rollouts._replace(mask=rollouts.mask & (places < torch.tensor(lengths, device=places.device).unsqueeze(1)))
