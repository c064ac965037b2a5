"""Teachers: a local model, the student's own, a server, or a folder of what a server said.

Each reads rollouts under its own prompt (privileged.py).

  teacher(rollouts) -> LinearHead over (B, L, D), or TopKLogprobs (B, L, K);  row i predicts answer token i

The student's tokenizer and chat template write the teacher's prompt too: both models share one vocabulary.
Not here: the student's own weights (self_teacher.py), the server's protocol (servers/teacher.py), the folder
(stored_teacher.py), how prompts and answers are aligned (rollouts.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from opd_ops.inputs.linear_head import LinearHead
from opd_ops.inputs.teacher_lists import TopKLogprobs
from opd_ops.trainer.config import SAME, OPDConfig
from opd_ops.trainer.models import load_model, load_tokenizer
from opd_ops.trainer.privileged import PrivilegedContext
from opd_ops.trainer.prompts import Prompt
from opd_ops.trainer.rollouts import Rollouts, context_ids, head_over, longest_context
from opd_ops.trainer.self_teacher import FROZEN, SelfTeacher, own_weights
from opd_ops.trainer.stored_teacher import StoredTeacher, StoringTeacher, vocabulary_digest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from opd_ops.trainer.servers.scoring import TeacherServer

Teacher = Callable[[Rollouts], LinearHead | TopKLogprobs]


class LocalTeacher:
    """A frozen model on the student's device."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, context: PrivilegedContext | None = None) -> None:
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer
        self.context = context or PrivilegedContext()

    @torch.no_grad()
    def __call__(self, rollouts: Rollouts) -> LinearHead:
        told = rollouts._replace(prompts=self.context.prompts(rollouts.prompts))
        return head_over(self.model, self.tokenizer, told)


class ListSource(Protocol):
    """A server's client, or a folder of a server's answers."""

    def score(self, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> TopKLogprobs:
        """As `TeacherServer.score`."""

    def identity(self) -> str:
        """What stands for the teacher's weights: a server's name for its model, or a digest."""


class ServerTeacher:
    """Top-K log-probabilities from a server, or from a folder of its answers."""

    def __init__(
        self, server: ListSource, tokenizer: PreTrainedTokenizerBase, context: PrivilegedContext | None = None
    ) -> None:
        self.server, self.tokenizer, self.context = server, tokenizer, context or PrivilegedContext()

    def __call__(self, rollouts: Rollouts) -> TopKLogprobs:
        contexts = [context_ids(self.tokenizer, prompt) for prompt in self.context.prompts(rollouts.prompts)]
        rows = zip(rollouts.tokens, rollouts.mask, strict=True)
        lists = self.server.score(contexts, [tokens[mask].tolist() for tokens, mask in rows])
        device, missing = rollouts.tokens.device, rollouts.tokens.shape[1] - lists.ids.shape[1]
        ids = nn.functional.pad(lists.ids, (0, 0, 0, missing), value=-1)
        logprobs = nn.functional.pad(lists.logprobs, (0, 0, 0, missing), value=-torch.inf)
        return TopKLogprobs(ids.to(device), logprobs.to(device))


def check_teacher(config: OPDConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> ListSource | None:
    """Check the teacher before any model loads. Returns the source of its lists, if it sends lists.

    Raises: ValueError: the teacher has another vocabulary, or its folder has a damaged or foreign shard. ServerError: the
        server cannot teach, or its model cannot read the longest prompt and answer.
    """
    if config.teacher_url is not None:
        server = _server(config)
        server.check()
        longest = longest_context(tokenizer, config.privileged_context().prompts(prompts))
        server.check_length(longest, config.max_new_tokens)
        if config.teacher_store is None:
            return server
        vocabulary = vocabulary_digest(tokenizer)
        return StoringTeacher(server, config.teacher_store, tokenizer=vocabulary, teacher=config.teacher_digest)
    if config.teacher_store is not None:
        vocabulary, k = vocabulary_digest(tokenizer), config.teacher_top_k
        return StoredTeacher(config.teacher_store, tokenizer=vocabulary, teacher=config.teacher_digest, top_k=k)
    if config.teacher != SAME:
        check_tokenizers(tokenizer, load_tokenizer(config.teacher))
    return None


def _server(config: OPDConfig) -> TeacherServer:
    from opd_ops.trainer.servers.sglang import SGLangTeacher
    from opd_ops.trainer.servers.teacher import ServedTeacher

    assert config.teacher_url is not None
    kind = SGLangTeacher if config.teacher_api == "sglang" else ServedTeacher
    return kind(
        config.teacher_url,
        model=config.teacher_model,
        top_k=config.teacher_top_k,
        retry_seconds=config.server_retry_seconds,
        api_key=config.api_key("teacher"),
    )


def make_teacher(
    config: OPDConfig,
    student: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    lists: ListSource | None,
) -> Teacher:
    """The teacher that the options name. `student`: the model before any training; `lists`: the result of `check_teacher`."""
    context = config.privileged_context()
    if lists is not None:
        return ServerTeacher(lists, tokenizer, context)
    if config.teacher == SAME and (config.lora_rank > 0 or config.teacher_weights != FROZEN):
        return SelfTeacher(student, tokenizer, context, own_weights(config.teacher_weights))
    if config.teacher == SAME:
        dtype = student.dtype if config.teacher_dtype == "auto" else getattr(torch, config.teacher_dtype)
        return LocalTeacher(copy.deepcopy(student).to(device, dtype), tokenizer, context)
    return LocalTeacher(load_model(config.teacher, dtype=config.teacher_dtype).to(device), tokenizer, context)


def check_tokenizers(student: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, role: str = "teacher") -> None:
    """Check that every id in both vocabularies stands for the same token; special ids are not compared.

    Raises: ValueError: an id stands for different tokens; names it.
    """
    special = {*student.all_special_ids, *other.all_special_ids}
    student_tokens, other_tokens = ({i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (student, other))
    common = (student_tokens.keys() & other_tokens.keys()) - special
    different = [i for i in common if student_tokens[i] != other_tokens[i]]
    if different:
        i = min(different)
        raise ValueError(
            f"{role}: its tokenizer differs from the student's at {len(different)} of {len(common)} ids: {i} is "
            f"{other_tokens[i]!r}, not {student_tokens[i]!r}; distilling needs one vocabulary, pass a {role} of the student's "
            "family"
        )
