"""Reads and writes checkpoints: Hugging Face and GGUF weights, PEFT adapters, tokenizers, third-party names."""
