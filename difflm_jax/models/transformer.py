"""The decoder (embedding, scanned stacks of layers, final norm) and the output head, a function of hidden states."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.distributed.collectives import lookup, rows_together, whole_vocabulary
from difflm_jax.models.attention import View, Window
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.experts import LayerStack
from difflm_jax.models.layers import LOW_RANK, MLP, PROJECTION, Attention, norm, stored
from difflm_jax.models.lora import LoraConfig
from difflm_jax.models.moe import MoE
from difflm_jax.models.rope import Rotation, rotation
from difflm_jax.ops import few_rows
from difflm_jax.ops.attention import ATTENTION_OUTPUT
from difflm_jax.ops.attention_kernels import FUSED_FORWARD
from difflm_jax.ops.cpu import bits_of, floats_of
from difflm_jax.ops.cross_entropy import capped
from difflm_jax.ops.few_rows import InStack
from difflm_jax.ops.matmul import matmul
from difflm_jax.ops.random import fold_seeds

_policies = jax.checkpoint_policies


def _keeping(*names: str) -> Callable[..., bool]:
    """Returns a policy that saves values with these names and the results of fused kernels."""
    of_name = _policies.save_only_these_names(*names)
    return lambda primitive, *args, **params: primitive.name in FUSED_FORWARD or of_name(primitive, *args, **params)


# The values that a layer saves for its backward pass, in addition to its input. The rest is recomputed.
REMAT = {
    "none": _policies.everything_saveable,
    "save_dots": _keeping(PROJECTION, LOW_RANK, ATTENTION_OUTPUT),  # the results of matmuls
    "save_attention": _keeping(ATTENTION_OUTPUT),
    "full": _policies.nothing_saveable,
}


@struct.dataclass
class LayerKind:
    """The properties of one layer, scanned from arrays with an axis of layers. None if all layers agree."""

    index: jax.Array  # [], int32
    window: jax.Array | None = None  # [], int32: keys at this distance or beyond are not seen
    rope: jax.Array | None = None  # [], int32: the index of its `Rotation`


class Layer(nn.Module):
    """Attention and MLP, with the model's norms.

    The signature is that of a `nn.scan` body, with the hidden states as the carry.
    """

    config: ModelConfig
    lora: LoraConfig | None
    attention_kernel: str
    sparse: bool  # a mixture of experts in place of one MLP

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        kind: LayerKind,
        rope: Rotation,
        view: View,
        seeds_BT: jax.Array | None,
        window: Window | None,
        gate_BT: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        # Without the barrier XLA hoists the mask and angles out of the layer loop, expanded to the size of the scores
        # and of all heads.
        x_BTD, rope, mask_BTS = jax.lax.optimization_barrier((x_BTD, rope, view.mask))
        view = view.replace(mask=mask_BTS)
        rope = jax.lax.stop_gradient(rope)  # the barrier would give it a gradient
        if seeds_BT is not None:
            seeds_BT = fold_seeds(seeds_BT, kind.index)
        config = self.config
        rope = rope.of_layer(kind.rope)
        if kind.window is not None:
            view = view.within(kind.window)
        attention = Attention(config, self.lora, self.attention_kernel, name="self_attn")
        mlp = (MoE if self.sparse else MLP)(config, self.lora, name="mlp")
        h_BTD = self._normalised(config.norms.before_attention, x_BTD)
        update_BTD = attention(h_BTD, rope, view, seeds_BT, window, gate_BT)
        update_BTD = self._normalised(config.norms.after_attention, update_BTD)
        if config.parallel_block:
            return self._added(self._added(x_BTD, update_BTD), mlp(h_BTD, seeds_BT, gate_BT)), None
        x_BTD = self._added(x_BTD, update_BTD)
        update_BTD = mlp(self._normalised(config.norms.before_mlp, x_BTD), seeds_BT, gate_BT)
        x_BTD = self._added(x_BTD, self._normalised(config.norms.after_mlp, update_BTD))
        if config.layer_scalar:
            x_BTD = x_BTD * self.variable("params", "layer_scalar", stored).value.astype(x_BTD.dtype)
        return x_BTD, None

    def _normalised(self, name: str | None, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if name is None else norm(self.config, name)(x_BTD)

    def _added(self, x_BTD: jax.Array, update_BTD: jax.Array) -> jax.Array:
        multiplier = self.config.residual_multiplier
        return x_BTD + (update_BTD if multiplier == 1.0 else update_BTD * multiplier)


class Transformer(nn.Module):
    """A Llama-like decoder without its head, applied to `{"params": ..., "lora": ...}`.

    Without a `lora` collection it is the base. `mask_token_id` is the token whose embedding is the trained row
    `lora/mask_row`, if present. `attention_kernel` is a key of `ops.attention_kernels.KERNELS`. `remat` (a key of
    `REMAT`) selects what the backward pass recomputes. `unroll` compiles every layer separately instead of one loop
    over a stack. With `on_cpu`, that loop slices bfloat16 weights as bits (`difflm_jax.ops.cpu`).
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    mask_token_id: int | None = None
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: bool = False
    on_cpu: bool = False
    attention_kernel: str = "xla"

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        view: View,
        seeds_BT: jax.Array | None = None,
        window: Window | None = None,
        gate_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the hidden states [B, T, D] after the final norm, in `dtype`.

        positions_BT: [B, T] int32, the positions for RoPE.
        view: the keys that each token sees.
        seeds_BT: the seeds of `difflm_jax.models.lora.dropout` (None: no dropout).
        window: the position of the tokens among columns whose keys are in the `cache` collection.
        gate_BT: bool, False for tokens without the adapter (None: all have it). See `lora.lora_down` for other shapes.

        See `layers.Attention` for the collections `columns` and `rows`, and `models.stacks` for `stacks`.
        """
        layer = Layer
        if self.remat != "none":
            # Outside a loop, XLA would deduplicate the recomputation and keep the first result.
            layer = nn.remat(Layer, prevent_cse=self.unroll, policy=REMAT[self.remat])
        x_BTD = self.embed(tokens_BT)
        shared = _Shared(positions_BT, view)
        for name, members, sparse in self.config.stacks:
            layers = nn.scan(
                layer,
                variable_axes={"params": 0, "lora": 0, "cache": 0, "columns": 0, "rows": 0, "routing": 0},
                variable_broadcast="stacks",
                split_rngs={},
                in_axes=(0, *[nn.broadcast] * 5),
                length=len(members),
                unroll=len(members) if self.unroll else 1,
                check_constancy_invariants=False,  # its extra trace forgets along which axes of a mesh arrays differ
            )
            if self.on_cpu:
                layers = nn.map_variables(layers, "params", _matrices_as_bits)
            config = self.config.of_stack(LayerStack(name, members, sparse))
            stack = layers(config, self.lora, self.attention_kernel, sparse, name=name)
            kinds, rope, seen = shared.of_layers(config, members)
            x_BTD, _ = stack(x_BTD, kinds, rope, seen, seeds_BT, window, gate_BT)
        x_BTD = norm(self.config, "norm")(x_BTD)
        return x_BTD if self.config.logit_scale == 1.0 else x_BTD * self.config.logit_scale

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Rows of the table, but the trained `mask_row` where the token is the mask; times the model's multiplier."""
        x_BTD = Embedding(name="embed_tokens")(tokens_BT).astype(self.dtype)
        if self.mask_token_id is not None and self.has_variable("lora", "mask_row"):
            mask_row_D = self.get_variable("lora", "mask_row").astype(self.dtype)
            x_BTD = jnp.where((tokens_BT == self.mask_token_id)[..., None], mask_row_D, x_BTD)
        multiplier = self.config.embedding_multiplier
        return x_BTD if multiplier == 1.0 else x_BTD * jnp.asarray(multiplier, self.dtype)


class _Shared:
    """Rotations and masks that stacks share, each computed once."""

    def __init__(self, positions_BT: jax.Array, view: View):
        self._positions_BT, self._view = positions_BT, view
        self._rotations: dict[Any, Rotation] = {}
        self._views: dict[int, View] = {0: view}

    def of_layers(self, config: ModelConfig, layers: tuple[int, ...]) -> tuple[LayerKind, Rotation, View]:
        """Returns the properties of each of `layers`, and the rotation and view that they share.

        A window that all of them have is part of the mask. A window at least as wide as the keys counts as none.
        """
        first, end = layers[0], layers[-1] + 1
        key = config.ropes, config.head_dim
        if key not in self._rotations:
            self._rotations[key] = rotation(*key, self._positions_BT)
        rope = jnp.asarray(config.layer_ropes[first:end], jnp.int32) if len(config.ropes) > 1 else None
        index, columns = jnp.arange(first, end), self._view.mask.shape[2]
        windows = [width if 0 < width < columns else 0 for width in config.windows[first:end]]
        if len(set(windows)) == 1:
            if windows[0] not in self._views:
                self._views[windows[0]] = self._view.within(windows[0])
            return LayerKind(index, None, rope), self._rotations[key], self._views[windows[0]]
        windows = jnp.asarray([width or jnp.iinfo(jnp.int32).max for width in windows], jnp.int32)
        return LayerKind(index, windows, rope), self._rotations[key], self._view.replace(lengths=None)


def _matrices_as_bits(params: dict[str, Any]) -> dict[str, Any]:
    """Converts stacked matrices to bits, which `matmul` reads in a loop. Norms and biases are small, and unchanged."""
    return jax.tree.map(lambda leaf: bits_of(leaf) if leaf.ndim > 2 else leaf, params)


class Embedding(nn.Module):
    """Looks up rows of a table [V, D]."""

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return floats_of(lookup(self.variable("params", "weight", stored).value, tokens_BT))


def head_weight(config: ModelConfig, params: dict[str, Any]) -> jax.Array:
    """Returns the output matrix [V, D]; the embedding if they are tied."""
    return params["embed_tokens" if config.tie_word_embeddings else "lm_head"]["weight"]


def head_logits(
    config: ModelConfig,
    params: dict[str, Any],
    lora: dict[str, Any] | None,
    mask_token_id: int | None,
    hidden: jax.Array,
    in_place: bool = False,
) -> jax.Array:
    """Returns float32 logits [..., V] of `hidden` [..., D], capped if the model has a cap.

    `hidden` must already be multiplied by the model's `logit_scale`. With tied embeddings, a trained mask row is also
    an output row, as in `peft` and in a merged export. `in_place`: `ops.few_rows` reads the matrix in its stored
    format, if it supports it.
    """
    head_VD = head_weight(config, params)
    is_read = in_place and few_rows.suits(head_VD[None], hidden.size // hidden.shape[-1])
    matrix = InStack(head_VD[None], jnp.int32(0)) if is_read else head_VD
    logits = matmul(rows_together(hidden, head_VD), matrix, jnp.float32)
    logits = whole_vocabulary(logits, head_VD, config.vocab_size)
    if lora is not None and "mask_row" in lora and mask_token_id is not None and config.tie_word_embeddings:
        own = matmul(hidden, lora["mask_row"][None], jnp.float32)
        logits = logits.at[..., mask_token_id].set(own[..., 0])
    return capped(logits, config.logit_softcap)
