"""Reads and writes LoRA adapters as directories of the `peft` library.

Keys and layout are those of peft 0.21: `adapter_config.json`, `adapter_model.safetensors`, and the trained mask row as
`trainable_token_indices`. `diffusion_config.json` next to them says what the adapter was trained for.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from difflm_jax.checkpoint.diffusion_config import DIFFUSION_FILE, read_diffusion_config, write_diffusion_config
from difflm_jax.checkpoint.names import peft_mask_row, set_path
from difflm_jax.checkpoint.peft_card import adapter_card
from difflm_jax.checkpoint.peft_config import MERGE, adapter_config, config_problems, trained_token, weight_changes
from difflm_jax.checkpoint.peft_modules import (
    FACTORS,
    PeftModule,
    adapted_modules,
    from_peft,
    patterns,
    peft_modules,
    peft_targets,
    to_peft,
    without_own_patterns,
)
from difflm_jax.checkpoint.peft_patterns import rank_of, scaling_of, widened
from difflm_jax.checkpoint.safetensors import TensorFiles, describe_faults, open_files, read_json, write_file
from difflm_jax.errors import UserError
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.lora import EXPERTS, LoraConfig
from difflm_jax.models.weights import PROJECTIONS
from difflm_jax.utils.files import new_directory

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_NAMED_TEMPLATES = "additional_chat_templates"  # where transformers saves all chat templates but the default


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter as read: the `lora` tree (float32, stacked over layers), and what its files say about it.

    `lora` has no `mask_row` if none was trained. `mask_token_id` and `diffusion_config` are None if no file has them.
    If `lora` is None, the adapter changes the weights themselves, with the keys in `weight_changes` (`peft_merged`).
    """

    lora: dict[str, Any] | None
    lora_config: LoraConfig | None
    mask_token_id: int | None
    diffusion_config: dict[str, Any] | None
    base_model_name: str | None
    weight_changes: str = ""


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that an adapter is for: its name or path, the revision of a hub id, and its shape."""

    name: str
    revision: str | None
    config: ModelConfig


def save_adapter(
    directory: str | Path,
    lora: Mapping[str, Any],
    lora_config: LoraConfig,
    base: Base,
    diffusion_config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    notes: str = "",
) -> None:
    """Writes `lora` (see `models.lora.init_lora`) for `base` as an adapter directory, all or nothing.

    An existing adapter directory is replaced. Raises `UserError` for any other non-empty directory. `notes` is added
    to the model card.
    """
    tensors = {}
    modules = adapted_modules(base.config, lora_config)
    for module in modules:
        for layer, *place in module.places:
            for factor, tensor in to_peft(module, lora, lora_config.r, place).items():
                tensors[module.key(factor, layer)] = tensor
    trained_tokens = None
    if "mask_row" in lora:
        tensors[peft_mask_row(base.config.decoder)] = np.asarray(lora["mask_row"], np.float32)[None]
        trained_tokens = {"embed_tokens": [diffusion_config["mask_token_id"]]}
    config = adapter_config(lora_config, base.name, base.revision, trained_tokens)
    ranks, alphas = patterns(base.config, lora_config)
    config |= {"rank_pattern": ranks, "alpha_pattern": alphas, **peft_targets(base.config, lora_config)}
    if base.config.decoder != "model":  # projections of other parts, some of which PEFT cannot wrap, have equal names
        config["exclude_modules"] = rf"(?!{re.escape(base.config.decoder)}\.).*"
    if "target_parameters" in config:  # PEFT opens such an adapter only without dropout
        config["lora_dropout"] = 0.0
    with new_directory(directory, may_replace=_is_adapter_directory) as fresh:
        write_file(fresh / WEIGHTS_FILE, tensors)
        _write_json(fresh / CONFIG_FILE, config)
        write_diffusion_config(fresh, diffusion_config)
        (fresh / "README.md").write_text(adapter_card(base.name, diffusion_config, notes), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)


def open_adapter(directory: Path, config: ModelConfig) -> tuple[dict[str, Any], TensorFiles]:
    """Returns the validated `adapter_config.json` of a directory, and its tensors. Raises `UserError`."""
    if not (directory / CONFIG_FILE).is_file():
        inside = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
        known = f"name one of the adapters in it: {', '.join(inside)}" if inside else "name a PEFT adapter's directory"
        raise UserError(f"{directory}: has no {CONFIG_FILE}; {known}")
    if not (directory / WEIGHTS_FILE).is_file():
        pickled = (
            " (adapter_model.bin is pickled and not opened)" if (directory / "adapter_model.bin").is_file() else ""
        )
        raise UserError(f"{directory}: has no {WEIGHTS_FILE}{pickled}; save the adapter again with peft")
    values = read_json(directory / CONFIG_FILE)
    problems = config_problems(values, config)
    if problems:
        hint = f"; {MERGE}" if any("not supported" in problem for problem in problems) else ""
        raise UserError(f"{directory / CONFIG_FILE}: {'; '.join(problems)}{hint}")
    return values, open_files([directory / WEIGHTS_FILE])


def load_adapter(directory: str | Path, config: ModelConfig) -> Adapter:
    """Reads an adapter directory, written by us or by `peft`, for a base of shape `config`.

    The tensors determine which projections are adapted. Raises a `UserError` that lists all unsupported options, or all
    unknown, missing and misshapen tensors.
    """
    directory = Path(directory).expanduser()
    values, files = open_adapter(directory, config)
    mask_token_id = trained_token(values)
    changes = weight_changes(values)
    lora, lora_config = (None, None) if changes else _read_lora(directory, files, values, config)
    diffusion_config = read_diffusion_config(directory)
    stated = (diffusion_config or {}).get("mask_token_id")
    if None not in (stated, mask_token_id) and stated != mask_token_id:
        raise UserError(
            f"{directory}: {DIFFUSION_FILE} has mask_token_id={stated}, but {CONFIG_FILE} trains token {mask_token_id}"
        )
    return Adapter(
        lora=lora,
        lora_config=lora_config,
        mask_token_id=stated if mask_token_id is None else mask_token_id,
        diffusion_config=diffusion_config,
        base_model_name=values.get("base_model_name_or_path"),
        weight_changes=changes,
    )


def _read_lora(
    directory: Path, files: TensorFiles, values: Mapping[str, Any], config: ModelConfig
) -> tuple[dict[str, Any], LoraConfig]:
    try:
        modules, faults = check_factors(files, values, config)
        if text := describe_faults(faults):
            raise UserError(f"{directory / WEIGHTS_FILE}: tensors do not fit the base model and {CONFIG_FILE}: {text}")
        return _read_tree(files, modules, values, config)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{directory / WEIGHTS_FILE}: {error}") from error


def check_factors(
    files: TensorFiles, values: Mapping[str, Any], config: ModelConfig
) -> tuple[tuple[PeftModule, ...], dict[str, list[str]]]:
    """Returns the modules that the tensors adapt, and the faults of the tensors by kind."""
    # Regular expressions and lists with exclusions are not evaluated: then only the tensors tell which modules are
    # adapted, and in which layers.
    listed = values.get("target_modules")
    is_exact = isinstance(listed, list) and not (values.get("exclude_modules") or values.get("layers_to_transform"))
    is_exact &= config.experts is None  # with experts, names of modules have other meanings
    named = [str(name).split(".")[-1] for name in listed] if is_exact else []
    possible = {
        module: {
            module.key(factor, layer): module.shape(factor, rank_of(module, layer, values))
            for layer in module.layers
            if is_exact or is_adapted(files, module, layer)
            for factor in FACTORS
        }
        for module in peft_modules(config)
    }
    targets = tuple(
        module
        for module, shapes in possible.items()
        if module.name in named or not files.shapes.keys().isdisjoint(shapes)
    )
    expected = {name: shape for module in targets for name, shape in possible[module].items()}
    if trained_token(values) is not None:
        expected[peft_mask_row(config.decoder)] = (1, config.hidden_size)
    missing = [name for name in expected if name not in files.shapes]
    return targets, {
        "unknown": [name for name in files.shapes if name not in expected],
        "missing": missing if targets else [*missing, "every lora_A and lora_B"],
        "misshapen": [
            f"{name} {list(files.shapes[name])} for {list(shape)}"
            for name, shape in expected.items()
            if name in files.shapes and files.shapes[name] != shape
        ],
        "defective": list(files.defects),
    }


def is_adapted(files: TensorFiles, module: PeftModule, layer: int) -> bool:
    """Whether the files have a factor of `module` in `layer`."""
    return any(module.key(factor, layer) in files.shapes for factor in FACTORS)


def _read_tree(
    files: TensorFiles, modules: tuple[PeftModule, ...], values: Mapping[str, Any], config: ModelConfig
) -> tuple[dict[str, Any], LoraConfig]:
    """Reads the `lora` tree and its config. All get the highest rank; layers that are not adapted are zero."""
    foreign = without_own_patterns(values, config)  # without the patterns that we write for fused modules
    found: dict[tuple[str, ...], list[tuple[np.ndarray, np.ndarray]]] = {}
    scalings: dict[tuple[str, ...], list[float]] = {}
    for module in modules:
        own = module.pattern in (values.get("rank_pattern") or {}) and module.pattern not in foreign["rank_pattern"]
        for layer, stack, _ in module.places:
            rank = rank_of(module, layer, values)
            if is_adapted(files, module, layer):
                A, B = (files.read(module.key(factor, layer)).astype(np.float32) for factor in FACTORS)
            else:
                A, B = (np.zeros(module.shape(factor, rank), np.float32) for factor in FACTORS)
            for part, pair in from_peft(module, A, B, values["r"] if own else rank).items():
                found.setdefault((stack, *part), []).append(pair)
                scalings.setdefault((stack, *part), []).append(scaling_of(module, layer, values))
        if len(module.parts) > 1:  # drop the parts of a module that are not adapted
            for path in [(stack, *part) for _, stack, _ in module.places for part in module.parts]:
                if path in found and not any(A.any() for A, _ in found[path]):
                    del found[path]
    routed = any(EXPERTS in path for path in found)
    adapted = {path[-1] for path in found if EXPERTS not in path}
    lora_config = LoraConfig(
        r=max((A.shape[-2] for pairs in found.values() for A, _ in pairs), default=values["r"]),
        lora_alpha=values["lora_alpha"],
        lora_dropout=float(values.get("lora_dropout") or 0),
        target_modules=tuple(name for name in PROJECTIONS if name in adapted),
        routed_experts=routed,
        use_rslora=bool(values.get("use_rslora", False)),
    )
    lora: dict[str, Any] = {}
    for path, pairs in found.items():
        factors = [scaling / lora_config.scaling for scaling in scalings[path]]
        wide = [widened(pair, lora_config.r, by) for pair, by in zip(pairs, factors, strict=True)]
        for factor, layers in zip(FACTORS, zip(*wide, strict=True), strict=True):
            set_path(lora, (*path, factor), jnp.asarray(np.stack(layers)))
    if (mask_row := peft_mask_row(config.decoder)) in files.shapes:
        lora["mask_row"] = jnp.asarray(files.read(mask_row)[0].astype(np.float32))
    return lora, lora_config


def _is_adapter_directory(path: Path) -> bool:
    """Whether `path` is an adapter directory. Its only folder may be that of named chat templates."""
    folders = [entry for entry in path.iterdir() if entry.is_dir()]
    templates = all(
        folder.name == _NAMED_TEMPLATES and all(file.is_file() and file.suffix == ".jinja" for file in folder.iterdir())
        for folder in folders
    )
    return (path / CONFIG_FILE).is_file() and templates


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
