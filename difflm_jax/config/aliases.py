"""Other names for keys: those of the original system, and those of our own earlier versions.

Users may write any of them. A loaded config, and so `config.json`, has only the keys that they stand for.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from difflm_jax.config.schema import KEYS, flatten
from difflm_jax.errors import UserError
from difflm_jax.models.lora import ADAPTABLE

VERSION_KEY = "config_version"  # in config.json
VERSION = 2  # 1: no version key, no `double_quantization`; use_qlora and qlora_config select a quantised base

# Keys of version 1 that no longer exist. None of them affected training.
RETIRED = ("eval_batches",)


@dataclasses.dataclass(frozen=True)
class Alias:
    """Another name of `key`.

    values: maps each allowed value of the alias to the value of `key`, or to None, which leaves `key` unchanged. If
      `values` is None, the alias and the key have the same values.
    when: a key; the alias applies only if that key is true.
    """

    key: str
    values: Mapping[Any, Any] | None = None
    when: str = ""


ALIASES = {
    "use_qlora": Alias("quantization", {False: None, True: "nf4"}),
    "qlora_config.load_in_4bit": Alias("quantization", {True: None}, "use_qlora"),
    "qlora_config.bnb_4bit_quant_type": Alias("quantization", {"nf4": None}, "use_qlora"),
    "qlora_config.bnb_4bit_use_double_quant": Alias("double_quantization", {True: None, False: False}),
    "qlora_config.bnb_4bit_compute_dtype": Alias("dtype", when="use_qlora"),
    "lora_config.bias": Alias("", {"none": None}),
}
ALL_LINEAR = ("all-linear",)  # PEFT's name for every projection
_UNDECIDED = ("", "auto", True)  # values of a key that an alias may override


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a copy of `config` in which the aliases are replaced by the keys that they stand for.

    Raises `UserError` for a value that an alias does not accept, and for an alias that contradicts its key.
    """
    flat = flatten(config.to_dict())
    given = {name: flat[name] for name in ALIASES if name in flat}
    resolved = config.copy_and_resolve_references()
    with resolved.unlocked():
        for name, value in given.items():
            alias = ALIASES[name]
            wanted = _meaning(name, alias, value) if flat.get(alias.when, True) else None
            unasked = alias.values is None and value == KEYS[name].default and resolved[alias.key] in _UNDECIDED
            if wanted is not None and not unasked:
                if resolved[alias.key] not in (*_UNDECIDED, wanted):
                    raise UserError(
                        f"{name}={value!r} contradicts {alias.key}={resolved[alias.key]!r}: set one of them"
                    )
                resolved[alias.key] = wanted
            section, _, leaf = name.rpartition(".")
            del (resolved[section] if section else resolved)[leaf]
        if "qlora_config" in resolved:
            del resolved["qlora_config"]
        if resolved.lora_config.get("target_modules") == ALL_LINEAR:
            resolved.lora_config.target_modules = ADAPTABLE
    return resolved


def _meaning(name: str, alias: Alias, value: Any) -> Any:
    """Returns the value for the alias's key; None leaves the key unchanged."""
    if alias.values is None:
        return value
    if value not in alias.values:
        allowed = " or ".join(_said(each) for each in alias.values)
        instead = f"; set {alias.key} instead" if alias.key else ""
        raise UserError(f"{name} must be {allowed}, not {_said(value)}{instead}")
    return alias.values[value]


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def current(values: Mapping[str, Any], where: str, of_run: bool = False) -> dict[str, Any]:
    """Returns the flat `values` of a file without the version key. Raises `UserError` for an unknown version.

    of_run: the file is a `config.json` that this or an earlier version wrote; retired keys in it are dropped.
    """
    version = values.get(VERSION_KEY, 1)
    if type(version) is not int or not 1 <= version <= VERSION:
        raise UserError(f"{where}{VERSION_KEY}={version!r}: written by a later version; update difflm_jax")
    left_out = (VERSION_KEY, *(RETIRED if of_run else ()))
    return {key: value for key, value in values.items() if key not in left_out}


assert all(name in KEYS for name in ALIASES)
