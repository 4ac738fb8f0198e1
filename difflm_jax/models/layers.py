"""The parts of a transformer layer. Weights are in `params`, low-rank factors in `lora`; one of the two is trained.

Weights are read with `self.variable`, not `self.param`. The latter compares the shape with a dense initialiser on
every call and would refuse quantised or sharded leaves. Shapes are checked once, when a file is read.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from difflm_jax.distributed.collectives import ROW_PARALLEL, gathered, mean_of_heads, own_heads, summed
from difflm_jax.models.attention import View, Window
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.lora import LoraConfig, lora_down, lora_up
from difflm_jax.models.rope import Rotation, rotate
from difflm_jax.ops import few_rows
from difflm_jax.ops.attention import attend_beside
from difflm_jax.ops.attention_kernels import attend_with, scaled
from difflm_jax.ops.cpu import floats_of, kept
from difflm_jax.ops.few_rows import InStack
from difflm_jax.ops.matmul import matmul
from difflm_jax.ops.random import fold_seeds

# Names in remat policies.
PROJECTION, LOW_RANK = "projection", "low_rank"

# Each input of projections has its own dropout.
_ATTENTION_INPUT, _ATTENTION_OUTPUT, _MLP_INPUT, _MLP_HIDDEN = range(4)


def stored(*_: Any) -> Any:
    """Raises `ValueError`. It is the initialiser of every variable: weights come from files."""
    raise ValueError("the model is applied to weights that were read from a file; it initialises none")


class Norm(nn.Module):
    """x / rms(x) over the last axis (arXiv:1910.07467) times the weight, in float32, returned in the dtype of `x`.

    `kind` "layer" subtracts the mean first (arXiv:1607.06450). "rms" without an offset rounds before the weight, as
    Llama does; "rms_once" does not. `offset` is added to the weight. If heads are sharded and the normalised axis or
    the weight spans all heads, the norm does too.
    """

    epsilon: float
    kind: str = "rms"
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = floats_of(self.variable("params", "weight", stored).value)
        own = x.shape[x.ndim - weight.ndim :]
        is_divided = own != weight.shape and weight.ndim == 1
        weight = own_heads(weight, own)
        x32 = x.astype(jnp.float32)
        if self.kind == "layer":
            x32 = x32 - mean_of_heads(x32, is_divided)
        x32 = x32 * jax.lax.rsqrt(mean_of_heads(jnp.square(x32), is_divided) + self.epsilon)
        if self.kind == "rms" and not self.offset:  # rounds before the weight, as Llama does
            return x32.astype(x.dtype) * weight.astype(x.dtype)
        x32 = x32 * (self.offset + weight.astype(jnp.float32))
        if self.has_variable("params", "bias"):
            x32 = x32 + self.variable("params", "bias", stored).value.astype(jnp.float32)
        return x32.astype(x.dtype)


def without_scale(x: jax.Array, epsilon: float) -> jax.Array:
    """Returns x / rms(x) over the last axis, computed in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


class Linear(nn.Module):
    """A projection [out, in] with an optional bias, plus its low-rank update if `lora` has one.

    `low_BLR` is the inner value of that update. `adapted` computes it for all projections of an input at once.
    """

    lora: LoraConfig | None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, low_BLR: jax.Array | None) -> jax.Array:
        y = matmul(x_BLD, gathered(self.variable("params", "weight", stored).value))
        if low_BLR is not None:
            y = y + lora_up(low_BLR, self.variable("lora", "lora_B", stored).value, self.lora)
        if self.name in ROW_PARALLEL:
            y = summed(y)
        return kept(self.with_bias(y), PROJECTION)

    def with_bias(self, y: jax.Array) -> jax.Array:
        """Returns `y` plus the bias, if any."""
        bias = self.get_variable("params", "bias") if self.has_variable("params", "bias") else None
        return y if bias is None else y + bias.astype(y.dtype)

    def down_factor(self) -> jax.Array | None:
        """Returns the factor that reads the input; None if this projection is not adapted."""
        return self.get_variable("lora", "lora_A") if self.is_adapted else None

    def in_stack(self, collection: str, name: str) -> InStack | None:
        """Returns a matrix left in its stack (`models.stacks`), or None. `collection` has the index of its layer."""
        if not self.has_variable("stacks", name):
            return None
        return InStack(self.get_variable("stacks", name), self.get_variable(collection, name))

    @property
    def is_adapted(self) -> bool:
        return self.lora is not None and self.has_variable("lora", "lora_A")


def adapted(
    projections: Sequence[Linear],
    x_BLD: jax.Array,
    seeds_BL: jax.Array | None,
    stream: int,
    gate_BL: jax.Array | None,
) -> list[jax.Array]:
    """Applies `projections`, which share the input `x_BLD`.

    `stream` selects the dropout of this input; see `lora_down` for `gate_BL`.
    """
    if all(projection.has_variable("stacks", "weight") for projection in projections):
        return _adapted_in_stacks(projections, x_BLD, gate_BL)
    factors = [projection.down_factor() for projection in projections]
    if seeds_BL is not None:
        seeds_BL = fold_seeds(seeds_BL, stream)
    low = iter(lora_down(x_BLD, [A for A in factors if A is not None], projections[0].lora, seeds_BL, gate_BL))
    return [
        projection(x_BLD, None if factor is None else kept(next(low), LOW_RANK))
        for projection, factor in zip(projections, factors, strict=True)
    ]


def _adapted_in_stacks(projections: Sequence[Linear], x_BLD: jax.Array, gate_BL: jax.Array | None) -> list[jax.Array]:
    """Does the work of `adapted` without dropout, with all weights and factors left in their stacks."""
    rows, updates = x_BLD.shape[0] * x_BLD.shape[1], None
    factors = [
        (projection.in_stack("lora", "lora_A"), projection.in_stack("lora", "lora_B"))
        if projection.is_adapted
        else None
        for projection in projections
    ]
    if any(factors):
        gate_BLR = jnp.ones((1, 1, 1), bool) if gate_BL is None else gate_BL.reshape(*gate_BL.shape[:2], -1)
        gate = jnp.broadcast_to(gate_BLR, (*x_BLD.shape[:2], gate_BLR.shape[2])).reshape(rows, -1)
        updates = few_rows.Updates(factors, gate, projections[0].lora.scaling)
    weights = [projection.in_stack("params", "weight") for projection in projections]
    results = few_rows.products(x_BLD.reshape(rows, -1), weights, updates)
    return [
        projection.with_bias(y.reshape(*x_BLD.shape[:2], -1))
        for projection, y in zip(projections, results, strict=True)
    ]


def norm(config: ModelConfig, name: str) -> Norm:
    """Returns a norm of the model's kind, with the module name `name`."""
    return Norm(config.norm_eps, config.norm, config.norm_offset, name=name)


class Attention(nn.Module):
    """Grouped-query self-attention with RoPE and, if the model has them, norms of queries and keys.

    With an empty, mutable `cache` collection, keys and values are stored there. With a filled one, the queries are the
    columns of `window`: their keys replace the cached ones, and `view` covers all columns.

    With a `columns` collection (`k` and `v` [B, K, S, E]), the queries are extra rows next to those S columns. The
    first S keys of the mask [B, T, S + T] are the columns, the last T the rows themselves. A mutable collection `rows`
    receives the keys and values of the queries, [B, K, T, E]; the decoder writes back the ones that it keeps.
    """

    config: ModelConfig
    lora: LoraConfig | None
    kernel: str

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        rope: Rotation,
        view: View,
        seeds_BT: jax.Array | None,
        window: Window | None,
        gate_BT: jax.Array | None,
    ) -> jax.Array:
        config = self.config
        batch, length, _ = x_BTD.shape
        names = ("q_proj", "k_proj", "v_proj") if config.has_values else ("q_proj", "k_proj")
        projections = [Linear(self.lora, name=name) for name in names]
        q, k, *v = adapted(projections, x_BTD, seeds_BT, _ATTENTION_INPUT, gate_BT)
        v = v[0] if v else k
        if config.qk_norm == "all":
            q, k = self._normalised(q, k)
        # -1: the heads of this device.
        q_BTHE, k_BSKE, v_BSKE = (x.reshape(batch, length, -1, config.head_dim) for x in (q, k, v))
        if config.value_norm:
            v_BSKE = without_scale(v_BSKE, config.norm_eps)
        is_per_head = config.qk_norm in ("head", "each")
        if is_per_head and not config.qk_norm_after_rope:
            q_BTHE, k_BSKE = self._normalised(q_BTHE, k_BSKE)
        q_BTHE, k_BSKE = (rotate(x, rope, config.rope_interleaved) for x in (q_BTHE, k_BSKE))
        if is_per_head and config.qk_norm_after_rope:
            q_BTHE, k_BSKE = self._normalised(q_BTHE, k_BSKE)
        if rope.query_scale is not None:
            q_BTHE = q_BTHE * rope.query_scale[:, :, None, None].astype(q_BTHE.dtype)
        q_BTHE = scaled(q_BTHE, config.attention_scale)
        if self.is_mutable_collection("rows"):
            self.put_variable("rows", "k", jnp.swapaxes(k_BSKE, 1, 2))
            self.put_variable("rows", "v", jnp.swapaxes(v_BSKE, 1, 2))
        sinks_H = self._sinks(q_BTHE.shape[2:3])
        if self.has_variable("stacks", "k"):
            in_stacks = [InStack(self.get_variable("stacks", x), self.get_variable("columns", x)) for x in ("k", "v")]
            y_BTHE = few_rows.attend_beside(q_BTHE, in_stacks, (k_BSKE, v_BSKE), view.mask, config.attention_softcap)
        elif self.has_variable("columns", "k"):
            columns_BKSE = tuple(floats_of(self.get_variable("columns", name)) for name in ("k", "v"))
            own = (k_BSKE, v_BSKE)
            y_BTHE = attend_beside(q_BTHE, columns_BKSE, own, view.mask, config.attention_softcap, sinks_H)
        else:
            qkv = (q_BTHE, self._cached("k", k_BSKE, window), self._cached("v", v_BSKE, window))
            y_BTHE = attend_with(self.kernel, qkv, view.mask, view.lengths, config.attention_softcap, sinks_H)
        output = Linear(self.lora, name="o_proj")
        return adapted([output], y_BTHE.reshape(batch, length, -1), seeds_BT, _ATTENTION_OUTPUT, gate_BT)[0]

    def _normalised(self, queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        return norm(self.config, "q_norm")(queries), norm(self.config, "k_norm")(keys)

    def _sinks(self, heads: tuple[int, ...]) -> jax.Array | None:
        return own_heads(self.variable("params", "sinks", stored).value, heads) if self.config.sinks else None

    def _cached(self, name: str, new_BTKE: jax.Array, window: Window | None) -> jax.Array:
        """Returns the keys or values of the whole canvas: the cached ones, with those of the window written over."""
        if self.has_variable("cache", name):
            new_BTKE = window.placed(new_BTKE, self.get_variable("cache", name))
        if self.is_mutable_collection("cache"):
            self.put_variable("cache", name, new_BTKE)
        return new_BTKE


class XIELU(nn.Module):
    """The activation of Apertus (arXiv:2411.13010): quadratic above zero, exponential below, with learned slopes."""

    @nn.compact
    def __call__(self, x32: jax.Array) -> jax.Array:
        alpha_p, alpha_n, beta, eps = (
            self.variable("params", name, stored).value.astype(jnp.float32)
            for name in ("alpha_p", "alpha_n", "beta", "eps")
        )
        below = (jnp.expm1(jnp.minimum(x32, eps)) - x32) * (beta + nn.softplus(alpha_n))
        return jnp.where(x32 > 0, nn.softplus(alpha_p) * x32 * x32, below) + beta * x32


ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": nn.gelu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
}


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (arXiv:2002.05202), or down(act(up(x))) in a model without a gate."""

    config: ModelConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, seeds_BL: jax.Array | None, gate_BL: jax.Array | None) -> jax.Array:
        kind, is_gated = self.config.activation, self.config.gated_mlp
        activation = XIELU(name="act_fn") if kind == "xielu" else ACTIVATIONS[kind]
        names = ("gate_proj", "up_proj") if is_gated else ("up_proj",)
        inner = adapted([Linear(self.lora, name=name) for name in names], x_BLD, seeds_BL, _MLP_INPUT, gate_BL)
        # float32 inside, so there is one rounding. In bfloat16 each operation rounds: half of the MLP's time on a CPU.
        first_BLF, *up = (x_BLF.astype(jnp.float32) for x_BLF in inner)
        hidden_BLF = activation(first_BLF)
        if is_gated:
            hidden_BLF = hidden_BLF * up[0]
        down = Linear(self.lora, name="down_proj")
        return adapted([down], hidden_BLF.astype(x_BLD.dtype), seeds_BL, _MLP_HIDDEN, gate_BL)[0]
