"""Shared by our ways and torch's in `benchmarks.accelerator`: shapes, settings, timing and figures."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.common import median_of
from difflm_jax.config.files import load_config, lora_config
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.flops import peak_flops, train_flops_per_token

GENERATED, PROMPT, BLOCK, PASSES = 128, 128, 32, 32  # tokens, tokens, tokens, forward passes of an answer
# Config keys of all our ways of training. A way's own keys override them.
SETTINGS = {
    "remat": "save_dots",
    "attention_kernel": "cudnn",
    "gradient_accumulation_steps": 1,
    "loss_chunk": 2048,
    "lora_config.lora_dropout": 0.0,
    "wandb_config.project": "",
}


def batch_sizes(keys: dict[str, str]) -> list[int]:
    """Removes the batch sizes of a generation from its keys and returns them."""
    return [int(size) for size in keys.pop("batch", "8").split(",")]


def configuration(options: argparse.Namespace, keys: dict[str, Any]) -> Any:
    overrides = {"model": options.model, "max_length": options.length, **keys}
    return load_config("", [f"--config.{key}={value}" for key, value in overrides.items()])


def timed(run: Callable[[int], Any], options: argparse.Namespace, of_a_round: int = 0) -> list[float]:
    """Returns the seconds per step (or answer) in each round. `run` takes their number and waits for the last."""
    count = of_a_round or options.steps
    run(2)
    seconds = []
    for _ in range(options.rounds):
        begun = time.perf_counter()
        run(count)
        seconds.append((time.perf_counter() - begun) / count)
    return seconds


def training_figures(
    config: Any, model_config: ModelConfig, seconds: list[float], options: argparse.Namespace
) -> dict[str, Any]:
    speed = options.rows * options.length / median_of(seconds)
    flops = train_flops_per_token(model_config, options.length, lora_config(config)) * speed
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "seconds_per_step": median_of(seconds),
        "tokens_per_second": speed,
        "tflops": flops / 1e12,
        "mfu": flops / peak if peak else "",
        "seconds": seconds,
    }


def generation_figures(batch: int, answers: Callable[[int], Any], options: argparse.Namespace) -> dict[str, Any]:
    begun = time.perf_counter()
    answers(1)
    first = time.perf_counter() - begun
    seconds = timed(answers, options, of_a_round=1)
    median = median_of(seconds)
    speed = {"tokens_per_second": batch * GENERATED / median, "ms_per_pass": 1e3 * median / PASSES}
    return {"batch": batch, "answer_seconds": median, **speed, "first_seconds": round(first, 1), "seconds": seconds}
