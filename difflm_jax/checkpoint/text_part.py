"""The text model in a checkpoint that also reads images: its config and tensors as those of a text model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from difflm_jax.checkpoint.safetensors import TensorFiles
from difflm_jax.models.families import FAMILIES

_COMPOSITES = ("gemma3", "gemma4", "gemma4_unified", "mistral3")
DECODER = "model.language_model"  # path of the text model in transformers 5
_RENAMED = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_IMAGES = tuple(
    f"{at}{part}."
    for at in ("", "model.")
    for part in (
        "vision_tower",
        "vision_embedder",
        "multi_modal_projector",
        "embed_vision",
        "embed_audio",
        "audio_tower",
    )
)


def text_config(hf_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the config of the text part of `hf_config`; None for a model of text only, or of an unknown type."""
    inner = hf_config.get("text_config")
    if hf_config.get("model_type") not in _COMPOSITES or not isinstance(inner, dict):
        return None
    if inner.get("model_type") not in FAMILIES:
        return None
    outer = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype")
    return {**inner, **{key: hf_config[key] for key in outer if hf_config.get(key) is not None}}


def text_tensors(files: TensorFiles) -> TensorFiles:
    """Returns `files` without the tensors for images; the others have the names of a text model."""
    theirs = {_alone(name): name for name in files.shapes if not name.startswith(_IMAGES)}
    return dataclasses.replace(
        files,
        shapes={ours: files.shapes[name] for ours, name in theirs.items()},
        read=lambda name: files.read(theirs[name]),
        stored={ours: files.stored[name] for ours, name in theirs.items() if name in files.stored},
    )


def _alone(name: str) -> str:
    for theirs, ours in _RENAMED.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
