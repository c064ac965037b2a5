# Sampled answers, and a model's head over them: which hidden state predicts which token.
#
#   left-padded prompt of P columns, then L answer tokens y: hidden state P - 1 + i predicts y[i], for i = 0 ... L - 1
#   mask[i] = 1 up to and including the first end token; what comes after it is padding.
#
# Not here: the prompts' text (smollm2.py), training on the answers (prompt_distillation.py).
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from examples import smollm2
from opd_ops import LinearHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Rollouts(NamedTuple):
    """Questions and one sampled answer to each."""

    questions: Sequence[str]
    tokens: Tensor  # (B, L) int64, padded on the right
    mask: Tensor  # (B, L) bool: up to and including the end token


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    n_tokens: int,
    *,
    greedy: bool = False,
    instruction: str | None = None,
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
) -> Rollouts:
    """Answers drawn from the whole distribution at temperature 1, as on-policy training needs, or the greedy ones.

    `logits_processor` sees every step's scores: `RolloutRecorder` keeps what scoring needs of them.
    """
    prompts = smollm2.encode_chats(tokenizer, questions, instruction)
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    how |= {"logits_processor": list(logits_processor), "pad_token_id": tokenizer.pad_token_id}
    ids = model.generate(**prompts, max_new_tokens=n_tokens, **how)
    tokens = ids[:, prompts["input_ids"].shape[1] :]
    ends = (tokens == tokenizer.eos_token_id).long()
    return Rollouts(questions, tokens, ends.cumsum(1) - ends == 0)


def head_over(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rollouts: Rollouts, instruction: str | None = None
) -> LinearHead:
    """The model's head over hidden states (B, L, D) whose row i predicts answer token i."""
    prompts = smollm2.encode_chats(tokenizer, rollouts.questions, instruction)
    ids = torch.cat((prompts["input_ids"], rollouts.tokens), 1)
    attention = torch.cat((prompts["attention_mask"], torch.ones_like(rollouts.tokens)), 1)
    positions = (attention.cumsum(1) - 1).clamp_min(0)  # padding on the left does not count
    body = model.model(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False)
    # The last prompt token predicts answer token 0; the last answer token predicts nothing that was sampled.
    hidden = body.last_hidden_state[:, prompts["input_ids"].shape[1] - 1 : -1]
    return LinearHead.from_module(hidden, model.lm_head)
