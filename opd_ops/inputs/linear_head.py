"""`LinearHead`: hidden states and the head that projects them to logits, passed in place of logits.

  logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap);  without softcap:
  logits = scale * (hidden @ weight.T + bias)
  (soft-cap as Gemma 2 uses it, scale as Cohere and Granite use it).

Not here: reading rows of logits or heads (sources.py), checking both sides of a call against each other (pair.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from opd_ops.arguments import check_layout, check_positive, take_plain
from opd_ops.inputs.float8 import Float8Rows
from opd_ops.inputs.unshard import unshard
from opd_ops.inputs.zero3 import is_zero3

_LORA_ATTRIBUTES = ("lora_A", "lora_embedding_A", "base_layer")


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Hidden states and the head that turns them into logits; the logits are never materialised whole.

    With `hidden` (..., D), `weight` (V, D) and `bias` (V,):
        logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)      (softcap given)
        logits = scale * (hidden @ weight.T + bias)                                (softcap None)
    A student's hidden, weight and bias get gradients, each only if it requires one. Gradients are accumulated in fp32 and
    returned in the tensor's dtype. A teacher gets no gradient.

    Args:
        hidden: (..., D) last hidden states, after the final norm; row i predicts target i.
        weight: (V, D) the head's weight, as in `nn.Linear`.
        bias: (V,) or None.
        scale: Multiplies the logits before the soft-cap; finite and > 0.
        softcap: Bound of the logits, > 0, or None.
        float8: `Float8Rows.of(weight)` for `score_dtype="float8"`, kept by the caller; None: computed in each such call. It
            must be of this weight, or another model ranks the positions.
    Raises:
        ValueError: shapes, devices or numbers that do not fit, or a head wrapped by LoRA.
        TypeError: not a floating-point tensor.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    float8: Float8Rows | None = None

    def __post_init__(self) -> None:
        take_plain(self, "scale", "softcap")
        _refuse_module(self.weight)
        for name, tensor in (("hidden", self.hidden), ("weight", self.weight), ("bias", self.bias)):
            if tensor is None and name == "bias":
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"LinearHead.{name}: got {type(tensor).__name__}, expected a tensor")
            check_layout(f"LinearHead.{name}", tensor)
            if not tensor.is_floating_point():
                raise TypeError(f"LinearHead.{name}: got dtype {tensor.dtype}, expected a floating-point dtype")
            if tensor.device != self.hidden.device:
                raise ValueError(
                    f"LinearHead.{name}: is on {tensor.device}, hidden is on {self.hidden.device}; move them to one device"
                )
        if is_zero3(self.weight) and not self.weight.numel():
            raise ValueError(
                "LinearHead.weight: got a parameter that ZeRO-3 partitions, expected a whole one; "
                "LinearHead.from_module(hidden, head) gathers it"
            )
        if self.weight.dim() != 2:
            raise ValueError(f"LinearHead.weight: got shape {tuple(self.weight.shape)}, expected (V, D)")
        if self.hidden.dim() < 1 or self.hidden.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"LinearHead.hidden: got shape {tuple(self.hidden.shape)}, expected (..., {self.weight.shape[1]}) "
                f"to match weight {tuple(self.weight.shape)}"
            )
        if self.bias is not None and self.bias.shape != (self.weight.shape[0],):
            raise ValueError(
                f"LinearHead.bias: got shape {tuple(self.bias.shape)}, expected ({self.weight.shape[0]},), one per entry"
            )
        for name, number in (("scale", self.scale), ("softcap", self.softcap)):
            if number is None and name == "softcap":
                continue
            check_positive(f"LinearHead.{name}", number)
        if self.float8 is not None and not isinstance(self.float8, Float8Rows):
            raise TypeError(f"LinearHead.float8: got {type(self.float8).__name__}, expected Float8Rows.of(weight) or None")
        if self.float8 is not None and self.float8.values.shape != Float8Rows.shape_of(self.weight):
            raise ValueError(
                f"LinearHead.float8: got values of shape {tuple(self.float8.values.shape)}, expected "
                f"{Float8Rows.shape_of(self.weight)}: Float8Rows.of(weight) of this weight"
            )
        if self.float8 is not None and self.float8.values.device != self.weight.device:
            raise ValueError(
                f"LinearHead.float8: is on {self.float8.values.device}, the weight is on {self.weight.device}; move one of them"
            )

    @classmethod
    def from_module(
        cls,
        hidden: Tensor,
        head: nn.Module,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        float8: Float8Rows | None = None,
    ) -> LinearHead:
        """A `LinearHead` from an `nn.Linear`-like module. A LoRA-wrapped module is an error: its adapter would never train.

        A weight sharded by FSDP2 or ZeRO-3 is gathered once, on all its ranks. Its gradient is the mean over ranks, as FSDP2
        and ZeRO-3 make it. To keep a DTensor sharded over the vocabulary, pass it as `weight`
        (docs/guides/vocabulary-parallel.md).
        """
        if not isinstance(hidden, Tensor):
            raise TypeError(f"hidden: got {type(hidden).__name__}, expected a tensor (..., D)")
        _refuse_lora(head)
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor):
            raise TypeError(f"head: got {type(head).__name__}, expected a module with a (V, D) weight, like nn.Linear")
        bias = getattr(head, "bias", None)
        bias = None if bias is None else unshard(bias, hidden.dtype)
        return cls(hidden, unshard(weight, hidden.dtype), bias, scale=scale, softcap=softcap, float8=float8)


def _refuse_module(weight: object) -> None:
    if isinstance(weight, nn.Module):
        _refuse_lora(weight)
        raise TypeError(
            f"LinearHead.weight: got a module ({type(weight).__name__}), expected its (V, D) weight; "
            "use LinearHead.from_module(hidden, head)"
        )


def _refuse_lora(head: nn.Module) -> None:
    if any(hasattr(head, name) for name in _LORA_ATTRIBUTES):
        raise ValueError(
            f"head: got {type(head).__name__}, a LoRA-wrapped head; its adapter would silently never train. "
            "Exclude lm_head from the LoRA targets (modules_to_save=['lm_head'] works), or merge the adapter first"
        )
