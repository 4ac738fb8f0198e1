"""The block-diffusion objective: equal to what generation sees block by block, and to the base at block length 1."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import CleanBatch, Corruption, corrupt
from difflm_jax.diffusion.extras.settings import Extras
from difflm_jax.diffusion.objective import loss_sums
from difflm_jax.diffusion.weights import LossRule
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.models.transformer import Transformer, head_logits
from tests.tiny import hidden_states, tiny_config, tiny_params

MASK, LENGTH = 96, 14
CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
LORA_CONFIG = LoraConfig(r=4)
LENGTHS, PROMPTS = np.array([14, 11, 13]), np.array([4, 3, 0])


@functools.cache
def random_lora():
    lora = init_lora(jax.random.key(1), PARAMS, LORA_CONFIG, jnp.full(32, 0.3))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(7), x.shape), lora)


def batch():
    position = np.arange(LENGTH)
    rows = CleanBatch.of_rows(
        tokens=np.random.default_rng(0).integers(0, 96, (3, LENGTH)).astype(np.int32),
        lengths=LENGTHS.astype(np.int32),
        answer_mask=(position >= PROMPTS[:, None]) & (position < LENGTHS[:, None]),
        prompt_lengths=PROMPTS.astype(np.int32),
        example_ids=np.arange(3, dtype=np.int32),
        strata=np.arange(3) / 3,
    )
    return jax.tree.map(jnp.asarray, rows)


def rule_of(block, shift):
    return Corruption(
        DiffusionConfig("block", block, shift, MASK), scope="answer", mask_rate="block", loss=LossRule("masked")
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_loss(model, rule, lora, rows):
    return loss_sums(model, {"params": PARAMS, "lora": lora}, rows, jax.random.key(5), rule, 8, train=False)


def nll_where(states_of, model, lora, wanted):
    """Sum of -log p of the clean tokens at `wanted` [(row, position)], from `states_of(row, position)` [D]."""
    total = 0.0
    for row, position in wanted:
        logits = head_logits(CONFIG, PARAMS, lora, MASK, states_of(row, position)).at[MASK].set(-jnp.inf)
        total -= float(jax.nn.log_softmax(logits)[batch().tokens[row, position]])
    return total


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("block", [1, 3, 4, 14])
def test_the_loss_is_what_generation_sees_block_by_block(block, shift):
    """Each block in a canvas of its own: clean text before it, the noisy block, and nothing behind it."""
    model = Transformer(CONFIG, lora=LORA_CONFIG, mask_token_id=MASK)
    lora, rule, rows = random_lora(), rule_of(block, shift), batch()
    loss, sums = run_loss(model, rule, lora, rows)
    noisy = corrupt(jax.random.key(5), rows, rule)
    noisy_tokens, masked = np.asarray(noisy.tokens), np.asarray(noisy.masked)
    assert masked.sum() > 8
    states = functools.partial(hidden_states, model, rule.diffusion, {"params": PARAMS, "lora": lora})
    apply = jax.jit(states)

    @functools.cache
    def canvas_states(row, first):
        tokens, valid = np.array(rows.tokens[row]), np.arange(LENGTH) < min(first + block, LENGTHS[row])
        tokens[first:] = noisy_tokens[row, first:]
        valid = valid[None]
        return apply(tokens[None], valid, PROMPTS[row : row + 1])[0]

    def states_of(row, position):
        first = position - (position - PROMPTS[row]) % block
        return canvas_states(row, first)[position - int(shift)]

    expected = nll_where(states_of, model, lora, np.argwhere(masked))
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(sums.masked_count.sum()) == masked.sum()


def test_block_one_with_the_shift_is_next_token_prediction_of_the_base():
    """Without an adapter, whatever is masked: the loss of a causal language model on the answer tokens."""
    model = Transformer(CONFIG, mask_token_id=MASK)
    rule, rows = rule_of(1, True), batch()
    loss, _ = run_loss(model, rule, {}, rows)
    masked = np.asarray(corrupt(jax.random.key(5), rows, rule).masked)
    valid = np.arange(LENGTH) < LENGTHS[:, None]
    states = hidden_states(model, rule.diffusion.causal(), {"params": PARAMS}, rows.tokens, valid, PROMPTS)
    expected = nll_where(lambda row, position: states[row, position - 1], model, None, np.argwhere(masked))
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_blocks_that_have_grown_train_as_if_they_had_never_been_smaller():
    """At the end of `block_growth_steps` the loss is that of whole blocks, and before it another."""
    model = Transformer(CONFIG, mask_token_id=MASK)
    grows = dataclasses.replace(rule_of(4, True), extras=Extras(block_growth_steps=6))
    whole = float(run_loss(model, rule_of(4, True), {}, batch())[0])
    loss = jax.jit(
        lambda index: loss_sums(
            model, {"params": PARAMS, "lora": {}}, batch(), jax.random.key(5), grows, 8, True, index
        )
    )
    assert float(loss(6)[0]) == pytest.approx(whole, rel=1e-6)
    assert float(loss(0)[0]) != pytest.approx(whole, rel=1e-3)


def test_one_block_without_a_prompt_is_full_attention():
    rows = batch()
    rows = rows.replace(prompt_lengths=jnp.zeros_like(rows.prompt_lengths))
    blocks = rule_of(LENGTH, False)
    full = dataclasses.replace(blocks, diffusion=DiffusionConfig(mask_token_id=MASK), mask_rate="row")
    model = Transformer(CONFIG, mask_token_id=MASK)
    losses = [float(run_loss(model, rule, {}, rows)[0]) for rule in (blocks, full)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_clean_copy_has_a_gradient_of_its_own():
    """The keys of finished blocks are trained too: with their gradient stopped the result would differ."""
    model = Transformer(CONFIG, lora=LORA_CONFIG, mask_token_id=MASK)
    lora, rows, rule = random_lora(), batch(), rule_of(3, False)

    def loss(lora, rows):
        return run_loss(model, rule, lora, rows)[0]

    gradient = jax.jit(jax.grad(loss))(lora, rows)["layers"]["self_attn"]["k_proj"]["lora_A"]
    direction = jax.random.normal(jax.random.key(0), gradient.shape)
    values = []
    for step in (3e-3, -3e-3):
        moved = jax.tree.map(lambda x: x, lora)
        moved["layers"]["self_attn"]["k_proj"]["lora_A"] += step * direction
        values.append(float(loss(moved, rows)))
    assert (values[0] - values[1]) / 6e-3 == pytest.approx(float((gradient * direction).sum()), rel=2e-2)
