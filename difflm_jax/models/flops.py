"""Floating-point operations of forward passes and training steps, and their share of the hardware's peak (MFU)."""

import math

import jax
from flax import struct

from difflm_jax.models.config import ModelConfig
from difflm_jax.models.lora import LoraConfig, is_adapted
from difflm_jax.models.weights import table

# Dense bfloat16 peak of one device in FLOP/s, by prefix of jax's `device_kind`. Source: the vendors' data sheets
# (cloud.google.com/tpu/docs, NVIDIA's architecture white papers; figures "with sparsity" halved). A TPU v2 or v3
# device is one of the two cores of a chip.
_PEAK = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v4 lite": 138e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


@struct.dataclass
class Work:
    """The amount of work of a pass, as numbers or as float32 scalars of a step.

    tokens: tokens that pass through the layers.
    pairs: pairs of a query and a key in the attention of one layer.
    scored: tokens whose logits are computed.
    """

    tokens: float | jax.Array
    pairs: float | jax.Array
    scored: float | jax.Array


def forward_flops(config: ModelConfig, lora: LoraConfig | None, work: Work) -> float:
    """Counts the FLOPs of the matmuls of a forward pass: layers and output head. Element-wise work is not counted."""
    base, adapted = _weights(config, lora)
    layers = 2 * (base + adapted) * work.tokens + 4 * _attention(config) * work.pairs
    return float(layers + 2 * config.hidden_size * config.vocab_size * work.scored)


def train_flops(config: ModelConfig, lora: LoraConfig | None, work: Work, remat: str = "none") -> float:
    """Counts the FLOPs of the matmuls of a training step, forward and backward.

    P is the number of weights in the projections of all layers, P_lora in the factors. There are N layers, H heads of
    size E, and an output head of D x V:

        forward of the layers   F = (2 P + 2 P_lora) tokens + 4 N H E pairs   (two matmuls per pair in attention)
        backward                (2 P + 4 P_lora) tokens + 8 N H E pairs       (the frozen base needs no weight gradient)
        output head             4 D V scored                                  (logits, and their gradient to the states)
        remat                   "full": F again; "save_attention": F again without attention

    Without `lora` every weight is trained: backward 4 P tokens + 8 N H E pairs, and 6 D V for the head.

    This is the count of Kaplan et al. (arXiv:2001.08361, section 2.1: 2 FLOPs per weight and token forward, 4
    backward), without the weight gradients of frozen weights. The mask row counts as trained, so the backward pass
    reaches the first layer for all target modules. Use remat "none" for model FLOPs as PaLM defines them
    (arXiv:2204.02311, appendix B).
    """
    base, adapted = _weights(config, lora)
    attention = _attention(config) * work.pairs
    products = 2 * (base + adapted) * work.tokens
    again = {"full": products + 4 * attention, "save_attention": products}.get(remat, 0)
    weight_gradients = 2 if lora is None else 0  # per weight of the base
    backward = ((2 + weight_gradients) * base + 4 * adapted) * work.tokens + 8 * attention
    head = (4 + weight_gradients) * config.hidden_size * config.vocab_size * work.scored
    return float(products + 4 * attention + again + backward + head)


def train_flops_per_token(config: ModelConfig, length: int, lora: LoraConfig | None) -> float:
    """Returns `train_flops` per token for rows of `length`, with all pairs of a row and the logits of every token."""
    return train_flops(config, lora, Work(1, length, 1))


def _weights(config: ModelConfig, lora: LoraConfig | None) -> tuple[int, int]:
    """Counts the weights of the projections that a token passes through, and those of their low-rank factors."""
    base = adapted = 0
    for row in table(config):
        if row.quantisable:
            count = len(row.layers) * (config.experts.per_token if row.experts else 1)
            base += count * row.shape[0] * row.shape[1]
            if lora is not None and is_adapted(row.path[:-1], lora):
                adapted += count * lora.r * (row.shape[0] + row.shape[1])
    return base, adapted


def parameters(config: ModelConfig) -> tuple[int, int]:
    """Counts (all weights of a model, active weights). Experts that a token is not routed to are not active."""
    total = active = 0
    for row in table(config):
        size = math.prod(row.shape)
        total += size * math.prod(row.stack)
        active += size * len(row.layers or (0,)) * (config.experts.per_token if row.experts else 1)
    return total, active


def _attention(config: ModelConfig) -> int:
    return sum(len(stack.layers) * config.num_heads * config.of_stack(stack).head_dim for stack in config.stacks)


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 FLOP/s of one device of jax's `device_kind`; None if unknown (such as a CPU)."""
    known = [kind for kind in _PEAK if device_kind == kind or device_kind.startswith((f"{kind} ", f"{kind}-"))]
    return _PEAK[max(known, key=len)] if known else None


def mfu(flops_per_second: float, device_kind: str, num_devices: int) -> float | None:
    """Returns `flops_per_second` as a share of the bfloat16 peak of `num_devices`; None if the peak is unknown."""
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_second / (peak * num_devices)
