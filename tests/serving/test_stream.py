"""Streams event by event, from a scripted engine: drafts, log-probabilities, tool calls, bytes."""

import dataclasses
import itertools
import json
import re
import time

import numpy as np
import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families

from difflm_jax.serving.requests import Draft, TokenProbability, Update
from tests.byte_tokenizer import byte_tokenizer
from tests.serving.conftest import serving
from tests.serving.scripted import ScriptedEngine, finished
from tests.serving.test_openai_client import events

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALLS = (
    'Let me.<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>{"name": "é", "arguments": {}}</tool_call>'
)
_TOKENIZER = byte_tokenizer()


def encoded(text: str) -> np.ndarray:
    return np.asarray(_TOKENIZER(text, add_special_tokens=False)["input_ids"], np.int32)


def says(text: str, **fields):
    """A script that says `text` a token at a time."""
    tokens = encoded(text)

    def script(ticket):
        for count in range(1, len(tokens)):
            ticket.tell(Update(tokens[:count], count, fields.get("logprobs", ())[:count]))
            time.sleep(0.001)
        ticket.finish(finished(tokens, fields.get("reason", "stop"), logprobs=fields.get("logprobs", ())))

    return script


def server(lm, script, **options):
    return serving(ScriptedEngine({"tiny": lm}, script), **options)


def test_characters_arrive_whole(tiny_lm):
    text = "é€😀 naïve 😀"
    with server(tiny_lm, says(text)) as client:
        chunks = events(client, "/v1/chat/completions", messages=MESSAGES)
    parts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(parts) == text and not any("�" in part for part in parts) and len(parts) > 4


def test_a_stop_string_and_what_could_begin_it_are_never_sent(tiny_lm):
    def script(ticket):
        tokens = encoded("one EN two END")
        for count in range(1, len(tokens)):
            ticket.tell(Update(tokens[:count], count))
            time.sleep(0.001)
        ticket.finish(finished(tokens, "stop"))

    with server(tiny_lm, script) as client:
        chunks = events(client, "/v1/chat/completions", messages=MESSAGES, stop=["END"])
    texts = [*itertools.accumulate(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)]
    assert texts[-1] == "one EN two " and not any(text.endswith("E") for text in texts)


def test_drafts_carry_the_canvas_in_chunks_without_text(tiny_lm):
    mask = tiny_lm.mask_token_id

    def script(ticket):
        committed = np.array([True, False, False])
        ticket.tell(
            Update(encoded("a"), 1, (), Draft(np.array([*encoded("ab"), mask]), committed, ~committed & [1, 1, 0]))
        )
        time.sleep(0.3)
        ticket.finish(finished(encoded("abc")))

    with server(tiny_lm, script) as client:
        chunks = events(client, "/v1/chat/completions", messages=MESSAGES, diffusion={"drafts": True})
        sdk = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="-")
        stream = sdk.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, extra_body={"diffusion": {"drafts": True}}
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "abc"
    drafts = [chunk for chunk in chunks if "draft" in chunk.get("diffusion", {})]
    assert drafts[0]["diffusion"] == {"passes": 1, "draft": {"pieces": ["a", "b", ""], "states": "cgo"}}
    assert all(chunk["choices"][0]["delta"] == {} for chunk in drafts)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_log_probabilities_join_to_those_of_the_whole_answer(tiny_lm, path):
    text = "aé b"
    tokens = encoded(text)
    found = tuple(TokenProbability(int(t), -0.5 * i, ((int(t), -0.5 * i), (65, -9.0))) for i, t in enumerate(tokens))
    found = (*found[:-1], dataclasses.replace(found[-1], logprob=-float("inf")))
    with server(tiny_lm, says(text, logprobs=found)) as client:
        if path == "completions":
            asked = {"prompt": "Hi", "logprobs": 2}
        else:
            asked = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
        whole = client.post(f"/v1/{path}", json=asked).json()["choices"][0]["logprobs"]
        parts = [chunk["choices"][0]["logprobs"] for chunk in events(client, f"/v1/{path}", **asked)]
    parts = [part for part in parts if part]
    for name in (
        ("content",) if path == "chat/completions" else ("tokens", "token_logprobs", "text_offset", "top_logprobs")
    ):
        assert [value for part in parts for value in part[name]] == whole[name]
    if path == "chat/completions":
        assert [one["logprob"] for one in whole["content"]] == [0.0, -0.5, -1.0, -1.5, -9999.0]
        assert whole["content"][0]["bytes"] == [97] and whole["content"][0]["top_logprobs"][1]["token"] == "b"
    else:
        assert whole["token_logprobs"][0] == 0.0 and whole["text_offset"][:2] == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_are_parsed(tiny_lm, stream):
    with server(tiny_lm, says(CALLS)) as client:
        sdk = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="-")
        asked = {"model": "tiny", "messages": MESSAGES, "tools": [TOOL]}
        if stream:
            chunks = list(sdk.chat.completions.create(**asked, stream=True))
            content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
            assert [call.index for call in calls] == [0, 1]
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = sdk.chat.completions.create(**asked).choices[0]
            content, calls, reason = choice.message.content, choice.message.tool_calls, choice.finish_reason
            one = sdk.chat.completions.create(**asked, parallel_tool_calls=False).choices[0].message
            assert len(one.tool_calls) == 1
            plain = sdk.chat.completions.create(**{**asked, "tool_choice": "none"}).choices[0]
            assert plain.message.content == CALLS and plain.finish_reason == "stop" and not plain.message.tool_calls
        assert content == "Let me." and reason == "tool_calls"
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
            ("add", {"a": 1}),
            ("é", {}),
        ]
        assert len({call.id for call in calls}) == 2


def test_log_probabilities_of_an_infilling_are_those_of_its_gap(client):
    asked = {"prompt": "Hi", "suffix": " you", "max_tokens": 6, "logprobs": 1}
    whole = client.post("/v1/completions", json=asked).json()["choices"][0]
    assert len(whole["logprobs"]["tokens"]) == 6 and max(whole["logprobs"]["token_logprobs"]) < 0
    assert whole["logprobs"]["text_offset"][0] == 0
    parts = [chunk["choices"][0]["logprobs"] for chunk in events(client, "/v1/completions", **asked)]
    for name, values in whole["logprobs"].items():
        assert [value for part in parts if part for value in part[name]] == values


def test_what_tune_chose_is_the_default_of_a_server(tiny_lm):
    """But for caches that are not exact, and a block length that does not divide the answer."""
    options = {"algorithm": "probability", "threshold": 0.8, "block_length": 4, "cache": "dual"}
    tuned = tiny_lm.with_diffusion(preset=json.dumps({"options": options}))
    paced = tiny_lm.with_diffusion(preset=json.dumps({"options": {"algorithm": "entropy", "tokens_per_pass": 3}}))
    engine = ScriptedEngine({"tuned": tuned, "paced": paced}, lambda ticket: ticket.finish(finished([97])))
    with serving(engine) as client:

        def asked(model="tuned", **more):
            body = {"model": model, "prompt": "Hi", "max_tokens": 12, **more}
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            return engine.tickets[-1].request

        one = asked()
        assert (one.sampling.algorithm, one.sampling.threshold, one.block_length) == ("probability", 0.8, 4)
        assert one.sampling.cache not in ("prefix", "dual")
        assert asked(max_tokens=13).block_length is None
        assert asked(diffusion={"threshold": 0.9}).sampling.threshold == 0.9
        assert asked(suffix="x").block_length is None
        assert (asked("paced").steps, asked("paced").sampling.algorithm) == (4, "entropy")
        assert asked("paced", diffusion={"steps": 7}).steps == 7


def test_a_default_block_length_leaves_infilling_as_it_is(tiny_lm):
    engine = ScriptedEngine({"tiny": tiny_lm}, lambda ticket: ticket.finish(finished([97])))
    with serving(engine, block_length=4) as client:
        response = client.post("/v1/completions", json={"prompt": "Hi", "suffix": "x", "max_tokens": 6})
    assert response.status_code == 200 and engine.tickets[-1].request.block_length is None


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": 1}</tool_call>',
        "<tool_call>{}",
        "a <tool_call>{} b",
        '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
    ],
)
def test_what_is_no_call_is_content(tiny_lm, text):
    with server(tiny_lm, says(text)) as client:
        chunks = events(client, "/v1/chat/completions", messages=MESSAGES, tools=[TOOL])
        whole = client.post("/v1/chat/completions", json={"messages": MESSAGES, "tools": [TOOL]}).json()["choices"][0]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    assert whole["message"]["content"] == text and whole["finish_reason"] == "stop"


def test_what_needs_a_tool_is_told_to_the_template(tiny_lm):
    with server(tiny_lm, says("x")) as client:
        said = client.post("/v1/tokenize", json={"messages": MESSAGES, "tools": [TOOL]}).json()["tokens"]
        assert "add" in tiny_lm.tokenizer.decode(said)
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        turns = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]},
                 {"role": "tool", "tool_call_id": "1", "content": "2"}]  # fmt: skip
        assert client.post("/v1/chat/completions", json={"messages": turns, "tools": [TOOL]}).status_code == 200


def test_figures_are_counted_for_prometheus(tiny_lm, wait):
    with server(tiny_lm, says("abc", reason="stop")) as client:
        body = {"messages": MESSAGES}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        events(client, "/v1/chat/completions", **body)
        client.get("/no/such/route")
        wait(lambda: re.search(r'requests_total{.*chat.*"200"} 2', client.get("/metrics").text))  # counted at its end
        families = text_string_to_metric_families(client.get("/metrics").text)
        found = {(one.name, *sorted(one.labels.items())): one.value for family in families for one in family.samples}
    chat = ("route", "/v1/chat/completions")
    assert found["difflm_requests_total", chat, ("status", "200")] == 2
    assert found["difflm_requests_total", ("route", "other"), ("status", "404")] == 1
    assert found["difflm_tokens_total", ("kind", "answer")] == 6
    assert found["difflm_answers_total", ("reason", "stop")] == 2
    assert found["difflm_time_to_first_token_seconds_count",] == 2
    assert found["difflm_tokens_per_pass_sum",] == 2.0
    assert found["difflm_engine_waiting",] == 0


def test_the_body_becomes_the_request_that_is_asked_for(tiny_lm):
    with server(tiny_lm, says("x"), sampling={"temperature": 0.5}, steps=5, time_limit=7.0) as client:
        engine = client.engine
        body = {"messages": MESSAGES, "max_completion_tokens": 9, "seed": 2**40 + 5, "stop": "q", "n": 2, "top_p": 0.9,
                "logit_bias": {"70": 5}, "logprobs": True,
                "diffusion": {"threshold": 0.8, "steps": 4, "top_k": 3}}  # fmt: skip
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        one, two = (ticket.request for ticket in engine.tickets)
        assert (one.max_new_tokens, one.steps, one.stop, one.time_limit) == (9, 4, ("q",), 7.0)
        assert (one.copy, two.copy, one.seed, two.seed) == (0, 1, 5, 5)
        assert (one.logit_bias, one.logprobs, one.drafts) == (((70, 5.0),), 0, False)
        sampling = one.sampling
        assert (sampling.threshold, sampling.top_k, sampling.top_p, sampling.temperature) == (0.8, 3, 0.9, 0.5)
        config = json.dumps({"do_sample": False, "max_new_tokens": 6, "transformers_version": "5.23.0"})
        client.post("/v1/chat/completions", json={"messages": MESSAGES, "generation_config": config})
        last = engine.tickets[-1].request
        assert (last.max_new_tokens, last.sampling.temperature, last.steps) == (6, None, 5)
