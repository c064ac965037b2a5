"""One recorded call: its name, the call in words, and what it gives as named tensors.

  Call     a public function of two models, whose inputs are data; its gradient is taken, too
  Custom   anything else: a function without arguments that returns named values

All calls go through the public functions here, so that a change of their signatures is followed in one place.
Not here: which calls there are (calls.py, family.py, ranks.py, hosts.py), digests (record.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd_ops import LinearHead, score_positions, selective_opd_loss, selective_opd_token_losses
from tests.support.cases import generator, leaf, leaf_head

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
REFUSALS = (ValueError, TypeError)  # what the library raises at its public door
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Custom:
    name: str
    words: str
    function: Callable[[], Mapping[str, Any]]

    def run(self) -> Mapping[str, Any]:
        return self.function()


@dataclass(frozen=True, eq=False)
class Call:
    name: str
    student: Tensor | LinearHead
    teacher: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    function: str = "selective_opd_loss"  # a key of FUNCTIONS
    is_frozen: bool = False  # the weight and bias of the student's head

    @property
    def words(self) -> str:
        sides = [in_words(side) for side in (self.student, self.teacher)]
        options = [f"{name}={in_words(value)}" for name, value in self.options.items()]
        return f"{self.function}({', '.join([*sides, *options])}){' with a frozen head' * self.is_frozen}"

    def run(self) -> Mapping[str, Any]:
        return called(self.student, self.teacher, self.options, self.function, is_frozen=self.is_frozen)


def called(
    student: Any, teacher: Any, options: Mapping[str, Any], function: str = "selective_opd_loss", *, is_frozen: bool = False
) -> dict[str, Any]:
    """What the call returns, and the gradients of the student's tensors."""
    trained = as_leaf(student)
    if is_frozen:
        trained = replace(trained, weight=student.weight, bias=student.bias)
    return FUNCTIONS[function](trained, teacher, options) | gradients(trained)


def loss(student: Any, teacher: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    out = selective_opd_loss(student, teacher, **options)
    out.loss.backward()
    return {"loss": out.loss} | returned(out)


def token_losses(student: Any, teacher: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Weighted as a host does, by factors of both signs."""
    out = selective_opd_token_losses(student, teacher, **options)
    factors = torch.randn(out.losses.shape, generator=generator(8)).to(out.losses.dtype)
    (out.losses * factors).sum().backward()
    return {"losses": out.losses} | returned(out)


def scores(student: Any, teacher: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    position_scores, stats = score_positions(student, teacher, **options)
    return {"scores": position_scores} | columns(stats)


FUNCTIONS = {"selective_opd_loss": loss, "selective_opd_token_losses": token_losses, "score_positions": scores}


def returned(out: Any) -> dict[str, Any]:
    metrics = {f"metrics.{name}": value for name, value in out.metrics.items()}
    return {"selected": out.selected, "scores": out.scores} | columns(out.stats) | metrics


def columns(stats: Any) -> dict[str, Tensor]:
    return {f"stats.{name}": column for name, column in stats._asdict().items() if column is not None}


def as_leaf(side: Any) -> Any:
    """A copy whose tensors take gradients."""
    return leaf_head(side) if isinstance(side, LinearHead) else leaf(side)


def gradients(side: Any, prefix: str = "gradient") -> dict[str, Tensor]:
    tensors = (
        {"hidden": side.hidden, "weight": side.weight, "bias": side.bias} if isinstance(side, LinearHead) else {"logits": side}
    )
    taken = {name: x.grad for name, x in tensors.items() if x is not None and x.grad is not None}
    return {f"{prefix}.{name}": x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in taken.items()}


# --- words -----------------------------------------------------------------------------------------------------------


def in_words(value: Any) -> str:
    """What a reader needs to make the same argument again; of a tensor its dtype and shape."""
    if isinstance(value, Tensor):
        kind = NAMES.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{value.item():g}" if not value.dim() else f"{kind} {tuple(value.shape)}"
    if isinstance(value, LinearHead):
        more = ", bias" * (value.bias is not None)
        more += "".join(
            f", {name}={x:g}" for name, x in (("scale", value.scale), ("softcap", value.softcap or 0)) if x not in (0, 1)
        )
        return f"LinearHead(hidden {in_words(value.hidden)}, weight {tuple(value.weight.shape)}{more})"
    if is_dataclass(value) and not isinstance(value, type):
        inside = ", ".join(f"{part.name}={in_words(getattr(value, part.name))}" for part in fields(value))
        return f"{type(value).__name__}({inside})"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={in_words(part)}" for name, part in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(in_words(part) for part in value) + "]"
    return getattr(value, "__name__", None) or repr(value)
