"""Opens models: a Hugging Face directory, a .gguf file or a hub id, all as a `Source`."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from transformers import PreTrainedTokenizerBase

from difflm_jax.checkpoint.bitsandbytes import open_quantised
from difflm_jax.checkpoint.experts import split_experts
from difflm_jax.checkpoint.foreign import read_field_config
from difflm_jax.checkpoint.fused import split_fused
from difflm_jax.checkpoint.gguf.weights import open_gguf
from difflm_jax.checkpoint.mxfp4 import is_mxfp4, open_mxfp4
from difflm_jax.checkpoint.names import from_foreign
from difflm_jax.checkpoint.safetensors import TensorFiles, open_shards, read_json
from difflm_jax.checkpoint.text_part import DECODER, text_config, text_tensors
from difflm_jax.checkpoint.tokenizer import load_tokenizer
from difflm_jax.errors import UserError, one_line
from difflm_jax.models.config import ModelConfig, unknown_keys
from difflm_jax.quant import QTensor, QuantConfig

_WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_UNWANTED = ("*/*", "consolidated*.safetensors")  # copies of the weights in other layouts


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that has been found and whose tensors are listed, but not read.

    path: the local directory or file (for a hub id, its snapshot).
    hf_config: `config.json` in the keys of one of our families; for a .gguf file, made from its metadata.
    shapes: Hugging Face tensor names -> shapes.
    read(name): returns one tensor, [out, in], in its stored dtype (float32 for quantised GGUF types), or a `QTensor` if
      its name is in `stored`.
    defects: faults of the files, which `load_params` reports with its own.
    diffusion: what a third-party diffusion checkpoint was trained for (`checkpoint.foreign`).
    generation_config: contents of the file of that name.
    unindexed: tensors that the index does not list; the model may ignore them.
    """

    name: str
    revision: str | None
    path: Path
    hf_config: dict[str, Any]
    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray | QTensor]
    defects: tuple[str, ...]
    stored: Mapping[str, QuantConfig]
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    diffusion: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unindexed: frozenset[str] = frozenset()

    @property
    def eos_token_ids(self) -> set[int]:
        """The ids of the tokens that end an answer, from config.json and generation_config.json."""
        named = (config.get("eos_token_id") for config in (self.hf_config, self.generation_config))
        ids = [each for ids in named for each in (ids if isinstance(ids, list) else [ids])]
        return {each for each in ids if type(each) is int and 0 <= each < self.config.vocab_size}

    def fingerprint(self) -> str:
        """Returns a hash of the names, sizes and times of the files of weights. It changes if they change."""
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def open_source(source: str, revision: str | None = None) -> Source:
    """Finds the model that `source` names and reads its config and list of tensors. A hub id is downloaded.

    Raises `UserError` for a model that is missing, cannot be read, or is not supported.
    """
    if not source.strip():
        raise UserError("model: is empty; give a directory, a .gguf file or a hub id")
    path = _expanded(source)
    is_local = path.exists() or _looks_like_path(source)
    if is_local and revision is not None:
        raise UserError(f"revision={revision!r} goes with a hub id, but {source} is a local path")
    if path.suffix == ".gguf" and path.is_file():
        return _open(source, None, path, *open_gguf(path))
    if path.is_dir():
        return _open_directory(source, None, path)
    if path.is_file():
        raise UserError(f"{source}: is neither a directory nor a .gguf file; give the directory that holds config.json")
    if is_local:
        raise UserError(f"{source}: no such directory or file{_where_looked(path)}")
    return _open_directory(source, revision, _download(source, revision))


def read_model_config(source: str, revision: str | None = None) -> ModelConfig:
    """Returns the shape of the model that `source` names, without its tensors. `source` may be a `config.json` itself.

    For a hub id, only that file is downloaded. Raises `UserError` as `open_source` does.
    """
    path = _expanded(source)
    if path.suffix == ".gguf":
        return open_source(source, revision).config
    if not (path.exists() or _looks_like_path(source)):
        path = _download(source, revision, ("config.json",))
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; the model is known by its config.json")
    hf_config = read_json(path)
    hf_config.pop("quantization_config", None)
    hf_config = text_config(hf_config) or hf_config
    field = _named(str(path), lambda: read_field_config(hf_config, source))
    return _named(str(path), lambda: ModelConfig.from_hf(hf_config if field is None else field.hf_config))


def _open_directory(name: str, revision: str | None, directory: Path) -> Source:
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise UserError(f"{directory}: is a PEFT adapter: name its base with --model and this with --adapter")
        raise UserError(f"{directory}: has no config.json")
    hf_config = read_json(directory / "config.json")
    if "phases" in hf_config and "model_type" not in hf_config:
        raise UserError(
            f"{directory}: is a training run: --run={directory}, or its model with {directory}/sft_model on it"
        )
    quantization_config = hf_config.pop("quantization_config", None)  # from here on, the tensors say what is quantised
    if is_mxfp4(quantization_config):
        files = open_mxfp4(directory)
    else:
        files = open_quantised(directory, quantization_config) if quantization_config else open_shards(directory)
    inner = text_config(hf_config)
    if inner is not None:
        print(f"{name}: {hf_config['model_type']} reads images too; its text part is used", flush=True)
        hf_config, files = inner, text_tensors(files)
    field = _named(name, lambda: read_field_config(hf_config, name))
    if field is not None:
        hf_config, files = field.hf_config, _renamed(files, field.names)
        if field.fused:
            apart = _named(name, lambda: ModelConfig.from_hf(hf_config))
            files = split_fused(files, dataclasses.replace(apart, fused=field.fused))
    if unknown := unknown_keys(hf_config):
        logging.getLogger(__name__).warning(
            "%s: config.json has keys that are not read here: %s", name, ", ".join(unknown)
        )
    diffusion = field.diffusion if field is not None else {}
    generation = directory / "generation_config.json"
    source = _open(
        name,
        revision,
        directory,
        hf_config,
        files,
        lambda: load_tokenizer(directory),
        diffusion,
        read_json(generation) if generation.is_file() else {},
    )
    if inner is None:
        return source
    return dataclasses.replace(source, config=dataclasses.replace(source.config, decoder=DECODER))


def _open(
    name: str,
    revision: str | None,
    path: Path,
    hf_config: dict[str, Any],
    files: TensorFiles,
    load_tokenizer: Callable[[], PreTrainedTokenizerBase],
    diffusion: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> Source:
    config = _named(name, lambda: ModelConfig.from_hf(hf_config))
    files = _named(name, lambda: split_fused(files, config)) if config.fused else files
    files = _named(name, lambda: split_experts(files, config)) if config.experts else files
    return Source(
        name,
        revision,
        path,
        hf_config,
        config,
        files.shapes,
        files.read,
        files.defects,
        files.stored,
        load_tokenizer,
        diffusion or {},
        generation_config or {},
        files.unindexed,
    )


def _named(name: str, read: Callable[[], Any]) -> Any:
    """Returns `read()`, with `name` put before the message of a `UserError`."""
    try:
        return read()
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _renamed(files: TensorFiles, names: str) -> TensorFiles:
    """Returns `files` with Hugging Face's names, from the table `names` of `checkpoint.names`; "": unchanged."""
    if not names:
        return files
    theirs = {from_foreign(names, name): name for name in files.shapes}
    return dataclasses.replace(
        files,
        shapes={ours: files.shapes[name] for ours, name in theirs.items()},
        read=lambda name: files.read(theirs[name]),
        unindexed=frozenset(from_foreign(names, name) for name in files.unindexed),
    )


def _expanded(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError as error:  # ~name of an unknown user
        raise UserError(f"{source}: no such directory or file") from error


def _where_looked(path: Path) -> str:
    """Returns a hint for a relative path, which may be right in another directory; "" for an absolute one."""
    return "" if path.is_absolute() else f" in {Path.cwd()}; name the model with --model (in training --config.model)"


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.endswith(".gguf") or source.count("/") > 1


def _download(repo_id: str, revision: str | None, wanted: Sequence[str] = _WANTED) -> Path:
    """Returns the local snapshot of a hub model, downloaded or from the cache. Raises `UserError`."""
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    except (HTTPError, HFValidationError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{repo_id}{at}: not in the local cache and cannot be fetched from the hub ({one_line(error)[:200]}); give "
            "instead a local directory with config.json and safetensors, a .gguf file, or a hub id that the cache holds"
        ) from error
