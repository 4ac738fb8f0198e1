"""Parses a row into a conversation or a plain text. Its keys tell which of the known formats it has."""

import dataclasses
import string
from collections.abc import Mapping
from typing import Any

from difflm_jax.data import keys
from difflm_jax.data.columns import KNOWN_NAMES, Naming
from difflm_jax.data.keys import Notes, account, is_given, note
from difflm_jax.data.messages import (
    SPEAKER_KEYS,
    Conversation,
    Message,
    a,
    parse_messages,
    parse_template_arguments,
    parse_tools,
    text_of,
)
from difflm_jax.data.rows import RowError

__all__ = ["FORMATS", "Conversation", "Format", "Message", "parse_messages", "parse_row"]

_PARTS_OF_QUESTION = ("instruction", "context", "input", "choices", "options")


@dataclasses.dataclass(frozen=True)
class Format:
    """Rows that have values under the keys `needed`; `used` are the keys it reads in addition to those of any chat."""

    needed: tuple[str, ...]
    source: str
    used: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "alpaca" if self.needed == ("instruction", "output") else "/".join(self.needed)


def _asked(question: str, answer: str, source: str) -> Format:
    return Format((question, answer), source, _PARTS_OF_QUESTION)


# In order of precedence: a row has the first format whose keys all have values.
FORMATS = (
    Format(("messages",), keys.OPENAI),
    Format(("conversations",), keys.SHAREGPT),
    _asked("prompt", "response", keys.LLAMA_FACTORY),
    _asked("prompt", "completion", keys.TRL),
    _asked("question", "answer", "https://huggingface.co/datasets/openai/gsm8k"),
    _asked("instruction", "output", keys.ALPACA),
    _asked("instruction", "response", keys.DOLLY),
    _asked("question", "answers", keys.SQUAD),
    _asked("question", "answerKey", "https://huggingface.co/datasets/allenai/ai2_arc"),
    _asked("question", "response", keys.ORCA),
    _asked("question", "solution", "https://huggingface.co/datasets/simplescaling/s1K"),
    _asked("query", "response", "https://huggingface.co/datasets/meta-math/MetaMathQA"),
    _asked("query", "answer", "https://huggingface.co/datasets/sentence-transformers/gooaq"),
    _asked("problem", "solution", "https://huggingface.co/datasets/AI-MO/NuminaMath-CoT"),
    _asked("problem", "answer", "https://huggingface.co/datasets/agentica-org/DeepScaleR-Preview-Dataset"),
    _asked("prompt", "answer", keys.AXOLOTL),
    _asked("inputs", "targets", "https://huggingface.co/datasets/Muennighoff/flan"),
    _asked("input", "output", keys.AXOLOTL),
    Format(("conversation",), "https://huggingface.co/datasets/lmsys/lmsys-chat-1m"),
    Format(("text",), keys.TRL),
)
_NAMED = 7  # formats that an error lists


def parse_row(row: Any, naming: Naming = KNOWN_NAMES, notes: Notes | None = None) -> tuple[str, Conversation | str]:
    """Returns (format name, conversation or text) of a row, by the first of `FORMATS` whose keys have values.

    `naming`: the data set's own names of columns and roles. `notes` counts keys that have a value and are not used.
    Raises `RowError`.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"is {a(row)}, not an object")
    row = naming.rename(row)
    found = _format_of({key for key, value in row.items() if is_given(value)})
    present = {key for key, value in row.items() if value is not None}
    found = found or _format_of(present)  # "is empty" helps more than "unknown format"
    if found is None:
        raise RowError(_unknown(present))
    if found.needed == ("text",):
        account(row, found.needed, notes)
        return found.name, _plain_text(row)
    messages, used = _messages(row, found, notes)
    conversation = parse_messages(messages, row.get("tools"), naming, notes, found.needed[0])
    conversation, more = _with_row_keys(conversation, row)
    account(row, {*found.needed, *used, *more}, notes)
    return found.name, conversation


def _format_of(present: set[Any]) -> Format | None:
    return next((format for format in FORMATS if present.issuperset(format.needed)), None)


def _unknown(present: set[Any]) -> str:
    known = ", ".join("/".join(format.needed) for format in FORMATS[:_NAMED])
    has = f"has the keys {', '.join(map(str, sorted(present, key=str))) or '(none)'}; known formats: {known}, text, …"
    if {"chosen", "rejected"} <= present:
        return f"{has}; preferences are not trained: data.columns=response=chosen (or messages=chosen) takes the chosen"
    return f"{has}; other names are mapped by data.columns"


def _messages(row: Mapping[str, Any], found: Format, notes: Notes | None) -> tuple[Any, set[str]]:
    """Returns (messages as the row has them, keys that they came from)."""
    if len(found.needed) == 1:
        return row[found.needed[0]], set()
    question_key, answer_key = found.needed
    labels = _choices(row)
    answer = _answer(row[answer_key], answer_key, labels, notes)
    if isinstance(row[question_key], list):
        return [*_turns(row[question_key], "user", question_key), *answer], set()
    question, used = _question(row, question_key, labels)
    return [_say("user", question), *answer], used


def _question(row: Mapping[str, Any], question_key: str, labels: list[tuple[str, str]]) -> tuple[str, set[str]]:
    """Returns (question with its context, input and choices, keys that they came from)."""
    before = ("context", "instruction") if question_key != "instruction" else ()
    order = dict.fromkeys((*before, question_key, "input", "context"))
    pieces = {key: text_of(row[key], key) for key in order if is_given(row.get(key))}
    pieces = pieces or {question_key: text_of(row[question_key], question_key)}
    question = "\n\n".join(pieces.values())
    if labels:
        question += "\n" + "\n".join(f"{label}. {text}" for label, text in labels)
    return question, {*pieces, *(("choices", "options") if labels else ())}


def _choices(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (label, text) of each choice, from a list, {"text": [...], "label": [...]} or {"A": ...}."""
    key = next((key for key in ("choices", "options") if is_given(row.get(key))), None)
    if key is None:
        return []
    choices = row[key]
    if isinstance(choices, Mapping) and set(choices) == {"text", "label"}:
        labels, texts = choices["label"], choices["text"]
    elif isinstance(choices, Mapping):
        choices = {label: text for label, text in choices.items() if text is not None}  # a column of structs
        labels, texts = list(choices), list(choices.values())
    else:
        labels, texts = string.ascii_uppercase, choices
    if (
        not isinstance(texts, list)
        or not all(isinstance(text, str) for text in texts)
        or len(labels or ()) < len(texts)
    ):
        raise RowError(f"{key} is not a list of texts")
    return [(str(label), text) for label, text in zip(labels, texts, strict=False)]


def _answer(answer: Any, where: str, labels: list[tuple[str, str]], notes: Notes | None) -> list[Message]:
    """Returns the answer's turns. A choice's number becomes its label; only the first of several answers is used."""
    if where == "answers":
        answers = answer.get("text") if isinstance(answer, Mapping) else answer
        if not isinstance(answers, list) or not answers:
            raise RowError("answers is not a list with an answer")
        if any(other != answers[0] for other in answers):
            note(notes, "answers after the first are not used")
        answer = answers[0]
    if labels and isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(labels):
            raise RowError(f"{where} is {answer}, and there are {len(labels)} choices, from 0")
        answer = labels[answer][0]
    return _turns(answer, "assistant", where)


def _turns(value: Any, role: str, where: str) -> list[Message]:
    """Wraps a text or typed parts in a turn of `role`; returns a list of messages unchanged."""
    if not isinstance(value, list) or not value or not all(isinstance(each, Mapping) for each in value):
        return [_say(role, text_of(value, where))]
    are_parts = all("type" in each and not each.keys() & set(SPEAKER_KEYS) for each in value)
    return [_say(role, value)] if are_parts else value


def _say(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _with_row_keys(conversation: Conversation, row: Mapping[str, Any]) -> tuple[Conversation, set[str]]:
    """Adds the row's tools, history, system message and template arguments; returns it with the keys used."""
    used = {"tools"}
    if conversation.tools is None and is_given(row.get("functions")):
        conversation = dataclasses.replace(conversation, tools=parse_tools(row["functions"]))
        used.add("functions")
    if earlier := _history(row):
        first = int(conversation.messages[0]["role"] == "system")
        conversation = _insert(conversation, first, earlier)
        used.add("history")
    system_key = next((key for key in ("system", "system_prompt") if is_given(row.get(key))), None)
    if conversation.messages[0]["role"] != "system" and system_key is not None:
        conversation = _insert(conversation, 0, [_say("system", text_of(row[system_key], system_key))])
        used.add(system_key)
    if is_given(row.get("chat_template_kwargs")):
        conversation = dataclasses.replace(
            conversation, template_arguments=parse_template_arguments(row["chat_template_kwargs"])
        )
        used.add("chat_template_kwargs")
    return conversation, used


def _insert(conversation: Conversation, at: int, messages: list[Message]) -> Conversation:
    """Inserts `messages` before message `at`."""
    untrained = frozenset(i + len(messages) if i >= at else i for i in conversation.untrained)
    whole = [*conversation.messages[:at], *messages, *conversation.messages[at:]]
    return dataclasses.replace(conversation, messages=whole, untrained=untrained)


def _history(row: Mapping[str, Any]) -> list[Message]:
    """LLaMA-Factory's earlier turns, [[question, answer], ...]."""
    history = row.get("history")
    if not is_given(history):
        return []
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise RowError("history is not a list of [question, answer]")
    return [
        _say(role, text_of(text, "history"))
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _plain_text(row: Mapping[str, Any]) -> str:
    text = text_of(row["text"], "text")
    if not text.strip():
        raise RowError("the text is empty")
    return text
