"""The modules of Hugging Face's model that PEFT adapts, and how they map to our projections.

Some families fuse several of our projections in one tensor (Phi-3's `qkv_proj`, GLM's `gate_up_proj`). We have a
low-rank update of rank r for each projection; PEFT has one for the module. Our updates of n projections are one update
of rank n r, with A stacked and B block-diagonal, which `rank_pattern` and `alpha_pattern` declare. An update that PEFT
trained has rank r and an A that the projections share.

Routed experts are such modules too, one for gate and up and one for down. They are parameters [X, out, in], and PEFT
wraps one in the other (`target_parameters`). A has shape [X r, in], and B [out, r X] with the expert innermost.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from difflm_jax.models.config import ModelConfig
from difflm_jax.models.lora import LoraConfig, is_adapted, leaf_at
from difflm_jax.models.weights import Row, table

FACTORS = ("lora_A", "lora_B")


@dataclasses.dataclass(frozen=True)
class PeftModule:
    """A module of Hugging Face's model.

    path: within a layer. parts: paths within a stack of our projections in it. outputs: outputs of each part. places:
    (layer, our stack that has it, index in that stack) for every layer with the module.
    experts: number of routed experts, or 0. parameter: the name of their parameter, or "". interleaved: whether the
    outputs of gate and up alternate.
    """

    path: str
    parts: tuple[tuple[str, ...], ...]
    outputs: tuple[int, ...]
    inputs: int
    prefix: str
    places: tuple[tuple[int, str, int], ...]
    experts: int = 0
    parameter: str = ""
    interleaved: bool = False

    @property
    def name(self) -> str:
        """The name in `target_modules` or, for routed experts, in `target_parameters`."""
        return self.parameter or self.path.split(".")[-1]

    @property
    def pattern(self) -> str:
        """The key in `rank_pattern` and `alpha_pattern`."""
        return rf".*\.{self.parameter}" if self.parameter else self.name

    def full_name(self, layer: int) -> str:
        """Returns the name that patterns are matched against."""
        path = f"{self.path.removesuffix('.base_layer')}.{self.parameter}" if self.parameter else self.path
        return f"{self.prefix}.layers.{layer}.{path}"

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for layer, _, _ in self.places)

    def key(self, factor: str, layer: int) -> str:
        """Returns the name of a factor's tensor in an adapter file."""
        return f"base_model.model.{self.prefix}.layers.{layer}.{self.path}.{factor}.weight"

    def shape(self, factor: str, rank: int) -> tuple[int, int]:
        rank *= max(self.experts, 1)
        return (rank, self.inputs) if factor == "lora_A" else (sum(self.outputs), rank)


def peft_modules(config: ModelConfig) -> tuple[PeftModule, ...]:
    """Returns the modules of a model that can be adapted: one for each path and each size that it has in the layers."""
    heads = {stack.name: config.of_stack(stack).head_dim for stack in config.stacks}
    found: dict[tuple[str, int], list[Row]] = {}
    for row in table(config):
        if row.quantisable:
            path = (row.fused or row.hf).removeprefix("model.layers.{layer}.").removesuffix(".weight")
            if row.experts:
                path = config.experts.names.module + ("" if row.path[-2] == "down_proj" else ".base_layer")
            found.setdefault((path, heads[row.path[0]]), []).append(row)
    return tuple(_module(config, path, rows) for (path, _), rows in found.items())


def _module(config: ModelConfig, path: str, rows: list[Row]) -> PeftModule:
    first = [row for row in rows if row.path[0] == rows[0].path[0]]
    places = {(layer, row.path[0], i) for row in rows for i, layer in enumerate(row.layers)}
    parameter = "gate_up_proj" if path.endswith("base_layer") else "down_proj"
    return PeftModule(
        path,
        tuple(row.path[1:-1] for row in first),
        tuple(row.shape[0] for row in first),
        first[0].shape[1],
        config.decoder,
        tuple(sorted(places)),
        first[0].experts,
        parameter if first[0].experts else "",
        bool(first[0].experts) and config.experts.names.stored == "interleaved",
    )


def adapted_modules(config: ModelConfig, lora_config: LoraConfig) -> tuple[PeftModule, ...]:
    """Returns the modules with at least one adapted projection."""
    return tuple(
        module for module in peft_modules(config) if any(is_adapted(part, lora_config) for part in module.parts)
    )


def peft_targets(config: ModelConfig, lora_config: LoraConfig) -> dict[str, list[str]]:
    """Returns `target_modules` and `target_parameters` for an adapter of ours.

    In most models with experts, PEFT 0.21.2 takes `gate_proj`, `up_proj` and `down_proj` in `target_modules` for the
    routed ones, even after a prefix. So those of dense layers and shared experts are named as parameters.
    """
    modules, parameters = set(), set()
    for module in adapted_modules(config, lora_config):
        if module.parameter:
            parameters.add(module.parameter)
        elif config.experts is not None and module.parts[0][0] == "mlp":
            parameters.add(".".join(module.path.split(".")[-2:]) + ".weight")
        else:
            modules.add(module.name)
    named = {"target_modules": sorted(modules), "target_parameters": sorted(parameters)}
    return named if parameters else {"target_modules": sorted(modules)}


def patterns(config: ModelConfig, lora_config: LoraConfig) -> tuple[dict[str, int], dict[str, float]]:
    """Returns (`rank_pattern`, `alpha_pattern`) for an adapter of ours, which keep the scaling of its projections."""
    joined = [module for module in adapted_modules(config, lora_config) if len(module.parts) > 1]
    ranks = {module.pattern: len(module.parts) * lora_config.r for module in joined}
    power = 0.5 if lora_config.use_rslora else 1.0
    alphas = {module.pattern: lora_config.lora_alpha * len(module.parts) ** power for module in joined}
    return ranks, {name: int(alpha) if float(alpha).is_integer() else alpha for name, alpha in alphas.items()}


def to_peft(module: PeftModule, lora: Mapping[str, Any], rank: int, place: tuple[str, int]) -> dict[str, np.ndarray]:
    """Returns the factors of a module by name, from those of its projections at `place` (stack, index) in `lora`."""
    pairs = [_pair(module, lora, part, rank, place) for part in range(len(module.parts))]
    A = np.concatenate([A for A, _ in pairs], axis=-2)
    B = np.zeros((*A.shape[:-2], sum(module.outputs), A.shape[-2]), np.float32)
    for index, (rows, (_, part_B)) in enumerate(zip(_rows(module), pairs, strict=True)):
        B[..., rows, index * rank : (index + 1) * rank] = part_B
    if module.experts:
        A, B = A.reshape(-1, module.inputs), np.moveaxis(B, 0, -1).reshape(sum(module.outputs), -1)
    return dict(zip(FACTORS, map(np.ascontiguousarray, (A, B)), strict=True))


def _pair(module: PeftModule, lora: Mapping[str, Any], part: int, rank: int, place: tuple[str, int]) -> list:
    stack, index = place
    factors = leaf_at(lora, (stack, *module.parts[part]))
    if factors is None:  # only other projections of the module are adapted
        return [np.zeros((rank, module.inputs), np.float32), np.zeros((module.outputs[part], rank), np.float32)]
    return [np.asarray(factors[factor][index], np.float32) for factor in FACTORS]


def from_peft(
    module: PeftModule, A: np.ndarray, B: np.ndarray, rank: int
) -> dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]]:
    """Returns (A, B) of each projection of a module, with an axis of experts first for routed experts.

    If the update has rank `rank`, its A is shared by all projections. Otherwise it must consist of one block of rank
    `rank` per projection. Raises `ValueError` if it does not; for routed experts A is then shared.
    """
    if module.experts:
        A = A.reshape(module.experts, -1, module.inputs)
        B = np.moveaxis(B.reshape(sum(module.outputs), -1, module.experts), -1, 0)
    found = A.shape[-2]
    shared = {part: (A, B[..., rows, :]) for part, rows in zip(module.parts, _rows(module), strict=True)}
    if found == rank:
        return shared
    parts: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {}
    for index, (part, rows) in enumerate(zip(module.parts, _rows(module), strict=True)):
        columns = slice(index * rank, (index + 1) * rank)
        if np.any(np.delete(B[..., rows, :], np.r_[columns], axis=-1)):
            if module.experts:  # PEFT's own adapters of experts have this rank too
                return shared
            raise ValueError(f"{module.name}.lora_B has rank {found} and is not made of {len(module.parts)} blocks")
        parts[part] = A[..., columns, :], B[..., rows, columns]
    return parts


def without_own_patterns(values: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns `adapter_config.json` without the patterns that `patterns` writes; other patterns are kept."""
    left = {key: dict(values.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")}
    rank, alpha, power = values.get("r"), values.get("lora_alpha"), 0.5 if values.get("use_rslora") else 1.0
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        return dict(values)
    for module in peft_modules(config):
        parts = len(module.parts)
        own = (parts * rank, alpha * parts**power)
        found = (left["rank_pattern"].get(module.pattern), left["alpha_pattern"].get(module.pattern))
        if parts > 1 and all(
            isinstance(x, int | float) and math.isclose(x, y) for x, y in zip(found, own, strict=True)
        ):
            for pattern in left.values():
                del pattern[module.pattern]
    return {**values, **left}


def _rows(module: PeftModule) -> list[slice]:
    """Returns the slice of each projection in the outputs of the module."""
    if module.interleaved and len(module.parts) > 1:
        return [slice(index, None, len(module.parts)) for index in range(len(module.parts))]
    ends = np.cumsum(module.outputs)
    return [slice(int(end - size), int(end)) for end, size in zip(ends, module.outputs, strict=True)]
