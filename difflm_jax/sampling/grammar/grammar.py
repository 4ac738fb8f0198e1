"""A checked user-defined grammar. With the tokens of a model it builds matchers."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from difflm_jax.errors import UserError, one_line
from difflm_jax.sampling.grammar.automaton import AutomatonMatcher, TokenAutomaton
from difflm_jax.sampling.grammar.matcher import Matcher
from difflm_jax.sampling.grammar.parser import ParserMatcher, parser_of
from difflm_jax.sampling.grammar.regex import of_regex, of_texts
from difflm_jax.sampling.grammar.vocabulary import Vocabulary

KINDS = ("json_schema", "regex", "choice", "lark")


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A grammar that the whole text of an answer must match.

    Create one with `json_object`, `json_schema`, `regex`, `choice` or `lark`. `source` is the schema as JSON, the
    regular expression, the choices as a JSON list, or the Lark grammar.
    """

    kind: str
    source: str

    @classmethod
    def json_object(cls) -> "Grammar":
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str | bool) -> "Grammar":
        """JSON that matches a schema (a mapping or its text), as interpreted by llguidance: keys in schema order."""
        try:
            schema = json.loads(schema) if isinstance(schema, str) else json.loads(json.dumps(schema))
        except (TypeError, ValueError) as error:
            raise UserError(f"json_schema: not JSON ({one_line(error)})") from error
        if not isinstance(schema, (dict, bool)):
            raise UserError(f"json_schema: a schema is an object, not {type(schema).__name__}")
        return cls("json_schema", json.dumps(schema))

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        r"""Text that fully matches a Python regular expression; \d, \w and \s match only ASCII."""
        if not isinstance(pattern, str):
            raise UserError(f"regex: must be a string, not {type(pattern).__name__}")
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> "Grammar":
        """One of several texts."""
        texts = [choices] if isinstance(choices, str) else list(choices)
        if not texts or any(not isinstance(text, str) or not text for text in texts):
            raise UserError("choice: must be one or several texts, none of them empty")
        return cls("choice", json.dumps(texts))

    @classmethod
    def lark(cls, grammar: str) -> "Grammar":
        """Text of a context-free grammar in llguidance's variant of Lark."""
        if not isinstance(grammar, str):
            raise UserError(f"lark: must be a string, not {type(grammar).__name__}")
        return cls("lark", grammar)

    @property
    def is_regular(self) -> bool:
        """Whether the grammar is a finite automaton. Its tokens may then be committed in any order."""
        return self.kind in ("regex", "choice")

    def matcher(self, vocabulary: Vocabulary) -> Matcher:
        """Returns a matcher at the start of an answer; each row needs its own. Raises `UserError` if invalid."""
        if self.is_regular:
            return AutomatonMatcher(self.automaton(vocabulary))
        return _parser_matcher(self, vocabulary).copy()

    def automaton(self, vocabulary: Vocabulary) -> TokenAutomaton:
        """Returns the automaton of a regular grammar. Raises `UserError` if the grammar is invalid."""
        return _automaton(self, vocabulary)


@functools.lru_cache(maxsize=32)
def _parser_matcher(grammar: Grammar, vocabulary: Vocabulary) -> ParserMatcher:
    return ParserMatcher(parser_of(grammar.kind, grammar.source, vocabulary), vocabulary)


@functools.lru_cache(maxsize=32)
def _automaton(grammar: Grammar, vocabulary: Vocabulary) -> TokenAutomaton:
    known = of_regex(grammar.source) if grammar.kind == "regex" else of_texts(json.loads(grammar.source))
    return TokenAutomaton.of(known, vocabulary)
