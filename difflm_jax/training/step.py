"""The training and evaluation steps: `jax.jit(jax.shard_map(...))` over the mesh, the same for all objectives."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.diffusion.lossless import CleanCopy, clean_copy
from difflm_jax.diffusion.objective import RATE_BUCKETS, LossSums, loss_sums
from difflm_jax.distributed.collectives import DATA, FSDP, ROW_AXES, varies
from difflm_jax.distributed.sharding import rows_spec, specs
from difflm_jax.models.flops import Work
from difflm_jax.models.transformer import Transformer
from difflm_jax.training.optimizer import global_norm

Tree = Any


@struct.dataclass
class TrainState:
    """Everything that training changes: collections of the model (float32 masters) and the optimiser's moments.

    `trained` is {"lora": adapters} over a frozen base, or {"params": weights}.
    """

    trained: Tree
    opt_state: Tree


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """The static options of a step.

    chunk: positions whose logits exist at once. unroll: whether the training step compiles every layer instead of a
    loop.
    """

    model: Transformer
    corruption: Corruption
    chunk: int
    unroll: bool = False


def make_train_step(
    options: StepOptions,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Returns `step(frozen, state, batch, key, index) -> (state, metrics)`.

    frozen: the collections that are not trained: {"params": the base} with adapters, else {}. state: is donated. batch:
    arrays [A, B, ...] (A micro-batches, B rows over all devices). key: the key of the phase. index: the number of the
    step in the phase, from 0.

    The loss is Σ weight * CE / Σ weight over all micro-batches and devices. It does not depend on their number or on
    how rows are split.

    A step with a non-finite loss or gradient norm is skipped: it returns the given state bit for bit, including moments
    and their count, and `metrics["finite"]` is false. (`optax.apply_if_finite` would apply such an update after its
    limit.)
    """

    def step(frozen: Tree, state: TrainState, batch: CleanBatch, key: jax.Array, index: jax.Array):
        key = jax.random.fold_in(key, index)
        # The gradient of an input that all rows share would be summed over devices in every micro-batch. Cast to
        # varying, it stays local and is summed once. It is not cast over `tensor`: there the sum over the parts of a
        # layer belongs to the gradient, and jax inserts it where a replicated value meets a divided one.
        trained = jax.tree.map(_varying_over_rows, state.trained)

        def micro_batch(totals: tuple[LossSums, Tree], rows: CleanBatch):
            sums_of = functools.partial(batch_loss, options, frozen, rows, key, index)
            gradient, sums = jax.grad(sums_of, has_aux=True)(trained)
            return jax.tree.map(jnp.add, totals, (sums, gradient)), None

        zeros = (_zero_sums(options), jax.tree.map(jnp.zeros_like, trained))
        (sums, gradient), _ = jax.lax.scan(micro_batch, zeros, batch)
        sums, gradient = _over_all_rows(sums, gradient, state.trained)
        grad_norm = global_norm(gradient)
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trained)
        learning_rate = schedule(index)
        trained = jax.tree.map(lambda leaf, update: leaf - learning_rate * update, state.trained, updates)
        new_state = jax.tree.map(functools.partial(jnp.where, finite), TrainState(trained, opt_state), state)
        metrics = {"sums": sums, "grad_norm": grad_norm, "learning_rate": learning_rate, "finite": finite}
        return new_state, metrics

    whole = PartitionSpec()

    def sharded(frozen: Tree, state: TrainState, batch: CleanBatch, key: jax.Array, index: jax.Array):
        state_specs = specs(state, mesh)
        mapped = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs(frozen, mesh), state_specs, rows_spec(), whole, whole),
            out_specs=(state_specs, whole),
        )
        return mapped(frozen, state, batch, key, index)

    return jax.jit(sharded, donate_argnums=1)


def make_eval_step(options: StepOptions, mesh: Mesh) -> Callable[..., LossSums]:
    """Returns `step(variables, batch, key) -> LossSums`, without dropout. `batch` has arrays [1, B, ...]."""

    def step(variables: Tree, batch: CleanBatch, key: jax.Array) -> LossSums:
        rows = jax.tree.map(lambda x: x[0], batch)
        _, sums = loss_sums(options.model, variables, rows, key, options.corruption, options.chunk, train=False)
        return jax.lax.psum(sums, ROW_AXES)

    whole = PartitionSpec()

    def sharded(variables: Tree, batch: CleanBatch, key: jax.Array) -> LossSums:
        in_specs = (specs(variables, mesh), rows_spec(), whole)
        return jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=whole)(variables, batch, key)

    return jax.jit(sharded)


def make_clean_step(options: StepOptions, mesh: Mesh) -> Callable[[Tree, CleanBatch], CleanCopy]:
    """Returns `step(frozen, batch) -> CleanCopy` for arrays [B, ...], the first half of a step of the draft objective.

    The axis `tensor` must have one device: what divides the heads would divide the copy.
    """

    def step(frozen: Tree, batch: CleanBatch) -> CleanCopy:
        return clean_copy(options.model, options.corruption, frozen["params"], batch)

    def sharded(frozen: Tree, batch: CleanBatch) -> CleanCopy:
        rows = rows_spec(leading=0)
        return jax.shard_map(step, mesh=mesh, in_specs=(specs(frozen, mesh), rows), out_specs=rows)(frozen, batch)

    return jax.jit(sharded)


def batch_loss(
    options: StepOptions, frozen: Tree, rows: CleanBatch, key: jax.Array, index: jax.Array, trained: Tree
) -> tuple[jax.Array, LossSums]:
    """Returns (loss, sums) of a micro-batch, as a function of the collections `trained`."""
    model, variables = options.model.clone(unroll=options.unroll), {**frozen, **trained}
    return loss_sums(model, variables, rows, key, options.corruption, options.chunk, train=True, index=index)


def _varying_over_rows(leaf: jax.Array) -> jax.Array:
    missing = tuple(axis for axis in ROW_AXES if not varies(leaf, axis))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf


def _over_all_rows(sums: LossSums, gradient: Tree, trained: Tree) -> tuple[LossSums, Tree]:
    """Returns the sums over all devices, and the gradient of the mean loss: Σ gradient / Σ weight.

    Gradients of leaves that are divided over `fsdp` were summed over it by the transpose of their all-gather. Their sum
    over `data` comes last and depends on the weight. So data dependences fix the order of the collectives.
    """
    gradients, structure = jax.tree.flatten(gradient)
    is_part = [varies(leaf, FSDP) for leaf in jax.tree.leaves(trained)]
    whole = [g for g, part in zip(gradients, is_part, strict=True) if not part]
    parts = [g for g, part in zip(gradients, is_part, strict=True) if part]
    sums, whole = jax.lax.psum((sums, whole), ROW_AXES)
    total_weight = jnp.maximum(sums.weight, jnp.finfo(jnp.float32).tiny)
    whole, parts = ([g / total_weight for g in each] for each in (whole, parts))
    whole, parts = iter(whole), iter(jax.lax.psum(parts, DATA) if parts else ())
    return sums, jax.tree.unflatten(structure, [next(parts if part else whole) for part in is_part])


def _zero_sums(options: StepOptions) -> LossSums:
    """Returns zeros of the types that `loss_sums` returns, which vary over the row axes."""
    zero = jax.lax.pcast(jnp.float32(0), ROW_AXES, to="varying")
    bucket = jnp.broadcast_to(zero, (RATE_BUCKETS,))
    work = Work(zero, zero, zero)
    experts, of_experts = options.model.config.experts, None
    if experts is not None and options.corruption.draft is None:
        of_experts = jnp.broadcast_to(zero, (sum(experts.sparse), experts.count))
    return LossSums(zero, zero, bucket, bucket, bucket, zero, work, work, of_experts)
