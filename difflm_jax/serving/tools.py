"""Parses function calls in an answer, in the format of Qwen and Hermes.

<tool_call>{"name": ..., "arguments": {...}}</tool_call>
"""

import dataclasses
import json
import re

TOOL_CALL = "<tool_call>"
_CALLS = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Call:
    """A function's name, and its arguments as JSON text."""

    name: str
    arguments: str


def parse_calls(text: str) -> tuple[str, list[Call]]:
    """Splits an answer into (text before the first call, calls).

    If any call is not complete JSON of that form, the whole answer is text and has no calls.
    """
    start = text.find(TOOL_CALL)
    if start < 0:
        return text, []
    calls = [_call(found) for found in _CALLS.findall(text[start:])]
    if not all(calls) or _CALLS.sub("", text[start:]).strip():
        return text, []
    return text[:start], calls


def _call(text: str) -> Call | None:
    try:
        call = json.loads(text.strip(), parse_constant=_refuse)
        json.dumps(call, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        return Call(call["name"], arguments)
    return Call(call["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
