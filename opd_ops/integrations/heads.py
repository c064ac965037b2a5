"""A Hugging Face causal language model's hidden states and head as a `LinearHead`, with what the model does to its logits.

  logits = softcap(scale * (hidden @ weight.T + bias)):  softcap Gemma 2 and 3; scale Cohere, Falcon-H1, Granite and others

A scale that is ignored trains another objective in silence, so all that models of transformers call it are looked for.
Of the hidden states the last ones alone are returned: `output_hidden_states=True` would keep those of every layer alive.
Not here: when and with which inputs the models run (hf.py), TRL, which hands both numbers over (trl.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from opd_ops.inputs.linear_head import LinearHead

MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVIDER = "logits_scaling"  # but a multiplier in HyperCLOVA X
KEPT = "logits_to_keep"  # the forward's argument for how many positions to compute logits of


def logit_scale(config: Any) -> float:
    """What the model multiplies its logits by before the softmax; 1.0 where its configuration names nothing."""
    text = config.get_text_config()
    for name in MULTIPLIERS:
        if getattr(text, name, None) is not None:
            return float(getattr(text, name))
    if getattr(text, DIVIDER, None) is not None:
        found = float(getattr(text, DIVIDER))
        return found if text.model_type == "hyperclovax" else 1 / found
    return 1.0


def head_of(model: nn.Module, hidden: Tensor) -> LinearHead:
    """The head of a causal language model over `hidden`, (..., D) after the final norm.

    A weight that FSDP2 shards is gathered. Raises: ValueError: a head wrapped by LoRA. TypeError: a model without one.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    softcap = getattr(text, "final_logit_softcapping", None)
    return LinearHead.from_module(hidden, head, scale=logit_scale(model.config), softcap=softcap)


def last_hidden(model: nn.Module, unwrapped: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """(B, T, D) hidden states after the final norm, and the model's outputs; logits of one position alone are computed.

    `model` is what is called, so that the hooks of a wrapper fire; `unwrapped` is asked what it takes.
    """
    # PEFT's forward takes anything and passes it on; what the model inside takes counts.
    inner = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped  # type: ignore[operator]
    options = {KEPT: 1} if KEPT in inspect.signature(inner.forward).parameters else {}
    body = getattr(inner, "base_model", inner)  # what transformers calls the model without its head
    if body is not inner and inner not in _NEED_ALL:
        with _last_alone(body):
            outputs = model(**inputs, **options, use_cache=False)
        if outputs.hidden_states is not None:
            return outputs.hidden_states[-1], outputs
        _NEED_ALL.add(inner)
    outputs = model(**inputs, **options, output_hidden_states=True, use_cache=False)
    return outputs.hidden_states[-1], outputs


_NEED_ALL: WeakSet[nn.Module] = WeakSet()  # models that do not hand on the hidden states that their body returns


@contextmanager
def _last_alone(body: nn.Module) -> Iterator[None]:
    """Inside, the body returns its last hidden states as the only ones, which the model around it hands on.

    So they leave through the outputs of every wrapper, as logits do: FSDP2 and DDP find them there to prepare the backward, and
    accelerate converts their dtype.
    """

    def add(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        last = getattr(output, "last_hidden_state", None)
        if last is not None and getattr(output, "hidden_states", None) is None:
            output["hidden_states"] = (last,)

    handle = body.register_forward_hook(add, prepend=True)  # before FSDP2's own
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def frozen_head(model: nn.Module, inputs: dict[str, Any]) -> LinearHead:
    """The head of a teacher over its own hidden states, without a graph."""
    return head_of(model, last_hidden(model, model, inputs)[0])
