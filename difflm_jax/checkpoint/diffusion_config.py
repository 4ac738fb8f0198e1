"""`diffusion_config.json`: what a decoder must know about the weights of an adapter or a merged checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difflm_jax.checkpoint.safetensors import read_json
from difflm_jax.errors import UserError

DIFFUSION_FILE = "diffusion_config.json"
_TYPES = {
    "mask_token": str,
    "mask_token_id": int,
    "attention": str,
    "logit_shift": bool,
    "algorithm": str,
    "mask_is_trained": bool,
    "gated": bool,
    "noise": str,
    "draft_length": int,
    "preset": dict,
}


def write_diffusion_config(directory: Path, diffusion_config: Mapping[str, Any]) -> None:
    """Writes `diffusion_config` (`DiffusionConfig.to_json`) as `diffusion_config.json` into `directory`."""
    text = json.dumps(diffusion_config, indent=2, sort_keys=True) + "\n"
    (directory / DIFFUSION_FILE).write_text(text, encoding="utf-8")


def read_diffusion_config(directory: str | Path) -> dict[str, Any] | None:
    """Reads the `diffusion_config.json` of a directory; None if there is none. Raises `UserError` if it is invalid."""
    path = Path(directory).expanduser() / DIFFUSION_FILE
    if not path.is_file():
        return None
    values = read_json(path)
    for key, kind in _TYPES.items():
        if values.get(key) is not None and type(values[key]) is not kind:
            raise UserError(f"{path}: {key} must be of type {kind.__name__}, not {str(values[key])[:60]!r}")
    return values


def model_card(base_model: str, diffusion_config: dict[str, Any], provenance: str) -> str:
    """Returns the README.md of a merged checkpoint. `provenance`: a paragraph on other changes of the weights or ""."""
    known = {key: value for key, value in diffusion_config.items() if key != "preset"}
    facts = "\n".join(f"- `{key}`: `{value}`" for key, value in known.items())
    return (
        f"---\nbase_model: {base_model}\nlibrary_name: transformers\ntags: [masked-diffusion, difflm_jax]\n---\n\n"
        f"# A masked-diffusion language model made from {base_model}\n\nAnswers are decoded by filling masks, not from "
        f"left to right. What a decoder must know (also in `diffusion_config.json`):\n\n{facts}\n"
        f"{provenance and chr(10) + provenance + chr(10)}"
    )
