"""Packed rows train like unpacked ones: same masks, same dropout, same loss and gradient, under every rule."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.data.fields import SHARED_SEGMENT
from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.diffusion.extras.settings import Extras
from difflm_jax.diffusion.objective import loss_sums
from difflm_jax.diffusion.weights import LossRule
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.models.transformer import Transformer
from tests.data.test_batches import batches
from tests.data.test_shared_prefix import with_prefix
from tests.tiny import tiny_config, tiny_params

MASK, LENGTH = 96, 16
CONFIG = tiny_config()
LORA_CONFIG = LoraConfig(r=4, lora_dropout=0.3)
LENGTHS, PROMPTS = np.array([9, 6, 16, 4, 7, 5]), np.array([4, 3, 7, 1, 0, 5])
PACKED = [[2], [0, 4], [1, 3, 5]]  # examples of each row
rule_of = functools.partial(DiffusionConfig, mask_token_id=MASK)
MASKED = LossRule("masked")
RULES = {
    "full": Corruption(rule_of()),
    "full, shift, of rows": Corruption(
        rule_of(logit_shift=True), mask_rate="row", loss=LossRule(weight="inverse_rate")
    ),
    "prefix": Corruption(rule_of("prefix", logit_shift=True), scope="answer", loss=MASKED),
    "prefix, random cut": Corruption(rule_of("prefix"), mask_rate="row"),
    "block": Corruption(rule_of("block", 3, logit_shift=True), scope="answer", mask_rate="block"),
}


def unpacked() -> CleanBatch:
    position = np.arange(LENGTH)
    tokens = np.random.default_rng(0).integers(0, 90, (6, LENGTH)).astype(np.int32)
    answers = (position >= PROMPTS[:, None]) & (position < LENGTHS[:, None])
    ids = np.arange(6) + 40
    return CleanBatch.of_rows(tokens, LENGTHS, answers, PROMPTS, ids, np.arange(6) / 6)


def packed() -> CleanBatch:
    """Three full rows, and three without an example."""
    rows, batch = {name: field for name, field in vars(unpacked()).items() if field is not None}, {}
    del rows["row_lengths"]  # they have several examples
    for name, field in rows.items():
        field = np.asarray(field)
        batch[name] = np.full((6, LENGTH), -1 if name == "example_ids" else 0, field.dtype)
        for row, examples in enumerate(PACKED):
            start = 0
            for number, example in enumerate(examples, start=1):
                end = start + LENGTHS[example]
                batch[name][row, start:end] = number if name == "segments" else field[example, : LENGTHS[example]]
                start = end
    return CleanBatch(**jax.tree.map(jnp.asarray, batch))


SHARED_RULES = {
    "prefix": RULES["prefix"],
    "block": RULES["block"],
    "context": Corruption(rule_of("prefix"), scope="answer", loss=LossRule("masked", "context")),
    "pairs": Corruption(
        rule_of("prefix", logit_shift=True), scope="answer",
        loss=LossRule("masked", average="answers", eos_token_id=7), extras=Extras(complementary=True, distillation=0.5),
    ),
    "policy": Corruption(
        rule_of("block", 3, logit_shift=True), scope="answer", mask_rate="block",
        loss=LossRule("masked", eos_token_id=7), extras=Extras(on_policy=0.7, on_policy_passes=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", SHARED_RULES.values(), ids=SHARED_RULES)
def test_what_all_prompts_begin_with_counts_as_if_it_stood_in_each(rule: Corruption) -> None:
    rows = with_prefix([5, 4, 3, 2, 1, 6], [(2, 5), (4, 4), (3, 7), (2, 3), (5, 0), (3, 6)])
    rows = rows.map(lambda row: {"tokens": [token % 90 for token in row["tokens"]]}, features=rows.features)
    options = {"shuffle": False, "max_length": 26, "length_multiple": 2}
    whole = batches(rows, batch_size=6, batching="rows", **options)[0]
    shared = batches(rows, batch_size=3, batching="shared", **options)[0]
    assert (shared["segments"] == SHARED_SEGMENT).sum() == 3 * 6
    for batch in (whole, shared):  # the place of an example in a step follows from the row that it is in
        batch["strata"] = np.maximum(batch["example_ids"], 0) / np.float32(6)
    dry = dataclasses.replace(LORA_CONFIG, lora_dropout=0.0)  # of a shared token one of several draws would be taken
    assert_same_loss_and_gradient(rule, dry, *(CleanBatch(**{k: v[0] for k, v in b.items()}) for b in (whole, shared)))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_packed_rows_have_the_loss_and_the_gradient_of_unpacked_ones(rule: Corruption) -> None:
    assert_same_loss_and_gradient(rule, LORA_CONFIG, unpacked(), packed())


def assert_same_loss_and_gradient(rule: Corruption, lora_config: LoraConfig, rows: CleanBatch, packed: CleanBatch):
    params = tiny_params(CONFIG)
    lora = init_lora(jax.random.key(1), params, lora_config, jnp.full(32, 0.3))
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(7), x.shape), lora)
    model = Transformer(CONFIG, lora=lora_config, mask_token_id=MASK)

    @jax.jit
    def run(lora, rows):
        def loss(lora):
            return loss_sums(model, {"params": params, "lora": lora}, rows, jax.random.key(5), rule, 8, train=True)

        return jax.value_and_grad(loss, has_aux=True)(lora)

    (loss, sums), gradient = run(lora, rows)
    (packed_loss, packed_sums), packed_gradient = run(lora, packed)
    assert float(sums.masked_count.sum()) > 5
    assert float(packed_loss) == pytest.approx(float(loss), rel=1e-5)
    is_shared = bool((packed.segments == SHARED_SEGMENT).any())
    assert (float(packed_sums.tokens) < float(sums.tokens)) == is_shared  # tokens that are computed
    if is_shared:
        packed_sums = packed_sums.replace(tokens=sums.tokens, work=sums.work, frozen_work=sums.frozen_work)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), packed_sums, sums)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), packed_gradient, gradient)
