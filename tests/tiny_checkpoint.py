"""A tiny model as transformers writes it, with a tokenizer of bytes."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from tests.byte_tokenizer import byte_tokenizer

_KINDS = {"llama": LlamaConfig, "qwen3": Qwen3Config}


def save_tiny_model(directory: Path, kind: str = "qwen3", noise: float = 0.3, **changes: Any) -> Path:
    """Writes two layers of random weights, with `noise` added so that attention matters; returns the directory."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = AutoModelForCausalLM.from_config(_KINDS[kind](**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
