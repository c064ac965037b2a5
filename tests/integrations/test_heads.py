"""A causal language model's last hidden states, taken through whatever wraps it, and without those of the layers below.

  Compared: with `output_hidden_states=True`, values and gradients; counted: hidden states that stay alive.
  Run: make test ARGS=tests/integrations/test_heads.py

Not here: the head over them against the model's own logits (test_hf.py).
"""

import weakref

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from opd_ops.integrations import heads
from opd_ops.integrations.heads import last_hidden
from tests.integrations.models import VOCAB, language_model, llama_model
from tests.support.cases import generator
from tests.support.tolerances import assert_gradient

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}


def checkpointed():
    model = language_model(0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def lora():
    return get_peft_model(llama_model(0), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))


MODELS = {
    "qwen2": lambda: language_model(0),
    "llama": lambda: llama_model(0),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **HEADS, final_logit_softcapping=3.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4)),
    "peft": lora,
    "checkpointed": checkpointed,
}


def tokens():
    return {"input_ids": torch.randint(3, VOCAB, (2, 7), generator=generator(1))}


def gradients(model, hidden):
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn(hidden.shape, generator=generator(2))
    got = torch.autograd.grad((hidden * weights).sum(), trained, allow_unused=True)
    return torch.cat([g.flatten() for g in got if g is not None])


@pytest.mark.parametrize("family", MODELS)
def test_the_last_hidden_states_are_those_among_all(family):
    torch.manual_seed(0)
    model = MODELS[family]()
    model = model if family == "checkpointed" else model.eval()
    want = model(**tokens(), output_hidden_states=True, use_cache=False).hidden_states
    hidden, outputs = last_hidden(model, model, tokens())
    assert len(want) == 3
    assert len(outputs.hidden_states) == 1
    torch.testing.assert_close(hidden, want[-1], rtol=1e-5, atol=1e-6)
    assert_gradient(gradients(model, hidden), gradients(model, want[-1]), 1e-5)
    assert outputs.logits.shape[1] == 1
    assert model(**tokens()).hidden_states is None  # no hook stays


@pytest.mark.parametrize(("needs_all", "alive"), [(True, 1), (False, 0)])
def test_the_layers_outputs_are_not_kept(needs_all, alive, monkeypatch):
    model, seen = language_model(0).eval(), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: seen.append(weakref.ref(output)))
    monkeypatch.setattr(heads, "_NEED_ALL", weakref.WeakSet([model] if needs_all else []))
    with torch.no_grad():
        kept = last_hidden(model, model, tokens())
    assert kept[0].shape == (2, 7, 32)
    # All hidden states are the embeddings, the first layer's output, and the last one's only after the norm.
    assert sum(ref() is not None for ref in seen) == alive


def test_a_model_that_does_not_hand_them_on_is_asked_for_all():
    class Own(type(language_model(0))):
        def forward(self, *arguments, output_hidden_states=False, **options):
            got = super().forward(*arguments, output_hidden_states=output_hidden_states, **options)
            got.hidden_states = got.hidden_states if output_hidden_states else None
            calls.append(output_hidden_states)
            return got

    calls = []
    model = Own(language_model(0).config).eval()
    want = super(Own, model).forward(**tokens(), output_hidden_states=True).hidden_states[-1]
    for _ in range(2):
        torch.testing.assert_close(last_hidden(model, model, tokens())[0], want)
    assert calls == [False, True, True]


def test_they_leave_through_the_outputs_of_wrappers():
    """accelerate converts what leaves `forward`; FSDP2 and DDP prepare the backward of the tensors they find there."""
    model = language_model(0).bfloat16()
    model.forward = convert_outputs_to_fp32(model.forward)
    assert last_hidden(model, model, tokens())[0].dtype == torch.float32
    want = gradients(plain := language_model(0), last_hidden(plain, plain, tokens())[0])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = language_model(0)
        wrapper = DistributedDataParallel(model, find_unused_parameters=True)
        hidden, _ = last_hidden(wrapper, model, tokens())
        (hidden * torch.randn(hidden.shape, generator=generator(2))).sum().backward()
        got = [p.grad.flatten() for name, p in model.named_parameters() if not name.startswith("lm_head")]
        assert_gradient(torch.cat(got), want, 1e-5)

        model = language_model(0)
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        hidden, outputs = last_hidden(model, model, tokens())
        assert len(outputs.hidden_states) == 1
        (hidden * torch.randn(hidden.shape, generator=generator(2))).sum().backward()
        sharded = {name: p.grad for name, p in model.named_parameters() if not name.startswith("lm_head")}
        assert_gradient(torch.cat([g.full_tensor().flatten() for g in sharded.values()]), want, 1e-5)
    finally:
        torch.distributed.destroy_process_group()
