"""Mixtures of experts as data: the router and experts that a `config.json` describes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from difflm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """Hugging Face's names of the parts of a mixture, within a layer.

    `stored` is the layout of routed experts in checkpoints: "each" (one tensor per expert), "fused" (gate and up of all
    experts in one tensor [X, 2F, D]) or "interleaved". The last is [X, D, 2F] with gate at even indices, with biases
    and possibly in MXFP4.
    """

    block: str = "mlp"
    router: str = "gate"
    correction: str = ""  # a bias that affects the choice of experts but not their weights
    correction_axes: int = 1  # 1 if that tensor is [X], 2 if [1, X]
    projections: tuple[tuple[str, str], ...] = ()  # (our name, their name) where they differ
    shared: str = ""
    shared_gate: str = ""
    module: str = "mlp.experts"  # the module of routed experts in transformers' model
    stored: str = "each"
    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"
    in_memory: tuple[tuple[str, str], ...] = ()  # (part of a name in transformers' memory, in checkpoints)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertFamily:
    """How the mixtures of a family differ, and the keys of `config.json` that describe them. A value may be a constant.

    `layers` is the rule for sparse layers: "all", "qwen" (`decoder_sparse_step`, `mlp_only_layers`), "ernie"
    (`moe_layer_start_index`, `moe_layer_end_index`, `moe_layer_interval`) or "first_dense" (`first_k_dense_replace`).
    `shared` is the key of the width of shared experts; with `shared_is_count`, of their number.
    """

    names: ExpertNames = ExpertNames()
    count: tuple[str, ...] = ("num_experts", "num_local_experts")  # spellings of one key
    per_token: tuple[str, ...] = ("num_experts_per_tok", "experts_per_token")
    width: str = "moe_intermediate_size"
    layers: str = "all"
    score: str = "softmax"  # or "sigmoid"
    normalised: str | bool = True
    scale: str = ""
    groups: tuple[str, str] | None = None  # keys: number of groups, and how many a token chooses from
    router_bias: bool = False
    bias: bool = False  # bias of the experts' projections
    shared: str = ""
    shared_is_count: bool = False
    clamped: bool = False  # SwiGLU with limits (`swiglu_limit`, `swiglu_alpha`)

    def keys(self) -> set[str]:
        """Returns the keys of `config.json` that this family reads."""
        named = {*self.count, *self.per_token, self.width, self.scale, self.shared, *(self.groups or ())}
        clamp = {"swiglu_limit", "swiglu_alpha"} if self.clamped else set()
        normalised = {self.normalised} if isinstance(self.normalised, str) else set()
        return (named | clamp | normalised | set(_SPARSE[self.layers].keys) | TRAINING) - {""}


# Keys of the load-balancing loss and of router noise in pretraining. Nothing here depends on them.
TRAINING = {"router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "router_z_loss_coef"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of a model: X = `count` experts of `width`; each token is routed to `per_token` of them.

    `sparse` has one entry per layer, False if the layer has one dense MLP instead. `groups` is (number of groups, how
    many a token chooses from). `clamp` is SwiGLU's (limit, alpha).
    """

    count: int
    per_token: int
    width: int
    sparse: tuple[bool, ...]
    names: ExpertNames
    score: str = "softmax"
    normalised: bool = True
    scale: float = 1.0
    groups: tuple[int, int] = (1, 1)
    router_bias: bool = False
    bias: bool = False
    shared_width: int = 0
    clamp: tuple[float, float] | None = None


class LayerStack(NamedTuple):
    """Consecutive layers of one kind, run by one scan. `name` is their key in each collection of the model."""

    name: str
    layers: tuple[int, ...]
    sparse: bool


def stacks_of(sparse: tuple[bool, ...], heads: tuple[bool, ...]) -> tuple[LayerStack, ...]:
    """Returns the stacks of a model in order: runs of layers with equal `sparse` and `heads`.

    A single stack is called `layers`; of several, each is called `layers_` plus its first layer.
    """
    layers, kinds = len(sparse), list(zip(sparse, heads, strict=True))
    starts = [i for i in range(layers) if i == 0 or kinds[i] != kinds[i - 1]]
    if len(starts) == 1:
        return (LayerStack("layers", tuple(range(layers)), sparse[0]),)
    return tuple(
        LayerStack(f"layers_{start}", tuple(range(start, end)), sparse[start])
        for start, end in zip(starts, [*starts[1:], layers], strict=True)
    )


def experts_of(hf: Mapping[str, Any], family: ExpertFamily | None, layers: int) -> Experts | None:
    """Reads the mixture from `hf`, which already has the family's defaults. Raises `UserError` naming a key."""
    if family is None:
        return None
    count, per_token = _one_of(hf, family.count), _one_of(hf, family.per_token)
    if per_token > count:
        raise UserError(f"config.json: {family.per_token[0]}={per_token} is more than {family.count[0]}={count}")
    groups = tuple(_positive(hf, key) for key in family.groups) if family.groups else (1, 1)
    if count % groups[0] or groups[1] > groups[0] or count // groups[0] * groups[1] < per_token:
        raise UserError(f"config.json: {family.groups}={groups} do not divide {count} experts, {per_token} a token")
    if groups[1] < groups[0] == count:  # a group is ranked by its two best experts
        raise UserError(f"config.json: {family.groups[0]}={groups[0]}: groups of one expert cannot be ranked")
    sparse = _SPARSE[family.layers].read(hf, layers)
    if not any(sparse):
        raise UserError(f"config.json: no layer has experts; such a model cannot be represented as {hf['model_type']}")
    shared = _integer(hf, family.shared, 0) if family.shared else 0
    return Experts(
        count=count,
        per_token=per_token,
        width=_positive(hf, family.width),
        sparse=tuple(sparse),
        names=family.names,
        score=family.score,
        normalised=family.normalised if isinstance(family.normalised, bool) else bool(hf.get(family.normalised)),
        scale=_number(hf, family.scale) if family.scale else 1.0,
        groups=groups,
        router_bias=family.router_bias,
        bias=family.bias,
        shared_width=shared * _positive(hf, family.width) if family.shared_is_count else shared,
        clamp=(_number(hf, "swiglu_limit"), _number(hf, "swiglu_alpha")) if family.clamped else None,
    )


def unstated(defaults: Mapping[str, Any], family: ExpertFamily, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `defaults` without the keys that `hf` has under another spelling."""
    stated = {key for keys in (family.count, family.per_token) if any(hf.get(each) is not None for each in keys)
              for key in keys}  # fmt: skip
    return {key: value for key, value in defaults.items() if key not in stated}


def _all(hf: Mapping[str, Any], layers: int) -> list[bool]:
    return [True] * layers


def _qwen(hf: Mapping[str, Any], layers: int) -> list[bool]:
    step, dense = _positive(hf, "decoder_sparse_step"), hf.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        raise UserError(f"config.json: mlp_only_layers must be a list of layers, not {str(dense)[:40]}")
    return [i not in dense and (i + 1) % step == 0 for i in range(layers)]


def _ernie(hf: Mapping[str, Any], layers: int) -> list[bool]:
    first, last = _integer(hf, "moe_layer_start_index", 0), _integer(hf, "moe_layer_end_index", -1)
    interval = _positive(hf, "moe_layer_interval")
    last = layers - 1 if last == -1 else last
    return [first <= i <= last and (i + 1) % interval == 0 for i in range(layers)]


def _first_dense(hf: Mapping[str, Any], layers: int) -> list[bool]:
    dense = _integer(hf, "first_k_dense_replace", 0)
    return [i >= dense for i in range(layers)]


class _Sparse(NamedTuple):
    read: Callable[[Mapping[str, Any], int], list[bool]]
    keys: tuple[str, ...] = ()


_SPARSE = {
    "all": _Sparse(_all),
    "qwen": _Sparse(_qwen, ("decoder_sparse_step", "mlp_only_layers")),
    "ernie": _Sparse(_ernie, ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")),
    "first_dense": _Sparse(_first_dense, ("first_k_dense_replace",)),
}


def _one_of(hf: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """Reads a positive integer from any of `keys`. Several of them may be present if they agree."""
    stated = [key for key in keys if hf.get(key) is not None] or list(keys)
    value = _positive(hf, stated[0])
    if odd := [f"{key}={str(hf[key])[:40]}" for key in stated[1:] if hf.get(key) != value]:
        raise UserError(f"config.json: {stated[0]}={value} and {odd[0]} contradict each other")
    return value


def _integer(hf: Mapping[str, Any], key: str, default: int) -> int:
    value = hf.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        raise UserError(f"config.json: {key} must be an integer, not {str(value)[:40]}")
    return value


def _positive(hf: Mapping[str, Any], key: str) -> int:
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise UserError(f"config.json: {key} must be a positive integer, not {str(value)[:40]}")
    return value


def _number(hf: Mapping[str, Any], key: str) -> float:
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"config.json: {key} must be a positive number, not {str(value)[:40]}")
    return float(value)
