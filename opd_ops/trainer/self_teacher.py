"""The student's own model as its teacher, with weights that stay or follow the student's.

  Weights after t updates; theta_t: the student's
    frozen   theta_0                                     under LoRA: adapters switched off, no memory; else a copy (teachers.py)
    live     theta_t                                     no memory
    lag=N    theta_max(0, t - N)                         N copies of the trained weights, the oldest also on the device
    ema=D    m_t = D m_(t-1) + (1 - D) theta_t, m_0 = theta_0    one fp32 copy of them
  OPSD, arXiv 2601.18734: frozen (advised), live, or ema=.999; SDPO, arXiv 2601.20802: ema=.95; prime-rl: live

The module is the student's. For the teacher's forward its trained parameters take the other values, so under LoRA a copy is one
of the adapters alone. `ema` then averages A and B, not their product. Copies are part of a checkpoint.
Not here: the teacher's prompt (privileged.py), frozen copies (teachers.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from opd_ops.inputs.linear_head import LinearHead
from opd_ops.trainer.privileged import PrivilegedContext
from opd_ops.trainer.rollouts import Rollouts, head_over

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FROZEN = "frozen"


class OwnWeights(Protocol):
    """Weights of the student's own model."""

    name: str  # in words, for the model card

    def within(self, student: nn.Module) -> AbstractContextManager[object]:
        """The student has these weights within the block."""


class SelfTeacher:
    """A teacher that is the student's module under its own prompt and weights, without dropout and without a gradient."""

    def __init__(
        self,
        student: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        context: PrivilegedContext,
        weights: OwnWeights,
    ) -> None:
        self.student, self.tokenizer, self.context, self.weights = student, tokenizer, context, weights

    @torch.no_grad()
    def __call__(self, rollouts: Rollouts) -> LinearHead:
        was_training = self.student.training
        self.student.eval()
        with self.weights.within(self.student):
            told = rollouts._replace(prompts=self.context.prompts(rollouts.prompts))
            head = head_over(self.student, self.tokenizer, told)
            # `detach` keeps the values of this block: the parameter itself has the student's again after it.
            head = replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
        self.student.train(was_training)
        return head

    def begin(self, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
        """Follow the student's updates from now on, if these weights do so, and save the copies with its checkpoints."""
        if isinstance(self.weights, Followed):
            self.weights.follow(self.student, optimizer)
            accelerator.register_for_checkpointing(self.weights)


class AdaptersOff:
    """theta_0, under LoRA."""

    name = "the student's own initial weights"

    def within(self, student: nn.Module) -> AbstractContextManager[object]:
        off: AbstractContextManager[object] = student.disable_adapter()  # type: ignore[operator]
        return off


class Live:
    """theta_t."""

    name = "the student's own weights"

    def within(self, student: nn.Module) -> AbstractContextManager[object]:
        return nullcontext()


class Followed(ABC):
    """Weights in copies that change with the student's updates."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._parameters: list[nn.Parameter] = []

    def follow(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Begin with the student's present weights, on their device."""
        self._parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._begin(optimizer)

    @contextmanager
    def within(self, student: nn.Module) -> Iterator[None]:
        """The trained parameters point at the copies within the block; a graph made before it keeps the student's weights."""
        own = [parameter.data for parameter in self._parameters]
        self._set(self._values())
        try:
            yield
        finally:
            self._set(own)

    def _set(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.data = value.to(parameter.dtype)

    @abstractmethod
    def _begin(self, optimizer: torch.optim.Optimizer) -> None: ...

    @abstractmethod
    def _values(self) -> Sequence[Tensor]:
        """The teacher's weights, in the order of the trained parameters, on their device."""

    @abstractmethod
    def state_dict(self) -> dict[str, list[list[Tensor]]]:
        """The copies, for a checkpoint."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, list[list[Tensor]]]) -> None:
        """The copies of a checkpoint, which are on the CPU."""


class Lagged(Followed):
    """theta_max(0, t - N)."""

    def __init__(self, steps: int) -> None:
        super().__init__(f"the student's own weights of {steps} updates before")
        self._versions: deque[list[Tensor]] = deque(maxlen=steps)  # theta_max(0, t - N) ... theta_(t - 1), on the CPU
        self._oldest: list[Tensor] = []  # on the device

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self._remember)

    def _remember(self, *_: object) -> None:
        self._versions.append([parameter.detach().to("cpu", copy=True) for parameter in self._parameters])
        self._place()

    def _place(self) -> None:
        if self._versions:
            pairs = zip(self._versions[0], self._parameters, strict=True)
            self._oldest = [value.to(parameter.device) for value, parameter in pairs]

    def _values(self) -> Sequence[Tensor]:
        return self._oldest or [parameter.data for parameter in self._parameters]

    def state_dict(self) -> dict[str, list[list[Tensor]]]:
        return {"versions": list(self._versions)}

    def load_state_dict(self, state: dict[str, list[list[Tensor]]]) -> None:
        self._versions = deque(state["versions"], self._versions.maxlen)
        self._place()


class Averaged(Followed):
    """m_t, in fp32 for parameters of 16 bits too: their own steps would be lost in rounding."""

    def __init__(self, decay: float) -> None:
        super().__init__(f"a moving average of the student's own weights with decay {decay:g}")
        self.decay = decay
        self._means: list[Tensor] = []

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        wide = [torch.promote_types(parameter.dtype, torch.float32) for parameter in self._parameters]
        self._means = [parameter.detach().to(dtype, copy=True) for parameter, dtype in zip(self._parameters, wide, strict=True)]
        optimizer.register_step_post_hook(self._average)

    @torch.no_grad()
    def _average(self, *_: object) -> None:
        for mean, parameter in zip(self._means, self._parameters, strict=True):
            mean.lerp_(parameter.to(mean.dtype), 1 - self.decay)

    def _values(self) -> Sequence[Tensor]:
        return self._means

    def state_dict(self) -> dict[str, list[list[Tensor]]]:
        return {"means": [self._means]}

    def load_state_dict(self, state: dict[str, list[list[Tensor]]]) -> None:
        (means,) = state["means"]
        for mean, saved in zip(self._means, means, strict=True):
            mean.copy_(saved)


def own_weights(text: str) -> OwnWeights:
    """The weights that the option `teacher_weights` names: "frozen" (under LoRA), "live", "lag=N" or "ema=D".

    Raises: ValueError: it names no weights.
    """
    kind, _, number = text.partition("=")
    if text in (FROZEN, "live"):
        return AdaptersOff() if text == FROZEN else Live()
    if kind == "lag" and number.isdecimal() and int(number) > 0:
        return Lagged(int(number))
    if kind == "ema" and 0 < _real(number) < 1:
        return Averaged(float(number))
    raise ValueError(
        f"teacher_weights: got {text!r}, expected 'frozen', 'live', 'lag=N' (the weights of N updates before, N at least 1) "
        "or 'ema=D' (their moving average with decay D, 0 < D < 1, such as 0.99)"
    )


def check_sharded(text: str) -> None:
    """Raises: ValueError: the weights need copies, which a process with a part of each weight cannot make."""
    if isinstance(own_weights(text), Followed):
        raise ValueError(
            f"teacher_weights: got {text!r} with FSDP, expected 'frozen' or 'live': a process has only a part of each weight"
        )


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
