"""Adapters that change the weights themselves: DoRA, and whole modules that PEFT saves next to LoRA.

Such an adapter does not fit the `lora` tree. It is merged while the base is read, one tensor at a time. The result is
that of peft; for DoRA it is W' = m (W + s B A) / |W + s B A|, with the norm of each output (row).
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from difflm_jax.checkpoint.names import peft_mask_row
from difflm_jax.checkpoint.peft import WEIGHTS_FILE, check_factors, is_adapted, open_adapter
from difflm_jax.checkpoint.peft_config import MERGE, trained_token, weight_changes
from difflm_jax.checkpoint.peft_modules import FACTORS, PeftModule
from difflm_jax.checkpoint.peft_patterns import scaling_of
from difflm_jax.checkpoint.safetensors import TensorFiles, describe_faults
from difflm_jax.checkpoint.source import Source
from difflm_jax.errors import UserError
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.weights import table

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COPIES = ("modules_to_save", "original_module")  # saved too if the vocabulary has grown
_MAGNITUDE = "lora_magnitude_vector"


@dataclasses.dataclass(frozen=True)
class _Update:
    """The low-rank update of some outputs (`rows`) of a module in a layer."""

    module: PeftModule
    layer: int
    rows: slice

    @property
    def magnitude(self) -> str:
        return f"base_model.model.{self.module.prefix}.layers.{self.layer}.{self.module.path}.{_MAGNITUDE}"


def merged_source(source: Source, directory: str | Path) -> Source:
    """Returns `source` with an adapter of `weight_changes` merged into the tensors it reads (updated ones are float32).

    If embedding and head are tied and one of them is saved, they are untied, as in peft. Raises `UserError` for a base
    that is stored quantised, and for tensors that do not fit it.
    """
    directory = Path(directory).expanduser()
    values, files = open_adapter(directory, source.config)
    if source.stored:
        kept = next(iter(source.stored.values())).format
        raise UserError(
            f"{directory}: {weight_changes(values)} is merged into the weights, and {source.name} stores them as "
            f"{kept}: name the base that is not quantised"
        )
    saved = _saved_modules(files, source)
    again = {key.replace(".weight", f".{copy}.weight") for key in saved.values() for copy in _COPIES}
    lora = {key for key in files.shapes if key not in {*saved.values(), *again} and not key.endswith(_MAGNITUDE)}
    try:
        targets, faults = check_factors(_only(files, lora), values, source.config)
        updates = _updates(targets, files, source.config)
    except ValueError as error:
        raise UserError(f"{directory / WEIGHTS_FILE}: {error}") from error
    grown = _grown(saved, files, source)
    _check_saved(faults, saved, files, source, grown)
    _check_magnitudes(faults, updates, files, bool(values.get("use_dora")))
    if text := describe_faults(faults):
        raise UserError(f"{directory / WEIGHTS_FILE}: tensors do not fit the base model: {text}")
    return _with_shapes(source, saved, grown, _reader(source, files, values, saved, updates))


def _saved_modules(files: TensorFiles, source: Source) -> dict[str, str]:
    """Returns {name of a tensor of the base: key of the saved tensor that replaces it}."""
    prefix = f"base_model.model.{source.config.decoder}."
    names = {}
    for key in files.shapes:
        inner = key.startswith(prefix)
        name = f"model.{key.removeprefix(prefix)}" if inner else key.removeprefix("base_model.model.")
        if name in source.shapes or (name == _HEAD and source.config.tie_word_embeddings):
            names[name] = key
    return names


def _only(files: TensorFiles, keys: set[str]) -> TensorFiles:
    return dataclasses.replace(files, shapes={key: files.shapes[key] for key in files.shapes if key in keys})


def _updates(targets: tuple[PeftModule, ...], files: TensorFiles, config: ModelConfig) -> dict[str, _Update]:
    """Returns {name of a tensor of the base: its update}. Raises `ValueError` for routed experts."""
    rows = [row for row in table(config) if row.quantisable and not row.experts]
    names = {
        (layer, *row.path[1:-1]): name for row in rows for layer, name in zip(row.layers, row.hf_names, strict=True)
    }
    found = {}
    for module in targets:
        if module.experts:
            raise ValueError(f"{module.parameter} of routed experts next to use_dora or modules_to_save; {MERGE}")
        ends = np.cumsum(module.outputs)
        for layer in module.layers:
            if not is_adapted(files, module, layer):
                continue
            for part, size, end in zip(module.parts, module.outputs, ends, strict=True):
                found[names[layer, *part]] = _Update(module, layer, slice(int(end) - size, int(end)))
    return found


def _grown(saved: Mapping[str, str], files: TensorFiles, source: Source) -> int:
    """Returns the rows of embedding and head: as saved if both are saved (a larger vocabulary), else the base's."""
    rows = {files.shapes[saved[name]][0] for name in (_EMBEDDING, _HEAD) if name in saved}
    return rows.pop() if len(rows) == 1 and {_EMBEDDING, _HEAD} <= saved.keys() else source.config.vocab_size


def _check_saved(
    faults: dict[str, list[str]], saved: Mapping[str, str], files: TensorFiles, source: Source, rows: int
) -> None:
    for name, key in saved.items():
        shape = source.shapes.get(name, source.shapes.get(_EMBEDDING, ()))
        if name in (_EMBEDDING, _HEAD):
            shape = (rows, *shape[1:])
        if files.shapes[key] != shape:
            faults["misshapen"].append(f"{key} {list(files.shapes[key])} for {list(shape)}")


def _check_magnitudes(
    faults: dict[str, list[str]], updates: Mapping[str, _Update], files: TensorFiles, use_dora: bool
) -> None:
    expected = {update.magnitude: (sum(update.module.outputs),) for update in updates.values()} if use_dora else {}
    found = {key for key in files.shapes if key.endswith(_MAGNITUDE)}
    faults["missing"] += sorted(expected.keys() - found)
    faults["unknown"] += sorted(found - expected.keys())
    faults["misshapen"] += [
        f"{key} {list(files.shapes[key])} for {list(shape)}"
        for key, shape in expected.items()
        if key in found and files.shapes[key] != shape
    ]


def _reader(
    source: Source,
    files: TensorFiles,
    values: Mapping[str, Any],
    saved: Mapping[str, str],
    updates: Mapping[str, _Update],
) -> Callable[[str], np.ndarray]:
    token, mask_row = trained_token(values), peft_mask_row(source.config.decoder)

    def read(name: str) -> np.ndarray:
        if name in saved:
            return files.read(saved[name])
        held = name if name in source.shapes else _EMBEDDING  # the head of a tied base
        weight = np.asarray(source.read(held))
        if name == _EMBEDDING and token is not None:
            weight = weight.astype(np.float32)
            weight[token] = files.read(mask_row)[0]
        return _updated(weight.astype(np.float32), updates[name], files, values) if name in updates else weight

    return read


def _updated(weight: np.ndarray, update: _Update, files: TensorFiles, values: Mapping[str, Any]) -> np.ndarray:
    A, B = (files.read(update.module.key(factor, update.layer)).astype(np.float32) for factor in FACTORS)
    weight = weight + np.float32(scaling_of(update.module, update.layer, values)) * (B[update.rows] @ A)
    if update.magnitude not in files.shapes:
        return weight
    magnitude = files.read(update.magnitude).astype(np.float32)[update.rows]
    return weight * (magnitude / np.linalg.norm(weight, axis=1))[:, None]


def _with_shapes(source: Source, saved: Mapping[str, str], rows: int, read: Callable[[str], np.ndarray]) -> Source:
    """Returns `source` with `read` as its reader, and the config and shapes that result from it."""
    untied = source.config.tie_word_embeddings and not saved.keys().isdisjoint((_EMBEDDING, _HEAD))
    tied = source.config.tie_word_embeddings and not untied
    changes = {"tie_word_embeddings": tied, "vocab_size": rows}
    shapes = dict(source.shapes)
    for name in (_EMBEDDING, _HEAD):
        if name in shapes or (name == _HEAD and untied):
            shapes[name] = (rows, source.config.hidden_size)
    return dataclasses.replace(
        source,
        config=dataclasses.replace(source.config, **changes),
        hf_config={**source.hf_config, **changes},
        shapes=shapes,
        read=read,
    )
