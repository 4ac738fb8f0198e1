"""Weights in and out in Hugging Face's layout: a `Source` to our tree, and our tree to a checkpoint directory."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from difflm_jax.checkpoint.diffusion_config import write_diffusion_config
from difflm_jax.checkpoint.directory import new_directory
from difflm_jax.checkpoint.names import REDUNDANT_SUFFIXES, get_path, set_path, table
from difflm_jax.checkpoint.shards import INDEX_FILE, SINGLE_FILE, describe_faults, write_file
from difflm_jax.checkpoint.source import Source
from difflm_jax.errors import UserError
from difflm_jax.models.config import ModelConfig

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MAX_SHARD_BYTES = 5_000_000_000


def load_params(source: Source, dtype: Any) -> dict[str, Any]:
    """The tree of `names.table` as jax arrays of `dtype`, layers stacked on axis 0.

    Read one stacked leaf at a time: host memory peaks at the largest leaf and one tensor beyond what is already on
    the device. Raises `UserError` listing all unknown, missing, duplicate and misshapen tensors before any is read.
    """
    check_tensors(source)
    dtype = jnp.dtype(dtype)
    params: dict[str, Any] = {}
    for row in table(source.config):
        names = row.hf_names(source.config.num_layers)
        leaf = np.empty((len(names), *row.shape), dtype)
        for index, name in enumerate(names):
            leaf[index] = source.read(name)
        set_path(params, row.path, jax.device_put(leaf if row.stacked else leaf[0]))
    return params


def check_tensors(source: Source) -> None:
    """Raises one `UserError` with every way in which the tensors of `source` are not those of its config."""
    expected = {name: row.shape for row in table(source.config) for name in row.hf_names(source.config.num_layers)}
    found = {name: shape for name, shape in source.shapes.items() if not name.endswith(REDUNDANT_SUFFIXES)}
    if _EMBEDDING not in found and "embed_tokens.weight" in found:
        raise UserError(
            f"{source.name}: tensor names lack the prefix 'model.' (embed_tokens.weight): this is a bare decoder; save "
            "it from AutoModelForCausalLM"
        )
    tied_copy = source.config.tie_word_embeddings and found.pop(_HEAD, None) is not None
    misshapen = [
        f"{name} {list(found[name])} for {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults = {
        "unknown": [name for name in found if name not in expected],
        "missing": [name for name in expected if name not in found],
        "misshapen": misshapen,
        "defective": source.defects,
    }
    if text := describe_faults(faults):
        raise UserError(f"{source.name}: tensors do not fit its config: {text}")
    if tied_copy and not _equal(source.read(_HEAD), source.read(_EMBEDDING)):
        raise UserError(
            f"{source.name}: {_HEAD} differs from {_EMBEDDING}, though config.json says tie_word_embeddings; set that "
            "to false or remove the tensor"
        )


def save_pretrained(
    directory: str | Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    hf_config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    model_card: str,
    diffusion_config: Mapping[str, Any],
) -> None:
    """Writes a checkpoint that transformers loads: safetensors, config, tokenizer, model card, all or nothing.

    The dtype is that of `params`. Above `MAX_SHARD_BYTES` the tensors are split over files with an index. Raises
    `UserError` if `directory` exists and is not empty, or cannot be written.
    """
    dtype = jnp.dtype(params["embed_tokens"]["weight"].dtype).name
    stored = {**hf_config, "dtype": dtype, "torch_dtype": dtype}  # the second is what transformers 4 reads
    with new_directory(directory) as fresh:
        _write_tensors(fresh, params, config)
        (fresh / "config.json").write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (fresh / "README.md").write_text(model_card, encoding="utf-8")
        write_diffusion_config(fresh, diffusion_config)
        tokenizer.save_pretrained(fresh)


def _write_tensors(directory: Path, params: Mapping[str, Any], config: ModelConfig) -> None:
    shards = _shards(params, config)
    if len(shards) == 1:
        write_file(directory / SINGLE_FILE, dict(_tensors(params, config, shards[0])))
        return
    weight_map = {}
    for index, names in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / file, dict(_tensors(params, config, names)))
        weight_map.update(dict.fromkeys(names, file))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(params: Mapping[str, Any], config: ModelConfig) -> list[list[str]]:
    """The tensor names in the order of the table, cut where a file would exceed `MAX_SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for row in table(config):
        names = row.hf_names(config.num_layers)
        size = get_path(params, row.path).nbytes // len(names)
        for name in names:
            if shards[-1] and filled + size > MAX_SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
    return shards


def _tensors(params: Mapping[str, Any], config: ModelConfig, wanted: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors named by `wanted`, each leaf brought to the host once."""
    wanted = set(wanted)
    for row in table(config):
        names = row.hf_names(config.num_layers)
        if wanted.isdisjoint(names):
            continue
        leaf = np.asarray(get_path(params, row.path))
        for name, tensor in zip(names, leaf if row.stacked else leaf[None], strict=True):
            if name in wanted:
                yield name, np.ascontiguousarray(tensor)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape:
        return False
    return all(np.array_equal(x.astype(np.float32), y.astype(np.float32)) for x, y in zip(a, b, strict=True))
