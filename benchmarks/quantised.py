"""Speed of a quantised base: LoRA steps over every format, the dense base, and torch + bitsandbytes.

    python -m benchmarks.quantised [--model=models/SmolLM2-135M-Instruct.Q4_1.gguf] [--rows=8 --length=128] [--peer]
                                   [--out=DIR]

Rounds alternate between the bases; figures are medians. Also: bytes per weight of the projections, seconds to quantise
a GB of bfloat16 weights, and seconds to load the base from the model and from its cached conversion.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import difflm_jax
from benchmarks.common import add_report_flags, alternating, median_of, report
from difflm_jax.checkpoint.converted import load_converted
from difflm_jax.config import default_config
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.quant import FORMATS, QTensor, QuantConfig, quantize
from difflm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from difflm_jax.training.step import StepOptions, TrainState, make_train_step

LORA = LoraConfig(r=16, lora_alpha=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--peer", action="store_true", help="torch, peft and bitsandbytes beside it")
    add_report_flags(parser, rounds=5)
    options = parser.parse_args()
    steps, facts = {}, {}
    for base in ("dense", *FORMATS):
        lm, facts[base] = _load(base, options)
        steps[base] = _our_step(lm, options)
    if options.peer:
        with tempfile.TemporaryDirectory() as directory:
            difflm_jax.load(options.model, dtype="float32").save_pretrained(f"{directory}/dense")
            steps["torch + peft, dense"] = _torch_step(f"{directory}/dense", False, options)
            steps["torch + peft + bitsandbytes nf4"] = _torch_step(f"{directory}/dense", True, options)
    seconds = alternating({name: lambda _, step=step: step() for name, step in steps.items()}, options.rounds)
    dense = median_of(seconds["dense"])
    rows = [
        {
            "way": base,
            "step_seconds": median_of(times),
            "of_dense": median_of(times) / dense,
            **facts.get(base, {}),
            "seconds": times,
        }
        for base, times in seconds.items()
    ]
    report("quantised", options, rows, "step_seconds")


def _load(base: str, options: argparse.Namespace) -> tuple[difflm_jax.LanguageModel, dict]:
    held = None if base == "dense" else QuantConfig(base)
    start = time.perf_counter()
    lm = difflm_jax.load(options.model, dtype=options.dtype, quantization=held)
    jax.block_until_ready(lm.params)
    facts = {"load_seconds": round(time.perf_counter() - start, 2)}
    if held is not None:
        leaves = jax.tree.leaves(lm.params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
        weights = [leaf for leaf in leaves if isinstance(leaf, QTensor)]
        facts["bits_a_weight"] = round(8 * sum(w.nbytes for w in weights) / sum(np.prod(w.shape) for w in weights), 3)
        facts["quantise_seconds_a_gb"] = round(_quantise_seconds(held), 2)
        with tempfile.TemporaryDirectory() as directory:
            arguments = (lm.source, lm.model.dtype, held, Path(directory))
            load_converted(*arguments)
            start = time.perf_counter()
            jax.block_until_ready(load_converted(*arguments))
            facts["kept_load_seconds"] = round(time.perf_counter() - start, 2)
    return lm, facts


def _quantise_seconds(held: QuantConfig) -> float:
    """Returns the seconds for 10^9 bytes of bfloat16, measured on a weight of 2560 x 9728 (Qwen3-4B's MLP)."""
    weight = jax.random.normal(jax.random.key(0), (2560, 9728), jnp.bfloat16)
    run = jax.jit(quantize, static_argnums=1)
    seconds = alternating({"quantise": lambda _: run(weight, held)}, 5)["quantise"]
    return median_of(seconds) * 1e9 / weight.nbytes


def _our_step(lm: difflm_jax.LanguageModel, options: argparse.Namespace) -> Callable[[], object]:
    """Returns a step of the original system's pretraining rule, with remat, on random rows without padding."""
    settings = default_config()
    model = lm.model.clone(lora=LORA, remat="full")
    optimizer = make_optimizer(settings)
    step = make_train_step(
        StepOptions(model, Corruption(lm.diffusion), 256),
        optimizer,
        learning_rate_schedule(settings, 1000),
        make_mesh(1),
    )
    lora = init_lora(jax.random.key(0), lm.params, LORA, jnp.zeros(lm.config.hidden_size))
    state = TrainState({"lora": lora}, optimizer.init({"lora": lora}))
    shape = (1, options.rows)
    row, full = np.arange(options.rows, dtype=np.int32)[None], np.full(shape, options.length, np.int32)
    tokens = _tokens(lm.config.vocab_size, options)[None]
    batch = jax.device_put(
        CleanBatch.of_rows(tokens, full, tokens >= 0, np.zeros(shape, np.int32), row, row / row.size)
    )

    def run() -> object:
        nonlocal state
        state, metrics = step({"params": lm.params}, state, batch, jax.random.key(1), 0)
        return metrics

    return run


def _torch_step(directory: str, quantised: bool, options: argparse.Namespace) -> Callable[[], object]:
    """Returns the same step in torch: rank 16 on seven projections, checkpointing, the loss at every token, AdamW."""
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    held = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=held if quantised else None, attn_implementation="sdpa"
    )
    model = prepare_model_for_kbit_training(model) if quantised else model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, PeftConfig(r=16, lora_alpha=32, target_modules=list(LORA.target_modules)))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    tokens = torch.tensor(_tokens(model.config.vocab_size, options)).long()
    everything = torch.zeros(options.rows, 1, options.length, options.length)  # no position is masked out

    def run() -> None:
        logits = model(tokens, attention_mask=everything, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _tokens(vocab_size: int, options: argparse.Namespace) -> np.ndarray:
    return np.random.default_rng(0).integers(10, vocab_size, (options.rows, options.length)).astype(np.int32)


if __name__ == "__main__":
    main()
