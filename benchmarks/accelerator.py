"""Training steps and generation on one accelerator, compared with torch + peft, for a model with random weights.

    python -m benchmarks.accelerator [--model=DIR or hub id] [--ways="lora; nf4; torch"] [--rows=16] [--out=DIR]

Only the model's `config.json` is needed. A way is a name and the keys that it changes, as in "lora remat=full". Ours:
`lora` and `nf4` (a step of the original objective, which scores every token, on rows without padding; keys are config
keys) and `generate` (block attention, blocks of 32, no adapter; `batch=8`, or several as `batch=1,8`). The peer's:
`torch` (checkpoints every layer, float32 adapters under autocast, all logits), `torch_best` (bfloat16
adapters, no checkpointing, micro-batches as large as memory allows), `torch_nf4` and `torch_nf4_best` (bitsandbytes),
and `torch_generate` (the whole canvas in every pass, logits of the answer). Each way runs in its own
process, so that none keeps memory of another. Figures are medians over rounds; the host does not wait between steps.
"""

import argparse
import functools
import json
import re
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import add_report_flags, report
from benchmarks.figures import (
    BLOCK,
    GENERATED,
    PASSES,
    PROMPT,
    SETTINGS,
    batch_sizes,
    configuration,
    generation_figures,
    timed,
    training_figures,
)
from benchmarks.kernels import time_of_kernels
from difflm_jax.checkpoint.hf import abstract_params
from difflm_jax.checkpoint.source import read_model_config
from difflm_jax.config.files import lora_config, quantization
from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import CleanBatch
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.lora import init_lora
from difflm_jax.models.transformer import Transformer
from difflm_jax.planning.jobs import training_job
from difflm_jax.quant import QTensor, QuantConfig, quantize
from difflm_jax.sampling.batching import FillOptions, answer_plan, fill_answers
from difflm_jax.sampling.caches import Decoder
from difflm_jax.sampling.options import sampling_options
from difflm_jax.training.optimizer import make_optimizer
from difflm_jax.training.step import TrainState
from difflm_jax.utils.dtypes import DTYPES

WAYS = (
    "lora; lora remat=save_attention; lora remat=full; lora attention_kernel=xla; nf4; nf4 remat=full; "
    "torch; torch_best; torch_nf4; torch_nf4_best; generate batch=1,8,128; torch_generate batch=1,8,128"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-4B-Instruct-2507")
    parser.add_argument("--ways", default=WAYS, help="separated by semicolons")
    parser.add_argument("--way", default="", help=argparse.SUPPRESS)  # one way, in this process
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=768)
    parser.add_argument("--steps", type=int, default=5, help="of a round")
    parser.add_argument("--limit", type=int, default=600, help="seconds that a way may take")
    parser.add_argument("--kernels", action="store_true", help="print where the time of a step goes, too")
    add_report_flags(parser, rounds=4)
    options = parser.parse_args()
    if options.way:
        for result in run_way(options.way, options):
            print("RESULT " + json.dumps(result), flush=True)
        return
    ways = [way.strip() for way in options.ways.split(";") if way.strip()]
    rows = [row for way in ways for row in in_own_process(way, options)]
    report("accelerator", options, rows, "tokens_per_second")


def in_own_process(way: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the results of a way, or a record of how it failed."""
    own = {name: value for name, value in vars(options).items() if name not in ("way", "ways", "out", "kernels")}
    command = [sys.executable, "-m", "benchmarks.accelerator", f"--way={way}"]
    command += [f"--{name}={value}" for name, value in own.items()] + ["--kernels"] * options.kernels
    begun = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
        lines = done.stdout.splitlines()
        print("\n".join(line for line in lines if not line.startswith("RESULT ")), flush=True)
        results = [json.loads(line[7:]) for line in lines if line.startswith("RESULT ")]
        errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
        error = (errors or [f"exit status {done.returncode}"])[-1][:200]
    except subprocess.TimeoutExpired:
        results, error = [], f"not finished in {options.limit} s"
    results = [{"way": way, **result} for result in results or [{"error": error}]]
    print(f"{results} in {time.perf_counter() - begun:.0f} s", flush=True)
    return results


def run_way(way: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    name, *pairs = way.split()
    keys = dict(pair.split("=", 1) for pair in pairs)
    if not name.startswith("torch"):
        ways = {"lora": training, "nf4": training, "generate": generation}
        return ways[name](name, keys, options)
    from benchmarks import torch_peer

    return (torch_peer.generation if name == "torch_generate" else torch_peer.training)(name, keys, options)


def training(name: str, keys: dict[str, str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times our step: `lora` over a bfloat16 base, or `nf4` with double quantisation."""
    held = {"quantization": "nf4"} if name == "nf4" else {}
    config = configuration(options, {**SETTINGS, **held, **keys})
    model_config = read_model_config(config.model)
    begun = time.perf_counter()
    step = training_job(config, "pretrain", model_config, make_mesh(1), options.rows).lower().compile()
    compiled = time.perf_counter() - begun
    params = random_params(model_config, DTYPES[config.dtype], quantization(config))
    lora = init_lora(jax.random.key(1), params, lora_config(config), jnp.zeros(model_config.hidden_size))
    state = TrainState({"lora": lora}, make_optimizer(config).init({"lora": lora}))
    frozen, batch, key = {"params": params}, full_rows(options, model_config.vocab_size), jax.random.key(0)
    weights = memory()

    def steps(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, metrics = step(frozen=frozen, state=state, batch=batch, key=key, index=jnp.int32(0))
        jax.block_until_ready(metrics)

    seconds = timed(steps, options)
    if options.kernels:
        time_of_kernels(lambda: steps(2), 2)
    figures = training_figures(config, model_config, seconds, options)
    memories = {"peak_gib": memory("peak_bytes_in_use"), "weights_gib": weights}
    return [{**figures, **memories, "compile_seconds": round(compiled, 1)}]


def generation(name: str, keys: dict[str, str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times `GENERATED` tokens in `PASSES` passes, block by block with an exact cache."""
    batches = batch_sizes(keys)
    config = configuration(options, {"attention": "block", "block_length": BLOCK, "logit_shift": "true", **keys})
    model_config = read_model_config(config.model)
    params = random_params(model_config, DTYPES[config.dtype], quantization(config))
    mask_id = model_config.vocab_size - 1
    model = Transformer(model_config, None, mask_id, DTYPES[config.dtype])
    decoder = Decoder({"params": params}, model, DiffusionConfig("block", BLOCK, True, mask_id))
    sampling = sampling_options("block", "probability", {"stop_at_eos": False})
    plan = answer_plan(decoder.diffusion, GENERATED, PASSES, None, sampling)
    rows = np.random.default_rng(0).integers(10, model_config.vocab_size - 1, (max(batches), PROMPT)).astype(np.int32)
    found = []
    for batch in batches:
        answers = functools.partial(answer, decoder, plan, sampling, list(rows[:batch]))
        found.append(generation_figures(batch, answers, options))
        if options.kernels:
            time_of_kernels(functools.partial(answers, 1), 1)
    return found


def answer(decoder: Decoder, plan: Any, sampling: Any, prompts: list[np.ndarray], times: int) -> None:
    for seed in range(times):
        options = FillOptions(sampling, PASSES, seed, len(prompts))
        fill_answers(decoder, prompts, GENERATED, plan, options)


def random_params(model_config: ModelConfig, dtype: Any, held: QuantConfig | None) -> dict[str, Any]:
    """Returns N(0, 0.02) weights of the model's shape, quantised one layer at a time; norms are ones."""

    def drawn(path: tuple[Any, ...], leaf: Any) -> Any:
        if "norm" in jax.tree_util.keystr(path):
            return jnp.ones(leaf.shape, leaf.dtype)
        quantised = isinstance(leaf, QTensor)
        finish = (lambda x: quantize(x, held)) if quantised else (lambda x: x.astype(leaf.dtype))
        count, *shape = leaf.shape if len(leaf.shape) > 2 else (1, *leaf.shape)
        keys = jax.random.split(jax.random.key(len(shape) * count), count)
        make = jax.jit(lambda keys: jax.lax.map(lambda key: finish(0.02 * jax.random.normal(key, shape)), keys))
        return make(keys) if len(leaf.shape) > 2 else make(keys)[0]

    shapes = abstract_params(model_config, dtype, held)
    return jax.tree_util.tree_map_with_path(drawn, shapes, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def full_rows(options: argparse.Namespace, vocab_size: int) -> CleanBatch:
    """Returns one micro-batch of rows without padding."""
    shape = (options.rows, options.length)
    tokens = np.random.default_rng(0).integers(10, vocab_size - 1, shape).astype(np.int32)
    lengths, ids = np.full(options.rows, options.length, np.int32), np.arange(options.rows, dtype=np.int32)
    batch = CleanBatch.of_rows(tokens, lengths, np.ones(shape, bool), 0 * lengths, ids, ids / options.rows)
    return jax.tree.map(lambda x: jnp.asarray(x)[None], batch)


def memory(kind: str = "bytes_in_use") -> float | str:
    """Returns a memory figure of the first device in GiB; "" if it reports none."""
    found = (jax.devices()[0].memory_stats() or {}).get(kind)
    return round(found / 2**30, 2) if found else ""


if __name__ == "__main__":
    main()
