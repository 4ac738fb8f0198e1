"""verify=base: a converted model drafts blocks by diffusion, and the text is that of its causal base."""

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import difflm_jax
from difflm_jax import UserError
from difflm_jax.generate import command
from difflm_jax.models.lora import LoraConfig, init_lora
from tests.tiny_checkpoint import save_tiny_model

PROMPTS = [[5, 9, 200, 31, 7], [66], [12, 13, 12, 13, 12, 13, 12], [101, 102, 103, 104, 105, 106, 107, 108, 109]]
RULES = {
    "prefix": {"attention": "prefix", "logit_shift": True},
    "prefix, no shift": {"attention": "prefix", "logit_shift": False},
    "block": {"attention": "block", "logit_shift": True, "block_length": 4},
    "full": {"attention": "full"},
    "causal": {"causal": True},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def converted(model_dir, rule):
    """A model with a random adapter and mask row, whose drafts are its base's choice now and then."""
    lm = difflm_jax.load(model_dir, dtype="float32", **RULES[rule])
    config = LoraConfig(r=4)
    lora = init_lora(jax.random.key(0), lm.params, config, lm.params["embed_tokens"]["weight"].mean(axis=0))
    lora = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(1), x.shape), lora)
    return lm.with_adapter(lora, config)


def greedy(model_dir, prompts, tokens):
    """transformers' greedy decoding."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    given = {"max_new_tokens": tokens, "do_sample": False}
    rows = [(len(row), torch.tensor([row])) for row in prompts]
    return [model.generate(x, attention_mask=torch.ones_like(x), **given)[0, n:].tolist() for n, x in rows]


def tokens_of(generation):
    return [row.tolist() for row in generation.tokens]


@pytest.mark.parametrize(
    ("rule", "tokens", "options"),
    [
        ("prefix", 24, {}),
        ("prefix, no shift", 7, {"draft_length": 3, "draft_passes": 2}),
        ("block", 24, {"draft_passes": 4}),
        ("block", 1, {}),
    ],
)
def test_the_text_is_transformers_greedy(model_dir, rule, tokens, options):
    lm, expected = converted(model_dir, rule), greedy(model_dir, PROMPTS, tokens)
    together = lm.generate(PROMPTS, max_new_tokens=tokens, verify="base", batch_size=4, **options)
    alone = lm.generate(PROMPTS, max_new_tokens=tokens, verify="base", batch_size=1, **options)
    assert tokens_of(together) == tokens_of(alone) == tokens_of(lm.base().generate(PROMPTS, tokens)) == expected
    assert together.steps.tolist() == alone.steps.tolist()
    # All passes count: those of each draft, and the one that verifies it.
    assert together.steps.tolist() == ((options.get("draft_passes", 1) + 1) * together.verified).tolist()
    if tokens == 24:
        assert together.accepted_by_depth[0] > 0


def test_an_answer_ends_with_the_bases_end_of_sequence(model_dir):
    lm = converted(model_dir, "prefix")
    whole = [row.tolist() for row in lm.base().generate(PROMPTS, 40).tokens]
    lm.tokenizer.eos_token_id = whole[0][9]
    out = lm.generate(PROMPTS, 40, verify="base")
    assert tokens_of(out) == tokens_of(lm.base().generate(PROMPTS, 40))
    assert tokens_of(out)[0] == whole[0][: whole[0].index(whole[0][9]) + 1]


def test_draws_are_the_bases(model_dir):
    """The first token of many copies, against the base's probabilities; drafts are near them, and are not drawn."""
    lm, copies = converted(model_dir, "prefix"), 240
    prompts = [PROMPTS[0]] * copies
    out = lm.generate(prompts, 2, verify="base", temperature=1.5, top_k=4, batch_size=24, seed=3, draft_length=2)
    logits = np.asarray(lm.base()([PROMPTS[0]])[0, -1]) / 1.5
    logits[lm.mask_token_id] = -np.inf
    best = np.argsort(-logits)[:4]
    p = np.exp(logits[best] - logits[best].max())
    expected = copies * p / p.sum()
    counts = np.array([sum(int(row[0]) == token for row in out.tokens) for token in best])
    assert counts.sum() == copies
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("full", {}, "verify='base': needs attention prefix or block"),
        ("causal", {}, "its text is the base's already"),
        ("block", {"draft_length": 5}, "fills blocks of 4"),
        ("prefix", {"draft_passes": 9}, "draft_passes=9"),
        ("prefix", {"threshold": 0.9}, "threshold=0.9: has no meaning with verify='base'"),
    ],
)
def test_what_cannot_be_verified_is_refused(model_dir, rule, options, message):
    lm = difflm_jax.load(model_dir, dtype="float32", **RULES[rule])
    with pytest.raises(UserError, match=message):
        lm.generate(PROMPTS[0], 8, verify="base", **options)


def test_the_command_line_verifies(model_dir, tmp_path, capsys):
    converted(model_dir, "prefix").save_adapter(tmp_path)
    given = [f"--model={model_dir}", f"--adapter={tmp_path}", "--prompt=Hi", "--max_new_tokens=6", "--dtype=float32"]
    assert command(["generate", *given, "--verify=base", "--stats"]) == 0
    verified = capsys.readouterr()
    assert command(["generate", *given, "--causal"]) == 0
    assert verified.out == capsys.readouterr().out
    assert "passes" in verified.err
