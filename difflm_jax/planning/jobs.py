"""Whether a run fits: its training steps and a generation as functions of shapes, and what they cost a device.

Nothing is loaded and no device is touched: a mesh may be one of devices that are not there
(`jax.sharding.AbstractMesh`). The costs are read off the traced functions (`difflm_jax.planning.costs`), or off what
XLA makes of them when it compiles them for devices that may not be there either.
"""

import dataclasses
import math
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
from difflm_jax.planning.costs import Buffer, Costs, Transfer, costs
from difflm_jax.sampling.batching import answer_plan
from difflm_jax.sampling.caches import Decoder, fill_on
from difflm_jax.sampling.loop import Canvas
from difflm_jax.sampling.options import sampling_options
from difflm_jax.training.loop import step_options
from difflm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from difflm_jax.training.parameters import Collections
from difflm_jax.training.step import TrainState, make_train_step
from difflm_jax.utils.dtypes import DTYPES

# What XLA assigns to a working set, over what it must hold at once: copies in other layouts, a schedule that is not the
# best, holes. From 1.6 to 2.0 in the training steps that were compiled for a CPU, 1.5 in a generation.
TRAINING_MARGIN, SAMPLING_MARGIN = 1.75, 1.4


@dataclasses.dataclass(frozen=True)
class Job:
    """A jitted function, its abstract arguments by name, and how often a loop runs whose end depends on data.

    `donated` names the arguments whose memory its results take.
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
class Estimate:
    """What a job costs one device. Bytes; `parts` add up to `total`."""

    parts: dict[str, int]
    flops: float
    product_bytes: float
    transfers: tuple[Transfer, ...]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def link_bytes(self) -> float:
        return sum(transfer.link_bytes for transfer in self.transfers)


def training_job(
    config: ConfigDict, phase: str, model_config: ModelConfig, mesh: AnyMesh, batch_size: int = 0, on_cpu: bool = False
) -> Job:
    """The training step of a phase at `max_length`; `batch_size` 0 is the configured one."""
    settings = phase_config(config, phase)
    batch_size = batch_size or settings.batch_size
    model = _model(settings, model_config, settings.remat, on_cpu)
    frozen, trained = _collections(settings, _params(config, model_config, mesh), model)
    optimizer = make_optimizer(settings)
    state = abstract(TrainState(trained, jax.eval_shape(optimizer.init, trained)), mesh)
    options = step_options(phase, settings, model, _diffusion(settings, model), eos_id=0, steps=10**6)
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
    chunks = -(-positions // settings.loss_chunk)  # every position scored: what pretraining by the original rule does
    return Job(phase, step, arguments, {}, chunks, donated=("state",))


def sampling_job(
    config: ConfigDict,
    model_config: ModelConfig,
    mesh: AnyMesh,
    batch_size: int,
    prompt_length: int,
    max_new_tokens: int,
    steps: int,
    block_length: int | None = None,
    on_cpu: bool = False,
) -> Job:
    """A generation for `batch_size` prompts of `prompt_length` tokens, as the trained model makes it."""
    model = _model(config, model_config, "none", on_cpu)
    params, diffusion = _params(config, model_config, mesh), _diffusion(config, model)
    sampling = sampling_options(diffusion.attention, config.algorithm, {})
    plan = answer_plan(diffusion, max_new_tokens, steps, block_length, sampling)
    plan = dataclasses.replace(plan, first_column=prompt_length)
    columns = prompt_length + plan.num_blocks * plan.block_length
    tokens = jax.ShapeDtypeStruct((batch_size, columns), jnp.int32)
    valid, row = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_), jax.ShapeDtypeStruct(tokens.shape[:1], jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
    quotas = jax.ShapeDtypeStruct((batch_size, plan.num_blocks, plan.steps_per_block), jnp.int32)
    steps_BN = jax.ShapeDtypeStruct(quotas.shape[:2], jnp.int32)
    canvas = Canvas(tokens, valid, valid, row, steps_BN, quotas, keys)
    variables = {"params": params, **({"lora": abstract(_adapters(params, model), mesh)} if model.lora else {})}
    arguments = {
        "decoder": Decoder(variables, model, diffusion, eos_token_ids=(0,), mesh=mesh),
        "canvas": _placed(canvas, NamedSharding(mesh, rows_spec(leading=0))),
        "sampling": sampling,
    }
    fill = fill_on(mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else "none")
    return Job("sampling", fill, arguments, {"plan": plan}, plan.num_blocks * plan.steps_per_block)


def abstract_batch(accumulation: int, batch_size: int, length: int) -> CleanBatch:
    """The shapes of a step's rows of one example each, none of them shorter than `length`."""
    row = jax.ShapeDtypeStruct((accumulation, batch_size), jnp.int32)
    tokens = jax.ShapeDtypeStruct((accumulation, batch_size, length), jnp.int32)
    is_answer = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)
    return jax.eval_shape(CleanBatch.of_rows, tokens, row, is_answer, row, row, row)


def estimate(job: Job, mesh: AnyMesh, layers: int, on_cpu: bool = False) -> Estimate:
    """What a job costs one device of the mesh, from its trace; `layers` is the model's number of them."""
    found = costs(job.trace().jaxpr, dict(mesh.shape), job.loop_trips, on_cpu)
    parts = {**_argument_parts(job), **_temporary_parts(found, job, layers)}
    return Estimate(parts, found.flops, found.product_bytes, found.transfers)


def compiled_parts(job: Job) -> tuple[dict[str, int], jax.stages.Compiled]:
    """({part: bytes of a device}, the compiled job), as XLA's buffer assignment has them."""
    compiled = job.lower().compile()
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes, "results": results}
    return parts, compiled


def largest_batch(total: Callable[[int], int], capacity: float, unit: int, most: int = 4096) -> int:
    """The largest multiple of `unit` rows whose `total` bytes are within `capacity`, at most `most`; 0 if none is.

    `total` is nearly linear in the rows: a line through what fits, then false position, finds the place in a few steps.
    """
    found = {1: total(unit)}
    if found[1] > capacity:
        return 0
    fits, too_many = 1, None
    while too_many is None or too_many - fits > 1:
        if too_many is None:
            a_row = (found[fits] - found[1]) / (fits - 1) if fits > 1 else 0
            more = math.floor((capacity - found[fits]) / a_row) if a_row > 0 else 7 * fits
            guess = min(fits + max(more, 1), most // unit)
        else:
            share = (capacity - found[fits]) / (found[too_many] - found[fits])
            guess = min(max(fits + math.floor(share * (too_many - fits)), fits + 1), too_many - 1)
        if guess == fits:
            break
        found[guess] = total(guess * unit)
        if found[guess] <= capacity:
            fits = guess
        else:
            too_many = guess
    return fits * unit


def _argument_parts(job: Job) -> dict[str, int]:
    named = dict(job.arguments)
    state = named.pop("state", None)
    decoder = named.pop("decoder", None)
    variables = decoder.variables if decoder else {**named.pop("frozen"), **state.trained}
    parts = {"weights": _device_bytes(variables["params"]), "adapters": _device_bytes(variables.get("lora"))}
    if state is not None:
        parts["moments"] = _device_bytes(state.opt_state)
    return {**parts, "batch": _device_bytes(named)}


def _temporary_parts(found: Costs, job: Job, layers: int) -> dict[str, int]:
    """The peak of temporaries, by what it consists of."""
    trained = job.arguments.get("state")
    shapes = {_shard_shape(leaf) for leaf in jax.tree.leaves(trained.trained)} if trained is not None else set()

    def kind(buffer: Buffer) -> str:
        if buffer.shape in shapes and buffer.dtype == "float32":
            return "gradients"
        return "activations" if buffer.stacked == layers else "working"

    parts = dict.fromkeys(("activations", "gradients", "working"), 0)
    for buffer in found.live:
        parts[kind(buffer)] += buffer.size
    parts["working"] += found.peak - sum(parts.values())  # what takes the place of something else
    parts["working"] = int(parts["working"] * (TRAINING_MARGIN if trained is not None else SAMPLING_MARGIN))
    return parts


def _device_bytes(tree: Any) -> int:
    """Bytes of one device's part of abstract arrays."""
    return sum(
        math.prod(_shard_shape(leaf)) * (getattr(leaf.dtype, "itemsize", 0) or 8) for leaf in jax.tree.leaves(tree)
    )


def _shard_shape(leaf: Any) -> tuple[int, ...]:
    sharding = getattr(leaf, "sharding", None)
    return tuple(leaf.shape if sharding is None else sharding.shard_shape(leaf.shape))


def _model(config: ConfigDict, model_config: ModelConfig, remat: str, on_cpu: bool) -> Transformer:
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


def _params(config: ConfigDict, model_config: ModelConfig, mesh: AnyMesh) -> dict[str, Any]:
    return abstract(abstract_params(model_config, DTYPES[config.dtype], quantization(config)), mesh)


def _collections(config: ConfigDict, params: dict[str, Any], model: Transformer) -> tuple[Collections, Collections]:
    """(frozen, trained), as `difflm_jax.training.parameters.collections` makes them."""
    if config.trained == "all":
        return {}, {"params": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)}
    return {"params": params}, {"lora": _adapters(params, model)}


def _adapters(params: dict[str, Any], model: Transformer) -> dict[str, Any]:
    mask_row = jax.ShapeDtypeStruct((model.config.hidden_size,), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda k, p, row: init_lora(k, p, model.lora, row), key, params, mask_row)


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
