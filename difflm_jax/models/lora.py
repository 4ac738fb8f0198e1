"""Low-rank adaptation (arXiv:2106.09685), written by hand: y = W x + scaling * B (A dropout(x)).

The trained tree is the `lora` collection: each adapted projection has `lora_A` [N, R, in] and `lora_B` [N, out, R],
stacked over layers (and experts) like the base. `mask_row` [D] is the input embedding of the mask token, if it is
trained. All leaves are float32.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from difflm_jax.distributed.collectives import TENSOR, varies
from difflm_jax.distributed.sharding import place_leaf
from difflm_jax.errors import UserError
from difflm_jax.ops.matmul import matmul
from difflm_jax.ops.random import element_bits
from difflm_jax.quant import QTensor, dequantize
from difflm_jax.utils.progress import Progress
from difflm_jax.utils.settings import POSITIVE, PROPER_SHARE, setting

EXPERTS = "experts"  # the name of routed experts in a path
ADAPTABLE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """LoRA options with the names and meaning of PEFT's. `target_modules` are names of projections."""

    r: int = setting(16, "Rank.", within=POSITIVE)
    lora_alpha: float = setting(32, "The update is multiplied by lora_alpha / r.", within=POSITIVE)
    lora_dropout: float = setting(0.0, "Dropout of the adapter's input.", within=PROPER_SHARE, config_default=0.05)
    target_modules: tuple[str, ...] = setting(
        ADAPTABLE, "Adapted projections, or all-linear.", choices=ADAPTABLE, required=True
    )
    routed_experts: bool = setting(False, "Adapt the projections of routed experts too, without dropout.")
    use_rslora: bool = setting(False, "Divide lora_alpha by sqrt(r) instead (rank-stabilised LoRA).")

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv:2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def of_model(self, projections: Sequence[str]) -> "LoraConfig":
        """Returns the config for a model with these `projections`. All of `ADAPTABLE` means all that the model has."""
        if set(self.target_modules) != set(ADAPTABLE):
            return self
        return dataclasses.replace(self, target_modules=tuple(name for name in ADAPTABLE if name in projections))


def lora_down(
    x_BLD: jax.Array,
    factors_A: Sequence[jax.Array],
    config: LoraConfig,
    seeds_BL: jax.Array | None,
    gate_BL: jax.Array | None = None,
) -> list[jax.Array]:
    """Returns A dropout(x) [B, L, R] for each factor A of the projections that share the input `x`.

    It is one wide matmul: several of rank 16 would each read `x` again, and run far slower. So projections of one
    input share its dropout, whose mask follows from `seeds_BL` (see `dropout`; None: no dropout).

    `gate_BL` bool is False for tokens without an update, which get exactly the base's result (None: all tokens have
    one). As [B, L or 1, R] it gates each of the R inner values, for `joined_adapters`.
    """
    if not factors_A:
        return []
    if seeds_BL is not None and config.lora_dropout > 0:
        x_BLD = dropout(x_BLD, config.lora_dropout, seeds_BL)
    low_BLR = matmul(x_BLD, jnp.concatenate(factors_A))
    if gate_BL is not None:
        gate_BLR = gate_BL[..., None] if gate_BL.ndim == 2 else jnp.tile(gate_BL, len(factors_A))
        low_BLR = jnp.where(gate_BLR, low_BLR, jnp.zeros((), low_BLR.dtype))
    ends = np.cumsum([len(factor) for factor in factors_A])[:-1]
    return jnp.split(low_BLR, ends, axis=-1)


def lora_up(low_BLR: jax.Array, lora_B: jax.Array, config: LoraConfig) -> jax.Array:
    """Returns the update scaling * B (A dropout(x)), [B, L, out], from the result of `lora_down`."""
    return matmul(low_BLR * jnp.asarray(config.scaling, low_BLR.dtype), lora_B)


def joined_adapters(
    adapters: Sequence[tuple[dict[str, Any], LoraConfig] | None],
) -> tuple[dict[str, Any], LoraConfig, np.ndarray]:
    """Joins adapters of one base into a single one with all their inner values, in order: (`lora`, config, owners).

    `owners` [X, R] bool is True for the inner values of adapter x. As the gate of a row, it applies that adapter to the
    row. Ranks, targets and scaling may differ; None is the base itself. Mask rows are left out.
    """
    present = [adapter for adapter in adapters if adapter is not None]
    rank = sum(config.r for _, config in present)
    owners, start = np.zeros((len(adapters), rank), bool), 0
    for number, adapter in enumerate(adapters):
        if adapter is not None:
            owners[number, start : start + adapter[1].r] = True
            start += adapter[1].r
    like = {path: leaf_at(lora, path) for lora, _ in present for path in projection_paths(lora)}
    joined: dict[str, Any] = {}
    for path, module in like.items():
        factors_A, factors_B = [], []
        for lora, config in present:
            own = leaf_at(lora, path)
            if own is None:
                factors_A.append(jnp.zeros_like(module["lora_A"], shape=_of_rank(module["lora_A"], -2, config.r)))
                factors_B.append(jnp.zeros_like(module["lora_B"], shape=_of_rank(module["lora_B"], -1, config.r)))
            else:
                factors_A.append(own["lora_A"])
                factors_B.append(own["lora_B"] * config.scaling)
        factors = {"lora_A": jnp.concatenate(factors_A, axis=-2), "lora_B": jnp.concatenate(factors_B, axis=-1)}
        set_leaf(joined, path, factors)
    targets = tuple(name for name in ADAPTABLE if any(path[-1] == name and EXPERTS not in path for path in like))
    routed = any(EXPERTS in path for path in like)
    return joined, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, routed_experts=routed), owners


def _of_rank(factor: jax.Array, axis: int, rank: int) -> tuple[int, ...]:
    shape = list(factor.shape)
    shape[axis] = rank
    return tuple(shape)


def dropout(x_BLD: jax.Array, rate: float, seeds_BL: jax.Array) -> jax.Array:
    """Sets the share `rate` of the elements of `x` to zero and divides the others by 1 - rate.

    Whether an element is dropped depends only on its token's seed (`difflm_jax.ops.random`) and its index in the
    token's vector. Other tokens and rows, padding, packing and the mesh have no effect.
    """
    width = x_BLD.shape[-1]
    start = jax.lax.axis_index(TENSOR) * width if varies(x_BLD, TENSOR) else 0
    kept = element_bits(seeds_BL, start + jnp.arange(width)) >= np.uint32(round(rate * 2**32))
    # Multiply instead of `jnp.where`: its zero would be an array, read by every layer.
    return x_BLD / jnp.asarray(1.0 - rate, x_BLD.dtype) * kept.astype(x_BLD.dtype)


def init_lora(
    key: jax.Array, params: dict[str, Any], config: LoraConfig, mask_row_D: jax.Array | None
) -> dict[str, Any]:
    """Returns a fresh `lora` tree: A as PEFT draws it (uniform in ±1/sqrt(in), Kaiming with a = sqrt 5), B zero.

    params: the base. Its stacked projections give the shapes.
    mask_row_D: the starting mask embedding. None: it is not trained, and stays the base's.

    Raises `UserError` for a target module that the model lacks.
    """
    lora: dict[str, Any] = {} if mask_row_D is None else {"mask_row": mask_row_D.astype(jnp.float32)}
    found = [path for path in projection_paths(params) if is_adapted(path, config)]
    if missing := set(config.target_modules) - {path[-1] for path in found if EXPERTS not in path}:
        raise UserError(
            f"lora_config.target_modules: the model has no {', '.join(sorted(missing))}"
            + (" outside its routed experts (lora_config.routed_experts=true)" if _has_experts(params) else "")
        )
    if config.routed_experts and not _has_experts(params):
        raise UserError("lora_config.routed_experts: the model has no routed experts")
    for stream, path in enumerate(found, start=1):
        *stack, out_dim, in_dim = leaf_at(params, path)["weight"].shape
        bound = 1.0 / math.sqrt(in_dim)
        factor_A = jax.random.uniform(
            jax.random.fold_in(key, stream), (*stack, config.r, in_dim), jnp.float32, -bound, bound
        )
        module = {"lora_A": factor_A, "lora_B": jnp.zeros((*stack, out_dim, config.r), jnp.float32)}
        set_leaf(lora, path, module)
    return lora


def is_adapted(path: tuple[str, ...], config: LoraConfig) -> bool:
    """Whether the projection at `path` of a tree of parameters has an update."""
    return config.routed_experts if EXPERTS in path else path[-1] in config.target_modules


def projection_paths(params: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns the paths of all projections: by stack, in the order of `ADAPTABLE`, with routed experts last.

    The order is fixed here because that of `params` depends on the files that the weights were read from.
    """

    def under(path: tuple[str, ...], tree: Any) -> Iterator[tuple[str, ...]]:
        if path and path[-1] in ADAPTABLE:
            yield path
        elif isinstance(tree, Mapping):
            for name, inner in tree.items():
                yield from under((*path, name), inner)

    def place(path: tuple[str, ...]) -> tuple[Any, ...]:
        number = path[0].partition("_")[2]
        return int(number or 0), EXPERTS in path, ADAPTABLE.index(path[-1]), path

    return sorted(under((), params), key=place)


def leaf_at(tree: Any, path: tuple[str, ...]) -> Any:
    """Returns the value at `path` of a nested dictionary, or None."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def set_leaf(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    """Sets `path` of a nested dictionary to `leaf`, and creates the dictionaries on the way."""
    functools.reduce(lambda inner, name: inner.setdefault(name, {}), path[:-1], tree)[path[-1]] = leaf


def _has_experts(params: Mapping[str, Any]) -> bool:
    return any(EXPERTS in path for path in projection_paths(params))


def merge_lora(
    params: dict[str, Any],
    lora: dict[str, Any],
    config: LoraConfig,
    mask_token_id: int | None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Returns the base with scaling * B A added to each adapted weight, and with the trained mask row.

    Sums are computed in float32, one layer at a time. Quantised weights, adapted or not, become dense in the dtype of
    the embedding. With a `mesh`, over which the inputs are sharded, the result is sharded in the same way.
    """

    def laid(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
        return leaf if mesh is None else place_leaf(path, leaf, mesh)

    dtype = params["embed_tokens"]["weight"].dtype
    merged = jax.tree.map(lambda leaf: leaf, params)  # new dictionaries around the same arrays
    found = projection_paths(params)
    with Progress("merging", "weights", len(found)) as progress:
        for path in found:
            factors, weight = leaf_at(lora, path), leaf_at(params, path)["weight"]
            if factors is not None or isinstance(weight, QTensor):
                dense = _merged_stack(weight, factors, config.scaling, dtype)
                leaf_at(merged, path)["weight"] = laid((*path, "weight"), dense)
                jax.block_until_ready(dense)
            progress.advance()
    if "mask_row" in lora and mask_token_id is not None:
        table = params["embed_tokens"]["weight"]
        table = table.at[mask_token_id].set(lora["mask_row"].astype(table.dtype))
        merged["embed_tokens"]["weight"] = laid(("embed_tokens", "weight"), table)
    return merged


@functools.partial(jax.jit, static_argnums=(2, 3))
def _merged_stack(weight: Any, factors: dict[str, jax.Array] | None, scaling: float, dtype: Any) -> jax.Array:
    def merged(layer: tuple[Any, dict[str, jax.Array] | None]) -> jax.Array:
        weight, factors = layer
        dense = dequantize(weight, jnp.float32) if isinstance(weight, QTensor) else weight.astype(jnp.float32)
        if factors is not None:
            dense += scaling * jnp.matmul(factors["lora_B"], factors["lora_A"], precision="highest")
        return dense.astype(dtype)

    return jax.lax.map(merged, (weight, factors))
