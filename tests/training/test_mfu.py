"""The work that `mfu` counts, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.data.fields import SHARED_SEGMENT
from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.diffusion.extras.settings import Extras
from difflm_jax.diffusion.lossless import Draft
from difflm_jax.diffusion.objective import LossSums, loss_sums
from difflm_jax.diffusion.segments import work_of_examples
from difflm_jax.models.flops import Work
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.models.transformer import Transformer
from difflm_jax.training.meter import Throughput
from tests.tiny import tiny_config, tiny_params

MASK = 96
CONFIG = tiny_config()
LORA = LoraConfig(r=4, target_modules=("q_proj",))
MODEL = Transformer(CONFIG, lora=LORA, mask_token_id=MASK)
LENGTHS, PROMPTS = np.array([5, 3], np.int32), np.array([2, 1], np.int32)  # 3 + 2 tokens of answers


def rows(width: int) -> CleanBatch:
    position = np.arange(width)
    return CleanBatch.of_rows(
        tokens=jnp.ones((2, width), jnp.int32),
        lengths=LENGTHS,
        answer_mask=(position >= PROMPTS[:, None]) & (position < LENGTHS[:, None]),
        prompt_lengths=PROMPTS,
        example_ids=np.arange(2, dtype=np.int32),
        strata=np.arange(2) / 2,
    )


def sums_of(corruption: Corruption, width: int = 8) -> LossSums:
    params = tiny_params(CONFIG)
    variables = {"params": params, "lora": init_lora(jax.random.key(1), params, LORA, jnp.zeros(CONFIG.hidden_size))}

    @jax.jit  # only the work is asked for, so XLA drops the model
    def work(batch):
        sums = loss_sums(MODEL, variables, batch, jax.random.key(0), corruption, 8, train=False)[1]
        return sums.work, sums.frozen_work

    work, frozen_work = jax.tree.map(float, work(rows(width)))
    return LossSums(*6 * [0.0], work, frozen_work)


def rule(diffusion: DiffusionConfig, **extras) -> Corruption:
    return Corruption(diffusion, scope="answer", extras=Extras(**extras))


FULL, BLOCK = DiffusionConfig("full", mask_token_id=MASK), DiffusionConfig("block", 2, mask_token_id=MASK)
ONCE, NOTHING = Work(8, 5**2 + 3**2, 0), Work(0, 0, 0)


@pytest.mark.parametrize(
    ("corruption", "work", "frozen_work"),
    [
        (rule(FULL), Work(8, 5**2 + 3**2, 3 + 2), NOTHING),
        (rule(BLOCK), Work(16, 10**2 + 6**2, 3 + 2), NOTHING),
        (rule(FULL, complementary=True), Work(16, 2 * (5**2 + 3**2), 2 * (3 + 2)), NOTHING),
        (rule(FULL, distillation=1.0), Work(8, 5**2 + 3**2, 3 + 2), ONCE),
    ],
    ids=["full", "noisy and clean copy", "complementary pairs", "teacher"],
)
def test_mfu_counted_the_head_at_every_token_and_attention_at_max_length(corruption, work, frozen_work):
    sums = sums_of(corruption)
    assert (sums.work, sums.frozen_work) == (work, frozen_work)


def test_mfu_rose_with_padding():
    assert sums_of(rule(FULL), 8) == sums_of(rule(FULL), 64)


def test_mfu_of_a_draft_counts_noise_rows_and_the_clean_copy():
    draft = Draft(rows=1, curriculum=(1,), anchors=8)
    sums = sums_of(Corruption(FULL, scope="answer", draft=draft))
    # An anchor precedes an answer token and one more: columns 1 and 2 of the first row, column 0 of the second.
    assert sums.work == Work(3, (2 + 1) + (3 + 1) + (1 + 1), 3)
    assert sums.frozen_work == ONCE


def test_mfu_counts_a_shared_beginning_once():
    segments = jnp.array([[SHARED_SEGMENT] * 2 + [1] * 3 + [2] * 2 + [0]])  # examples of 5 and 4 tokens
    lengths = jnp.array([[5] * 5 + [4] * 2 + [0]])
    assert jax.tree.map(float, work_of_examples(segments, lengths)) == Work(7, 2 * 2 + 3 * 5 + 2 * 4, 0)


def test_flops_of_a_step_by_hand():
    d, f, v, n = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.vocab_size, CONFIG.num_layers
    q, kv = CONFIG.num_heads * CONFIG.head_dim, CONFIG.num_kv_heads * CONFIG.head_dim
    base, adapted = n * (2 * d * q + 2 * d * kv + 3 * d * f), n * 4 * (d + q)
    trained = (4 * base + 6 * adapted) * 8 + 12 * n * q * 34 + 4 * d * v * 5
    teacher = 2 * base * 8 + 4 * n * q * 34
    assert Throughput(MODEL, 1).flops(sums_of(rule(FULL, distillation=1.0))) == trained + teacher


def test_mfu_is_flops_by_the_peak_of_all_devices(monkeypatch):
    monkeypatch.setattr(
        "difflm_jax.training.meter.jax.devices", lambda: [type("H100", (), {"device_kind": "NVIDIA H100"})]
    )
    assert Throughput(MODEL, 4).fields(10.0, 989e12) == {"tokens_per_second": 10.0, "mfu": pytest.approx(0.25)}
