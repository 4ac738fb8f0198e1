"""A tiny model, rows and a command line for tests that run the training command, in this process or in another."""

import json
from pathlib import Path
from typing import Any

from difflm_jax.checkpoint.hf import save_pretrained
from difflm_jax.training.metrics import read_metrics
from tests.byte_tokenizer import byte_tokenizer
from tests.tiny import HF, tiny_config, tiny_params

# What differs between two runs of the same numbers.
TIMED = {
    "tokens_per_second", "mfu", "step_seconds", "slow_steps", "slowest_step_seconds", "data_wait",
    "host_memory_peak", "device_memory_peak",
}  # fmt: skip


def make_model(directory: Path, vocab_size: int = 264) -> Path:
    """A two-layer Qwen3 with a byte tokenizer."""
    tokenizer = byte_tokenizer()
    hf = {**HF, "vocab_size": vocab_size, "num_hidden_layers": 2, "intermediate_size": 64, "tie_word_embeddings": False}
    config = tiny_config(**hf)
    save_pretrained(directory, tiny_params(config), config, hf, tokenizer, "", {"mask_token": "<|mask|>"})
    return directory


def make_rows(path: Path, count: int = 24) -> Path:
    path.write_text("".join(json.dumps({"question": f"{i}+1", "answer": f"{i + 1}."}) + "\n" for i in range(count)))
    return path


def train_arguments(model: Path, rows: Path, directory: Path, *more: str) -> list[str]:
    """A run of both phases with dropout and accumulation; `directory` gets `run` and `cache`."""
    return [
        "train",
        f"--config.model={model}",
        f"--config.dataset={rows}",
        f"--config.output_dir={directory / 'run'}",
        f"--config.cache_dir={directory / 'cache'}",
        "--config.dtype=float32",
        "--config.attention=prefix",
        "--config.logit_shift=true",
        "--config.mask_rate=row",
        "--config.loss_tokens=masked",
        "--config.batch_size=4",
        "--config.gradient_accumulation_steps=2",
        "--config.max_length=64",
        "--config.lora_config.r=4",
        "--config.lora_config.lora_dropout=0.1",
        "--config.log_interval=2",
        "--config.eval_interval=3",  # an epoch
        "--config.test_size=0.2",
        "--config.sample_tokens=8",
        "--config.sample_prompts=2",
        "--config.diffusion_steps=4",
        "--config.wandb_config.project=",
        "--config.epochs=2",
        *more,
    ]


# A base in four bits, which the model's 32 inputs divide into blocks of, and packed rows: two examples in each.
NF4_PACKED = (
    "--config.quantization=nf4",
    "--config.quantization_block_size=16",
    "--config.batching=packed",
    "--config.epochs=3",
    "--config.eval_interval=2",  # an epoch
)


def results(run: Path) -> dict[str, Any]:
    """All that two runs of the same numbers have in common: adapters to the byte, samples, untimed metrics."""
    return {
        **{f"{phase} adapter": (run / f"{phase}_model" / "adapter_model.safetensors").read_bytes()
           for phase in ("pretrain", "sft") if (run / f"{phase}_model").is_dir()},
        "samples": (run / "samples.jsonl").read_text(),
        "metrics": json.dumps([{k: v for k, v in r.items() if k not in TIMED} for r in read_metrics(run)]),
    }  # fmt: skip
