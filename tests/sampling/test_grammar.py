"""Grammars: what may come next, endings within a budget, and messages; validators of others are the oracle."""

import json
import re

import jsonschema
import numpy as np
import pytest

from difflm_jax import UserError
from difflm_jax.sampling.grammar.grammar import Grammar
from difflm_jax.sampling.grammar.vocabulary import Vocabulary, packed, unpacked
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer((("a", "a"), ("t", "r"), ("tr", "ue"), ('"', "}"), ("u", "e")))
SIZE = 320
EOS = TOKENIZER.eos_token_id
VOCABULARY = Vocabulary.of(TOKENIZER, SIZE, (EOS,))
PERSON = {
    "type": "object",
    "properties": {
        "description": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 2}, "minItems": 1},
        "age": {"type": "integer", "minimum": 18},
        "colour": {"enum": ["red", "green"]},
        "nested": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]},
    },
    "required": ["description", "tags", "age", "nested"],
    "additionalProperties": False,
}
SCHEMAS = {
    "person": (PERSON, 100),
    "any object": ({"type": "object"}, 30),
    "array": ({"type": "array", "items": {"anyOf": [{"type": "number"}, {"type": "null"}]}, "maxItems": 3}, 20),
    "date": ({"type": "string", "format": "date"}, 13),
    "recursive": (
        {
            "$defs": {"tree": {"type": "object", "properties": {"l": {"$ref": "#/$defs/tree"}}}},
            "$ref": "#/$defs/tree",
        },
        25,
    ),
}


def drawn(grammar: Grammar, budget: int, seed: int) -> tuple[str, list[int]]:
    """An answer of uniform draws from what is allowed: (text, tokens)."""
    rng, matcher, tokens = np.random.default_rng(seed), grammar.matcher(VOCABULARY), []
    while len(tokens) < budget and EOS not in tokens:
        left = budget - len(tokens)
        tokens += matcher.take([rng.choice(np.flatnonzero(unpacked(matcher.allowed(left), SIZE)))], left)
    assert matcher.is_accepting and len(tokens) <= budget
    return TOKENIZER.decode(tokens, skip_special_tokens=True), tokens


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_answers_are_valid_json_and_closed_within_their_budget(name):
    schema, budget = SCHEMAS[name]
    for seed in range(25):
        jsonschema.validate(json.loads(drawn(Grammar.json_schema(schema), budget, seed)[0]), schema)


def test_a_roomy_budget_leaves_a_model_its_choice():
    text = '{"description": "a }\\" b", "tags": ["xy"], "age": 44, "nested": {"x": true}}'
    matcher = Grammar.json_schema(PERSON).matcher(VOCABULARY)
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert matcher.accepts(tokens) == len(tokens)
    for place, token in enumerate(tokens):
        assert unpacked(matcher.allowed(300 - place), SIZE)[token]
        assert matcher.take([token], 300 - place) == [token]
    assert matcher.is_accepting and matcher.is_finished
    assert np.flatnonzero(unpacked(matcher.allowed(100), SIZE)).tolist() == [EOS]


def test_a_budget_that_is_too_short_is_used_up():
    rng, matcher, tokens = np.random.default_rng(0), Grammar.json_schema(PERSON).matcher(VOCABULARY), []
    while len(tokens) < 12:
        left = 12 - len(tokens)
        tokens += matcher.take([rng.choice(np.flatnonzero(unpacked(matcher.allowed(left), SIZE)))], left)
    assert not matcher.is_accepting


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar.regex(r"[0-9]{4}-[0-9]+(-[a-f]{2})?"), r"[0-9]{4}-[0-9]+(-[a-f]{2})?"),
        (Grammar.choice(["yes", "no", "not sure", "a|b.*"]), r"yes|no|not sure|a\|b\.\*"),
        (Grammar.lark('start: "[" (/[ab]+/ ("," /[ab]+/)*)? "]"'), r"\[([ab]+(,[ab]+)*)?\]"),
    ],
    ids=["regex", "choice", "lark"],
)
def test_random_answers_match(grammar, pattern):
    for seed in range(25):
        assert re.fullmatch(pattern, drawn(grammar, 14, seed)[0])


def test_a_copy_moves_by_itself():
    matcher = Grammar.choice(["ab", "ac"]).matcher(VOCABULARY)
    a, b, c = TOKENIZER.convert_tokens_to_ids(["a", "b", "c"])
    matcher.advance([a])
    other = matcher.copy()
    other.advance([b])
    assert other.is_finished and not matcher.is_accepting and matcher.accepts([c]) == 1
    with pytest.raises(ValueError, match="may not come next"):
        other.advance([c])


def test_masks_of_bits_are_their_tokens():
    allowed = np.random.default_rng(0).random((3, 5, 97)) < 0.5
    bits = packed(allowed)
    assert bits.shape == (3, 5, 4) and bits.dtype == np.uint32
    np.testing.assert_array_equal(unpacked(bits, 97), allowed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.json_schema("{'a': 1}"), "json_schema: not JSON"),
        (lambda: Grammar.json_schema([]), "a schema is an object, not list"),
        (lambda: Grammar.choice([]), "choice: must be one or several texts"),
        (lambda: Grammar.choice(["a", ""]), "choice: must be one or several texts"),
        (lambda: Grammar.regex("a(").matcher(VOCABULARY), "regex: .*unclosed group|regex: .*unterminated"),
        (lambda: Grammar.json_schema({"type": "array", "uniqueItems": True}).matcher(VOCABULARY), "uniqueItems"),
        (lambda: Grammar.lark("start: x").matcher(VOCABULARY), "lark: .*unknown name"),
        (lambda: Vocabulary.of(TOKENIZER, SIZE, ()), "no end-of-sequence token"),
        (lambda: Vocabulary.of(object(), SIZE, (EOS,)), "needs a tokenizer with a tokenizer.json"),
    ],
)
def test_what_is_no_grammar_is_one_line(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
