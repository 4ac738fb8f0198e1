"""The parts of a transformer layer. Weights live in `params`, low-rank factors in `lora`; one of them is trained.

A weight is read with `self.variable`, not `self.param`: the latter would compare its shape with that of a dense
initialiser on every call, and refuse quantised or sharded leaves. Shapes are checked once, when a file is read.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from difflm_jax.distributed.collectives import ROW_PARALLEL, gathered, summed
from difflm_jax.models.attention import View, Window
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.lora import LoraConfig, lora_down, lora_up
from difflm_jax.models.rope import rotate
from difflm_jax.ops.attention import attend_beside
from difflm_jax.ops.attention_kernels import KERNELS
from difflm_jax.ops.cpu import floats_of, kept
from difflm_jax.ops.matmul import matmul
from difflm_jax.ops.random import fold_seeds

# Names in remat policies.
PROJECTION, LOW_RANK = "projection", "low_rank"

# Each input of projections has a dropout of its own.
_ATTENTION_INPUT, _ATTENTION_OUTPUT, _MLP_INPUT, _MLP_HIDDEN = range(4)


def stored(*_: Any) -> Any:
    """The initialiser of every variable: there is none, weights come from files."""
    raise ValueError("the model is applied to weights that were read from a file; it initialises none")


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32, returned in the dtype of `x` (arXiv:1910.07467)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.variable("params", "weight", stored).value
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return x32.astype(x.dtype) * weight.astype(x.dtype)


class Linear(nn.Module):
    """A projection [out, in] with an optional bias, plus its low-rank update where `lora` holds one.

    `low_BLR` is that update's inner value, which projections of the same input make together (`adapted`).
    """

    lora: LoraConfig | None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, low_BLR: jax.Array | None) -> jax.Array:
        y = matmul(x_BLD, gathered(self.variable("params", "weight", stored).value))
        if low_BLR is not None:
            y = y + lora_up(low_BLR, self.variable("lora", "lora_B", stored).value, self.lora)
        if self.name in ROW_PARALLEL:
            y = summed(y)
        if self.has_variable("params", "bias"):
            y = y + self.variable("params", "bias", stored).value.astype(y.dtype)
        return kept(y, PROJECTION)

    def down_factor(self) -> jax.Array | None:
        """The factor that reads the input; None where this projection is not adapted."""
        is_adapted = self.lora is not None and self.has_variable("lora", "lora_A")
        return self.get_variable("lora", "lora_A") if is_adapted else None


def adapted(
    projections: Sequence[Linear],
    x_BLD: jax.Array,
    seeds_BL: jax.Array | None,
    stream: int,
    gate_BL: jax.Array | None,
) -> list[jax.Array]:
    """The results of `projections`, which share an input.

    `stream` is that of its dropout; `gate_BL` is that of `lora_down`.
    """
    factors = [projection.down_factor() for projection in projections]
    if seeds_BL is not None:
        seeds_BL = fold_seeds(seeds_BL, stream)
    low = iter(lora_down(x_BLD, [A for A in factors if A is not None], projections[0].lora, seeds_BL, gate_BL))
    return [
        projection(x_BLD, None if factor is None else kept(next(low), LOW_RANK))
        for projection, factor in zip(projections, factors, strict=True)
    ]


class Attention(nn.Module):
    """Grouped-query self-attention with RoPE and, where the model has them, norms of queries and keys.

    Applied with an empty, mutable `cache` collection it leaves its keys and values there. Applied with a filled one its
    queries are the columns of `window`: their keys take the place of the cached ones, and `view` covers them all.

    Applied with a `columns` collection (`k` and `v` [B, K, S, E]), the queries are rows beside those S columns. The
    first S keys of the mask [B, T, S + T] are the columns, the last T the rows themselves. A mutable collection `rows`
    receives the keys and values of the queries, [B, K, T, E]; whoever decodes writes those that it keeps.
    """

    config: ModelConfig
    lora: LoraConfig | None
    kernel: str

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        view: View,
        seeds_BT: jax.Array | None,
        window: Window | None,
        gate_BT: jax.Array | None,
    ) -> jax.Array:
        config = self.config
        batch, length, _ = x_BTD.shape
        projections = [Linear(self.lora, name=name) for name in ("q_proj", "k_proj", "v_proj")]
        q_BTHE, k_BSKE, v_BSKE = (
            projected.reshape(batch, length, -1, config.head_dim)  # as many heads as this device has
            for projected in adapted(projections, x_BTD, seeds_BT, _ATTENTION_INPUT, gate_BT)
        )
        if config.qk_norm:
            q_BTHE = RMSNorm(config.rms_norm_eps, name="q_norm")(q_BTHE)
            k_BSKE = RMSNorm(config.rms_norm_eps, name="k_norm")(k_BSKE)
        q_BTHE, k_BSKE = rotate(q_BTHE, *rope), rotate(k_BSKE, *rope)
        if self.is_mutable_collection("rows"):
            self.put_variable("rows", "k", jnp.swapaxes(k_BSKE, 1, 2))
            self.put_variable("rows", "v", jnp.swapaxes(v_BSKE, 1, 2))
        if self.has_variable("columns", "k"):
            columns_BKSE = tuple(floats_of(self.get_variable("columns", name)) for name in ("k", "v"))
            y_BTHE = attend_beside(q_BTHE, columns_BKSE, (k_BSKE, v_BSKE), view.mask)
        else:
            k_BSKE, v_BSKE = self._cached("k", k_BSKE, window), self._cached("v", v_BSKE, window)
            y_BTHE = KERNELS[self.kernel](q_BTHE, k_BSKE, v_BSKE, view.mask, view.lengths)
        output = Linear(self.lora, name="o_proj")
        return adapted([output], y_BTHE.reshape(batch, length, -1), seeds_BT, _ATTENTION_OUTPUT, gate_BT)[0]

    def _cached(self, name: str, new_BTKE: jax.Array, window: Window | None) -> jax.Array:
        """The keys or values of the whole canvas: those of the window in their place among the cached ones."""
        if self.has_variable("cache", name):
            cached_BSKE = self.get_variable("cache", name)
            length = new_BTKE.shape[1]
            old_BTKE = jax.lax.dynamic_slice_in_dim(cached_BSKE, window.start, length, axis=1)
            is_written_T = window.start + jnp.arange(length) >= window.written_from
            new_BTKE = jnp.where(is_written_T[:, None, None], new_BTKE, old_BTKE)
            new_BTKE = jax.lax.dynamic_update_slice_in_dim(cached_BSKE, new_BTKE, window.start, axis=1)
        if self.is_mutable_collection("cache"):
            self.put_variable("cache", name, new_BTKE)
        return new_BTKE


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    lora: LoraConfig | None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, seeds_BL: jax.Array | None, gate_BL: jax.Array | None) -> jax.Array:
        projections = [Linear(self.lora, name=name) for name in ("gate_proj", "up_proj")]
        gate_BLF, up_BLF = adapted(projections, x_BLD, seeds_BL, _MLP_INPUT, gate_BL)
        down = Linear(self.lora, name="down_proj")
        # One rounding: between operations in bfloat16 there would be one each, and half of the time is theirs on a CPU.
        hidden_BLF = nn.silu(gate_BLF.astype(jnp.float32)) * up_BLF.astype(jnp.float32)
        return adapted([down], hidden_BLF.astype(x_BLD.dtype), seeds_BL, _MLP_HIDDEN, gate_BL)[0]


class Layer(nn.Module):
    """Pre-norm attention and MLP. Its signature is that of a `nn.scan` body: the hidden states are the carry."""

    config: ModelConfig
    lora: LoraConfig | None
    attention_kernel: str

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        layer_index: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        view: View,
        seeds_BT: jax.Array | None,
        window: Window | None,
        gate_BT: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        # The barrier keeps XLA from hoisting the expanded mask and angles out of the layer loop at the size of the
        # scores and of all heads.
        x_BTD, rope, mask_BTS = jax.lax.optimization_barrier((x_BTD, rope, view.mask))
        view = view.replace(mask=mask_BTS)
        rope = jax.lax.stop_gradient(rope)  # behind the barrier they would have one
        if seeds_BT is not None:
            seeds_BT = fold_seeds(seeds_BT, layer_index)
        epsilon = self.config.rms_norm_eps
        h_BTD = RMSNorm(epsilon, name="input_layernorm")(x_BTD)
        attention = Attention(self.config, self.lora, self.attention_kernel, name="self_attn")
        x_BTD = x_BTD + attention(h_BTD, rope, view, seeds_BT, window, gate_BT)
        h_BTD = RMSNorm(epsilon, name="post_attention_layernorm")(x_BTD)
        return x_BTD + MLP(self.lora, name="mlp")(h_BTD, seeds_BT, gate_BT), None
