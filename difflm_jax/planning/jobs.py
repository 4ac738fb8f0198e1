"""The training steps and the generation of a run as jitted functions with abstract arguments.

Nothing is loaded and no device is used: the devices of a mesh may be absent (`jax.sharding.AbstractMesh`).
`planning.estimate` estimates what a job costs. `compiled_parts` asks XLA, which can compile for absent devices too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from difflm_jax.checkpoint.hf import abstract_params
from difflm_jax.config.files import lora_config, phase_config, quantization
from difflm_jax.data.packing import PACKED
from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import CleanBatch
from difflm_jax.distributed.mesh import AnyMesh, row_shards
from difflm_jax.distributed.sharding import abstract, batch_sharding, rows_spec
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.lora import init_lora
from difflm_jax.models.transformer import Transformer
from difflm_jax.models.weights import projections_of
from difflm_jax.sampling.batching import answer_plan
from difflm_jax.sampling.caches import Decoder, fill_on
from difflm_jax.sampling.loop import Canvas
from difflm_jax.sampling.options import sampling_options
from difflm_jax.training.loop import step_options
from difflm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from difflm_jax.training.parameters import Collections
from difflm_jax.training.step import StepOptions, TrainState, make_train_step
from difflm_jax.utils.dtypes import DTYPES


@dataclasses.dataclass(frozen=True)
class Job:
    """A jitted function and its abstract arguments by name.

    loop_trips: trips of a loop whose end depends on data. donated: the arguments that are donated to the results.
    """

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    static: dict[str, Any]
    loop_trips: int
    donated: tuple[str, ...] = ()

    def trace(self) -> jax.stages.Traced:
        return self.function.trace(**self.arguments, **self.static)

    def lower(self) -> jax.stages.Lowered:
        return self.function.lower(**self.arguments, **self.static)


@dataclasses.dataclass(frozen=True)
class Generation:
    """A planned generation: `batch_size` prompts of `prompt_length` tokens, in `steps` forward passes."""

    batch_size: int
    prompt_length: int
    max_new_tokens: int
    steps: int
    block_length: int | None = None


def training_job(
    config: ConfigDict, phase: str, model_config: ModelConfig, mesh: AnyMesh, batch_size: int = 0, on_cpu: bool = False
) -> Job:
    """Returns the training step of a phase at `max_length`. `batch_size=0` is the configured one."""
    settings = phase_config(config, phase)
    batch_size = batch_size or settings.batch_size
    model = _model(settings, model_config, settings.remat, on_cpu)
    frozen, trained = _collections(settings, _params(config, model_config, mesh), model)
    optimizer = make_optimizer(settings)
    state = abstract(TrainState(trained, jax.eval_shape(optimizer.init, trained)), mesh)
    options = _options(settings, phase, model)
    step = make_train_step(options, optimizer, learning_rate_schedule(settings, 10**6), mesh)
    key, index = abstract((jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.int32)), mesh)
    batch = abstract_batch(settings.gradient_accumulation_steps, batch_size, settings.max_length)
    if settings.batching in PACKED:
        batch = batch.replace(row_lengths=None)
    arguments = {
        "frozen": abstract(frozen, mesh),
        "state": state,
        "batch": _placed(batch, batch_sharding(mesh)),
        "key": key,
        "index": index,
    }
    positions = batch_size // row_shards(mesh) * settings.max_length
    chunks = -(-positions // settings.loss_chunk)  # every position is scored, as in pretraining with the defaults
    return Job(phase, step, arguments, {}, chunks, donated=("state",))


def step_parts(settings: ConfigDict, phase: str, model_config: ModelConfig, remat: str) -> tuple[StepOptions, Any, Any]:
    """Returns abstract (options, frozen, trained) of a phase's loss on one device: dense base, XLA attention."""
    model = _model(settings, model_config, remat).clone(attention_kernel="xla")
    params = abstract_params(model_config, DTYPES[settings.dtype], None)
    return _options(settings, phase, model), *_collections(settings, params, model)


def sampling_job(
    config: ConfigDict, model_config: ModelConfig, mesh: AnyMesh, generation: Generation, on_cpu: bool = False
) -> Job:
    """Returns the job of a generation with the trained model. Its attention is always XLA's."""
    model = _model(config, model_config, "none", on_cpu).clone(attention_kernel="xla")
    params, diffusion = _params(config, model_config, mesh), _diffusion(config, model)
    sampling = sampling_options(diffusion.attention, config.algorithm, {})
    plan = answer_plan(diffusion, generation.max_new_tokens, generation.steps, generation.block_length, sampling)
    plan = dataclasses.replace(plan, first_column=generation.prompt_length)
    batch_size = generation.batch_size
    columns = generation.prompt_length + plan.num_blocks * plan.block_length
    tokens = jax.ShapeDtypeStruct((batch_size, columns), jnp.int32)
    valid, row = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_), jax.ShapeDtypeStruct(tokens.shape[:1], jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
    quotas = jax.ShapeDtypeStruct((batch_size, plan.num_blocks, plan.steps_per_block), jnp.int32)
    steps_BJ = jax.ShapeDtypeStruct(quotas.shape[:2], jnp.int32)
    canvas = Canvas(tokens, valid, valid, row, steps_BJ, quotas, keys)
    variables = {"params": params, **({"lora": abstract(_adapters(params, model), mesh)} if model.lora else {})}
    arguments = {
        "decoder": Decoder(variables, model, diffusion, eos_token_ids=(0,), mesh=mesh),
        "canvas": _placed(canvas, NamedSharding(mesh, rows_spec(leading=0))),
        "sampling": sampling,
    }
    fill = fill_on(mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else "none")
    return Job("sampling", fill, arguments, {"plan": plan}, plan.num_blocks * plan.steps_per_block)


def abstract_batch(accumulation: int, batch_size: int, length: int) -> CleanBatch:
    """Returns the shapes [A, B, L] of a step's batch: one example per row, L = `length`."""
    row = jax.ShapeDtypeStruct((accumulation, batch_size), jnp.int32)
    tokens = jax.ShapeDtypeStruct((accumulation, batch_size, length), jnp.int32)
    is_answer = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)
    return jax.eval_shape(CleanBatch.of_rows, tokens, row, is_answer, row, row, row)


def compiled_parts(job: Job) -> tuple[dict[str, int], jax.stages.Compiled]:
    """Compiles `job` and returns ({part: bytes on one device}, the compiled job), from XLA's buffer assignment."""
    compiled = job.lower().compile()
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes, "results": results}
    return parts, compiled


def _model(config: ConfigDict, model_config: ModelConfig, remat: str, on_cpu: bool = False) -> Transformer:
    return Transformer(
        config=model_config,
        lora=None if config.trained == "all" else lora_config(config).of_model(projections_of(model_config)),
        mask_token_id=model_config.vocab_size - 1,
        dtype=DTYPES[config.dtype],
        remat=remat,
        attention_kernel=config.attention_kernel,
        on_cpu=on_cpu,
    )


def _diffusion(config: ConfigDict, model: Transformer) -> DiffusionConfig:
    return DiffusionConfig(config.attention, config.block_length, config.logit_shift, model.mask_token_id)


def _options(settings: ConfigDict, phase: str, model: Transformer) -> StepOptions:
    return step_options(phase, settings, model, _diffusion(settings, model), eos_id=0, steps=10**6)


def _params(config: ConfigDict, model_config: ModelConfig, mesh: AnyMesh) -> dict[str, Any]:
    return abstract(abstract_params(model_config, DTYPES[config.dtype], quantization(config)), mesh)


def _collections(config: ConfigDict, params: dict[str, Any], model: Transformer) -> tuple[Collections, Collections]:
    """Returns (frozen, trained) as `difflm_jax.training.parameters.collections` does."""
    if config.trained == "all":
        return {}, {"params": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)}
    return {"params": params}, {"lora": _adapters(params, model)}


def _adapters(params: dict[str, Any], model: Transformer) -> dict[str, Any]:
    mask_row = jax.ShapeDtypeStruct((model.config.hidden_size,), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda k, p, row: init_lora(k, p, model.lora, row), key, params, mask_row)


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
