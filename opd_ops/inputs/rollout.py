"""Statistics of the student from the rollout: an on-policy sampler has computed the student's logits at every position.

  logsumexp, H(p) = logsumexp - E_p[s], and the top-K ids with their log p           [nats]
  With these statistics scoring runs only the teacher's head. The scores of arXiv 2605.26844 eqs. 9 to 16 also need the
  student's logits on the teacher's top-K: K dot products per position.

Not here: scores from these statistics (backends/shared/two_lists.py), the selectors that they allow (selection/selectors.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops.arguments import (
    DEFAULT_TEMPERATURE,
    DEFAULT_TOP_K,
    check_integer,
    check_layout,
    check_positive,
    may_look,
    per_position,
)
from opd_ops.inputs.chunks import parts
from opd_ops.inputs.order import best_places

CANDIDATES = 1 << 22  # most logits ranked at a time


@dataclass(frozen=True, eq=False)
class StudentStats:
    """The student's statistics at each position, as the rollout computed them; (...) is the positions' shape.

    The student's logits are taken after scale, soft-cap and the call's `temperature`.

    Args:
        logsumexp: (...) log sum exp of the logits.
        entropy: (...) H(p) in nats.
        ids: (..., K) int64 or int32, the K different ids of largest logit, in any order; K at least the call's `top_k`.
        logprobs: (..., K) log p of these ids.
    Raises:
        ValueError: shapes that do not fit each other. TypeError: ids that are not integers, or statistics that are no floats.
    """

    logsumexp: Tensor
    entropy: Tensor
    ids: Tensor
    logprobs: Tensor

    def __post_init__(self) -> None:
        for name in ("logsumexp", "entropy", "logprobs"):
            if not isinstance(getattr(self, name), Tensor) or not getattr(self, name).is_floating_point():
                raise TypeError(f"StudentStats.{name}: got {_kind(getattr(self, name))}, expected a floating-point tensor")
        if not isinstance(self.ids, Tensor) or self.ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"StudentStats.ids: got {_kind(self.ids)}, expected an int32 or int64 tensor")
        for name in ("logsumexp", "entropy", "ids", "logprobs"):
            check_layout(f"StudentStats.{name}", getattr(self, name))
        shape = self.logsumexp.shape
        if self.entropy.shape != shape:
            raise ValueError(f"StudentStats.entropy: got shape {tuple(self.entropy.shape)}, expected {tuple(shape)}")
        if self.ids.dim() != len(shape) + 1 or self.ids.shape[:-1] != shape:
            raise ValueError(f"StudentStats.ids: got shape {tuple(self.ids.shape)}, expected {tuple(shape)} and K")
        if self.logprobs.shape != self.ids.shape:
            raise ValueError(f"StudentStats.logprobs: got shape {tuple(self.logprobs.shape)}, expected {tuple(self.ids.shape)}")

    @classmethod
    @torch.no_grad()
    def from_logits(
        cls, logits: Tensor, *, top_k: int = DEFAULT_TOP_K, temperature: float = DEFAULT_TEMPERATURE
    ) -> StudentStats:
        """The statistics of (..., V) logits, computed in fp32 (fp64 for fp64), for a user's own sampler.

        Raises: ValueError: a top_k below 1, or a temperature that is not above 0. TypeError: a top_k that is no integer.
        """
        top_k, temperature = check_integer("top_k", top_k, least=1), check_positive("temperature", temperature)
        check_layout("logits", logits)
        x = logits.reshape(-1, logits.shape[-1])
        x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32) / temperature
        log_p = torch.log_softmax(x, 1)
        entropy = torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p).sum(1).neg_()
        every_id, k = torch.arange(x.shape[1], device=x.device), min(top_k, x.shape[1])
        size = max(1, CANDIDATES // x.shape[1])
        ids = torch.cat([best_places(group, every_id.expand_as(group), k) for group in parts(x, size, 0)])
        shape = logits.shape[:-1]
        return cls(
            torch.logsumexp(x, 1).view(shape),
            entropy.view(shape),
            ids.view(*shape, k),
            log_p.gather(1, ids).view(*shape, k),
        )


class RolloutRecorder:
    """Records `StudentStats` while Hugging Face `generate` samples: pass it as `logits_processor=[recorder]`.

    It returns the scores unchanged. `generate` applies temperature, top-k and top-p later, so that these do not matter. It
    applies penalties earlier: a `repetition_penalty`, suppressed tokens or a minimum length, in the call or in the model's
    generation_config, would be recorded as the model's own logits. Switch penalties off, as on-policy training needs anyway, or
    pass raw logits (`output_logits=True`) to `StudentStats.from_logits`. One row per sequence: not for beam search.

    Args:
        top_k: `top_k` of the call that will use the statistics.
        temperature: `temperature` of that call, not the sampling temperature, unless both are equal.
    Example:
        >>> recorder = RolloutRecorder()
        >>> tokens = model.generate(**prompts, do_sample=True, logits_processor=[recorder])
        >>> score_positions(student_head, teacher_head, student_stats=recorder.stats())
    """

    def __init__(self, *, top_k: int = DEFAULT_TOP_K, temperature: float = DEFAULT_TEMPERATURE) -> None:
        self.top_k, self.temperature = top_k, temperature
        self._steps: list[StudentStats] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """One step: (B, V) scores of the next token of every sequence."""
        self._steps.append(StudentStats.from_logits(scores, top_k=self.top_k, temperature=self.temperature))
        return scores

    def stats(self) -> StudentStats:
        """The statistics of all steps so far, (B, T): column t is from the distribution of new token t."""
        if not self._steps:
            raise ValueError("RolloutRecorder: got no step, expected generate(..., logits_processor=[recorder]) to have run")
        columns = zip(*((x.logsumexp, x.entropy, x.ids, x.logprobs) for x in self._steps), strict=True)
        return StudentStats(*(torch.stack(column, 1) for column in columns))


def check_student_stats(
    stats: object,
    shape: torch.Size,
    device: torch.device,
    *,
    top_k: int,
    vocab_size: int,
    student_vocab_size: int,
    valid: Tensor | None,
) -> None:
    """Check shape, device, K >= `top_k`, and that the ids are of the common vocabulary."""
    if not isinstance(stats, StudentStats):
        raise TypeError(f"student_stats: got {type(stats).__name__}, expected StudentStats")
    for name in ("logsumexp", "entropy"):
        per_position(f"student_stats.{name}", getattr(stats, name), shape, device)
    for name in ("ids", "logprobs"):
        if getattr(stats, name).device != device:
            raise ValueError(f"student_stats.{name}: is on {getattr(stats, name).device}, the student is on {device}")
    if stats.ids.shape[-1] < top_k:
        raise ValueError(f"student_stats: got {stats.ids.shape[-1]} ids a position, expected at least top_k = {top_k}")
    if student_vocab_size != vocab_size:
        raise ValueError(
            f"student_stats: are over the student's own vocabulary of {student_vocab_size}, but the call compares the first "
            f"{vocab_size} entries; pass no student_stats"
        )
    if may_look(stats.ids):
        ids = stats.ids if valid is None else stats.ids[valid]
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
            raise ValueError(
                f"student_stats.ids: got {int(ids.min())} ... {int(ids.max())} at valid positions, expected 0 ... "
                f"{vocab_size - 1}"
            )


def _kind(value: object) -> str:
    return f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
