"""Adapters created with the real `peft`, for tests that read them."""

from typing import Any

import peft
import torch

from difflm_jax.models.config import ModelConfig
from difflm_jax.models.weights import PROJECTIONS

MASK = 50
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def config_of(model) -> ModelConfig:
    return ModelConfig.from_hf(model.config.to_dict())


def trained_peft(model, **options: Any) -> peft.PeftModel:
    """Returns a `peft` adapter with every factor changed from its initial value, and a mask row unlike the base's."""
    options = {"target_modules": list(PROJECTIONS), "trainable_token_indices": {"embed_tokens": [MASK]}, **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 12, **options}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted.eval()
