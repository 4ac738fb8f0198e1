"""Maps a data set's own column and speaker names to the known ones.

The keys `data.columns` and `data.roles` are written 'known=own, known=own'. Each own name may appear once per key.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from difflm_jax.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")

# Speakers of ShareGPT, OpenAssistant, Hermes, Anthropic's and Cohere's data, in lower case.
SPEAKERS = {
    **{role: role for role in ROLES},
    "human": "user",
    "prompter": "user",
    "question": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "answer": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}


@dataclasses.dataclass(frozen=True)
class Naming:
    """A data set's own names of columns and roles, as pairs (own, known)."""

    columns: tuple[tuple[str, str], ...] = ()
    roles: tuple[tuple[str, str], ...] = ()

    def rename(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns `row` with known names. A mapped column replaces one that already has the known name."""
        if not self.columns:
            return row
        own = dict(self.columns)
        taken = {known for name, known in own.items() if name in row}
        kept = {key: value for key, value in row.items() if key not in own and key not in taken}
        return kept | {known: row[name] for name, known in own.items() if name in row}

    def role(self, speaker: Any) -> str | None:
        """The role of a speaker; None if it is unknown."""
        if not isinstance(speaker, str):
            return None
        return dict(self.roles).get(speaker) or SPEAKERS.get(speaker.strip().lower())


KNOWN_NAMES = Naming()


@functools.lru_cache
def parse_naming(columns: str, roles: str) -> Naming:
    """Parses the keys `data.columns` and `data.roles`. Raises `UserError`."""
    found = Naming(_pairs("data.columns", columns), _pairs("data.roles", roles))
    for _, role in found.roles:
        if role not in ROLES:
            raise UserError(f"data.roles: {role!r} is no role; known: {', '.join(ROLES)}")
    return found


def _pairs(key: str, text: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for part in filter(str.strip, text.split(",")):
        known, equals, own = (piece.strip() for piece in part.partition("="))
        if not (known and equals and own):
            raise UserError(f"{key}: {part.strip()!r} is not written known=own")
        pairs.append((own, known))
    names = ({own for own, _ in pairs}, {known for _, known in pairs} if key == "data.columns" else pairs)
    if any(len(each) != len(pairs) for each in names):  # several speakers may have one role
        raise UserError(f"{key}: names something twice: {text}")
    return tuple(pairs)
