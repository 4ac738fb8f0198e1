"""A tiny Qwen3 as transformers writes it, with a tokenizer of bytes."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from tests.byte_tokenizer import byte_tokenizer


def save_tiny_qwen3(directory: Path) -> Path:
    """Writes two layers of large random weights, so that attention matters; returns the directory."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
