"""GGUF files: header, weights and tokenizer, read without running anything of theirs."""
