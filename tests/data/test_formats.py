"""Tests that each format becomes the right conversation, and that errors of malformed rows say why."""

import json
from typing import Any

import pytest

from difflm_jax.data.formats import Conversation, parse_row
from difflm_jax.data.sources import RowError


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


QA = [user("Q"), assistant("A")]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"messages": QA, "prompt": "Q", "text": "t"}, "messages", QA),
        ({"messages": [*QA], "system": "S"}, "messages", [system("S"), *QA]),
        ({"messages": [system("T"), *QA], "system": "S"}, "messages", [system("T"), *QA]),
        ({"messages": None, "question": "Q", "answer": "A"}, "question/answer", QA),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "conversations", QA),
        ({"conversations": QA}, "conversations", QA),
        ({"prompt": "Q", "response": "A"}, "prompt/response", QA),
        ({"prompt": "Q", "completion": "A", "chosen": "B"}, "prompt/completion", QA),
        ({"prompt": [system("S"), user("Q")], "completion": [assistant("A")]}, "prompt/completion", [system("S"), *QA]),
        ({"question": "Q", "answer": "A"}, "question/answer", QA),
        ({"instruction": "Q", "input": "", "output": "A", "text": "t"}, "alpaca", QA),
        ({"instruction": "Q", "input": None, "output": "A"}, "alpaca", QA),
        ({"instruction": "Q", "input": "I", "output": "A"}, "alpaca", [user("Q\n\nI"), assistant("A")]),
    ],
)
def test_chat_formats(row: dict[str, Any], name: str, messages: list[dict[str, Any]]) -> None:
    assert parse_row(row) == (name, Conversation(messages))


def test_text() -> None:
    assert parse_row({"text": "Once", "meta": {}}) == ("text", "Once")


def test_sharegpt_with_tools() -> None:
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    turns = [("human", "Q"), ("function_call", call), ("observation", "[1]"), ("gpt", "A")]
    row = {
        "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
        "tools": json.dumps([{"name": "f", "parameters": {}}]),
    }
    _, conversation = parse_row(row)
    assert conversation.messages == [
        user("Q"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": "[1]"},
        assistant("A"),
    ]
    assert conversation.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_null_contents_typed_parts_and_tool_calls() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": None, "value": "!"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "content": "r", "tool_call_id": "c1", "name": "f"},
        {
            "role": "assistant",
            "content": [
                {"type": "reasoning", "value": "R"},
                {"type": "tool_call", "value": json.dumps(CALL["function"])},
            ],
        },
        {"role": "tool", "content": None},
        {"role": "assistant", "content": "A", "tool_calls": None, "name": None},
    ]
    assert parse_row({"messages": messages})[1].messages == [
        user("Q!"),
        assistant("", tool_calls=[{"id": "c1", **CALL}]),
        {"role": "tool", "content": "r", "tool_call_id": "c1", "name": "f"},
        assistant("", reasoning_content="R", tool_calls=[CALL]),
        {"role": "tool", "content": ""},
        assistant("A"),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("words", "is a str, not an object"),
        ([1], "is a list, not an object"),
        ({"a": 1, "b": None}, "has the keys a; known formats: messages, conversations, prompt/response, "),
        ({}, r"has the keys \(none\); known formats"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": "hello"}, "messages is a str, not a list"),
        ({"messages": ["hello"]}, "message 0 is a str, not an object"),
        ({"messages": [user("Q"), {"role": "robot", "content": "A"}]}, "message 1 has the unknown role 'robot'"),
        ({"messages": [{"content": "A"}]}, "message 0 has the unknown role None"),
        ({"messages": [{"role": ["user"], "content": "A"}]}, r"message 0 has the unknown role \['user'\]"),
        ({"messages": [{"role": "user", "content": 5}]}, "content of message 0 is an int, not a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of type 'image', which is not text"),
        ({"messages": [assistant("", tool_calls=[{"id": 1}])]}, "a tool call of message 0 names no function"),
        ({"messages": QA, "tools": "{"}, "tools is not JSON"),
        ({"messages": QA, "tools": [1]}, "tools is not a list of objects"),
        ({"conversations": [{"from": "alien", "value": "Q"}]}, "unknown speaker 'alien' in turn 0"),
        ({"conversations": {"from": "human"}}, "conversations is a dict, not a list"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "function_call of turn 0 is not JSON"),
        ({"question": "Q", "answer": ["A"]}, "answer is a list, not a text"),
        ({"text": " \n"}, "the text is empty"),
    ],
)
def test_malformed_rows(row: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse_row(row)
