"""Putting values into a configuration: unknown keys are refused with the nearest known one, types are checked."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from difflm_jax.errors import UserError

_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_NONE = ("none", "null")
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def merge(config: ConfigDict, defaults: ConfigDict, values: Mapping[str, Any], where: str) -> None:
    """Sets the nested `values` in `config`, typed as in `defaults`.

    Messages begin with `where` followed by the dotted key. A text for a key of another type is read as on the command
    line (YAML takes `1e-3` for text).
    """
    _merge(config, defaults, values, where, [])


def _merge(
    section: ConfigDict,
    defaults: ConfigDict,
    values: Mapping[str, Any],
    where: str,
    parents: list[tuple[str, ConfigDict]],
) -> None:
    """`parents` are the (name, defaults) of the sections around this one, outermost first."""
    for key, value in values.items():
        name = ".".join([*(name for name, _ in parents), str(key)])
        if not isinstance(key, str) or "." in key or key not in defaults:
            root = parents[0][1] if parents else defaults
            if isinstance(value, Mapping) and len(value) == 1:  # one key of an unknown section: name it in full
                name = f"{name}.{next(iter(value))}"
            raise UserError(f"{where}{name}: unknown key; the nearest known one is {nearest(root, name)}")
        if isinstance(defaults[key], ConfigDict):
            if not isinstance(value, Mapping):
                some = ", ".join(f"{name}.{inner}" for inner in list(defaults[key])[:2])
                raise UserError(f"{where}{name}: is a section, not a value; set its keys ({some}, ...)")
            _merge(section[key], defaults[key], value, where, [*parents, (key, defaults)])
        else:
            section[key] = convert(value, defaults.get_type(key), defaults[key], where + name)


def convert(value: Any, kind: type, default: Any, name: str) -> Any:
    """`value` as a `kind`, or `UserError` with `name`, the expected type and the value.

    A `default` of None marks a key that may be None, and the first element of a tuple gives the type of the others.
    """
    if kind is tuple:
        return _convert_tuple(value, type(default[0]), name)
    if default is None and (value is None or (isinstance(value, str) and value.lower() in _NONE)):
        return None
    try:
        return _convert_scalar(value, kind)
    except (ValueError, OverflowError):
        raise UserError(f"{name}: expected {_EXPECTED[kind]}, not {_quoted(value)}") from None


def _convert_scalar(value: Any, kind: type) -> Any:
    """Raises `ValueError` (`OverflowError` for an infinite whole number) where `value` is no `kind`."""
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _WORDS:
            return _WORDS[value.lower()]
    elif kind is str:
        if isinstance(value, str):
            return value
    elif isinstance(value, str) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        number = kind(value)
        if isinstance(value, str) or number == value or value != value:
            return number
    raise ValueError


def _convert_tuple(value: Any, kind: type, name: str) -> tuple:
    """A list, a tuple, or a text like `q_proj,v_proj` (brackets and quotes of Python are let pass)."""
    if isinstance(value, str):
        parts = [part.strip().strip("\"'") for part in value.strip().strip("()[]").split(",")]
        value = [part for part in parts if part]
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name}: expected a list separated by commas, not {_quoted(value)}")
    return tuple(convert(element, kind, kind(), name) for element in value)


def nearest(config: ConfigDict, name: str) -> str:
    """The known dotted key that looks most like `name`, by its whole or by its last part."""

    def likeness(known: str) -> float:
        last = known.rpartition(".")[2], name.rpartition(".")[2]
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in ((known, name), last))

    return max(_known_keys(config), key=likeness)


def _known_keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """Dotted keys of all values and sections."""
    keys = []
    for key, value in config.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, ConfigDict):
            keys += _known_keys(value, f"{prefix}{key}.")
    return keys


def parse_overrides(items: Sequence[str]) -> list[tuple[str, str]]:
    """[(dotted key, text)] of 'key=value', '--config.key=value' or '--config.key', 'value' items in order."""
    pairs = []
    rest = list(items)
    while rest:
        item = rest.pop(0)
        key, equals, text = item.partition("=")
        flag = key.startswith("-")
        if not equals:
            if not flag:
                raise UserError(f"{item!r}: not understood; settings are written --config.key=value")
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{key}: has no value; write {key}=value")
            text = rest.pop(0)
        key = key.lstrip("-") if flag else key
        if flag and not key.startswith("config."):
            raise UserError(f"--{key}: unknown flag; settings are written --config.key=value")
        pairs.append((key.removeprefix("config."), text))
    return pairs


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
