"""Tiny language models, a tokenizer and prompts, made here: no download, no training time to speak of.

Not here: what is trained with them (test_trl.py and its neighbours, tests/trainer/).
"""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCAB = 64


def language_model(seed: int, *, width: int = 32, vocab: int = VOCAB) -> Qwen2ForCausalLM:
    """Weights large enough for peaked logits."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config)


def llama_model(seed: int) -> LlamaForCausalLM:
    """One to be saved and loaded: with a saved Qwen2, transformers takes Qwen2's tokenizer whatever lies beside it."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, initializer_range=0.2, **sizes, **special)
    )


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0")


def prompts(n: int = 16) -> Dataset:
    return Dataset.from_dict({"prompt": [" ".join(f"w{3 + (7 * i + j) % 50}" for j in range(4)) for i in range(n)]})
