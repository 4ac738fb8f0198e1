"""Seconds to compile the training step by depth, without and with the compilation cache.

    python -m benchmarks.compile [--width=512] [--out=DIR]

The step is that of `configs/pretrain.py` (dropout, remat) for models that differ only in the number of layers. Only
shapes are needed. Layers are scanned, so the time should not grow with their number.
"""

import argparse
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import add_report_flags, median_of, report
from difflm_jax.checkpoint.hf import abstract_params
from difflm_jax.config import default_config
from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.distributed.sharding import abstract
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.models.transformer import Transformer
from difflm_jax.models.weights import projections_of
from difflm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from difflm_jax.training.step import StepOptions, TrainState, make_train_step

LAYERS = (4, 36)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    add_report_flags(parser, rounds=3)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {f"{layers} layers": [] for layers in LAYERS}
    seconds["36 layers, kept compilation"] = []
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as directory:
            for layers in LAYERS:
                jax.config.update("jax_compilation_cache_dir", directory if layers == LAYERS[-1] else None)
                jax.experimental.compilation_cache.compilation_cache.reset_cache()
                seconds[f"{layers} layers"].append(compile_seconds(layers, options.width))
            seconds["36 layers, kept compilation"].append(compile_seconds(LAYERS[-1], options.width))
    base = median_of(seconds["4 layers"])
    rows = [
        {"way": name, "compile_seconds": median_of(times), "of_4_layers": median_of(times) / base, "seconds": times}
        for name, times in seconds.items()
    ]
    report("compile", options, rows, "compile_seconds")


def compile_seconds(
    layers: int, width: int, changes: dict[str, Any] | None = None, with_lowering: bool = False
) -> float:
    """Returns the seconds from the traced step to a program, with the caches of this process cleared.

    `changes` are applied to the model's `config.json`; `with_lowering` also counts tracing.
    """
    jax.clear_caches()
    begun = time.perf_counter()
    lowered = _lowered(layers, width, changes or {})
    start = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - (begun if with_lowering else start)


def _lowered(layers: int, width: int, changes: dict[str, Any]) -> jax.stages.Lowered:
    config = ModelConfig.from_hf(
        {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": width,
            "intermediate_size": 3 * width, "num_hidden_layers": layers, "num_attention_heads": width // 64,
            "num_key_value_heads": width // 128, "head_dim": 64, "vocab_size": 151_936, "rms_norm_eps": 1e-6,
            "rope_theta": 1e6, "max_position_embeddings": 4096, "tie_word_embeddings": True, "hidden_act": "silu",
            "attention_bias": False, **changes,
        }
    )  # fmt: skip
    mesh, settings, lora_config = make_mesh(1), default_config(), LoraConfig(lora_dropout=0.05)
    lora_config = lora_config.of_model(projections_of(config))
    params = abstract(abstract_params(config, jnp.bfloat16, None), mesh)
    model = Transformer(config, lora=lora_config, mask_token_id=5, dtype=jnp.bfloat16, remat="full")
    optimizer = make_optimizer(settings)
    schedule = learning_rate_schedule(settings, 1000)
    step = make_train_step(
        StepOptions(model, Corruption(DiffusionConfig(mask_token_id=5)), settings.loss_chunk), optimizer, schedule, mesh
    )
    row = jax.ShapeDtypeStruct((width,), jnp.float32)
    lora = jax.eval_shape(lambda p, r: init_lora(jax.random.key(0), p, lora_config, r), params, row)
    state = abstract(TrainState({"lora": lora}, jax.eval_shape(optimizer.init, {"lora": lora})), mesh)
    tokens, of_rows = jax.ShapeDtypeStruct((1, 16, 768), jnp.int32), jax.ShapeDtypeStruct((1, 16), jnp.int32)
    answers = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)
    batch = jax.eval_shape(CleanBatch.of_rows, tokens, of_rows, answers, of_rows, of_rows, of_rows)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return step.lower({"params": params}, state, batch, key, jax.ShapeDtypeStruct((), jnp.int32))


if __name__ == "__main__":
    main()
