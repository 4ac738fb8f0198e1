"""The modules of Hugging Face's model that PEFT adapts, where they differ from our projections.

Some families hold several of our projections in one tensor (Phi-3's `qkv_proj`, GLM's `gate_up_proj`). Ours have a
low-rank update each, of rank r. PEFT has one for the module: the same update with n projections has rank n r, with A
stacked and B block-diagonal, and `rank_pattern` and `alpha_pattern` say so. One that PEFT trained has rank r and an A
that the projections share.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from difflm_jax.checkpoint.names import get_path
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.lora import LoraConfig
from difflm_jax.models.weights import PROJECTIONS, fused_name, hf_module, projections_of, table

FACTORS = ("lora_A", "lora_B")


@dataclasses.dataclass(frozen=True)
class PeftModule:
    """`path` within a layer, the projections that it holds, and how many outputs each has."""

    path: str
    parts: tuple[str, ...]
    outputs: tuple[int, ...]
    inputs: int
    prefix: str

    @property
    def name(self) -> str:
        """As `target_modules` spells it."""
        return self.path.split(".")[-1]

    def key(self, factor: str, layer: int) -> str:
        """The name of a factor's tensor in an adapter file."""
        return f"base_model.model.{self.prefix}.layers.{layer}.{self.path}.{factor}.weight"

    def shape(self, factor: str, rank: int) -> tuple[int, int]:
        return (rank, self.inputs) if factor == "lora_A" else (sum(self.outputs), rank)


def peft_modules(config: ModelConfig) -> tuple[PeftModule, ...]:
    """The modules of a model that can be adapted."""
    shapes = {row.path[2]: row.shape for row in table(config) if row.quantisable}
    found: dict[str, list[str]] = {}
    for name in projections_of(config):
        path = hf_module(config, name)
        if (fused := fused_name(config, name)) is not None:
            path = f"{PROJECTIONS[name][0]}.{fused}"
        found.setdefault(path, []).append(name)
    return tuple(
        PeftModule(path, tuple(parts), tuple(shapes[part][0] for part in parts), shapes[parts[0]][1], config.decoder)
        for path, parts in found.items()
    )


def adapted_modules(config: ModelConfig, lora_config: LoraConfig) -> tuple[PeftModule, ...]:
    """Those that hold a projection with an update."""
    return tuple(module for module in peft_modules(config) if set(module.parts) & set(lora_config.target_modules))


def patterns(config: ModelConfig, lora_config: LoraConfig) -> tuple[dict[str, int], dict[str, float]]:
    """(`rank_pattern`, `alpha_pattern`) of an adapter of ours: the scaling of a module is that of its projections."""
    joined = [module for module in adapted_modules(config, lora_config) if len(module.parts) > 1]
    ranks = {module.name: len(module.parts) * lora_config.r for module in joined}
    power = 0.5 if lora_config.use_rslora else 1.0
    alphas = {module.name: lora_config.lora_alpha * len(module.parts) ** power for module in joined}
    return ranks, {name: int(alpha) if float(alpha).is_integer() else alpha for name, alpha in alphas.items()}


def to_peft(module: PeftModule, layers: Mapping[str, Any], rank: int, layer: int) -> dict[str, np.ndarray]:
    """The factors of a module, by name, from those of its projections in the `layers` of a `lora` tree."""
    pairs = [_pair(module, layers, index, rank, layer) for index in range(len(module.parts))]
    if len(pairs) == 1:
        return dict(zip(FACTORS, map(np.ascontiguousarray, pairs[0]), strict=True))
    B = np.zeros((sum(module.outputs), rank * len(pairs)), np.float32)
    for index, (rows, (_, part_B)) in enumerate(zip(_rows(module), pairs, strict=True)):
        B[rows, index * rank : (index + 1) * rank] = part_B
    return {"lora_A": np.concatenate([A for A, _ in pairs]), "lora_B": B}


def _pair(module: PeftModule, layers: Mapping[str, Any], index: int, rank: int, layer: int) -> list[np.ndarray]:
    block, name = PROJECTIONS[module.parts[index]]
    if name not in layers.get(block, {}):  # another projection of the module is adapted, and this one is not
        return [np.zeros((rank, module.inputs), np.float32), np.zeros((module.outputs[index], rank), np.float32)]
    return [np.asarray(get_path(layers, (block, name))[factor][layer], np.float32) for factor in FACTORS]


def from_peft(module: PeftModule, A: np.ndarray, B: np.ndarray, rank: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(A, B) of each projection of a module, of rank `rank`. Raises `ValueError` if their update has another rank."""
    if len(A) == rank:
        return {part: (A, B[rows]) for part, rows in zip(module.parts, _rows(module), strict=True)}
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for index, (part, rows) in enumerate(zip(module.parts, _rows(module), strict=True)):
        columns = slice(index * rank, (index + 1) * rank)
        if np.any(np.delete(B[rows], np.r_[columns], axis=1)):
            raise ValueError(f"{module.name}.lora_B has rank {len(A)} and is not made of {len(module.parts)} blocks")
        parts[part] = A[columns], B[rows, columns]
    return parts


def without_own_patterns(values: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """`adapter_config.json` less the patterns that `patterns` writes; any other is left in place."""
    left = {key: dict(values.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")}
    rank, alpha, power = values.get("r"), values.get("lora_alpha"), 0.5 if values.get("use_rslora") else 1.0
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        return dict(values)
    for module in peft_modules(config):
        parts = len(module.parts)
        own = (parts * rank, alpha * parts**power)
        found = (left["rank_pattern"].get(module.name), left["alpha_pattern"].get(module.name))
        if parts > 1 and all(
            isinstance(x, int | float) and math.isclose(x, y) for x, y in zip(found, own, strict=True)
        ):
            for pattern in left.values():
                del pattern[module.name]
    return {**values, **left}


def _rows(module: PeftModule) -> list[slice]:
    ends = np.cumsum(module.outputs)
    return [slice(int(end - size), int(end)) for end, size in zip(ends, module.outputs, strict=True)]
