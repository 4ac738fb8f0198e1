"""Toy denoisers for sampler tests: small functions of the tokens of a row, in JAX and in torch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from difflm_jax.sampling.batching import row_keys, steps_bucket
from difflm_jax.sampling.loop import Canvas, Carry, Loop, Plan
from difflm_jax.sampling.options import sampling_options
from difflm_jax.sampling.schedule import quotas

VOCABULARY, MASK, EOS = 11, 10, 9


class Rigged:
    """logits = tanh(mix · embedding[tokens]) · head + bias: every position depends on every token.

    `mix=False` ignores the tokens: logits depend only on the position.
    """

    def __init__(self, length: int, seed: int, mix: bool = True, scale: float = 3.0):
        rng = np.random.default_rng(seed)
        self.embedding = rng.normal(size=(VOCABULARY, 6))
        self.mix = rng.normal(size=(length, length)) * (0.7 if mix else 0.0)
        self.head = rng.normal(size=(6, VOCABULARY)) * scale / 2
        self.bias = rng.normal(size=(length, VOCABULARY)) * scale / 2

    def arrays(self):
        return tuple(jnp.asarray(x, jnp.float32) for x in (self.embedding, self.mix, self.head, self.bias))

    def __call__(self, row: torch.Tensor) -> torch.Tensor:
        embedding, mix, head, bias = (torch.tensor(x) for x in (self.embedding, self.mix, self.head, self.bias))
        return torch.tanh(mix @ embedding[row]) @ head + bias


@functools.partial(jax.jit, static_argnames=("plan", "eos"))
def _sampled(arrays, canvas, sampling, plan, eos):
    embedding, mix, head, bias = arrays

    def predict(cache, tokens_BL, turn):
        logits_BLV = jnp.tanh(jnp.einsum("ij,bjd->bid", mix, embedding[tokens_BL], precision="highest"))
        logits_BLV = jnp.einsum("bid,dv->biv", logits_BLV, head, precision="highest") + bias
        active_BT = turn.first[:, None] + jnp.arange(plan.block_length)
        return jnp.take_along_axis(logits_BLV, active_BT[..., None], axis=1), cache, None

    loop = Loop(predict, canvas, plan, sampling, MASK, eos)
    return loop.run(loop.start())


def run(denoiser: Rigged, tokens, plan: Plan, seed=0, eos=(EOS,), fillable=None, **options) -> Carry:
    """Runs the library's sampler on a rigged denoiser. `options` are those of `generate`, by default "probability"."""
    tokens = np.asarray(tokens, np.int32)
    fillable = tokens == MASK if fillable is None else np.asarray(fillable)
    fillable = fillable & (tokens == MASK)
    sampling = sampling_options("full", "probability", options)
    end = plan.first_column + plan.num_blocks * plan.block_length
    answers = fillable[:, plan.first_column : end].reshape(len(tokens), plan.num_blocks, plan.block_length)
    masks = answers.sum(axis=2)
    steps = np.where(masks > 0, plan.steps_per_block, 0).astype(np.int32)
    plan = dataclasses.replace(plan, steps_per_block=steps_bucket(plan.steps_per_block, plan))
    schedule = quotas(sampling.schedule, masks, steps, plan.steps_per_block)
    prompts = np.full(len(tokens), plan.first_column, np.int32)
    canvas = Canvas(tokens, np.ones_like(fillable), fillable, prompts, steps, schedule, row_keys(seed, list(tokens)))
    return _sampled(denoiser.arrays(), jax.tree.map(jnp.asarray, canvas), sampling, plan, eos)


def rows(seed: int, batch: int, prompt: int, answer: int, masked: float = 1.0) -> np.ndarray:
    """Returns random prompts with answers of masks, in which a share of tokens is given (never EOS)."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, EOS, (batch, prompt + answer))
    tokens[:, prompt:][rng.random((batch, answer)) < masked] = MASK
    return tokens
