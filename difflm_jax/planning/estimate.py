"""Estimates what a training step or a generation costs one device, from shapes. Nothing is compiled or run.

Arguments (weights, adapters, moments, batch) are exact. Residuals of the backward pass are exact too: jax traces the
loss at one row and at two (`kept_per_row`). XLA also allocates gradients, the working set of one layer's backward pass
and a chunk of logits, in multiples that depend on the backend (`_BACKENDS`). The multiples were fitted to steps
compiled by XLA for a CPU, an H100 and a v6e (docs/planning.md).
"""

import bisect
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from difflm_jax.config.files import lora_config, phase_config, quantization
from difflm_jax.diffusion.corruption import CleanBatch
from difflm_jax.distributed.mesh import abstract_mesh, row_shards
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.experts import Experts
from difflm_jax.models.flops import Work, forward_flops, train_flops
from difflm_jax.models.weights import table
from difflm_jax.planning.jobs import Job, abstract_batch, step_parts, training_job
from difflm_jax.training.step import batch_loss
from difflm_jax.utils.dtypes import DTYPES

Sizes = tuple[int, int, int]  # of the mesh: data, fsdp, tensor


@dataclasses.dataclass(frozen=True)
class _Backend:
    """Temporaries of XLA in addition to residuals, as multiples of sizes known from shapes."""

    layer: float  # residuals of one layer without rematerialisation
    trained: float  # trained float32 weights: gradients of a micro-batch, their sum, the updates
    logits: float  # a chunk of float32 logits in training
    canvas: float  # float32 logits of the active blocks in a generation
    takes_turns: bool = False  # whether a layer and a chunk of logits share a buffer


_BACKENDS = {
    "cpu": _Backend(1.4, 2.4, 2.0, 2.0, takes_turns=True),
    "cuda": _Backend(0.46, 2.1, 0.85, 1.0),
    "tpu": _Backend(1.2, 3.0, 0.87, 3.1),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The cost of a job on one device. `parts` are bytes in memory and add up to `total`.

    `flops` and the other bytes are those of one optimiser step, or of a whole generation.
    """

    parts: dict[str, int]
    flops: float
    memory_bytes: float  # weights and residuals that are read and written
    link_bytes: float  # received from other devices

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step of a phase on a mesh. The residuals of a row are traced once, in `of`."""

    config: ConfigDict
    phase: str
    model_config: ModelConfig
    sizes: Sizes
    arguments: dict[str, int]  # bytes by part, `batch` with a row per device
    trained: int  # bytes
    kept: tuple[float, float]  # bytes per row of `max_length`: all residuals, and those of one layer without remat

    @classmethod
    def of(cls, config: ConfigDict, phase: str, model_config: ModelConfig, sizes: Sizes) -> "Step":
        settings, mesh = phase_config(config, phase), abstract_mesh(*sizes)
        job = training_job(config, phase, model_config, mesh, row_shards(mesh))
        part = _part(model_config, sizes[2])
        kept = {remat: kept_per_row(settings, phase, part, remat) for remat in {"none", "full", settings.remat}}
        layer = (kept["none"] - kept["full"]) / model_config.num_layers
        trained = device_bytes(job.arguments["state"].trained)
        traced = (argument_parts(job), trained, (kept[settings.remat], layer))
        return cls(config, phase, model_config, sizes, *traced)

    def estimate(self, platform: str, batch_size: int, length: int = 0) -> Estimate:
        """Estimates a step with micro-batches of `batch_size` rows of `length` tokens (0: `max_length`)."""
        settings = phase_config(self.config, self.phase)
        length = length or settings.max_length
        rows = batch_size // (self.sizes[0] * self.sizes[1])
        scale = rows * length / settings.max_length
        backend = _BACKENDS[platform]
        arguments = {**self.arguments, "batch": int(scale * self.arguments["batch"])}
        chunk = 4 * min(rows * length, settings.loss_chunk) * self.sizes[1] * self._vocabulary
        working = (backend.layer * scale * self.kept[1], backend.logits * chunk)
        parts = {
            **arguments,
            "activations": int(scale * self.kept[0]),
            "gradients": int(backend.trained * self.trained),
            "working": int(max(working) if backend.takes_turns else sum(working))
            + _copies(settings, self.model_config, self.sizes, platform),
        }
        accumulation = settings.gradient_accumulation_steps
        flops = accumulation * train_flops(
            self.model_config, self._lora, work_of_rows(settings, rows, length), settings.remat
        )
        passes = 2 * accumulation  # forward and backward
        read = passes * arguments["weights"] * self.sizes[1] + 2 * accumulation * parts["activations"]
        links = passes * self._gathered(arguments["weights"]) + self._exchanged(rows * length, passes)
        return Estimate(parts, flops / self.sizes[2], read, links + self._summed_gradients())

    @property
    def _lora(self) -> Any:
        return None if self.config.trained == "all" else lora_config(self.config)

    @property
    def _vocabulary(self) -> int:
        """Rows of the output head on one device."""
        return self.model_config.vocab_size // (self.sizes[1] * self.sizes[2])

    def _gathered(self, weights: int) -> float:
        """Returns the bytes that a device receives when the weights of all layers are gathered over `fsdp` once."""
        table_bytes = _tables(self.model_config) * _itemsize(self.config) / math.prod(self.sizes[1:])
        return max(weights - table_bytes, 0) * (self.sizes[1] - 1)

    def _exchanged(self, tokens: int, passes: int) -> float:
        """Returns the bytes of exchanged hidden states: two sums per layer over `tensor`, plus embedding and head."""
        _, fsdp, tensor = self.sizes
        states = tokens * self.model_config.hidden_size * _itemsize(self.config)
        over_tensor = 2 * self.model_config.num_layers * states * 2 * (1 - 1 / tensor)
        return passes * (over_tensor + states * 2 * (fsdp * tensor - 1) / tensor)

    def _summed_gradients(self) -> float:
        return 2 * self.trained * (1 - 1 / (self.sizes[0] * self.sizes[1]))


def sampling_estimate(config: ConfigDict, model_config: ModelConfig, sizes: Sizes, platform: str, job: Job) -> Estimate:
    """Estimates a generation (`sampling_job`) with all of its passes."""
    plan, canvas = job.static["plan"], job.arguments["canvas"]
    rows = canvas.tokens.shape[0] // (sizes[0] * sizes[1])
    columns, block = canvas.tokens.shape[1], plan.block_length
    is_cached = job.arguments["decoder"].diffusion.exact_cache != "none"
    lora = None if config.trained == "all" else lora_config(config)
    arguments = argument_parts(job)
    each = ((len(stack.layers), model_config.of_stack(stack)) for stack in model_config.stacks)
    heads = sum(layers * own.num_kv_heads * own.head_dim for layers, own in each)
    cache = 2 * rows * columns * heads * _itemsize(config) // sizes[2] if is_cached else 0
    logits = 4 * rows * block * model_config.vocab_size
    working = int(_BACKENDS[platform].canvas * logits) + _copies(config, model_config, sizes, platform)
    queries = rows * (block if is_cached else columns)
    work = Work(queries, queries * columns, rows * block)
    passes = job.loop_trips
    flops = passes * forward_flops(model_config, lora, work) / sizes[2]
    states = queries * model_config.hidden_size * _itemsize(config)
    links = arguments["weights"] * (sizes[1] - 1) + 4 * model_config.num_layers * states * (1 - 1 / sizes[2])
    read = passes * (arguments["weights"] * sizes[1] + cache + logits)
    return Estimate({**arguments, "cache": cache, "working": working}, flops, read, passes * links)


def work_of_rows(settings: ConfigDict, rows: int, length: int) -> Work:
    """Returns the work of a micro-batch of `rows`, padding included.

    Complementary masks double the rows. Attention "block" doubles the columns: a noisy and a clean copy.
    """
    rows *= 2 if settings.complementary_masks else 1
    width = 2 * length if settings.attention == "block" else length
    return Work(rows * width, rows * width**2, rows * length)


def kept_per_row(settings: ConfigDict, phase: str, model_config: ModelConfig, remat: str) -> float:
    """Returns the bytes of residuals per row of `max_length` tokens: those of two rows minus those of one."""
    options, frozen, trained = step_parts(settings, phase, model_config, remat)
    key, index = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.int32)

    def residuals(frozen: Any, trained: Any, rows: CleanBatch, key: jax.Array, index: jax.Array) -> Any:
        return jax.vjp(lambda trained: batch_loss(options, frozen, rows, key, index, trained)[0], trained)[1]

    sizes = []
    for rows in (1, 2):
        batch = jax.tree.map(_without_micro_batches, abstract_batch(1, rows, settings.max_length))
        sizes.append(device_bytes(jax.eval_shape(residuals, frozen, trained, batch, key, index)))
    return sizes[1] - sizes[0]


def argument_parts(job: Job) -> dict[str, int]:
    """Returns the exact bytes of one device's part of the arguments of a job, by part."""
    named = dict(job.arguments)
    state = named.pop("state", None)
    decoder = named.pop("decoder", None)
    variables = decoder.variables if decoder else {**named.pop("frozen"), **state.trained}
    parts = {"weights": device_bytes(variables["params"]), "adapters": device_bytes(variables.get("lora"))}
    if state is not None:
        parts["moments"] = device_bytes(state.opt_state)
    return {**parts, "batch": device_bytes(named)}


def device_bytes(tree: Any) -> int:
    """Returns the bytes of one device's part of abstract arrays. A key counts 8 bytes, a Python number 0."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]
    return sum(math.prod(_shard_shape(leaf)) * (getattr(leaf.dtype, "itemsize", 0) or 8) for leaf in leaves)


def _part(config: ModelConfig, tensor: int) -> ModelConfig:
    """Returns the config of the narrower model that each device along `tensor` computes."""
    own = config.global_heads
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // tensor,
        num_kv_heads=config.num_kv_heads // tensor,
        global_heads=own and own._replace(number=own.number // tensor),
        intermediate_size=config.intermediate_size // tensor,
        experts=None if config.experts is None else _part_of_experts(config.experts, tensor),
    )


def _part_of_experts(experts: Experts, tensor: int) -> Experts:
    """Narrows the experts. A device really computes its share of whole experts, which takes as many bytes."""
    return dataclasses.replace(experts, width=experts.width // tensor, shared_width=experts.shared_width // tensor)


def _copies(config: ConfigDict, model_config: ModelConfig, sizes: Sizes, platform: str) -> int:
    """Returns the bytes of the CPU's copies of bfloat16 weights: dense layers (`ops.cpu`), and the head in float32."""
    if platform != "cpu" or config.dtype != "bfloat16" or config.trained == "all":
        return 0
    quantised = quantization(config) is not None
    rows = () if quantised else [row for row in table(model_config) if row.quantisable]
    matrices = sum(math.prod(row.stack + row.shape) for row in rows)
    head = model_config.vocab_size * model_config.hidden_size
    return (2 * matrices + 4 * head) // (sizes[1] * sizes[2])


def _tables(config: ModelConfig) -> int:
    """Returns the number of weights of embedding and head, which are never gathered."""
    return sum(math.prod(row.shape) for row in table(config) if not row.stacked and len(row.shape) == 2)


def _itemsize(config: ConfigDict) -> int:
    return 4 if config.trained == "all" else jnp.dtype(DTYPES[config.dtype]).itemsize


def _shard_shape(leaf: Any) -> tuple[int, ...]:
    sharding = getattr(leaf, "sharding", None)
    return tuple(leaf.shape if sharding is None else sharding.shard_shape(leaf.shape))


def _without_micro_batches(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)


def largest_batch(total: Callable[[int], int], capacity: float, unit: int, most: int = 4096) -> int:
    """Returns the largest multiple of `unit` rows, up to `most`, whose `total` bytes fit `capacity`; 0 if none does."""
    candidates = range(unit, most + 1, unit)
    return unit * bisect.bisect_right(candidates, capacity, key=total)
