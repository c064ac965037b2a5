"""Sampled answers, and a model's head over them: which hidden state predicts which token.

  left-padded prompt of P columns, then L answer tokens y: hidden state P - 1 + i predicts y[i], for i = 0 ... L - 1
  mask[i] = 1 up to and including the first end token; all tokens after it are padding.

The two models' prompts may differ in length (privileged.py); the answer's tokens are the same for both.
Not here: which prompts (order.py), their text (prompts.py), answers sampled by a server (servers/rollouts.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from opd_ops.inputs.linear_head import LinearHead
from opd_ops.integrations.heads import head_of, last_hidden
from opd_ops.trainer.prompts import Conversation, Prompt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase


DIGESTED = 256  # prompts, for a digest that takes less than a second


class SamplingOptions(TypedDict):
    """How answers are drawn, by `sample` or by a server."""

    max_new_tokens: int
    temperature: float
    top_p: float


class GenerationOptions(SamplingOptions, total=False):
    """Options of `sample`, with two for transformers' `generate`."""

    remove_invalid_values: bool
    synced_gpus: bool


class Rollouts(NamedTuple):
    """Prompts, and one sampled answer to each prompt."""

    prompts: Sequence[Prompt]
    tokens: Tensor  # (B, L) int64, padded on the right
    mask: Tensor  # (B, L) bool: up to and including the end token

    @classmethod
    def of(cls, prompts: Sequence[Prompt], tokens: Tensor, eos_ids: Sequence[int]) -> Rollouts:
        """Answers that end with their first end token."""
        ends = torch.isin(tokens, torch.tensor(list(eos_ids), device=tokens.device)).long()
        return cls(prompts, tokens, ends.cumsum(1) - ends == 0)

    def answers(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The answers' texts."""
        rows = zip(self.tokens, self.mask, strict=True)
        return [tokenizer.decode(tokens[mask], skip_special_tokens=True) for tokens, mask in rows]

    def token_texts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
        """The text of every valid token."""
        rows = zip(self.tokens, self.mask, strict=True)
        return [[tokenizer.decode([i]) for i in tokens[mask].tolist()] for tokens, mask in rows]


def encode(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> BatchEncoding:
    """Left-padded prompts; each ends where the answer begins. Without a chat template: the messages joined by newlines."""
    if tokenizer.chat_template is None:
        texts = ["\n".join(message["content"] for message in conversation) for conversation in conversations]
    else:
        texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    # A chat template writes the special tokens itself.
    adds_special = tokenizer.chat_template is None
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=adds_special)


def context_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, system: str | None = None) -> list[int]:
    """The token ids of one prompt, without padding, as a server reads it."""
    ids: list[int] = encode(tokenizer, [prompt.conversation(system)])["input_ids"][0].tolist()
    return ids


def longest_context(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> int:
    """The number of tokens of the longest prompt."""
    return max((len(context_ids(tokenizer, prompt)) for prompt in prompts), default=0)


def context_digest(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> str:
    """A digest of the token ids of up to DIGESTED prompts, at regular distances."""
    ids = [context_ids(tokenizer, prompt) for prompt in prompts[:: 1 + len(prompts) // DIGESTED]]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that end an answer."""
    config = getattr(model, "generation_config", None)
    ids = None if config is None else config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return list(ids) if isinstance(ids, (list, tuple)) else [] if ids is None else [ids]


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Set torch's global generators to `seed` within this block, and restore them after it; None: do nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def plain_generation(model: PreTrainedModel, end_ids: Sequence[int]) -> Iterator[None]:
    """Within this block, the model's generation_config has only the end tokens.

    A checkpoint's generation_config may have penalties, top_k and so on, and `generate` uses them if a call does not set them.
    Answers would then come from another policy than the trained one.
    """
    from transformers import GenerationConfig

    owners = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    configs = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig(eos_token_id=list(end_ids) or None, bos_token_id=configs[0].bos_token_id)
    try:
        yield
    finally:
        for owner, config in zip(owners, configs, strict=True):
            owner.generation_config = config


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    system: str | None = None,
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    **options: object,
) -> Rollouts:
    """Answers drawn at `temperature` (0: greedy), by default from the whole distribution, as on-policy training needs.

    Args:
        seed: The answers depend on this seed alone; None: on the state of torch's global generators.
        system: The system message for the model; None: the prompts' own.
        logits_processor: Called with the scores of every step, like `RolloutRecorder`, which records statistics for scoring.
        options: More arguments of `generate`, like `synced_gpus`.
    """
    device = model.device
    inputs = encode(tokenizer, [prompt.conversation(system) for prompt in prompts]).to(device)
    arguments: dict[str, object] = {"do_sample": False}
    if temperature > 0:
        arguments = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
    arguments |= {"logits_processor": list(logits_processor), "pad_token_id": tokenizer.pad_token_id}
    was_training = model.training
    model.eval()  # no dropout; and in training mode gradient checkpointing turns the cache off
    with seeded(seed, device), plain_generation(model, end_tokens(model, tokenizer)):
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **arguments, **options)
    model.train(was_training)
    return Rollouts.of(prompts, ids[:, inputs["input_ids"].shape[1] :], end_tokens(model, tokenizer))


def model_inputs(
    tokenizer: PreTrainedTokenizerBase, rollouts: Rollouts, system: str | None = None
) -> tuple[dict[str, Tensor], int]:
    """The model's inputs: prompts, under a system message if there is one, then answers; and the prompts' number of columns."""
    prompts = encode(tokenizer, [prompt.conversation(system) for prompt in rollouts.prompts]).to(rollouts.tokens.device)
    ids = torch.cat((prompts["input_ids"], rollouts.tokens), 1)
    attention = torch.cat((prompts["attention_mask"], torch.ones_like(rollouts.tokens)), 1)
    positions = (attention.cumsum(1) - 1).clamp_min(0)  # padding on the left does not count
    inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": positions}
    return inputs, prompts["input_ids"].shape[1]


def head_over(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Rollouts,
    *,
    system: str | None = None,
    unwrapped: nn.Module | None = None,
) -> LinearHead:
    """The model's head over hidden states (B, L, D) whose row i predicts answer token i.

    Args:
        system: The system message of all prompts; None: the prompts' own.
        unwrapped: The model inside `model`, if `model` is a wrapper whose hooks must run (DDP).
    """
    unwrapped = model if unwrapped is None else unwrapped
    inputs, width = model_inputs(tokenizer, rollouts, system)
    hidden, _ = last_hidden(model, unwrapped, inputs)
    # The last prompt token predicts answer token 0; the last answer token predicts no sampled token.
    return head_of(unwrapped, hidden[:, width - 1 : -1])


def in_bf16(head: LinearHead) -> LinearHead:
    """The same head in bf16; its gradients come back in the dtypes of `head`."""
    bias = None if head.bias is None else head.bias.bfloat16()
    return replace(head, hidden=head.hidden.bfloat16(), weight=head.weight.bfloat16(), bias=bias)
