"""Reads the config of a run from its sources, checks it, and writes it.

Values come from the defaults, a file (`--config`: .py, .yaml or .json), `--hyper_parameters_json` and
`--config.key=value`. Later sources win. All go through `_set`, so rules and error messages are the same for all.
"""

import difflib
import importlib.util
import json
import reprlib
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from difflm_jax.config.aliases import VERSION, VERSION_KEY, current, resolve
from difflm_jax.config.checks import validate
from difflm_jax.config.schema import KEYS, PHASE_KEYS, build, default_config, flatten
from difflm_jax.data.examples import PHASES
from difflm_jax.errors import UserError, one_line
from difflm_jax.models.lora import LoraConfig
from difflm_jax.quant import QuantConfig
from difflm_jax.utils.files import expanded

CONVERTED = "converted"  # subdirectory of a run for its quantised base


def load_config(path: str = "", overrides: Sequence[str] = (), hyper_parameters_json: str = "") -> ConfigDict:
    """Loads the config of a run, validated, locked and without aliases. An empty `path` means the defaults.

    overrides: "key=value", with or without a leading "--config." (see `take_overrides`).
    Raises `UserError` for a file that cannot be read, an unknown key, a wrong type or a value out of range.
    """
    config = default_config()
    if path:
        _update(config, _read(path), f"{path}: ")
    if hyper_parameters_json:
        where = "--hyper_parameters_json: "
        _update(config, _parse_json(hyper_parameters_json, where), where)
    for override in overrides:
        key, equals, text = override.removeprefix("--config.").partition("=")
        if not equals:
            raise UserError(f"--config.{key}: write --config.{key}=VALUE")
        _set(config, key, text, "--config.")
    return _settled(config)


def load_run_config(path: str | Path) -> ConfigDict:
    """Loads the `config.json` that this or an earlier version wrote. Raises `UserError` if it is missing or invalid."""
    return from_json(_text(str(path)), f"{path}: ")


def take_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into (overrides as "key=value", all other arguments).

    Accepts `--config.key=value`, `--config.key value` and, for a boolean key, `--config.key` alone.
    """
    overrides, others = [], []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--config."):
            others.append(argument)
            continue
        key, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            known = KEYS.get(key)
            if known is not None and known.kind is bool and (not waiting or waiting[0].lower() not in _WORDS):
                text = "true"
            elif waiting and not waiting[0].startswith("--"):
                text = waiting.pop(0)
            else:
                raise UserError(f"--config.{key}: write --config.{key}=VALUE")
        overrides.append(f"{key}={text}")
    return overrides, others


def phase_config(config: ConfigDict, phase: str) -> ConfigDict:
    """Returns the config of one phase: its own values replace the common ones; `pretrain` and `sft` are removed."""
    resolved = config.copy_and_resolve_references()
    with resolved.unlocked():
        for key in PHASE_KEYS:
            if config[phase][key] is not None:
                resolved[key] = config[phase][key]
        for section in PHASES:
            del resolved[section]
    return resolved


def quantization(config: ConfigDict) -> QuantConfig | None:
    """Returns how the frozen projections are quantised; None if they are not."""
    return build(QuantConfig, config) if config.quantization else None


def lora_config(config: ConfigDict) -> LoraConfig:
    """Returns the LoRA settings of the trained adapter."""
    return build(LoraConfig, config)


def notes(config: ConfigDict) -> list[str]:
    """Returns lines to print at the start of a run, about keys that were set but have no effect."""
    found = []
    if not config.pin_memory:
        found.append("pin_memory has no effect here: JAX has no pinned host buffers to choose")
    if config.trained == "all" and lora_config(config) != lora_config(default_config()):
        found.append("lora_config has no effect with trained='all': there is no adapter, and so no dropout")
    return found


def to_json(config: ConfigDict) -> str:
    """Returns the config as JSON with sorted keys; `from_json` reads it."""
    return json.dumps({VERSION_KEY: VERSION, **config.to_dict()}, sort_keys=True, indent=2) + "\n"


def from_json(text: str, where: str = "config.json: ") -> ConfigDict:
    """Parses, validates and locks a config that `to_json` of this or an earlier version wrote.

    Missing keys have their defaults. Raises `UserError` with a message that begins with `where`.
    """
    config = default_config()
    _update(config, _parse_json(text, where), where, of_run=True)
    return _settled(config)


def difference(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns a line "key: old -> new" for every key whose value differs, sorted by key. Aliases are resolved first."""
    a, b = (flatten(resolve(config).to_dict()) for config in (old, new))
    return [
        f"{key}: {json.dumps(a.get(key))} -> {json.dumps(b.get(key))}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def _settled(config: ConfigDict) -> ConfigDict:
    config = resolve(config)
    validate(config)
    return config.lock()


_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _update(config: ConfigDict, values: Mapping[str, Any], where: str, of_run: bool = False) -> None:
    for key, value in current(flatten(values), where, of_run).items():
        _set(config, key, value, where)


def _set(config: ConfigDict, key: str, value: Any, where: str) -> None:
    """Sets a dotted key. Raises `UserError` with a message that begins with `where`."""
    known = KEYS.get(key)
    if known is None:
        inside = [name for name in KEYS if name.startswith(f"{key}.")]
        if inside and value == {}:
            return
        if inside:
            raise UserError(f"{where}{key} is a section, not a value: set one of {', '.join(inside)}")
        raise UserError(f"{where}{key}: unknown key (did you mean {_nearest(key)}?)")
    try:
        converted = None if known.optional and value in (None, "none") else _convert(known.kind, known.element, value)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{where}{key} must be {known}, not {reprlib.repr(value)}") from error
    if known.setting.path and converted:
        converted = expanded(converted, where + key)
    section, _, leaf = key.rpartition(".")
    (config[section] if section else config)[leaf] = converted


def _convert(kind: type, element: type | None, value: Any) -> Any:
    """Converts `value` to `kind`. Text is parsed as on the command line, whatever its source.

    Raises ValueError, TypeError or OverflowError if it cannot be converted.
    """
    if kind is tuple:
        if isinstance(value, str):
            parts = (part.strip(" '\"") for part in value.strip(" ()[]").split(","))
            value = [part for part in parts if part]
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return tuple(_convert(element, None, each) for each in value)
    if kind is bool:
        if str(value).lower() not in _WORDS:
            raise ValueError
        return _WORDS[str(value).lower()]
    if kind is str:
        if not isinstance(value, (str, Path)):
            raise TypeError
        return str(value)
    if isinstance(value, bool):
        raise TypeError
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    return kind(value)


def _nearest(key: str) -> str:
    """Returns the known key most similar to `key`, comparing whole names and last parts."""

    def likeness(known: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, known, key).ratio()
        last = difflib.SequenceMatcher(None, known.split(".")[-1], key.split(".")[-1]).ratio()
        return max(whole, last), whole

    return max(KEYS, key=likeness)


def _read(path: str) -> Mapping[str, Any]:
    """Returns the values that a config file sets."""
    suffix = Path(path).suffix
    if suffix not in (".py", ".yaml", ".yml", ".json"):
        raise UserError(f"--config={path}: a config file ends in .py, .yaml or .json")
    text = _text(path)
    if suffix == ".py":
        return _run(path)
    if suffix == ".json":
        return _parse_json(text, f"{path}: ")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no valid YAML: {one_line(error)}") from error
    return _mapping({} if values is None else values, f"{path}: ")


def _text(path: str) -> str:
    if not Path(path).exists():
        there = sorted(
            str(file) for file in (Path(path).parent if Path(path).parent.is_dir() else Path("configs")).glob("*.py")
        )
        known = f"there are {', '.join(there)}" if there else "difflm recipes copy NAME FILE writes one"
        raise UserError(f"--config={path}: no such file ({known})")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config={path}: cannot be read ({one_line(error)})") from error


def _run(path: str) -> Mapping[str, Any]:
    """Runs `get_config()` of a Python config file and returns its values."""
    spec = importlib.util.spec_from_file_location("difflm_jax_config_file", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # user code may raise anything: report it as an error of the file
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        raise UserError(f"{path}:{line}: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() must return a ConfigDict, not {type(config).__name__}")
    return config.to_dict()


def _parse_json(text: str, where: str) -> Mapping[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}no valid JSON: {one_line(error)}") from error
    return _mapping(values, where)


def _mapping(values: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise UserError(f"{where}must hold keys and values, not {type(values).__name__}")
    return values
