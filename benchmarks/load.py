"""Time to load a checkpoint, compared with a raw read of its bytes and with transformers.

    python -m benchmarks.load [--gigabytes=1] [--out=DIR]

The checkpoint is made of random bfloat16 weights in the shape of Qwen3-0.6B's layers, as many as needed. The raw read
goes through the same file with `readinto`; the file is in the page cache for all.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import difflm_jax
from benchmarks.common import add_report_flags, alternating, median_of, report
from difflm_jax.checkpoint.hf import load_params
from difflm_jax.checkpoint.source import open_source
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.weights import table
from difflm_jax.quant import QuantConfig

WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM = 1024, 3072, 16, 8, 128
LAYER_BYTES = 2 * (WIDTH * HEAD_DIM * 2 * (HEADS + KV_HEADS) + 3 * WIDTH * MLP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct.Q4_1.gguf", help="whose tokenizer")
    add_report_flags(parser, rounds=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = difflm_jax.load(options.model).tokenizer
        tokenizer.save_pretrained(directory)
        size = _write(Path(directory), max(1, round(options.gigabytes * 1e9 / LAYER_BYTES)), len(tokenizer))
        source = open_source(directory)
        ways = {
            "raw read": lambda _: _read(Path(directory) / "model.safetensors"),
            "difflm_jax, bfloat16": lambda _: load_params(source, jnp.bfloat16),
            "difflm_jax, nf4": lambda _: load_params(source, jnp.bfloat16, QuantConfig("nf4")),
            "transformers, bfloat16": lambda _: _transformers(directory),
        }
        seconds = alternating(ways, options.rounds)
    raw = median_of(seconds["raw read"])
    rows = [
        {
            "way": name,
            "gigabytes_per_second": size / 1e9 / median_of(times),
            "times_raw_read": median_of(times) / raw,
            "seconds": times,
        }
        for name, times in seconds.items()
    ]
    report("load", options, rows, "gigabytes_per_second", {"gigabytes": size / 1e9})


def _write(directory: Path, layers: int, vocabulary: int) -> int:
    """Writes a Qwen3 checkpoint with `layers` layers; returns its size in bytes."""
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": WIDTH, "intermediate_size": MLP,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "vocab_size": vocabulary, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 4096, "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False,
    }  # fmt: skip
    return write_checkpoint(directory, config)


def write_checkpoint(directory: Path, config: dict) -> int:
    """Writes random weights for a `config.json`; returns their size in bytes."""
    (directory / "config.json").write_text(json.dumps(config))
    rng, tensors = np.random.default_rng(0), {}
    bfloat16 = jnp.dtype("bfloat16")
    for row in table(ModelConfig.from_hf(config)):
        for name in row.hf_names:
            tensors[name] = (rng.integers(0, 2**15, row.shape, np.int16) // 8 + 15000).view(bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return (directory / "model.safetensors").stat().st_size


def _read(path: Path) -> None:
    buffer = bytearray(64 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _transformers(directory: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
