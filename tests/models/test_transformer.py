"""Properties of the model for any weights: visibility, remat, the cache, the mask row, LoRA."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax import models
from difflm_jax.diffusion.config import DiffusionConfig, Layout
from difflm_jax.models.attention import Window, positions_of
from difflm_jax.models.lora import LoraConfig, init_lora, merge_lora
from difflm_jax.models.transformer import Transformer, head_logits
from difflm_jax.ops.random import token_seeds
from tests.tiny import hidden_states, tiny_config, tiny_params

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
MASK = 96
VALID = np.ones((2, 12), bool)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))
PROMPTS = np.array([5, 3])


apply = jax.jit(hidden_states, static_argnums=(0, 1))


def rule_of(rule):
    return DiffusionConfig(rule, 3 if rule == "block" else 0)


def hidden(rule="full", tokens=TOKENS, valid=VALID, prompts=PROMPTS, lora=None, lora_config=None, **options):
    model = Transformer(CONFIG, lora=lora_config, mask_token_id=MASK, **options)
    variables = {"params": PARAMS} if lora is None else {"params": PARAMS, "lora": lora}
    return np.asarray(apply(model, rule_of(rule), variables, tokens, valid, prompts))


def random_lora(config, seed=1):
    lora = init_lora(jax.random.key(seed), PARAMS, config, jnp.full(32, 0.3))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(7), x.shape), lora)


def influences(rule: str) -> np.ndarray:
    """[query, key] bool for row 0: does changing the token at `key` change the state at `query`?"""
    before = hidden(rule)[0]
    seen = np.zeros((12, 12), bool)
    for key in range(12):
        changed = TOKENS.copy()
        changed[0, key] = (changed[0, key] + 1) % 96
        seen[:, key] = np.abs(hidden(rule, changed)[0] - before).max(axis=-1) > 1e-6
    return seen


def test_full_attention_lets_every_token_see_every_token():
    assert influences("full").all()


def test_causal_attention_sees_no_later_token():
    assert (influences("causal") == np.tril(np.ones((12, 12), bool))).all()


def test_prefix_prompt_is_causal_and_answer_sees_everything():
    expected = np.tril(np.ones((12, 12), bool))
    expected[5:] = True
    assert (influences("prefix") == expected).all()


def test_block_answer_sees_its_own_block_and_what_precedes_it():
    expected = np.tril(np.ones((12, 12), bool))
    for first in (5, 8, 11):  # row 0 has a prompt of 5
        expected[first : first + 3, first : first + 3] = True
    assert (influences("block") == expected).all()


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="attention rule 'window'"):
        hidden("window")


@pytest.mark.parametrize("rule", ["full", "prefix", "block", "causal"])
def test_padding_changes_nothing_on_either_side(rule):
    alone = hidden(rule)
    for before, after in ((4, 0), (0, 4), (3, 2)):
        tokens = np.pad(TOKENS, ((0, 0), (before, after)), constant_values=11)
        valid = np.pad(VALID, ((0, 0), (before, after)), constant_values=False)
        padded = hidden(rule, tokens, valid)
        np.testing.assert_allclose(padded[:, before : before + 12], alone, atol=1e-5, rtol=2e-5)


def test_a_row_of_padding_alone_is_finite():
    assert np.isfinite(hidden(valid=np.array([[True] * 12, [False] * 12]))).all()


@pytest.mark.parametrize(
    ("remat", "unroll"),
    [("save_dots", False), ("save_attention", False), ("full", False), ("none", True), ("full", True)],
)
def test_neither_remat_nor_unrolling_changes_value_or_gradient(remat, unroll):
    config = LoraConfig(r=4)
    lora = random_lora(config)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def loss(lora, name, unroll):
        model = Transformer(CONFIG, lora=config, mask_token_id=MASK, remat=name, unroll=unroll)
        out = hidden_states(model, rule_of("full"), {"params": PARAMS, "lora": lora}, TOKENS, VALID, PROMPTS)
        return (out * out[::-1]).sum()

    value, gradient = jax.value_and_grad(loss)(lora, "none", False)
    other_value, other_gradient = jax.value_and_grad(loss)(lora, remat, unroll)
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, other_gradient)


def cached_states(rule, filled, start, written_from, mutable=False):
    """Returns the states of columns from `start` on; the cache has the first `filled` columns, padded to the canvas."""
    whole, model = Layout(positions_of(VALID), jnp.asarray(VALID), np.array([5, 5])), Transformer(CONFIG)
    part = whole.part(0, filled)
    view = rule_of(rule).view(part)
    _, cache = model.apply({"params": PARAMS}, TOKENS[:, :filled], part.positions, view, mutable=["cache"])
    cache = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, 12 - filled), (0, 0), (0, 0)]), cache)
    part, window = whole.part(start, 12 - start), Window(start, written_from)
    arguments = (TOKENS[:, start:], part.positions, rule_of(rule).view(part, whole), None, window)
    return model.apply({"params": PARAMS, **cache}, *arguments, mutable=["cache"] if mutable else False)


@pytest.mark.parametrize(("rule", "filled"), [("prefix", 5), ("causal", 5), ("causal", 9), ("block", 5), ("block", 8)])
def test_a_cache_of_what_sees_nothing_later_equals_the_whole_forward(rule, filled):
    whole = hidden(rule, prompts=np.array([5, 5]))
    np.testing.assert_allclose(cached_states(rule, filled, filled, filled), whole[:, filled:], atol=1e-5, rtol=2e-5)


def test_columns_before_the_written_ones_use_the_keys_that_are_cached():
    """A window may begin one column early for the logit shift without changing the keys of that column."""
    states, updated = cached_states("prefix", 5, 4, 5, mutable=True)
    np.testing.assert_allclose(states, hidden("prefix", prompts=np.array([5, 5]))[:, 4:], atol=1e-5, rtol=2e-5)
    _, spoilt = cached_states("prefix", 4, 4, 5, mutable=True)  # column 4 was never run: its zeros must stay
    key = spoilt["cache"]["layers"]["self_attn"]["k"]
    assert not np.asarray(key)[:, :, 4].any()
    assert np.asarray(updated["cache"]["layers"]["self_attn"]["k"])[:, :, 4:].all()


def test_fresh_lora_is_the_base_except_for_the_mask_row():
    config = LoraConfig(r=4)
    lora = init_lora(jax.random.key(1), PARAMS, config, jnp.full(32, 0.3))
    np.testing.assert_array_equal(hidden(lora=lora, lora_config=config), hidden())
    masked = TOKENS.copy()
    masked[0, 2] = MASK
    assert np.abs(hidden(lora=lora, lora_config=config, tokens=masked) - hidden(tokens=masked)).max() > 1e-3


@pytest.mark.parametrize("targets", [("q_proj",), ("v_proj", "down_proj"), LoraConfig().target_modules])
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_give_the_same_states(targets, rslora):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora)
    lora = random_lora(config)
    tokens = TOKENS.copy()
    tokens[:, 4] = MASK
    merged = merge_lora(PARAMS, lora, config, MASK)
    model = Transformer(CONFIG, mask_token_id=MASK)
    expected = hidden(lora=lora, lora_config=config, tokens=tokens)
    got = hidden_states(model, rule_of("full"), {"params": merged}, tokens, VALID, PROMPTS)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
    logits = head_logits(CONFIG, PARAMS, lora, MASK, expected)
    np.testing.assert_allclose(head_logits(CONFIG, merged, None, MASK, got), logits, atol=1e-3, rtol=1e-3)


def test_lora_of_a_module_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match="the model has no w_proj"):
        init_lora(jax.random.key(0), PARAMS, LoraConfig(target_modules=("q_proj", "w_proj")), jnp.zeros(32))


def test_dropout_of_a_row_depends_on_its_seeds_alone():
    config = LoraConfig(r=4, lora_dropout=0.5)
    lora = random_lora(config)
    model = Transformer(CONFIG, lora=config, mask_token_id=MASK)

    def states(rows, width):
        tokens = np.pad(TOKENS[rows], ((0, 0), (0, width - 12)))
        valid = np.pad(VALID[rows], ((0, 0), (0, width - 12)))
        ids, positions = jnp.broadcast_arrays(jnp.array(rows)[:, None], positions_of(valid))
        seeds = token_seeds(jax.random.key(0), ids, positions)
        variables = {"params": PARAMS, "lora": lora}
        out = apply(model, rule_of("full"), variables, tokens, valid, PROMPTS[rows], seeds)
        return np.asarray(out[:, :12])

    both = states([0, 1], 12)
    np.testing.assert_allclose(both[1:], states([1], 12), atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(both, states([0, 1], 16), atol=1e-5, rtol=1e-4)
    assert np.abs(both - hidden(lora=lora, lora_config=config)).max() > 1e-2


@pytest.mark.usefixtures("optimised")
def test_on_a_cpu_a_bfloat16_base_is_neither_copied_to_float32_nor_changed():
    """Without `on_cpu` XLA makes a float32 copy of every stack of weights before the loop over layers."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_params(CONFIG))
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    arguments = (tokens, jnp.ones((1, 6), bool), jnp.array([2]))

    def hidden(on_cpu):
        model = Transformer(CONFIG, dtype=jnp.bfloat16, on_cpu=on_cpu)
        states = functools.partial(hidden_states, model, rule_of("prefix"))
        compiled = jax.jit(lambda params: states({"params": params}, *arguments)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    (plain, plain_bytes), (found, found_bytes) = hidden(False), hidden(True)
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(plain, np.float32), atol=3e-2)
    stacks = sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim > 2)
    assert found_bytes < plain_bytes - stacks / 2


def test_the_models_know_nothing_of_diffusion():
    """Masks, prompts and blocks are those of `diffusion.config`; the transformer takes a view."""
    folder = Path(models.__file__).parent
    words = re.compile("diffusion|prompt|noisy|denois|corrupt|block_length", re.IGNORECASE)
    lines = [(path.name, line) for path in folder.glob("*.py") for line in path.read_text().splitlines()]
    refused = re.compile('"diffusion_gemma(_text)?"')  # third-party kinds that are refused by name
    told = [(name, line) for name, line in lines if name != "__init__.py" and words.search(refused.sub("", line))]
    assert not told
