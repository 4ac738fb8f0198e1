"""A question, and what rows of several tasks have in common."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from difflm_jax.data.sources import RowError


@dataclasses.dataclass(frozen=True)
class Question:
    """A conversation up to the answer, the reference answer as text, the row that they come from, what tools and
    arguments of the chat template the conversation has, and where the row stands ('file:line')."""

    messages: list[dict]
    reference: str
    row: Any = None
    tools: list[dict] | None = None
    template_arguments: dict[str, Any] | None = None
    origin: str = ""

    @property
    def prompt(self) -> dict[str, Any]:
        """The question as `LanguageModel.generate` takes it."""
        arguments = {"chat_template_kwargs": self.template_arguments} if self.template_arguments else {}
        return {"messages": self.messages, "tools": self.tools, **arguments}


def ask(text: str) -> list[dict]:
    """A conversation of one user turn."""
    return [{"role": "user", "content": text}]


def text_field(row: Any, name: str) -> str:
    """The text of a field. Raises `RowError`."""
    if not isinstance(row, Mapping) or not isinstance(row.get(name), str) or not row[name].strip():
        raise RowError(f"has no text under {name!r}")
    return row[name]
