"""Speculative decoding gives the tokens of the causal base, whatever drafts and however many rows share a batch."""

import dataclasses
import json

import jax
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import difflm_jax
from difflm_jax import UserError
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.quant import QuantConfig
from difflm_jax.sampling.cycles import BETWEEN_CHECKS
from difflm_jax.sampling.drafts import STRATEGIES
from tests.tiny_checkpoint import save_tiny_model

TOKENS = 24
PROMPTS = [[5, 9, 200, 31, 7], [66], [12, 13, 12, 13, 12, 13, 12], [101, 102, 103, 104, 105, 106, 107, 108, 109]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def drafter(model_dir, **options):
    """A model with a random adapter that agrees with its base now and then."""
    lm = difflm_jax.load(model_dir, dtype="float32", **options)
    config = LoraConfig(r=4)
    lora = init_lora(jax.random.key(0), lm.params, config, None)
    lora = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(1), x.shape), lora)
    diffusion = dataclasses.replace(
        lm.diffusion.causal(), gated=True, noise="uniform", draft_length=3, algorithm="speculative"
    )
    return dataclasses.replace(lm.with_adapter(lora, config), diffusion=diffusion)


@pytest.fixture(scope="module")
def lm(model_dir):
    return drafter(model_dir)


@pytest.fixture(scope="module")
def expected(model_dir):
    """transformers' greedy decoding."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, attention_mask=torch.ones(1, len(prompt))
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def tokens_of(generation):
    return [row.tolist() for row in generation.tokens]


def test_plain_decoding_is_transformers_greedy(lm, expected):
    out = lm.base().generate(PROMPTS, max_new_tokens=TOKENS)
    assert tokens_of(out) == expected
    assert out.steps.tolist() == [len(row) for row in expected]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_the_bases_tokens(lm, expected, strategy):
    out = lm.generate(PROMPTS, max_new_tokens=TOKENS, strategy=strategy, batch_size=4)
    assert tokens_of(out) == expected
    assert (out.tokens_per_pass > 1).any()
    assert out.accepted_by_depth[0] > 0


def test_rows_alone_and_in_batches_are_the_same(lm, expected):
    alone = lm.generate(PROMPTS, max_new_tokens=TOKENS, batch_size=1)
    together = lm.generate(PROMPTS, max_new_tokens=TOKENS, batch_size=4)
    assert tokens_of(alone) == tokens_of(together) == expected
    assert alone.steps.tolist() == together.steps.tolist()


def test_drafts_of_a_quantised_base_are_verified_by_it(model_dir):
    lm = drafter(model_dir, quantization=QuantConfig("nf4", 16))
    out = lm.generate(PROMPTS, max_new_tokens=TOKENS, lookup=False)
    assert tokens_of(out) == tokens_of(lm.base().generate(PROMPTS, max_new_tokens=TOKENS))


def test_answers_end_at_eos_and_at_stop_strings(lm):
    base = lm.base().generate(PROMPTS, max_new_tokens=TOKENS)
    word = next(text[3:5] for text in base.texts if len(text) > 8)
    out, expected = (x.generate(PROMPTS, max_new_tokens=TOKENS, stop=word) for x in (lm, lm.base()))
    assert out.texts == expected.texts
    assert tokens_of(out) == tokens_of(expected)


def test_a_stop_string_ends_the_passes(lm):
    """A row ends within the cycles between two checks, and not at its budget."""
    texts = lm.base().generate(PROMPTS, max_new_tokens=8).texts
    row = max(range(len(texts)), key=lambda i: len(texts[i]))
    for model in (lm, lm.base()):
        stopped, whole = (model.generate(PROMPTS[row], 160, 160, stop=stop) for stop in (texts[row][:2], ()))
        assert stopped.texts == [""]
        assert stopped.steps[0] <= BETWEEN_CHECKS < whole.steps[0]


@pytest.mark.parametrize("options", [{"strategy": "tree"}, {"temperature": 0.9}], ids=str)
def test_watched_drafts_are_those_that_are_verified_and_change_nothing(lm, options):
    seen = []
    plain = lm.generate(PROMPTS, max_new_tokens=TOKENS, **options)
    watched = lm.generate(PROMPTS, max_new_tokens=TOKENS, on_pass=seen.append, **options)
    assert tokens_of(watched) == tokens_of(plain)
    assert watched.steps.tolist() == plain.steps.tolist()
    assert [one.number for one in seen] == list(range(1, len(seen) + 1))
    known = drafts = kept = 0
    for before, one in zip([None, *seen], seen, strict=False):
        known = known + one.written
        assert (known == (one.tokens != lm.mask_token_id)).all() and known.max() == 1
        if before is not None:
            drafted, guess = before.probabilities[..., 0] > 0, before.guess(lm.mask_token_id)[:, before.block]
            became = one.tokens[:, before.block]
            drafts += drafted.sum()
            kept += (drafted & (guess == became)).sum()
    assert drafts > kept > 0
    for tokens, row in zip(plain.tokens, seen[-1].tokens, strict=True):
        assert row[: len(tokens)].tolist() == tokens.tolist()


def test_a_model_without_a_drafting_adapter_is_refused(model_dir):
    lm = difflm_jax.load(model_dir, dtype="float32")
    with pytest.raises(UserError, match="algorithm='speculative'"):
        lm.generate(PROMPTS, max_new_tokens=TOKENS, algorithm="speculative")


def test_prompt_lookup_needs_no_adapter(model_dir, expected):
    lm = difflm_jax.load(model_dir, dtype="float32", causal=True)
    out = lm.generate(PROMPTS, max_new_tokens=TOKENS, algorithm="speculative", strategy="lookup", draft_length=4)
    assert tokens_of(out) == expected


def test_an_export_drafts_in_sglang(lm, model_dir, expected, tmp_path):
    """SGLang's loading rules and its two-pass loop, in words of our own, over torch and peft.

    Its rules: tensors are named by layer and module; only lora_A and lora_B exist, in pairs; q_proj is there where
    k_proj or v_proj is, gate_proj where up_proj is. A draft pass is [last token, noise], the adapter on for the noise.
    """
    lm.save_adapter(tmp_path)
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not adapter.get("modules_to_save") and not adapter.get("trainable_token_indices")
    assert adapter["peft_type"] == "LORA" and not adapter.get("use_dora") and adapter["bias"] == "none"
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert all(".layers." in name and name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)
    assert {name.replace("lora_A", "lora_B") for name in names} == {name for name in names if "lora_B" in name} | {
        name.replace("lora_A", "lora_B") for name in names if "lora_A" in name
    }
    assert json.loads((tmp_path / "diffusion_config.json").read_text())["gated"] is True
    for dependent, needed in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
        assert all(name.replace(dependent, needed) in names for name in names if dependent in name)

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path)
    torch.manual_seed(0)
    for prompt, answer in zip(PROMPTS[:2], expected, strict=False):
        assert two_pass(model, list(prompt), 12, width=4) == answer[:12]


@torch.no_grad()
def two_pass(model, tokens, count, width):
    """`count` tokens after `tokens`, by SGLang's loop for --speculative-num-draft-tokens=`width`."""
    start = len(tokens)
    while len(tokens) < start + count:
        with model.disable_adapter():
            out = model(torch.tensor([tokens]), use_cache=True)
        proposal = [int(out.logits[0, -1].argmax())]  # the seed's row is the base's
        noise = torch.randint(0, model.config.vocab_size, (1, width - 1))
        proposal += model(noise, past_key_values=out.past_key_values).logits[0].argmax(-1).tolist()
        with model.disable_adapter():
            own = model(torch.tensor([tokens + proposal])).logits[0, -width:].argmax(-1).tolist()
        right = 0
        while right < width - 1 and proposal[right + 1] == own[right]:
            right += 1
        tokens = tokens + proposal[: right + 1] + [own[right]]
    return tokens[start : start + count]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "strategies", "tokens"), [(None, ("two_pass", "one_pass"), 16), ("nf4", ("likeliest",), 6)]
)
def test_a_real_model_writes_its_own_text(smollm2, quantization, strategies, tokens):
    """SmolLM2 in float32 with an untrained adapter, dense and in NF4, against the sampler's loop over a canvas."""
    lm = drafter(smollm2, quantization=quantization)
    prompts = ["Count from one to twelve, and then once more.", "What is the capital of Italy?"][: tokens // 6]
    expected = lm.base().generate(prompts, max_new_tokens=tokens, on_pass=lambda _: None)
    assert tokens_of(lm.base().generate(prompts, max_new_tokens=tokens)) == tokens_of(expected)
    for strategy in strategies:
        out = lm.generate(prompts, max_new_tokens=tokens, strategy=strategy)
        assert tokens_of(out) == tokens_of(expected)
