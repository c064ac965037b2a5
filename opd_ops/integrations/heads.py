"""A Hugging Face causal language model's hidden states and head as a `LinearHead`, with the scale and softcap of its logits.

  logits = softcap(scale * (hidden @ weight.T + bias)):  softcap Gemma 2 and 3; scale Cohere, Falcon-H1, Granite and others

An ignored scale would train another objective without a warning. So every name of the scale in transformers is looked up.
Only the last layer's hidden states are returned: `output_hidden_states=True` would keep the tensors of every layer in memory.
Not here: when and with which inputs the models run (hf.py), TRL, which passes scale and softcap itself (trl.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn

from opd_ops.inputs.linear_head import LinearHead

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.utils import ModelOutput

MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVIDER = "logits_scaling"  # HyperCLOVA X alone multiplies by it
LOGITS_TO_KEEP = "logits_to_keep"  # argument of the forward: for how many last positions it computes logits


def logit_scale(config: PretrainedConfig) -> float:
    """The model multiplies its logits by this number before the softmax; 1.0 if its configuration has no scale."""
    text_config = config.get_text_config()
    for name in MULTIPLIERS:
        if getattr(text_config, name, None) is not None:
            return float(getattr(text_config, name))
    if getattr(text_config, DIVIDER, None) is not None:
        scaling = float(getattr(text_config, DIVIDER))
        return scaling if text_config.model_type == "hyperclovax" else 1 / scaling
    return 1.0


def head_of(model: nn.Module, hidden: Tensor) -> LinearHead:
    """The head of a causal language model over `hidden`, (..., D) after the final norm.

    A weight that FSDP2 has sharded is gathered. Raises: ValueError: LoRA wraps the head. TypeError: the model has no head.
    """
    lm_head = model.get_output_embeddings()  # type: ignore[operator]
    text_config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    softcap = getattr(text_config, "final_logit_softcapping", None)
    return LinearHead.from_module(hidden, lm_head, scale=logit_scale(model.config), softcap=softcap)


def last_hidden(model: nn.Module, unwrapped: nn.Module, inputs: Mapping[str, object]) -> tuple[Tensor, ModelOutput]:
    """(B, T, D) hidden states after the final norm, and the model's outputs; it computes the logits of one position only.

    `model` is called, so that the hooks of a wrapper run; `unwrapped` tells which arguments the forward takes.
    """
    # PEFT's forward takes any argument and passes it on, so the signature of the model inside is read.
    inner = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped  # type: ignore[operator]
    options = {LOGITS_TO_KEEP: 1} if LOGITS_TO_KEEP in inspect.signature(inner.forward).parameters else {}
    body = getattr(inner, "base_model", inner)  # transformers' name for the model without its head
    if body is not inner and inner not in _NEED_ALL:
        with _returning_last_hidden(body):
            outputs = model(**inputs, **options, use_cache=False)
        if outputs.hidden_states is not None:
            return outputs.hidden_states[-1], outputs
        _NEED_ALL.add(inner)
    outputs = model(**inputs, **options, output_hidden_states=True, use_cache=False)
    return outputs.hidden_states[-1], outputs


# Models that drop the hidden states that their body returns; they are asked for the hidden states of all layers.
_NEED_ALL: WeakSet[nn.Module] = WeakSet()


@contextmanager
def _returning_last_hidden(body: nn.Module) -> Iterator[None]:
    """Within this block the body returns `hidden_states` with one entry, the last layer's; the model around it passes it on.

    So the hidden states leave through the outputs of every wrapper, as logits do: FSDP2 and DDP find them there to prepare the
    backward, and accelerate converts their dtype.
    """

    def add(_: nn.Module, __: tuple[object, ...], output: ModelOutput) -> None:
        last = getattr(output, "last_hidden_state", None)
        if last is not None and getattr(output, "hidden_states", None) is None:
            output["hidden_states"] = (last,)

    handle = body.register_forward_hook(add, prepend=True)  # runs before FSDP2's own hook
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def frozen_head(model: nn.Module, inputs: Mapping[str, object]) -> LinearHead:
    """The head of a teacher over its own hidden states, without an autograd graph."""
    return head_of(model, last_hidden(model, model, inputs)[0])
