"""Decoding under a grammar: the tokens of transformers' greedy decoding under llguidance's masks, and valid answers."""

import json
import re

import jsonschema
import llguidance
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList

import difflm_jax
from difflm_jax import Grammar, UserError
from tests.sampling.test_speculative import PROMPTS, drafter, tokens_of
from tests.test_lm import randomly_adapted
from tests.tiny_checkpoint import save_tiny_model

TOKENS = 64
# Without whitespace, and with short strings, a greedy answer ends by itself.
SHORT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["tea", "coffee"]},
        "hot": {"type": "boolean"},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
GRAMMARS = {
    "schema": (Grammar.json_schema(SHORT), llguidance.LLMatcher.grammar_from_json_schema(SHORT)),
    "regex": (
        Grammar.regex("[a-f]{3,9}-(xy|z[0-9]){2}"),
        llguidance.LLMatcher.grammar_from_regex("[a-f]{3,9}-(xy|z[0-9]){2}"),
    ),
    "choice": (Grammar.choice(["yes", "yesterday", "no"]), llguidance.LLMatcher.grammar_from_regex("yes|yesterday|no")),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(model_dir):
    return drafter(model_dir)


@pytest.fixture(scope="module")
def diffusion(model_dir):
    return randomly_adapted(model_dir, "full", False)


@pytest.fixture(scope="module")
def greedy(model_dir, lm):
    """Returns a function from a grammar's name to transformers' greedy answers, each step masked by llguidance."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokens = llguidance.LLTokenizer(
        lm.tokenizer.backend_tokenizer.to_str(), n_vocab=lm.config.vocab_size, eos_token=list(lm.eos_token_ids)
    )

    def answer(prompt, grammar):
        matcher = llguidance.LLMatcher(tokens, grammar, log_level=0)

        def masked(ids, scores):
            if ids.shape[1] > len(prompt):
                matcher.consume_token(int(ids[0, -1]))
            allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            scores[:, ~torch.from_numpy(allowed[: scores.shape[1]].astype(bool))] = -torch.inf
            scores[:, lm.mask_token_id] = -torch.inf
            return scores

        row = torch.tensor([prompt])
        out = model.generate(
            row, max_new_tokens=TOKENS, do_sample=False, attention_mask=torch.ones_like(row),
            logits_processor=LogitsProcessorList([masked]), eos_token_id=list(lm.eos_token_ids),
        )  # fmt: skip
        return out[0, len(prompt) :].tolist()

    known = {}

    def answers(name):
        if name not in known:
            known[name] = [answer(prompt, GRAMMARS[name][1]) for prompt in PROMPTS]
        return known[name]

    return answers


@pytest.mark.parametrize("name", GRAMMARS)
def test_causal_answers_are_transformers_greedy_under_the_same_masks(lm, greedy, name):
    out = lm.base().generate(PROMPTS, max_new_tokens=TOKENS, grammar=GRAMMARS[name][0])
    assert tokens_of(out) == greedy(name)
    assert out.complete.all() and all(row[-1] in lm.eos_token_ids for row in tokens_of(out))


@pytest.mark.parametrize("strategy", ["two_pass", "one_pass", "tree", "lookup"])
def test_every_drafting_strategy_gives_the_constrained_text_of_the_base(lm, greedy, strategy):
    out = lm.generate(PROMPTS, max_new_tokens=TOKENS, grammar=GRAMMARS["schema"][0], strategy=strategy, batch_size=3)
    assert tokens_of(out) == greedy("schema")


def test_drafts_and_a_short_budget_close_an_object_as_the_base_does(lm):
    grammar = Grammar.json_schema({"type": "object"})
    base = lm.base().generate(PROMPTS, max_new_tokens=17, grammar=grammar)
    drafted = lm.generate(PROMPTS, max_new_tokens=17, grammar=grammar)
    assert tokens_of(base) == tokens_of(drafted)
    assert base.complete.all() and all(isinstance(json.loads(text), dict) for text in base.texts)


@pytest.mark.slow
def test_200_of_200_drawn_answers_are_valid(lm):
    """Draws 200 answers of a random model in batches. Most would exceed the budget without the grammar."""
    schema = {**SHORT, "x-guidance": {"whitespace_flexible": True}}
    out = lm.generate(
        [[7, 8]] * 200, max_new_tokens=45, grammar=Grammar.json_schema(schema), temperature=1.0, batch_size=64
    )
    for text in out.texts:
        jsonschema.validate(json.loads(text), schema)
    assert out.complete.all() and len({*out.texts}) > 150


def test_a_budget_that_no_answer_fits_is_told(lm):
    out = lm.base().generate(PROMPTS[:1], max_new_tokens=5, grammar=Grammar.json_schema(SHORT))
    assert not out.complete[0] and len(out.tokens[0]) == 5


WAYS = (
    {"steps": 24},
    {"steps": 3, "algorithm": "probability"},
    {"steps": 6, "algorithm": "origin"},
    {"steps": 8, "block_length": 6, "algorithm": "entropy"},
    {"steps": 24, "threshold": 0.02, "leftmost": True},
    {"steps": 5, "algorithm": "left_to_right"},
    {"steps": 6, "temperature": 1.0, "seed": 3, "algorithm": "random"},
)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_canvas_filled_in_any_order_matches_its_expression(diffusion, options):
    for pattern in (r"[a-f]{3,9}-(xy|z[0-9]){2}", "yes|yesterday|no(t now)?", r"\w+ \w+"):
        out = diffusion.generate(PROMPTS, max_new_tokens=24, grammar=Grammar.regex(pattern), **options)
        assert all(re.fullmatch(pattern, text) for text in out.texts), out.texts
        assert out.complete.all() and (out.steps <= options["steps"]).all()


def test_one_token_a_pass_is_the_best_allowed_one_of_each_pass(diffusion):
    """Greedy decoding from the left, written out: the model's own logits under llguidance's masks."""
    grammar = llguidance.LLMatcher.grammar_from_json_schema(SHORT)
    tokens = llguidance.LLTokenizer(
        diffusion.tokenizer.backend_tokenizer.to_str(),
        n_vocab=diffusion.config.vocab_size,
        eos_token=list(diffusion.eos_token_ids),
    )
    out = diffusion.generate(PROMPTS[:2], max_new_tokens=TOKENS, steps=TOKENS, grammar=Grammar.json_schema(SHORT))
    for prompt, found in zip(PROMPTS, tokens_of(out), strict=False):
        matcher = llguidance.LLMatcher(tokens, grammar, log_level=0)
        row = np.array([*prompt, *[diffusion.mask_token_id] * TOKENS])
        for place in range(len(prompt), len(row)):
            allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            logits = np.array(diffusion(row[None])[0, place])
            logits[~allowed[: len(logits)].astype(bool)] = -np.inf
            logits[diffusion.mask_token_id] = -np.inf
            row[place] = logits.argmax()
            if row[place] in diffusion.eos_token_ids:
                break
            matcher.consume_token(int(row[place]))
        assert row[len(prompt) : place + 1].tolist() == found


@pytest.mark.parametrize("attention", ["block_causal", "block", "prefix"])
def test_json_on_canvases_of_other_models(model_dir, attention):
    block_length = None if attention == "prefix" else 8
    lm = difflm_jax.load(model_dir, attention=attention, block_length=block_length, dtype="float32")
    out = lm.generate(PROMPTS, max_new_tokens=32, grammar=Grammar.json_object(), algorithm="left_to_right")
    assert out.complete.all() and all(isinstance(json.loads(text), dict) for text in out.texts)
    out = lm.generate(PROMPTS, max_new_tokens=32, grammar=Grammar.choice(["red", "green"]), temperature=1.0)
    assert {*out.texts} <= {"red", "green"}


def test_what_is_known_from_the_left_only_is_not_committed_in_another_order(diffusion):
    with pytest.raises(UserError, match="json_schema allows is known from the left only"):
        diffusion.generate([[5]], grammar=Grammar.json_object(), algorithm="entropy")
    with pytest.raises(UserError, match="its shortest answer has 7 tokens"):
        diffusion.generate([[5]], max_new_tokens=6, grammar=Grammar.regex("[a-f]{7}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"eos_penalty": 2.0}, "eos_penalty"), ({"stop_at_eos": False}, "stop_at_eos")],
)
def test_options_that_contradict_a_grammar_are_refused(lm, options, message):
    with pytest.raises(UserError, match=message):
        lm.base().generate([[5]], grammar=Grammar.json_object(), **options)
