"""The keys of the config as text: docs/configuration.md and the end of `train --help`."""

import itertools
import json
import textwrap
from collections.abc import Iterator
from typing import Any

from difflm_jax.config.schema import KEYS, PHASE_KEYS, Key
from difflm_jax.utils.settings import DEVICES, NOT_NEGATIVE, POSITIVE

_OBVIOUS = (POSITIVE, NOT_NEGATIVE, DEVICES)  # ranges that the help need not mention

_INTRODUCTION = f"""# Configuration

A run is described by keys. Set them in a config file, as JSON, or one by one; later sources win:

1. the defaults below;
2. `--config=FILE`: Python (`get_config()` changes `default_config()` and returns it), YAML or JSON;
3. `--hyper_parameters_json='{{"epochs": 2}}'`;
4. `--config.KEY=VALUE`, for example `--config.lora_config.r=8`. Lists are written `a,b,c`.

These keys can also be set for one phase, as in `--config.sft.epochs=3`: {", ".join(f"`{key}`" for key in PHASE_KEYS)}.

A leading `~` is expanded in paths. An unknown key is refused, and the nearest known one is named. The run directory's
`config.json` holds the values of a run. The original system's YAML and JSON work unchanged.

This page is generated: `python -m difflm_jax.config > docs/configuration.md`.
"""


def markdown() -> str:
    """Returns the text of docs/configuration.md."""
    sections = [_INTRODUCTION]
    for title, keys in _sections():
        rows = [f"| `{key.name}` | {_code(_shown(key.default))} | {key.setting.help} {_allowed(key)} |" for key in keys]
        sections.append("\n".join([f"## {title}\n", "| Key | Default | Meaning |", "|---|---|---|", *map(_tidy, rows)]))
    return "\n".join([sections[0], "\n\n".join(sections[1:])]) + "\n"


def help_text() -> str:
    """Returns every key with its default and meaning, formatted for a terminal."""
    lines = []
    for title, keys in _sections():
        lines.append(f"{title}:")
        for key in keys:
            text = f"{key.setting.help} {_allowed(key)}".replace("`", "").strip()
            lines.append(f"  --config.{key.name}={_shown(key.default)}")
            lines += textwrap.wrap(text, 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _sections() -> Iterator[tuple[str, list[Key]]]:
    common = [key for key in KEYS.values() if not key.optional]
    for title, keys in itertools.groupby(common, lambda key: key.title):
        yield title, list(keys)


def _allowed(key: Key) -> str:
    if key.setting.choices and key.kind is not tuple:
        return f"One of {', '.join(_code(choice) for choice in key.setting.choices)}."
    within = key.setting.within
    return f"{within.wording[0].upper()}{within.wording[1:]}." if within and within not in _OBVIOUS else ""


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def _code(value: Any) -> str:
    return f"`{value}`" if value not in ("", None) else "empty"


def _tidy(row: str) -> str:
    return row.replace("  |", " |")
