"""A mixture of experts in place of an MLP: a float32 router, routed experts, and shared experts for every token.

Tokens are sorted by expert, so the rows of each expert are contiguous (`ops.grouped`); none is dropped. If experts are
sharded over `tensor`, each device applies its own experts to all tokens, and the results are summed.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from difflm_jax.distributed.collectives import gathered_experts, own_experts, summed, varying_with
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.experts import Experts
from difflm_jax.models.layers import ACTIVATIONS, LOW_RANK, MLP, PROJECTION, stored
from difflm_jax.models.lora import LoraConfig
from difflm_jax.ops.cpu import floats_of, kept
from difflm_jax.ops.grouped import grouped_matmul


class Router(nn.Module):
    """Returns the experts of each row and their weights, both [M, K]. Always computed in float32."""

    experts: Experts

    @nn.compact
    def __call__(self, x_MD: jax.Array) -> tuple[jax.Array, jax.Array]:
        weight_XD = floats_of(self.variable("params", "weight", stored).value).astype(jnp.float32)
        scores_MX = jnp.matmul(x_MD.astype(jnp.float32), weight_XD.T, precision="highest")
        if self.has_variable("params", "bias"):
            scores_MX = scores_MX + self.variable("params", "bias", stored).value.astype(jnp.float32)
        scores_MX = nn.sigmoid(scores_MX) if self.experts.score == "sigmoid" else nn.softmax(scores_MX)
        preference_MX = scores_MX
        if self.has_variable("params", "correction"):
            correction = self.variable("params", "correction", stored).value.astype(jnp.float32)
            preference_MX = scores_MX + correction.reshape(-1)
        chosen_MK = jax.lax.top_k(within_groups(preference_MX, *self.experts.groups), self.experts.per_token)[1]
        weights_MK = jnp.take_along_axis(scores_MX, chosen_MK, axis=1)
        if self.experts.normalised:
            weights_MK = weights_MK / jnp.maximum(weights_MK.sum(axis=1, keepdims=True), 1e-20)
        return chosen_MK, weights_MK * self.experts.scale


def within_groups(scores_MX: jax.Array, groups: int, per_token: int) -> jax.Array:
    """Returns `scores_MX` with minus infinity outside the best `per_token` groups.

    A group is ranked by the sum of its two highest scores.
    """
    if groups == per_token:
        return scores_MX
    by_group = scores_MX.reshape(len(scores_MX), groups, -1)
    best = jax.lax.top_k(by_group, 2)[0].sum(axis=-1)
    chosen = jax.nn.one_hot(jax.lax.top_k(best, per_token)[1], groups, dtype=bool).any(axis=1)
    return jnp.where(chosen[:, :, None], by_group, -jnp.inf).reshape(scores_MX.shape)


class GroupedLinear(nn.Module):
    """A projection [X, out, in] of rows sorted by expert, each with its expert's weight; see `projected`."""

    lora: LoraConfig | None

    @nn.compact
    def __call__(self, y: jax.Array, low: jax.Array | None, sizes_X: jax.Array) -> jax.Array:
        """Adds the low-rank update of the inner values `low`, and the bias, to `y`, the matmul with the weight."""
        if low is not None:
            low = kept(low * jnp.asarray(self.lora.scaling, low.dtype), LOW_RANK)
            y = y + grouped_matmul(low, [self.get_variable("lora", "lora_B")], sizes_X)[0]
        if self.has_variable("params", "bias"):
            bias_XF = gathered_experts(floats_of(self.variable("params", "bias", stored).value))
            of_row = jnp.repeat(jnp.arange(len(bias_XF)), sizes_X, total_repeat_length=len(y))
            y = y + bias_XF[of_row].astype(y.dtype)
        return kept(y, PROJECTION)

    def weight(self) -> Any:
        return gathered_experts(self.get_variable("params", "weight"))

    def down_factor(self) -> jax.Array | None:
        """Returns the factor that reads the input; None if experts are not adapted."""
        is_adapted = self.lora is not None and self.has_variable("lora", "lora_A")
        return self.get_variable("lora", "lora_A") if is_adapted else None


def projected(
    projections: Sequence[GroupedLinear], rows: jax.Array, sizes_X: jax.Array, gate: jax.Array | None
) -> list[jax.Array]:
    """Applies `projections`, which share their rows. `gate` [M, R or 1] is False where the update is turned off."""
    products = grouped_matmul(rows, [projection.weight() for projection in projections], sizes_X)
    factors = [projection.down_factor() for projection in projections]
    adapted = [factor for factor in factors if factor is not None]
    lows = iter(grouped_matmul(rows, adapted, sizes_X) if adapted else ())
    found = []
    for projection, y, factor in zip(projections, products, factors, strict=True):
        low = None if factor is None else next(lows)
        if low is not None and gate is not None:
            low = jnp.where(gate, low, jnp.zeros((), low.dtype))
        found.append(projection(y, low, sizes_X))
    return found


class RoutedExperts(nn.Module):
    """Σ_k weight_k down_k(act(gate_k(x)) * up_k(x)) over the experts k of each row, [M, D]."""

    config: ModelConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(
        self, x_MD: jax.Array, chosen_MK: jax.Array, weights_MK: jax.Array, gate_MR: jax.Array | None
    ) -> jax.Array:
        experts = self.config.experts
        names = ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (GroupedLinear(self.lora, name=name) for name in names)
        own = self.get_variable("params", "down_proj")["weight"]
        x_MD, chosen_MK, weights_MK = (varying_with(each, own) for each in (x_MD, chosen_MK, weights_MK))
        first, count = own_experts(own, experts.count)
        here = chosen_MK.reshape(-1) - first
        here = jnp.where((here >= 0) & (here < count), here, count)  # experts of other devices sort last
        order = jnp.argsort(here, stable=True)
        back = jnp.argsort(order)
        sizes_X = jnp.bincount(here, length=count).astype(jnp.int32)
        rows = _spread(x_MD, order, back, experts.per_token)
        gates = None if gate_MR is None else jnp.repeat(gate_MR, experts.per_token, axis=0)[order]
        inner = _activated(self.config, *(y.astype(jnp.float32) for y in projected([gate, up], rows, sizes_X, gates)))
        y = projected([down], inner.astype(x_MD.dtype), sizes_X, gates)[0]
        y_MKD = _permuted(y, back, order).reshape(*chosen_MK.shape, -1)
        is_here = (here < count).reshape(chosen_MK.shape)
        weights_MK = jnp.where(is_here, weights_MK, 0)
        return summed(jnp.einsum("mkd,mk->md", y_MKD.astype(jnp.float32), weights_MK)).astype(x_MD.dtype)


class MoE(nn.Module):
    """A mixture [B, T, D] -> [B, T, D]. A mutable collection `routing` receives `chosen`, the experts [B, T, K]."""

    config: ModelConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, seeds_BT: jax.Array | None, gate_BT: jax.Array | None) -> jax.Array:
        experts = self.config.experts
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        chosen_MK, weights_MK = Router(experts, name="router")(x_MD)
        if self.is_mutable_collection("routing"):
            self.put_variable("routing", "chosen", chosen_MK.reshape(*x_BTD.shape[:2], -1))
        gate_MR = None
        if gate_BT is not None:  # gates the whole update, or each of its inner values
            gate_BTR = gate_BT[..., None] if gate_BT.ndim == 2 else gate_BT
            gate_MR = jnp.broadcast_to(gate_BTR, (*x_BTD.shape[:2], gate_BTR.shape[-1])).reshape(len(x_MD), -1)
        routed = RoutedExperts(self.config, self.lora, name="experts")
        y_BTD = routed(x_MD, chosen_MK, weights_MK, gate_MR).reshape(x_BTD.shape)
        if not experts.shared_width:
            return y_BTD
        shared_BTD = MLP(self.config, self.lora, name="shared")(x_BTD, seeds_BT, gate_BT)
        if experts.names.shared_gate:
            weight_1D = _Stored(name="shared_gate")()
            share = nn.sigmoid(jnp.matmul(x_BTD.astype(jnp.float32), weight_1D.T, precision="highest"))
            shared_BTD = (share * shared_BTD.astype(jnp.float32)).astype(x_BTD.dtype)
        return y_BTD + shared_BTD


class _Stored(nn.Module):
    @nn.compact
    def __call__(self) -> jax.Array:
        return floats_of(self.variable("params", "weight", stored).value).astype(jnp.float32)


def _activated(config: ModelConfig, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns act(gate) * up in float32; with limits, gpt-oss's gate * sigmoid(alpha gate) * (up + 1)."""
    if config.experts.clamp is None:
        return ACTIVATIONS[config.activation](gate) * up
    limit, alpha = config.experts.clamp
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * nn.sigmoid(alpha * gate) * (up + 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x_MD: jax.Array, order: jax.Array, back: jax.Array, per_token: int) -> jax.Array:
    """Repeats each row `per_token` times, [M K, D], in `order`; `back` is its inverse. Both passes are gathers."""
    return x_MD[order // per_token]


def _spread_forward(x_MD: jax.Array, order: jax.Array, back: jax.Array, per_token: int) -> tuple[jax.Array, Any]:
    return x_MD[order // per_token], back


def _spread_backward(per_token: int, back: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    return gradient[back].reshape(-1, per_token, gradient.shape[-1]).sum(axis=1), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _permuted(rows: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """Returns `rows[order]`; `back` is the inverse of `order`. Both passes are gathers; jax's gradient is a scatter."""
    return rows[order]


def _permuted_forward(rows: jax.Array, order: jax.Array, back: jax.Array) -> tuple[jax.Array, Any]:
    return rows[order], back


def _permuted_backward(back: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    return gradient[back], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)
