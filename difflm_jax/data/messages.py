"""Normalises the forms in which data sets store conversations to the messages that chat templates take."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from difflm_jax.data.columns import KNOWN_NAMES, ROLES, Naming
from difflm_jax.data.keys import Notes, account_message, is_given, note
from difflm_jax.data.rows import RowError

Message = dict[str, Any]

_TEXT_KEYS = ("content", "value", "text")
SPEAKER_KEYS = ("role", "from", "speaker")
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
_THOUGHT_PARTS = ("reasoning", "thinking")
_TEMPLATE_OWN = ("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "tokenize")
_CALL_SPEAKERS = ("function_call", "tool_call")  # their text is the JSON of a call


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's format, as chat templates take them.

    `content` is a str, a thought is in `reasoning_content`, and tool calls have parsed arguments. `tools` is a list of
    function descriptions or None. `untrained` holds the indices of answers that serve only as context.
    `template_arguments` are passed to the template.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    untrained: frozenset[int] = frozenset()
    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def parse_messages(
    messages: Any, tools: Any = None, naming: Naming = KNOWN_NAMES, notes: Notes | None = None, name: str = "messages"
) -> Conversation:
    """Checks and normalises messages: a list of objects, the JSON text of one, or an object of lists.

    Null contents become empty, typed parts are joined, tool calls are parsed. Errors refer to the messages as `name`;
    `notes` counts keys that are not used. Raises `RowError`.
    """
    messages = _as_list(messages, name)
    if not messages:
        raise RowError("the conversation is empty")
    parsed = [_message(message, i, naming, notes) for i, message in enumerate(messages)]
    roles = [message["role"] for message in parsed]
    untrained = (i for i, message in enumerate(messages) if _is_untrained(message, i, roles[i], notes))
    return Conversation(parsed, parse_tools(tools), frozenset(untrained))


def _as_list(messages: Any, name: str) -> Sequence[Any]:
    if isinstance(messages, str):
        try:
            parsed = json.loads(messages)
        except (ValueError, RecursionError):
            parsed = messages
        if not isinstance(parsed, list):
            raise RowError(f"{name} is a str, not a list, and not the JSON of one")
        return parsed
    if isinstance(messages, Mapping) and messages and all(isinstance(column, list) for column in messages.values()):
        if len({len(column) for column in messages.values()}) != 1:
            raise RowError(f"{name} is an object of lists of different lengths")
        return [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    if not isinstance(messages, Sequence):
        raise RowError(f"{name} is {a(messages)}, not a list")
    return messages


def _message(message: Any, i: int, naming: Naming, notes: Notes | None) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(f"message {i} is {a(message)}, not an object")
    account_message(message, f"message {i}", notes)
    role, speaker = _role(message, i, naming)
    text = _text_of(message, i)
    if isinstance(speaker, str) and speaker.strip().lower() in _CALL_SPEAKERS:
        calls = parse_json(text, f"{speaker} of turn {i}")
        return {"role": role, "content": "", "tool_calls": _tool_calls(calls, i)}
    result = {"role": role} | _content(text, f"content of message {i}")
    if (thought := _thought(message, i, notes)) is not None:
        result["reasoning_content"] = thought
    for field in ("name", "tool_call_id"):
        if message.get(field) is not None:
            result[field] = message[field]
    calls = [message[key] for key in ("tool_calls", "function_call") if is_given(message.get(key))]
    calls += [result.pop("tool_calls")] if "tool_calls" in result else []
    if len(calls) > 1:
        raise RowError(f"message {i} has tool calls in more than one place")
    if calls:
        result["tool_calls"] = _tool_calls(parse_json(calls[0], f"tool_calls of message {i}"), i)
    return result


def _role(message: Mapping[str, Any], i: int, naming: Naming) -> tuple[str, Any]:
    """Returns (role, speaker as written in the row)."""
    given = [key for key in SPEAKER_KEYS if message.get(key) is not None]
    key = given[0] if given else "role"
    speaker = message.get(key)
    role = naming.role(speaker)
    if any(naming.role(message[other]) != role for other in given[1:]):
        raise RowError(f"message {i} has more than one of {', '.join(SPEAKER_KEYS)}, and they differ")
    if role is None and key == "role":
        raise RowError(f"message {i} has the unknown role {speaker!r}; known: {', '.join(ROLES)}; see data.roles")
    if role is None:
        raise RowError(f"unknown speaker {speaker!r} in turn {i}; name it with data.roles")
    return role, speaker


def _text_of(message: Mapping[str, Any], i: int) -> Any:
    """Returns the message's content, under whichever key it is. Raises `RowError` if two keys differ."""
    given = [message[key] for key in _TEXT_KEYS if is_given(message.get(key))]
    if any(value != given[0] for value in given[1:]):
        raise RowError(f"message {i} has more than one of {', '.join(_TEXT_KEYS)}, and they differ")
    return given[0] if given else next((message[key] for key in _TEXT_KEYS if message.get(key) is not None), None)


def _thought(message: Mapping[str, Any], i: int, notes: Notes | None) -> str | None:
    given = [(key, message[key]) for key in _THOUGHT_KEYS if is_given(message.get(key))]
    for key, value in given:
        if not isinstance(value, str):
            raise RowError(f"{key} of message {i} is {a(value)}, not a text")
        if value != given[0][1]:
            note(notes, f"{key} of messages is not used next to {given[0][0]}")
    return given[0][1] if given else None


def _is_untrained(message: Mapping[str, Any], i: int, role: str, notes: Notes | None) -> bool:
    """Whether `weight`, `train`, `training` or `loss` marks the message as context."""
    untrained = False
    for key in ("weight", "train", "training", "loss"):
        value = message.get(key)
        if value is None:
            continue
        if isinstance(value, str) or value not in (0, 1):  # True and False are 1 and 0
            raise RowError(f"{key} of message {i} is {value!r}: it must be 0 or 1")
        if not value:
            untrained = True
        elif role != "assistant":
            note(notes, f"{key} of messages that are no answers is not used")
    return untrained


def _content(content: Any, where: str) -> Message:
    """Returns the message fields found in `content`: text and, in a list of parts, thoughts and tool calls."""
    if content is None:
        return {"content": ""}
    if isinstance(content, str):
        return {"content": content}
    if not isinstance(content, list):
        raise RowError(f"{where} is {a(content)}, not a text")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind == "tool_call":
            parsed = parse_json(part.get("value", part.get("tool_call")), where)
            calls += parsed if isinstance(parsed, list) else [parsed]
        elif kind in _THOUGHT_PARTS:
            thoughts.append(_text_of_part(part, kind, where))
        elif kind == "text":
            texts.append(_text_of_part(part, kind, where))
        else:
            raise RowError(f"{where} has a part of type {kind!r}, which is not text")
    result = {"content": "".join(texts)}
    if thoughts:
        result["reasoning_content"] = "".join(thoughts)
    if calls:
        result["tool_calls"] = calls
    return result


def _text_of_part(part: Mapping[str, Any], kind: str, where: str) -> str:
    keys = tuple(dict.fromkeys((kind, "text", "value", "content")))
    value = next((part[key] for key in keys if part.get(key) is not None), None)
    if value is None:
        raise RowError(f"{where} has a part of type {kind!r} without text under {', '.join(keys)}")
    return text_of(value, where)


def _tool_calls(calls: Any, i: int) -> list[Message]:
    calls = calls if isinstance(calls, list) else [calls]
    return [_tool_call(call, f"a tool call of message {i}") for call in calls]


def _tool_call(call: Any, where: str) -> Message:
    call = parse_json(call, where)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"{where} names no function")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = parse_json(arguments, where) if arguments.strip() else {}
    result = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    return result if call.get("id") is None else {"id": call["id"]} | result


def parse_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Parses function descriptions (a list or JSON) and adds the wrapper that templates expect. Raises `RowError`."""
    tools = parse_json(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if not is_given(tools):
        return None
    if isinstance(tools, list):
        tools = [parse_json(tool, "a tool") for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("tools is not a list of objects")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


def parse_template_arguments(value: Any) -> dict[str, Any]:
    """Parses arguments of the chat template, an object or its JSON. Raises `RowError`."""
    arguments = parse_json(value, "chat_template_kwargs")
    if not isinstance(arguments, Mapping) or set(arguments) & set(_TEMPLATE_OWN):
        raise RowError("chat_template_kwargs is not an object of arguments of the chat template")
    return dict(arguments)


def parse_json(value: Any, where: str) -> Any:
    """Parses `value` as JSON if it is a str; returns it unchanged otherwise. Raises `RowError`."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where} is not JSON") from error


def check_unicode(text: str) -> bytes:
    """Encodes `text` as UTF-8. Raises `RowError`."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RowError("its text is not Unicode (it holds half of a surrogate pair)") from error


def text_of(value: Any, where: str) -> str:
    """Returns `value`. Raises `RowError` if it is not a str."""
    if not isinstance(value, str):
        raise RowError(f"{where} is {a(value)}, not a text")
    return value


def a(value: Any) -> str:
    """The name of a value's type with its article, such as "an int"; "null" for None."""
    name = type(value).__name__
    return "null" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
