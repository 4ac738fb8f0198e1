"""Files in and out: Hugging Face and GGUF weights, PEFT adapters, the table of names, training state (orbax)."""
