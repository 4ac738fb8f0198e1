"""Reads the attention window and the RoPE of each layer from `config.json`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from difflm_jax.errors import UserError
from difflm_jax.models.families import Family
from difflm_jax.models.rope import RopeConfig

FULL, SLIDING = "full_attention", "sliding_attention"
# The meaning of unsupported values of `layer_types`, for the error message.
_OTHER_LAYERS = {
    "linear_attention": "recurrent: a token there sees earlier ones only",
    "mamba": "recurrent: a token there sees earlier ones only",
    "mamba2": "recurrent: a token there sees earlier ones only",
    "recurrent": "recurrent: a token there sees earlier ones only",
    "conv": "a causal convolution",
    "chunked_attention": "attention within fixed chunks",
}


class LayerKinds(NamedTuple):
    """Per layer: its window (0: none) and the index of its RoPE in `ropes`. None in `ropes` means no RoPE."""

    windows: tuple[int, ...]
    ropes: tuple[RopeConfig | None, ...]
    layer_ropes: tuple[int, ...]


def layer_kinds(hf: Mapping[str, Any], family: Family, layers: int) -> LayerKinds:
    """Reads the kinds of all layers; `hf` already has the family's defaults. Raises `UserError` naming a key."""
    types = _layer_types(hf, family, layers)
    window = _window(hf, family)
    windows = tuple(window if window and each == SLIDING else 0 for each in types)
    per_layer = _ROPES[family.rotated](dict(hf), family, types, window)
    ropes = tuple(dict.fromkeys(per_layer))
    if not any(ropes):
        raise UserError("config.json: no layer has a rotary position embedding; such a model cannot be represented")
    return LayerKinds(windows, ropes, tuple(ropes.index(rope) for rope in per_layer))


class Heads(NamedTuple):
    """Keys and values of a layer: number of heads, elements per head, and whether values have their own projection."""

    number: int
    size: int
    has_values: bool = True


def global_heads(hf: Mapping[str, Any], family: Family, windows: tuple[int, ...], local: Heads) -> Heads | None:
    """Returns the heads of layers without a window, or None if they equal `local`, the heads of the other layers.

    transformers 5.23 reads `global_head_dim` and, with `attention_k_eq_v`, `num_global_key_value_heads`. It saves both
    as `per_layer_config`. Raises `UserError` naming a key.
    """
    if not family.global_heads:
        return None
    if not any(windows):
        raise UserError("config.json: sliding_window is needed: no layer is local, but heads of local layers are given")
    is_shared = bool(hf.get("attention_k_eq_v"))
    given = hf.get("per_layer_config")
    if given is None:
        number = hf.get("num_global_key_value_heads") if is_shared else None
        own = {"head_dim": hf["global_head_dim"], "num_key_value_heads": number or local.number}
        return _heads(own, local, is_shared)
    if not isinstance(given, Mapping) or not all(isinstance(own, Mapping) for own in given.values()):
        raise UserError("config.json: per_layer_config must give an object for each layer that it names")
    of_layer = {str(layer): own for layer, own in given.items()}
    kinds = {False: set(), True: set()}  # whether a layer is global -> the heads found
    for layer, window in enumerate(windows):
        own, is_global = of_layer.get(str(layer), {}), not window
        kinds[is_global].add(_heads(own, local, is_shared and is_global))
    if kinds[False] != {local} or len(kinds[True]) > 1:
        raise UserError("config.json: per_layer_config must say the same of all global layers, and nothing of others")
    return next(iter(kinds[True]), None)


def _heads(own: Mapping[str, Any], local: Heads, is_shared: bool) -> Heads:
    if other := sorted(set(own) - {"head_dim", "num_key_value_heads"}):
        raise UserError(f"config.json: {other[0]} of per_layer_config is not supported")
    sizes = own.get("num_key_value_heads", local.number), own.get("head_dim", local.size)
    for each in sizes:
        if isinstance(each, bool) or not isinstance(each, int) or each < 1:
            raise UserError(f"config.json: heads of global layers must be positive integers, not {str(each)[:40]}")
    return Heads(*sizes, has_values=not is_shared)


def _window(hf: Mapping[str, Any], family: Family) -> int | None:
    if family.windows == "none" or (family.windows.startswith("qwen") and not hf.get("use_sliding_window")):
        return None
    window = hf.get("sliding_window")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise UserError(f"config.json: sliding_window must be a positive integer, not {str(window)[:40]}")
    return window


def _layer_types(hf: Mapping[str, Any], family: Family, layers: int) -> list[str]:
    given = hf.get("layer_types")
    if given is not None:
        for each in map(str, given):
            if each not in (FULL, SLIDING):
                meaning = _OTHER_LAYERS.get(each)
                raise UserError(
                    f"config.json: layer_types has {each!r}{f' ({meaning})' if meaning else ''}, which is not supported"
                )
        if len(given) < layers and (family.rotated == "typed" or _window(hf, family)):
            raise UserError(f"config.json: layer_types has {len(given)} entries for num_hidden_layers={layers}")
    if family.windows == "none":
        if given is not None and SLIDING in given:
            raise UserError(f"config.json: model_type {hf['model_type']!r} has no layers of type {SLIDING!r}")
        return [FULL] * layers
    if family.windows in ("every", "qwen_every"):
        if given is not None and FULL in given and hf.get("sliding_window") is not None:
            raise UserError(
                f"config.json: model_type {hf['model_type']!r} has sliding_window in every layer, but layer_types says "
                "otherwise"
            )
        return [SLIDING] * layers
    if given is not None:
        types = [*map(str, given[:layers]), *[FULL] * (layers - len(given))]
        return [*types[:-1], FULL] if family.global_heads else types  # the last layer is global, as in transformers
    if family.windows == "qwen":
        first = hf.get("max_window_layers")
        if family.rotated == "no_rope_layers":
            return [FULL if has_rope else SLIDING for has_rope in _has_rope(hf, layers)]
        return [SLIDING if i >= (28 if first is None else first) else FULL for i in range(layers)]
    if family.windows == "qwen_even":
        first = hf.get("max_window_layers")
        return [SLIDING if i % 2 == 0 and i < (28 if first is None else first) else FULL for i in range(layers)]
    types = [FULL if _is_global(hf, family, i) else SLIDING for i in range(layers)]
    return [*types[:-1], FULL] if family.global_heads else types


def _is_global(hf: Mapping[str, Any], family: Family, index: int) -> bool:
    if not family.period:
        return False
    period = hf.get("sliding_window_pattern") if "sliding_window_pattern" in family.reads else None
    period = family.period if period is None else period
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise UserError(f"config.json: sliding_window_pattern={str(period)[:40]!r} is not supported; give layer_types")
    return index % period == (0 if family.first_is_global else period - 1)


def _has_rope(hf: Mapping[str, Any], layers: int) -> list[bool]:
    given, interval = hf.get("no_rope_layers"), hf.get("no_rope_layer_interval")
    if given is None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise UserError(f"config.json: no_rope_layer_interval must be a positive integer, not {str(interval)[:40]}")
        return [(i + 1) % interval != 0 for i in range(layers)]
    if not isinstance(given, list) or len(given) < layers:
        raise UserError(f"config.json: no_rope_layers must be a list of {layers} numbers, 1 for a layer with RoPE")
    return [bool(each) for each in given[:layers]]


def _one(hf: dict[str, Any], family: Family) -> RopeConfig:
    return RopeConfig.from_hf(hf, family.partial_rotary, family.longrope)


def _everywhere(hf, family, types, window):
    return [_one(hf, family)] * len(types)


def _sliding_only(hf, family, types, window):
    rope = _one(hf, family)
    return [rope if window and each == SLIDING else None for each in types]


def _unless_global(hf, family, types, window):
    return _sliding_only(hf, family, types, window) if window else _everywhere(hf, family, types, window)


def _listed(hf, family, types, window):
    rope = _one(hf, family)
    return [rope if has_rope else None for has_rope in _has_rope(hf, len(types))]


def _of_theta(hf, family, types, window):
    thetas = hf.get("layer_rope_theta")
    if thetas is None:
        return _everywhere(hf, family, types, window)
    if not isinstance(thetas, list) or len(thetas) < len(types):
        raise UserError(f"config.json: layer_rope_theta must be a list of {len(types)} numbers, 0 for no RoPE")
    parameters = {**(hf.get("rope_scaling") or hf.get("rope_parameters") or {})}

    def of(theta: Any) -> RopeConfig | None:
        return _one({**hf, "rope_scaling": None, "rope_parameters": {**parameters, "rope_theta": theta}}, family)

    return [of(theta) if theta else None for theta in thetas[: len(types)]]


def _of_type(hf, family, types, window):
    """Reads one RoPE per type of layer, nested in `rope_parameters` or in the spelling of transformers 4."""
    nested = hf.get("rope_parameters") or {}
    is_nested = any(isinstance(nested.get(key), dict) for key in (FULL, SLIDING))
    if nested and not is_nested:
        raise UserError(f"config.json: rope_parameters must have {FULL!r} and {SLIDING!r} for {hf['model_type']!r}")
    scaling = hf.get("rope_scaling") or {}
    local = "rope_local_base_freq" if "rope_local_base_freq" in family.reads else None
    thetas = {FULL: hf.get("rope_theta"), SLIDING: hf.get(local) if local else family.defaults["rope_theta"]}

    def of(kind: str) -> RopeConfig:
        parameters = {**(nested.get(kind) or {}), **(scaling if kind == FULL else {})}
        theta = parameters.pop("rope_theta", None) or thetas[kind]
        alone = {"rope_scaling": None, "rope_parameters": {**parameters, "rope_theta": theta}}
        # transformers ignores the model's original length if parameters are nested
        return _one({**hf, **alone, "original_max_position_embeddings": None}, family)

    return [of(each) for each in types]


_ROPES: dict[str, Callable[..., list[RopeConfig | None]]] = {
    "all": _everywhere,
    "sliding": _sliding_only,
    "unless_global": _unless_global,
    "no_rope_layers": _listed,
    "layer_rope_theta": _of_theta,
    "typed": _of_type,
}
