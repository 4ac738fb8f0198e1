"""Constrained answers: JSON by a schema, a pattern, one of several texts, a tool call."""

import json
import re

import openai
import pytest

import difflm_jax
from difflm_jax.serving.engine import Engine
from tests.serving.conftest import serving
from tests.serving.test_openai_client import MESSAGES, events
from tests.tiny_checkpoint import save_tiny_model

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "size": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["city", "size"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {**SCHEMA, "required": [*SCHEMA["required"]]}}}
    for name in ("visit", "leave")
]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A causal model with room for descriptions of tools in bytes."""
    directory = save_tiny_model(tmp_path_factory.mktemp("long"), max_position_embeddings=1024)
    lm = difflm_jax.load(directory, causal=True, dtype="float32")
    canvas = difflm_jax.load(directory, attention="full", dtype="float32")
    with serving(Engine({"tiny:base": lm, "tiny": canvas}), max_length=1024) as found:
        yield found


@pytest.fixture(scope="module")
def sdk(client):
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="-", max_retries=0)


def ask(sdk, **body):
    body = {"model": "tiny:base", "messages": MESSAGES, "max_tokens": 96, "temperature": 1.0, **body}
    return sdk.chat.completions.create(**body).choices[0]


def is_place(value) -> bool:
    return value["city"] in ("Rome", "Oslo") and value["size"] in range(100) and set(value) == {"city", "size"}


@pytest.mark.slow
def test_json_keeps_to_its_schema(sdk, client):
    """Proves with a random model that every drawn answer is an object of the schema, streamed or not."""
    for seed in range(4):
        assert is_place(json.loads(ask(sdk, seed=seed, response_format=FORMAT).message.content))
    assert isinstance(json.loads(ask(sdk, seed=1, response_format={"type": "json_object"}).message.content), dict)
    body = {"model": "tiny:base", "messages": MESSAGES, "max_tokens": 96, "temperature": 1.0, "response_format": FORMAT}
    chunks = events(client, "/v1/chat/completions", **body, seed=0)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == ask(sdk, seed=0, response_format=FORMAT).message.content


@pytest.mark.slow
def test_a_call_that_is_required_is_made(sdk):
    """Proves that `required` gives calls of known tools with arguments of their schema, and a named one only it."""
    choice = ask(sdk, seed=0, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=160)
    call = choice.message.tool_calls[0]
    assert len(choice.message.tool_calls) == 1
    assert choice.finish_reason == "tool_calls" and call.function.name in ("visit", "leave")
    assert is_place(json.loads(call.function.arguments))
    named = {"type": "function", "function": {"name": "leave"}}
    choice = ask(sdk, seed=0, tools=TOOLS, tool_choice=named, max_tokens=160)
    assert [call.function.name for call in choice.message.tool_calls] == ["leave"]


def test_a_pattern_and_a_choice_are_kept_to(sdk):
    said = ask(sdk, seed=0, extra_body={"diffusion": {"regex": r"\d{3}-[ab]+x"}}, max_tokens=24).message.content
    assert re.fullmatch(r"\d{3}-[ab]+x", said)
    assert ask(sdk, seed=0, extra_body={"diffusion": {"choice": ["yes", "no"]}}).message.content in ("yes", "no")


@pytest.mark.slow
def test_a_model_that_fills_masks_keeps_to_a_form_too(sdk, client):
    said = ask(
        sdk, model="tiny", seed=0, extra_body={"diffusion": {"regex": r"\d{3}-[ab]+x", "steps": 8}}, max_tokens=16
    )
    assert re.fullmatch(r"\d{3}-[ab]+x", said.message.content)
    place = ask(sdk, model="tiny", seed=0, response_format=FORMAT, max_tokens=48).message.content
    assert is_place(json.loads(place))
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 48, "temperature": 1.0, "response_format": FORMAT}
    chunks = events(client, "/v1/chat/completions", **body, seed=0)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == place


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"response_format": FORMAT, "extra_body": {"diffusion": {"regex": "a"}}}, "two grammars for one answer"),
        ({"extra_body": {"diffusion": {"regex": "(a"}}}, r"regex: missing \)"),
        ({"extra_body": {"diffusion": {"regex": "((a{1,999}){1,999}){1,999}"}}}, "too large|states|simpler"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}}, "no"),
        ({"response_format": {"type": "json_schema"}}, "needs it"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "go"}}}, "'go' is not one of"),
        ({"tool_choice": "required"}, "there are no tools"),
    ],
)
def test_a_form_that_cannot_be_kept_to_is_refused(sdk, more, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(sdk, **more)
