"""The draft objective: its loss equals that of draft passes, and a trained adapter decodes its base's text."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import difflm_jax
from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.diffusion.lossless import Draft, _noise, noise_rows
from difflm_jax.diffusion.objective import loss_sums
from difflm_jax.models.attention import View
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.models.transformer import Transformer, head_logits
from difflm_jax.train import command
from difflm_jax.training.metrics import read_metrics
from tests.tiny import tiny_config, tiny_params
from tests.tiny_run import make_model, make_rows, results, train_arguments

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
LORA_CONFIG = LoraConfig(r=4)
LENGTH, MASK = 14, 96
DIFFUSION = DiffusionConfig("causal", 0, True, MASK, gated=True, noise="uniform", draft_length=3)


@pytest.fixture(scope="module")
def lora():
    fresh = init_lora(jax.random.key(1), PARAMS, LORA_CONFIG, None)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(7), x.shape), fresh)


def batch():
    position, prompts, lengths = np.arange(LENGTH), np.array([4, 3]), np.array([14, 11])
    rows = CleanBatch.of_rows(
        tokens=np.random.default_rng(0).integers(0, 96, (2, LENGTH)).astype(np.int32),
        lengths=lengths.astype(np.int32),
        answer_mask=(position >= prompts[:, None]) & (position < lengths[:, None]),
        prompt_lengths=prompts.astype(np.int32),
        example_ids=np.arange(2, dtype=np.int32),
        strata=np.arange(2) / 2,
    )
    return jax.tree.map(jnp.asarray, rows)


def draft_pass(lora, tokens, noise):
    """float32 logits of noise rows after `tokens`, in one causal pass without any cache."""
    row = jnp.concatenate([tokens, noise])[None]
    position = jnp.arange(row.shape[1])[None]
    view = View(position[:, None, :] <= position[:, :, None], position, position)
    hidden = Transformer(CONFIG, lora=LORA_CONFIG).apply(
        {"params": PARAMS, "lora": lora}, row, position, view, gate_BT=position >= len(tokens)
    )
    logits = head_logits(CONFIG, PARAMS, None, None, hidden[0, len(tokens) :])
    return logits.at[:, MASK].set(-jnp.inf)


def test_the_loss_is_that_of_draft_passes(lora):
    """Every noise row of a step, against a pass of its own over the tokens before it; and what is accepted of it."""
    draft = Draft(rows=3, curriculum=(3,), anchors=2)
    corruption = Corruption(DIFFUSION, scope="answer", draft=draft)
    key, rows = jax.random.key(5), batch()
    model = Transformer(CONFIG, lora=LORA_CONFIG)
    loss, sums = loss_sums(model, {"params": PARAMS, "lora": lora}, rows, key, corruption, 8, train=True)
    placed = noise_rows(rows, "answer", draft, key, 0, train=True)
    noise = _noise(placed, rows, draft, DIFFUSION, key, CONFIG.vocab_size)
    assert placed.valid.sum() > 6
    expected, accepted = 0.0, 0
    for b in range(2):
        for anchor in range(2):
            own = placed.anchors == anchor
            column, valid = int(placed.columns[b][own][0]), placed.valid[b][own]
            logits = draft_pass(lora, rows.tokens[b, : column + 1], noise[b][own])
            assert rows.answer_mask[b, column + 1]
            right = True
            for depth in range(1, int(valid.sum()) + 1):
                target = rows.tokens[b, column + depth + 1]
                expected -= 0.8 ** (depth - 1) * jax.nn.log_softmax(logits[depth - 1])[target]
                right &= bool(logits[depth - 1].argmax() == target)
                accepted += right
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert sums.masked_correct.sum() == accepted


@pytest.mark.parametrize("kind", ["kl", "tv"])
def test_a_draft_like_the_base_has_no_divergence(kind):
    """Without an update and with the true tokens for noise the rows are the base's own."""
    draft = Draft(rows=2, curriculum=(2,), anchors=3, loss=kind)
    corruption = Corruption(DIFFUSION, scope="answer", draft=draft)
    lora = init_lora(jax.random.key(1), PARAMS, LORA_CONFIG, None)
    rows, key = batch(), jax.random.key(2)
    model = Transformer(CONFIG, lora=LORA_CONFIG)

    def loss(tokens):
        return loss_sums(
            model, {"params": PARAMS, "lora": lora}, rows.replace(tokens=tokens), key, corruption, 8, train=False
        )[0]

    constant = jnp.full_like(rows.tokens, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("difflm_jax.diffusion.lossless._noise", lambda placed, *_: jnp.full(placed.valid.shape, 5))
        assert abs(float(loss(constant))) < 1e-4
    assert float(loss(rows.tokens)) > 0.1


def test_the_curriculum_spreads_over_the_steps():
    draft = dataclasses.replace(Draft(rows=4, curriculum=(2, 4)), steps=10)
    assert [int(draft.rows_at(step)) for step in (0, 4, 5, 9, 12)] == [2, 2, 4, 4, 4]


def test_a_run_leaves_an_adapter_that_drafts_for_its_base(tmp_path, capfd):
    """Regenerates, trains, resumes to the bit, reports, exports; and the text is the base's."""
    arguments = train_arguments(make_model(tmp_path / "model"), make_rows(tmp_path / "rows.jsonl"), tmp_path)
    arguments = [a for a in arguments if not a.startswith(("--config.attention", "--config.logit_shift"))]
    arguments += [
        "--config.objective=draft", "--config.phases=sft", "--config.train_mask_row=false", "--config.draft.rows=3",
        "--config.draft.curriculum=1,3", "--config.draft.answer_tokens=12", "--config.learning_rate=0.01",
        "--config.gradient_accumulation_steps=1", "--config.loss_tokens=all", "--config.mask_rate=batch",
    ]  # fmt: skip
    assert command(arguments) == 0
    run = tmp_path / "run"
    answers = [json.loads(line) for line in (run / "answers" / "sft.jsonl").read_text().splitlines()]
    assert len(answers) == 24 and all(len(answer["answer"]) <= 12 for answer in answers)
    evaluations = [record for record in read_metrics(run) if "eval_accepted" in record]
    assert evaluations[-1]["eval_tokens_per_cycle"] == 2 + sum(evaluations[-1]["eval_accepted_by_depth"])

    lm = difflm_jax.load(tmp_path / "model", adapter=run / "sft_model", dtype="float32")
    assert lm.diffusion.gated and lm.diffusion.draft_length == 3 and "mask_row" not in lm.lora
    out, base = (x.generate(["7+1", "20+1"], max_new_tokens=20) for x in (lm, lm.base()))
    assert [row.tolist() for row in out.tokens] == [row.tolist() for row in base.tokens]

    whole = results(run)
    shutil.rmtree(run / "sft_model")
    steps = sorted(int(path.name) for path in (run / "checkpoints" / "sft").iterdir() if path.name.isdigit())
    shutil.rmtree(run / "checkpoints" / "sft" / str(steps[-1]))
    capfd.readouterr()
    assert command(arguments) == 0
    printed = capfd.readouterr().out
    assert "answers: 24 found" in printed and f"from step {steps[-2]}" in printed
    assert results(run) == whole
