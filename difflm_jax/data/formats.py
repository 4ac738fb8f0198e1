"""What a row means: from one of six formats, told by its keys, to a conversation or a plain text."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from difflm_jax.data.sources import RowError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

# ShareGPT's names of the speakers.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}

# Fields of a message that chat templates read beside role and content.
_KEPT_FIELDS = ("reasoning_content", "name", "tool_call_id")

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them: content is a str, tool calls have the shape of OpenAI's interface with
    the arguments parsed, `tools` is a list of function descriptions or None.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def parse_row(row: Any) -> tuple[str, Conversation | str]:
    """(name of the format, conversation or text) of a row.

    Formats, by the first whose keys are there and not null: messages; conversations (ShareGPT); prompt with response
    or completion; question/answer; instruction/output with an optional input (Alpaca); text. `tools`, and `system` if
    the conversation does not begin with one, are taken beside any chat format; other keys are not read. Raises
    `RowError`.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"is {_a(row)}, not an object")
    keys = {key for key, value in row.items() if value is not None}
    for name, needed, read in _FORMATS:
        if keys.issuperset(needed):
            return name, read(row) if name == "text" else _conversation(read(row), row)
    known = ", ".join("/".join(needed) for _, needed, _ in _FORMATS)
    raise RowError(f"has the keys {', '.join(map(str, sorted(keys, key=str))) or '(none)'}; known formats: {known}")


def parse_messages(messages: Any, tools: Any = None) -> Conversation:
    """Checks and normalises messages: null contents become empty, typed parts are joined, tool calls are parsed.

    Raises `RowError`.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RowError(f"messages is {_a(messages)}, not a list")
    if not messages:
        raise RowError("the conversation is empty")
    return Conversation([_message(message, i) for i, message in enumerate(messages)], _tools(tools))


def _conversation(messages: Any, row: Mapping[str, Any]) -> Conversation:
    conversation = parse_messages(messages, row.get("tools"))
    system = row.get("system")
    if system and conversation.messages[0]["role"] != "system":
        return dataclasses.replace(
            conversation, messages=[_say("system", _text(system, "system")), *conversation.messages]
        )
    return conversation


def _say(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _prompt_and_answer(row: Mapping[str, Any], prompt_key: str, answer_key: str) -> list[Message]:
    """Two messages; each of the two may also be a list of messages already."""
    return [*_turns(row[prompt_key], "user", prompt_key), *_turns(row[answer_key], "assistant", answer_key)]


def _turns(value: Any, role: str, where: str) -> list[Message]:
    if isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
        return value
    return [_say(role, _text(value, where))]


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    instruction, addition = _text(row["instruction"], "instruction"), row.get("input")
    if addition:
        instruction = f"{instruction}\n\n{_text(addition, 'input')}"
    return [_say("user", instruction), _say("assistant", _text(row["output"], "output"))]


def _sharegpt(row: Mapping[str, Any]) -> list[Message]:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise RowError(f"conversations is {_a(turns)}, not a list")
    return [_turn(turn, i) for i, turn in enumerate(turns)]


def _turn(turn: Any, i: int) -> Message:
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn  # messages under another name, or what `parse_messages` will refuse
    speaker, value = turn["from"], turn.get("value")
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(f"unknown speaker {speaker!r} in turn {i}")
    if speaker == "function_call":
        return {"role": role, "content": "", "tool_calls": _parsed(value, f"function_call of turn {i}")}
    return _say(role, value)


def _plain_text(row: Mapping[str, Any]) -> str:
    text = _text(row["text"], "text")
    if not text.strip():
        raise RowError("the text is empty")
    return text


_FORMATS = (
    ("messages", ("messages",), lambda row: row["messages"]),
    ("conversations", ("conversations",), _sharegpt),
    ("prompt/response", ("prompt", "response"), lambda row: _prompt_and_answer(row, "prompt", "response")),
    ("prompt/completion", ("prompt", "completion"), lambda row: _prompt_and_answer(row, "prompt", "completion")),
    ("question/answer", ("question", "answer"), lambda row: _prompt_and_answer(row, "question", "answer")),
    ("alpaca", ("instruction", "output"), _alpaca),
    ("text", ("text",), _plain_text),
)


def _message(message: Any, i: int) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(f"message {i} is {_a(message)}, not an object")
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"message {i} has the unknown role {role!r}; known: {', '.join(ROLES)}")
    result = {"role": role} | _content(message.get("content"), f"content of message {i}")
    for field in _KEPT_FIELDS:
        if message.get(field) is not None:
            result[field] = message[field]
    if message.get("tool_calls"):
        result["tool_calls"] = _tool_calls(message["tool_calls"], i)
    elif "tool_calls" in result:
        result["tool_calls"] = _tool_calls(result["tool_calls"], i)
    return result


def _content(content: Any, where: str) -> Message:
    """The fields of a message that its content holds: text, and reasoning and tool calls if it is a list of parts."""
    if content is None:
        return {"content": ""}
    if isinstance(content, str):
        return {"content": content}
    if not isinstance(content, list):
        raise RowError(f"{where} is {_a(content)}, not a text")
    texts: dict[str, list[str]] = {"text": [], "reasoning": []}
    calls: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "tool_call":
            parsed = _parsed(part.get("value", part.get("tool_call")), where)
            calls += parsed if isinstance(parsed, list) else [parsed]
        elif kind in texts:
            value = part.get(kind) if part.get(kind) is not None else part.get("value")
            texts[kind].append(_text(value, where))
        else:
            raise RowError(f"{where} has a part of type {kind!r}, which is not text")
    result = {"content": "".join(texts["text"])}
    if texts["reasoning"]:
        result["reasoning_content"] = "".join(texts["reasoning"])
    if calls:
        result["tool_calls"] = calls
    return result


def _tool_calls(calls: Any, i: int) -> list[Message]:
    calls = calls if isinstance(calls, list) else [calls]
    return [_tool_call(call, f"a tool call of message {i}") for call in calls]


def _tool_call(call: Any, where: str) -> Message:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"{where} names no function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, where) if arguments.strip() else {}
    result = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    return result if call.get("id") is None else {"id": call["id"]} | result


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """Function descriptions from a list or the JSON of one, each in the wrapper that templates expect."""
    tools = _parsed(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("tools is not a list of objects")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


def _parsed(value: Any, where: str) -> Any:
    """`value`, parsed if it is the text of a JSON value."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where} is not JSON") from error


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{where} is {_a(value)}, not a text")
    return value


def _a(value: Any) -> str:
    name = type(value).__name__
    return "null" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
