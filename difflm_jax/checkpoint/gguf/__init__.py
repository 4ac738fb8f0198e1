"""Reads GGUF files: header, weights and tokenizer. Nothing in a file is executed."""
