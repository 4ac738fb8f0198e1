"""A question, and functions that several tasks share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from difflm_jax.data.sources import RowError


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its reference answer.

    messages: the conversation up to the answer. reference: the answer as text. row: the row of data. tools,
    template_arguments: those of the chat template. origin: where the row is ('file:line').
    """

    messages: list[dict]
    reference: str
    row: Any = None
    tools: list[dict] | None = None
    template_arguments: dict[str, Any] | None = None
    origin: str = ""

    @property
    def prompt(self) -> dict[str, Any]:
        """The question in the form that `LanguageModel.generate` takes."""
        arguments = {"chat_template_kwargs": self.template_arguments} if self.template_arguments else {}
        return {"messages": self.messages, "tools": self.tools, **arguments}


def ask(text: str) -> list[dict]:
    """Returns a conversation with one user turn."""
    return [{"role": "user", "content": text}]


def text_field(row: Any, name: str) -> str:
    """Returns the text of a field. Raises `RowError` if it is missing or empty."""
    if not isinstance(row, Mapping) or not isinstance(row.get(name), str) or not row[name].strip():
        raise RowError(f"has no text under {name!r}")
    return row[name]
