"""The decoder: embed, one scanned stack of layers, final norm; and the output head as a function of hidden states."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from difflm_jax.distributed.collectives import lookup, rows_together, whole_vocabulary
from difflm_jax.models.attention import View, Window
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.layers import LOW_RANK, PROJECTION, Layer, LayerKind, norm, stored
from difflm_jax.models.lora import LoraConfig
from difflm_jax.models.rope import rotation
from difflm_jax.ops.attention import ATTENTION_OUTPUT
from difflm_jax.ops.attention_kernels import FUSED_FORWARD
from difflm_jax.ops.cpu import bits_of
from difflm_jax.ops.cross_entropy import capped
from difflm_jax.ops.matmul import matmul

_policies = jax.checkpoint_policies


def _keeping(*names: str) -> Callable[..., bool]:
    """A policy that saves values of these names and the results of fused kernels."""
    of_name = _policies.save_only_these_names(*names)
    return lambda primitive, *args, **params: primitive.name in FUSED_FORWARD or of_name(primitive, *args, **params)


# What a layer saves for its backward pass besides its input; the rest is recomputed there.
REMAT = {
    "none": _policies.everything_saveable,
    "save_dots": _keeping(PROJECTION, LOW_RANK, ATTENTION_OUTPUT),  # the results of products
    "save_attention": _keeping(ATTENTION_OUTPUT),
    "full": _policies.nothing_saveable,
}


class Transformer(nn.Module):
    """Hidden states of a Llama-like decoder; applied to `{"params": ..., "lora": ...}`.

    Without a `lora` collection it is the base. `mask_token_id` is the token whose embedding is the trained row
    `lora/mask_row`, if there is one. `attention_kernel` is a key of `ops.attention_kernels.KERNELS`. `remat` (a key of
    `REMAT`) says what the backward pass computes again. `unroll` compiles every layer for itself, in place of one loop
    over a stack. `on_cpu`: that loop takes its slices of bfloat16 weights as bits (`difflm_jax.ops.cpu`).
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
        """[B, T, D] hidden states after the final norm, in `dtype`.

        `positions_BT` [B, T] int32 are those of RoPE; `view` says which keys each token sees. `seeds_BT` are those of
        `difflm_jax.models.lora.dropout` (None: no dropout). `window` places the tokens among columns whose keys are in
        the `cache` collection. `gate_BT` bool is False at tokens without the adapter (None: all have it); see
        `lora.lora_down` for other shapes. Collections `columns` and `rows` are those of `layers.Attention`.
        """
        rope = rotation(self.config.ropes, self.config.head_dim, positions_BT)

        layer = Layer
        if self.remat != "none":
            # Outside a loop XLA would find what is computed twice, and keep it.
            layer = nn.remat(Layer, prevent_cse=self.unroll, policy=REMAT[self.remat])
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0, "cache": 0, "columns": 0, "rows": 0},
            split_rngs={},
            in_axes=(0, *[nn.broadcast] * 5),
            length=self.config.num_layers,
            unroll=self.config.num_layers if self.unroll else 1,
            check_constancy_invariants=False,  # its extra trace forgets along which axes of a mesh arrays differ
        )
        if self.on_cpu:
            layers = nn.map_variables(layers, "params", _matrices_as_bits)
        x_BTD = self.embed(tokens_BT)
        stack = layers(self.config, self.lora, self.attention_kernel, name="layers")
        kinds, view = _kinds(self.config, view)
        x_BTD, _ = stack(x_BTD, kinds, rope, view, seeds_BT, window, gate_BT)
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


def _kinds(config: ModelConfig, view: View) -> tuple[LayerKind, View]:
    """What each layer has of its own, and what they share of `view`: a window that is the same for all is in the mask.

    A window that reaches as far as the keys do is none.
    """
    rope = jnp.asarray(config.layer_ropes, jnp.int32) if len(config.ropes) > 1 else None
    index, columns = jnp.arange(config.num_layers), view.mask.shape[2]
    windows = [width if 0 < width < columns else 0 for width in config.windows]
    if len(set(windows)) == 1:
        return LayerKind(index, None, rope), view.within(windows[0]) if windows[0] else view
    windows = jnp.asarray([width or jnp.iinfo(jnp.int32).max for width in windows], jnp.int32)
    return LayerKind(index, windows, rope), view.replace(lengths=None)


def _matrices_as_bits(params: dict[str, Any]) -> dict[str, Any]:
    """Stacked matrices as `matmul` takes them from a loop; norms and biases, which are small, as they are."""
    return jax.tree.map(lambda leaf: bits_of(leaf) if leaf.ndim > 2 else leaf, params)


class Embedding(nn.Module):
    """Rows of a table [V, D]."""

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return lookup(self.variable("params", "weight", stored).value, tokens_BT)


def head_weight(config: ModelConfig, params: dict[str, Any]) -> jax.Array:
    """The output matrix [V, D]: the embedding itself where they are tied."""
    return params["embed_tokens" if config.tie_word_embeddings else "lm_head"]["weight"]


def head_logits(
    config: ModelConfig,
    params: dict[str, Any],
    lora: dict[str, Any] | None,
    mask_token_id: int | None,
    hidden: jax.Array,
) -> jax.Array:
    """float32 logits [..., V] of `hidden` [..., D], which the model's `logit_scale` is in; capped if it has a cap.

    With tied embeddings a trained mask row is an output row too, as in `peft` and in a merged export.
    """
    head_VD = head_weight(config, params)
    logits = matmul(rows_together(hidden, head_VD), head_VD, jnp.float32)
    logits = whole_vocabulary(logits, head_VD, config.vocab_size)
    if lora is not None and "mask_row" in lora and mask_token_id is not None and config.tie_word_embeddings:
        own = matmul(hidden, lora["mask_row"][None], jnp.float32)
        logits = logits.at[..., mask_token_id].set(own[..., 0])
    return capped(logits, config.logit_softcap)
