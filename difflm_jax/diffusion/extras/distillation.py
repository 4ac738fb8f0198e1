"""Self-distillation: the frozen base, causal and without adapter, teaches the diffusion model made from it.

At a hidden position i of a clean sequence x, the teacher's distribution is the base's p(x_i | x_<i). The loss there is
CE + weight * KL(teacher || model). Teacher and model share the weight arrays, so the teacher costs a forward pass but
no extra weights (OPDLM distils an adapted model in this way).
"""

from typing import Any

import jax
import jax.numpy as jnp

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import NoisyBatch
from difflm_jax.models.transformer import Transformer
from difflm_jax.ops.cross_entropy import Teacher


def teacher_of(model: Transformer, diffusion: DiffusionConfig, params: dict[str, Any], noisy: NoisyBatch) -> Teacher:
    """Returns the base's states [B, L, D] that predict each clean token, and the weights [B, L] of the divergence.

    The weight is 0 at the first token of an example, because nothing precedes it.
    """
    base, rule = model.clone(lora=None, remat="none"), diffusion.causal()
    hidden_BLD = base.apply({"params": params}, noisy.clean, noisy.positions, rule.view(noisy.layout))
    hidden_BLD = jax.lax.stop_gradient(rule.predicting(hidden_BLD))
    return Teacher(hidden_BLD, jnp.where(rule.predictable(noisy.positions), noisy.teacher_weights, 0.0))
