"""Models as the sampler sees them: `predict(tokens, start) -> logits` of the active block, with or without a cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from difflm_jax.diffusion.objective import predicting_states
from difflm_jax.diffusion.sampler import Carry, Plan, Predict, sample
from difflm_jax.mesh import over_rows
from difflm_jax.models.attention import positions_of
from difflm_jax.models.transformer import Transformer, head_logits

Variables = dict[str, Any]  # {"params": ..., "lora": ...}

# Rules under which the keys and values of a prompt do not depend on what follows it.
PROMPT_CACHE_RULES = ("prefix", "causal")


@functools.partial(jax.jit, static_argnames=("model", "logit_shift", "plan", "eos_token_ids", "mesh"))
def generate(
    model: Transformer,
    variables: Variables,
    logit_shift: bool,
    plan: Plan,
    eos_token_ids: tuple[int, ...],
    tokens_BL: jax.Array,
    valid_BL: jax.Array,
    fillable_BL: jax.Array,
    prompt_lengths_B: jax.Array,
    keys_B: jax.Array,
    mesh: Mesh | None = None,
) -> Carry:
    """Fills a canvas; the prompt's keys and values are computed once where the attention rule allows it.

    `mesh` is that over which `variables` are divided; it divides the rows.
    """

    def fill(variables, tokens_BL, valid_BL, fillable_BL, prompt_lengths_B, keys_B) -> Carry:
        canvas = (tokens_BL, valid_BL, positions_of(valid_BL), prompt_lengths_B)
        cached = model.attention in PROMPT_CACHE_RULES and plan.first_column > logit_shift
        make = _prompt_cached_predict if cached else _whole_canvas_predict
        predict = make(model, variables, logit_shift, plan, *canvas)
        return sample(predict, tokens_BL, fillable_BL, keys_B, plan, model.mask_token_id, eos_token_ids)

    return over_rows(fill, mesh, variables, tokens_BL, valid_BL, fillable_BL, prompt_lengths_B, keys_B)


def _whole_canvas_predict(
    model: Transformer,
    variables: Variables,
    logit_shift: bool,
    plan: Plan,
    _tokens_BL: jax.Array,
    valid_BL: jax.Array,
    positions_BL: jax.Array,
    prompt_lengths_B: jax.Array,
) -> Predict:
    """Every forward pass runs over every column."""

    def predict(tokens_BL: jax.Array, start: jax.Array) -> jax.Array:
        hidden_BLD = model.apply(variables, tokens_BL, positions_BL, valid_BL, prompt_lengths_B)
        hidden_BLD = predicting_states(hidden_BLD, logit_shift)
        return _block_logits(model, variables, hidden_BLD, start, plan.block_length)

    return predict


def _prompt_cached_predict(
    model: Transformer,
    variables: Variables,
    logit_shift: bool,
    plan: Plan,
    tokens_BL: jax.Array,
    valid_BL: jax.Array,
    positions_BL: jax.Array,
    prompt_lengths_B: jax.Array,
) -> Predict:
    """The prompt runs once; a pass runs over the answer and, with the shift, the last token of the prompt."""
    cut = plan.first_column - int(logit_shift)
    _, cache = model.apply(
        variables, tokens_BL[:, :cut], positions_BL[:, :cut], valid_BL[:, :cut], prompt_lengths_B, mutable=["cache"]
    )
    answer_columns = plan.num_blocks * plan.block_length

    def predict(tokens_BL: jax.Array, start: jax.Array) -> jax.Array:
        hidden_BTD = model.apply(
            {**variables, **cache},
            tokens_BL[:, cut:],
            positions_BL[:, cut:],
            valid_BL[:, cut:],
            prompt_lengths_B,
            cached_positions_BP=positions_BL[:, :cut],
            cached_valid_BP=valid_BL[:, :cut],
        )
        # With the shift the window begins one column early: state i of it predicts column i of the answer either way.
        return _block_logits(
            model, variables, hidden_BTD[:, :answer_columns], start - plan.first_column, plan.block_length
        )

    return predict


def _block_logits(
    model: Transformer, variables: Variables, hidden_BLD: jax.Array, start: jax.Array, block_length: int
) -> jax.Array:
    block_BTD = jax.lax.dynamic_slice_in_dim(hidden_BLD, start, block_length, axis=1)
    return head_logits(model.config, variables["params"], variables.get("lora"), model.mask_token_id, block_BTD)


def row_sampling_keys(seed: int, prompts: list[tuple[int, ...]]) -> jax.Array:
    """One key a row from `seed` and the number of earlier rows with the same prompt.

    So a row alone and the same row in any batch draw the same noise, while copies of a prompt differ.
    """
    seen: dict[tuple[int, ...], int] = {}
    copies = []
    for prompt in prompts:
        copies.append(seen.get(prompt, 0))
        seen[prompt] = copies[-1] + 1
    key = jax.random.key(seed)
    return jax.vmap(lambda copy: jax.random.fold_in(key, copy))(jnp.asarray(np.array(copies, np.uint32)))
