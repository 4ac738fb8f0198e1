"""Grammars: allowed tokens, endings within a budget, and messages. Third-party validators are the oracle."""

import itertools
import json
import re
import time

import jsonschema
import llguidance
import numpy as np
import pytest

from difflm_jax import UserError
from difflm_jax.sampling.grammar.bits import packed, unpacked, where_allowed
from difflm_jax.sampling.grammar.canvas import AutomatonRow
from difflm_jax.sampling.grammar.grammar import Grammar
from difflm_jax.sampling.grammar.regex import of_regex
from difflm_jax.sampling.grammar.vocabulary import Vocabulary
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
    """Draws an answer uniformly from the allowed tokens: (text, tokens)."""
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


REGEXES = (r"\d{4}-\d\d(-\d\d)?", r"(true|tr)+x?", r"[^a-zA-Z\x80-\U0010ffff]{2}b|a{3,}", r"é[à-ü]+😀")


@pytest.mark.parametrize("pattern", REGEXES)
def test_masks_of_an_automaton_are_those_of_llguidance(pattern):
    """Along random answers, with a budget that leaves nothing out; `llguidance` reads the expression by itself."""
    automaton = Grammar.regex(pattern).matcher(VOCABULARY)
    spelt = pattern.replace(r"\d", "[0-9]")
    parser = llguidance.LLMatcher(VOCABULARY.parser_tokens, llguidance.LLMatcher.grammar_from_regex(spelt), log_level=0)
    rng = np.random.default_rng(0)
    for _ in range(40):
        expected = unpacked(np.frombuffer(parser.compute_bitmask(), np.uint32), SIZE)
        np.testing.assert_array_equal(unpacked(automaton.allowed(10**6), SIZE), expected)
        assert automaton.is_accepting == parser.is_accepting()
        choices = np.flatnonzero(expected)
        if choices.tolist() == [EOS]:
            assert automaton.is_finished
            break
        token = int(rng.choice(choices[choices != EOS]))
        automaton.advance([token])
        assert parser.consume_token(token)


@pytest.mark.parametrize(
    "pattern", [*REGEXES, r"(a|bc)*d+?", r"[^a-c]x|.", r"\w+\s\S", "(ab|a)(bc)?", "(?:x(?:y|z){0,3})+", "^ab$"]
)
def test_an_expression_means_what_it_means_to_python(pattern):
    automaton, rng = of_regex(pattern), np.random.default_rng(0)
    letters = list("abcdxyztrue019_- \n😀àüé" + pattern)
    for text in ("".join(rng.choice(letters, rng.integers(0, 8))) for _ in range(1500)):
        state = 0
        for byte in text.encode():
            state = automaton.delta[state, byte] if state >= 0 else -1
        matches = bool(state >= 0 and automaton.accepting[state])
        assert matches == (re.fullmatch(pattern, text, re.ASCII if r"\w" in pattern else 0) is not None), text


@pytest.mark.parametrize(
    "pattern",
    [
        "((){9999}){9999}",
        "(a{1000}){1000}",
        "(a|aa){0,99999999}",
        r"(\W|\w){2000}",
        "(a?){3000}b*" * 3,
        "(.*a){40}.{40}",
    ],
)
def test_an_expression_that_explodes_is_refused_soon(pattern):
    began = time.process_time()
    with pytest.raises(UserError, match=r"too large|make it simpler"):
        of_regex(pattern)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("pattern", ["(?=a)b", r"(a)\1", r"\bx", "(?i)a", "(?>a)b", "a*+", "a^b", "(?m)^a", "a("])
def test_what_no_finite_automaton_has_is_refused_by_name(pattern):
    with pytest.raises(UserError, match="regex: "):
        of_regex(pattern)


def test_a_tight_budget_allows_what_can_still_be_completed_and_no_less():
    """Against every text of up to five tokens."""
    grammar, texts = Grammar.regex("(aa|tr|a)*true"), set()
    tokens = [TOKENIZER.convert_tokens_to_ids(text) for text in ("a", "aa", "t", "r", "u", "e", "tr", "true", "ue")]
    for count in range(1, 6):
        for row in itertools.product(tokens, repeat=count):
            if re.fullmatch(grammar.source, TOKENIZER.decode(row)):
                texts.add(row)
    for budget in range(1, 6):
        firsts = {row[0] for row in texts if len(row) <= budget}
        assert {*np.flatnonzero(unpacked(grammar.matcher(VOCABULARY).allowed(budget), SIZE))} == firsts


def test_a_canvas_allows_at_each_place_what_can_still_become_a_text():
    """Against every filling of five places, some of which are committed."""
    pattern, size = "(aa|tr|a)*true|aue", 5
    texts = ("a", "aa", "t", "r", "ue", "tr", "true")
    tokens = [TOKENIZER.convert_tokens_to_ids(text) for text in texts]
    mask = SIZE - 1
    row = AutomatonRow(Grammar.regex(pattern).automaton(VOCABULARY), size, 0, mask)
    spelt = dict(zip(tokens, texts, strict=True))
    fillings = [
        whole
        for whole in itertools.product([*tokens, EOS], repeat=size)
        if re.fullmatch(pattern, "".join(spelt[token] for token in itertools.takewhile(lambda t: t != EOS, whole)))
    ]
    for committed in ({}, {1: tokens[1]}, {3: EOS}, {2: tokens[5], 3: tokens[4]}, {0: tokens[0], 4: EOS}):
        canvas = np.full(size, mask)
        canvas[[*committed]] = [*committed.values()]
        left = [whole for whole in fillings if all(whole[place] == token for place, token in committed.items())]
        found = unpacked(row.masks(canvas, range(size)), SIZE)
        for place in set(range(size)) - {*committed}:
            assert {*np.flatnonzero(found[place])} & {*tokens, EOS} == {whole[place] for whole in left}


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
    logits = np.random.default_rng(1).normal(size=allowed.shape).astype(np.float32)
    np.testing.assert_array_equal(where_allowed(logits, bits), np.where(allowed, logits, -np.inf))


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
