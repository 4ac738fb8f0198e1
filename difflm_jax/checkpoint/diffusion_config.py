"""`diffusion_config.json`: what must be known to decode with weights, beside an adapter or a merged checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difflm_jax.checkpoint.shards import read_json

DIFFUSION_FILE = "diffusion_config.json"


def write_diffusion_config(directory: Path, diffusion_config: Mapping[str, Any]) -> None:
    """Writes mask token and id, attention rule, logit shift and sampling algorithm into `directory`."""
    text = json.dumps(diffusion_config, indent=2, sort_keys=True) + "\n"
    (directory / DIFFUSION_FILE).write_text(text, encoding="utf-8")


def read_diffusion_config(directory: str | Path) -> dict[str, Any] | None:
    """The `diffusion_config.json` of a directory, or None if it has none (or is a file)."""
    path = Path(directory).expanduser() / DIFFUSION_FILE
    return read_json(path) if path.is_file() else None
