"""LoRA adapters as directories that the `peft` library reads and writes.

Keys and layout are those of peft 0.21: `adapter_config.json`, `adapter_model.safetensors`, and the trained mask row as
`trainable_token_indices`. Beside them lies `diffusion_config.json`: what the adapter was trained for.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from difflm_jax.checkpoint.diffusion_config import DIFFUSION_FILE, read_diffusion_config, write_diffusion_config
from difflm_jax.checkpoint.names import peft_mask_row, set_path
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
from difflm_jax.checkpoint.peft_patterns import pattern_problems, rank_of, scaling_of, widened
from difflm_jax.checkpoint.safetensors import TensorFiles, describe_faults, open_files, read_json, write_file
from difflm_jax.errors import UserError
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.lora import EXPERTS, LoraConfig
from difflm_jax.models.weights import PROJECTIONS
from difflm_jax.utils.files import new_directory

PEFT_VERSION = "0.21.2"  # the version whose format is written
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_NAMED_TEMPLATES = "additional_chat_templates"  # where transformers saves chat templates but the default

# Keys of adapter_config.json that change the result in ways not represented here, unless they hold one of these.
_ONLY = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # the others change the base as well
}
_READ = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "trainable_token_indices", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "target_parameters",
}  # fmt: skip
# peft's own way to make an ordinary checkpoint of an adapter that cannot be represented here.
_MERGE = "merge it with peft (merge_and_unload, save_pretrained), and load the result as the model"
_NEUTRAL = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "exclude_modules", "layers_pattern", "megatron_core", "eva_config", "qalora_group_size", "runtime_config",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter as read: the `lora` tree (float32, stacked over layers), and what its files say of it.

    `lora` has no `mask_row` if none was trained. `mask_token_id` and `diffusion_config` are None where no file tells.
    """

    lora: dict[str, Any]
    lora_config: LoraConfig
    mask_token_id: int | None
    diffusion_config: dict[str, Any] | None
    base_model_name: str | None


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
    """Writes `lora` (see `lora.init_lora`) for `base` as an adapter directory, all or nothing.

    An existing adapter directory is replaced; any other non-empty directory is a `UserError`. `notes` goes into the
    model card.
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
    config = _adapter_config(lora_config, base.name, base.revision, trained_tokens)
    ranks, alphas = patterns(base.config, lora_config)
    config |= {"rank_pattern": ranks, "alpha_pattern": alphas, **peft_targets(base.config, lora_config)}
    if "target_parameters" in config:  # PEFT opens such an adapter without dropout alone
        config["lora_dropout"] = 0.0
    with new_directory(directory, may_replace=_is_adapter_directory) as fresh:
        write_file(fresh / WEIGHTS_FILE, tensors)
        _write_json(fresh / CONFIG_FILE, config)
        write_diffusion_config(fresh, diffusion_config)
        (fresh / "README.md").write_text(_model_card(base.name, diffusion_config, notes), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)


def load_adapter(directory: str | Path, config: ModelConfig) -> Adapter:
    """Reads an adapter directory, ours or one that `peft` wrote, for a base of shape `config`.

    Which projections are adapted is told by the tensors. Raises one `UserError` with all that cannot be represented
    and all tensors that are unknown, missing or misshapen.
    """
    directory = Path(directory).expanduser()
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
    problems = _config_problems(values, config)
    if problems:
        hint = f"; {_MERGE}" if any("not supported" in problem for problem in problems) else ""
        raise UserError(f"{directory / CONFIG_FILE}: {'; '.join(problems)}{hint}")
    files = open_files([directory / WEIGHTS_FILE])
    mask_token_id = _trained_token(values)
    try:
        modules, faults = _check_tensors(files, values, config, mask_token_id is not None)
        if text := describe_faults(faults):
            raise UserError(f"{directory / WEIGHTS_FILE}: tensors do not fit the base model and {CONFIG_FILE}: {text}")
        lora, lora_config = _read_tree(files, modules, values, config)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{directory / WEIGHTS_FILE}: {error}") from error

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
    )


def _adapter_config(
    config: LoraConfig, base_model_name: str, revision: str | None, trained_tokens: dict[str, list[int]] | None
) -> dict[str, Any]:
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(config.lora_alpha) if float(config.lora_alpha).is_integer() else config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": config.r,
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": trained_tokens,
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }


def _config_problems(values: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """What an `adapter_config.json` asks for that is not represented here, key by key."""
    problems = [
        f"{key}={_short(values[key])} is not supported"
        for key, allowed in _ONLY.items()
        if key in values and values[key] not in allowed
    ]
    # An option that is off is off under any name, also one that a later peft brings.
    known = {*_ONLY, *_READ, *_NEUTRAL}
    problems += [
        f"{key}={_short(value)} is not supported" for key, value in values.items() if key not in known and value
    ]
    if "peft_type" not in values:
        problems.append("peft_type is missing")
    rank, dropout, rslora = values.get("r"), values.get("lora_dropout"), values.get("use_rslora")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
        problems.append(f"r must be a positive integer, not {_short(rank)}")
    if not _is_number(values.get("lora_alpha")):
        problems.append(f"lora_alpha must be a number, not {_short(values.get('lora_alpha'))}")
    if dropout is not None and not (_is_number(dropout) and 0 <= dropout < 1):
        problems.append(f"lora_dropout must be at least 0 and below 1, not {_short(dropout)}")
    if rslora not in (None, False, True):
        problems.append(f"use_rslora must be true or false, not {_short(rslora)}")
    problems += pattern_problems(values)
    targets = values.get("target_modules")
    if isinstance(targets, list):
        known = [module.name for module in peft_modules(config)]
        outside = [str(name) for name in targets if str(name).split(".")[-1] not in known]
        if outside:
            problems.append(f"target_modules {', '.join(outside)} are none of {', '.join(known)}")
    return problems + _trained_token_problems(values.get("trainable_token_indices"), config.vocab_size)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _trained_token_problems(indices: Any, vocab_size: int) -> list[str]:
    if not indices:
        return []
    if isinstance(indices, dict):
        if other := [name for name in indices if name.split(".")[-1] != "embed_tokens"]:
            return [f"trainable_token_indices of {', '.join(other)} are not supported (embed_tokens only)"]
        indices = next(iter(indices.values()))
    if not isinstance(indices, list) or len(indices) != 1 or not isinstance(indices[0], int):
        return [f"trainable_token_indices={_short(indices)} must be the mask token alone"]
    if not 0 <= indices[0] < vocab_size:
        return [f"trainable_token_indices={indices} is outside the base model's {vocab_size} tokens"]
    return []


def _trained_token(values: Mapping[str, Any]) -> int | None:
    indices = values.get("trainable_token_indices") or None
    if isinstance(indices, dict):
        (indices,) = indices.values()
    return indices[0] if indices else None


def _check_tensors(
    files: TensorFiles, values: Mapping[str, Any], config: ModelConfig, has_mask_row: bool
) -> tuple[tuple[PeftModule, ...], dict[str, list[str]]]:
    """The modules that the tensors adapt, and the faults of the tensors by kind."""
    # A regular expression is not evaluated, nor a list from which others are taken away: there the tensors alone tell
    # which modules are adapted, and in which layers.
    listed = values.get("target_modules")
    is_exact = isinstance(listed, list) and not (values.get("exclude_modules") or values.get("layers_to_transform"))
    is_exact &= config.experts is None  # names of modules mean other things in a model with experts
    named = [str(name).split(".")[-1] for name in listed] if is_exact else []
    possible = {
        module: {
            module.key(factor, layer): module.shape(factor, rank_of(module, layer, values))
            for layer in module.layers
            if is_exact or _is_adapted(files, module, layer)
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
    if has_mask_row:
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


def _is_adapted(files: TensorFiles, module: PeftModule, layer: int) -> bool:
    return any(module.key(factor, layer) in files.shapes for factor in FACTORS)


def _read_tree(
    files: TensorFiles, modules: tuple[PeftModule, ...], values: Mapping[str, Any], config: ModelConfig
) -> tuple[dict[str, Any], LoraConfig]:
    """The `lora` tree, and its config: the highest rank is that of all, and a layer that is not adapted has zeros."""
    foreign = without_own_patterns(values, config)  # patterns that are not the way in which we write fused modules
    found: dict[tuple[str, ...], list[tuple[np.ndarray, np.ndarray]]] = {}
    scalings: dict[tuple[str, ...], list[float]] = {}
    for module in modules:
        own = module.pattern in (values.get("rank_pattern") or {}) and module.pattern not in foreign["rank_pattern"]
        for layer, stack, _ in module.places:
            rank = rank_of(module, layer, values)
            if _is_adapted(files, module, layer):
                A, B = (files.read(module.key(factor, layer)).astype(np.float32) for factor in FACTORS)
            else:
                A, B = (np.zeros(module.shape(factor, rank), np.float32) for factor in FACTORS)
            for part, pair in from_peft(module, A, B, values["r"] if own else rank).items():
                found.setdefault((stack, *part), []).append(pair)
                scalings.setdefault((stack, *part), []).append(scaling_of(module, layer, values))
        if len(module.parts) > 1:  # of a module that is adapted in parts, the others have neither A nor B
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
    """Whether `path` holds an adapter and nothing else: the one folder in it may be that of named chat templates."""
    folders = [entry for entry in path.iterdir() if entry.is_dir()]
    templates = all(
        folder.name == _NAMED_TEMPLATES and all(file.is_file() and file.suffix == ".jinja" for file in folder.iterdir())
        for folder in folders
    )
    return (path / CONFIG_FILE).is_file() and templates


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _peft_lines(base_model_name: str) -> str:
    """What opens an adapter in peft: transformers must be told of a .gguf file, which `AutoPeftModel...` cannot."""
    if not base_model_name.endswith(".gguf"):
        return (
            "from peft import AutoPeftModelForCausalLM\n"
            'model = AutoPeftModelForCausalLM.from_pretrained("this directory")'
        )
    path = Path(base_model_name)
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(str(path.parent))}, "
        f"gguf_file={json.dumps(path.name)})\n"
        'model = PeftModel.from_pretrained(base, "this directory")'
    )


def _model_card(base_model_name: str, diffusion_config: Mapping[str, Any], notes: str) -> str:
    settings = "\n".join(
        f"- {key}: `{json.dumps(value)}`" for key, value in sorted(diffusion_config.items()) if key != "preset"
    )
    return f"""---
base_model: {json.dumps(base_model_name)}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- masked-diffusion
- difflm_jax
---

# Masked-diffusion adapter for {base_model_name}

LoRA factors and the mask token's embedding row that turn a causal language model into a masked-diffusion one. It was
trained for the settings below, which `diffusion_config.json` repeats:

{settings}

```python
import difflm_jax
lm = difflm_jax.load({json.dumps(base_model_name)}, adapter="this directory")
print(lm.generate("What is the capital of France?").texts[0])
```

PEFT loads the same weights; attention and decoding are then the caller's to provide:

```python
{_peft_lines(base_model_name)}
```
{notes and chr(10) + notes.strip() + chr(10)}
### Framework versions

- PEFT {PEFT_VERSION}
- JAX {jax.__version__}
"""
