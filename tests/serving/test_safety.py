"""Robustness of the server: keys, limits, time-outs, clients that disconnect, and malformed bodies."""

import base64
import contextlib
import copy
import dataclasses
import json
import random
import socket
import threading
import time

import httpx
import numpy as np
import openai
import pytest

from difflm_jax.serving.app import Server
from difflm_jax.serving.engine import Engine, EngineOptions
from difflm_jax.serving.guard import OPEN_ROUTES
from difflm_jax.serving.options import ServeOptions
from difflm_jax.serving.requests import Busy, Update
from tests.serving.conftest import serving
from tests.serving.scripted import ScriptedEngine, finished

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
TOKENS = np.array([72, 73, 74], np.int32)


def answer(ticket):
    ticket.tell(Update(TOKENS[:2], 1))
    ticket.finish(finished(TOKENS))


def until_cancelled(ticket):
    ticket.tell(Update(TOKENS[:1], 1))
    while not ticket.cancelled:
        time.sleep(0.01)
    ticket.finish(finished(TOKENS[:1], "cancelled", error=ticket.cancelled))


def _connection(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)


def _head(path: str, length: int) -> bytes:
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}"
    return f"{head}\r\n\r\n".encode()


@pytest.fixture(scope="module")
def quick(tiny_lm):
    """A server that answers at once."""
    with serving(ScriptedEngine({"tiny": tiny_lm}, answer), max_body_bytes=20_000) as found:
        yield found


def test_the_key_is_asked_for_on_every_route_but_health(tiny_lm):
    with serving(ScriptedEngine({"tiny": tiny_lm}, answer), api_key="sésame") as client:
        routes = Server(client.engine, ServeOptions()).app().routes
        assert len(routes) >= 9 and OPEN_ROUTES == ("/health",)
        wrong = [
            None,
            "Bearer sesame",
            "Bearer",
            "Basic !!",
            "sésame".encode(),
            b"Bearer s\xc3",
            "Bearer sésame2".encode(),
        ]
        for route in routes:
            path = route.path.replace("{name:path}", "tiny")
            for method in route.methods & {"GET", "POST"}:
                for key in wrong:
                    headers = {} if key is None else {"Authorization": key}
                    response = client.request(method, path, headers=headers)
                    assert response.status_code == (200 if path == "/health" else 401), (path, key)
        assert client.get("/no/such/route").status_code == 401
        basic = base64.b64encode("any:sésame".encode()).decode()
        for key in ("Bearer sésame".encode(), f"Basic {basic}"):
            assert client.get("/v1/models", headers={"Authorization": key}).status_code == 200
        refused = client.get("/v1/models")
        assert refused.headers["www-authenticate"].startswith("Basic") and "sésame" not in refused.text
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_page_of_another_site_cannot_speak_to_a_local_server(tiny_lm):
    engine = ScriptedEngine({"tiny": tiny_lm}, answer)
    with serving(engine, hosts=("127.0.0.1", "localhost", "[::1]")) as client:
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost@evil.example:80", ""):
            assert client.get("/v1/models", headers={"Host": host}).status_code in (400, 421), host
        for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:80", "LOCALHOST"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200, host
        form = client.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"Content-Type": "text/plain"})
        assert form.status_code == 415 and not engine.tickets
        assert "access-control-allow-origin" not in client.get("/v1/models", headers={"Origin": "http://evil"}).headers


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 10**9}, "n"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"min_tokens": 10**9}, "min_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": 300, "max_tokens": None}, "max_tokens"),
        ({"top_logprobs": 10**6, "logprobs": True}, "top_logprobs"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 10_000}, "stop"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"264": 1}}, "logit_bias"),
        ({"logit_bias": {"1": float("inf")}}, "logit_bias.1"),
        ({"logit_bias": {"1": float("nan")}}, "logit_bias.1"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
        ({"generation_config": '{"\\ud800": 1}'}, "generation_config"),
        ({"temperature": float("nan")}, "temperature"),
        ({"diffusion": {"steps": 10**9}}, "diffusion.steps"),
        ({"diffusion": {"block_length": 10**12}}, "diffusion.block_length"),
        ({"diffusion": {"temperature": float("nan")}}, "diffusion"),
        ({"chat_template": "{% for i in range(10**9) %}x{% endfor %}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"tools": "x"}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"a": {"b": 1}}}, "chat_template_kwargs.a"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {"id": "a", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "<|mask|>"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
         "messages.0.content.0.type"),
    ],
)  # fmt: skip
def test_what_is_out_of_bounds_is_refused_by_name(quick, more, param):
    before = len(quick.engine.tickets)
    body = json.dumps({**CHAT, **more})
    response = quick.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param, response.text
    assert "\n" not in error["message"] and len(error["message"]) < 500
    assert len(quick.engine.tickets) == before


def test_masks_of_an_infilling_are_counted_before_they_are_made(quick):
    body = {"prompt": "a", "suffix": "b", "max_tokens": 10**12}
    assert quick.post("/v1/completions", json=body).json()["error"]["param"] == "max_tokens"
    many = {"prompt": ["a"] * 17, "max_tokens": 1}
    assert quick.post("/v1/completions", json=many).json()["error"]["param"] == "n"


def test_a_template_that_loops_ends_in_an_error(tiny_lm):
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    loop = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = loop + tiny_lm.tokenizer.chat_template
    lm = dataclasses.replace(tiny_lm, tokenizer=tokenizer)
    with serving(ScriptedEngine({"loops": lm, "tiny": tiny_lm}, answer), template_seconds=0.5) as client:
        start = time.monotonic()
        refused = client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 400 and "template took longer than 0.5 s" in refused.text
        assert time.monotonic() - start < 20
        assert client.post("/v1/chat/completions", json={**CHAT, "model": "tiny"}).status_code == 200


def test_a_template_cannot_leave_its_sandbox(tiny_lm):
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}" + tiny_lm.tokenizer.chat_template
    lm = dataclasses.replace(tiny_lm, tokenizer=tokenizer)
    with serving(ScriptedEngine({"bad": lm}, answer)) as client:
        refused = client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 400 and "unsafe" in refused.text


def test_a_body_that_is_too_large_is_refused_while_it_arrives(quick):
    def endless():
        for _ in range(1000):
            yield b" " * 1000

    headers = {"Content-Type": "application/json"}
    response = quick.post("/v1/chat/completions", content=endless(), headers=headers)
    assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"


def test_a_body_that_never_ends_does_not_hold_its_connection(tiny_lm):
    with serving(ScriptedEngine({"tiny": tiny_lm}, answer), body_seconds=0.3) as client, _connection(client) as slow:
        slow.sendall(_head("completions", 9) + b"{")
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_full_queue_says_when_to_come_again(tiny_lm):
    class Full(ScriptedEngine):
        def submit(self, request):
            if self.tickets:
                raise Busy("2 requests are waiting already", retry_after=2.4)
            return super().submit(request)

    engine = Full({"tiny": tiny_lm}, until_cancelled)
    with serving(engine) as client:
        refused = client.post("/v1/chat/completions", json={**CHAT, "n": 2})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
        assert [ticket.cancelled for ticket in engine.tickets] == ["the queue is full"]  # what was taken is given up
        with pytest.raises(openai.RateLimitError):
            openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="-", max_retries=0).chat.completions.create(
                model="tiny", **CHAT
            )


def test_health_says_whether_the_engine_lives_and_ready_whether_it_has_room(tiny_lm):
    with serving(ScriptedEngine({"tiny": tiny_lm}, answer)) as client:
        assert (client.get("/health").status_code, client.get("/ready").status_code) == (200, 200)
        client.engine.stats = lambda: {"ready": False, "waiting": client.engine.options.queue}
        assert (client.get("/health").status_code, client.get("/ready").status_code) == (200, 503)
        client.engine.stats, client.engine.is_alive = lambda: {"ready": True, "waiting": 0}, False
        assert (client.get("/health").status_code, client.get("/ready").status_code) == (503, 503)
    engine = Engine({"tiny": tiny_lm})
    assert engine.is_alive
    engine.close()
    assert not engine.is_alive


def test_a_request_that_fails_ends_alone(tiny_lm):
    def script(ticket):
        if ticket.request.max_new_tokens == 7:
            ticket.tell(Update(TOKENS[:1], 1))
            return ticket.finish(finished(TOKENS[:1], "failed", error="secret of the server"))
        answer(ticket)

    with serving(ScriptedEngine({"tiny": tiny_lm}, script)) as client:
        bad = {**CHAT, "max_tokens": 7}
        refused = client.post("/v1/chat/completions", json=bad)
        assert refused.status_code == 500 and "secret" not in refused.text
        assert refused.headers["x-should-retry"] == "false"
        sdk = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="-", max_retries=0)
        with pytest.raises(openai.APIError, match="the server's log says why"):
            list(sdk.chat.completions.create(model="tiny", stream=True, **bad))
        assert client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"]


def test_a_request_that_takes_too_long_ends_in_a_time_out(tiny_lm):
    with serving(Engine({"tiny": tiny_lm}), time_limit=0.001) as client:
        refused = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 64})
        assert refused.status_code == 504 and refused.json()["error"]["code"] == "timeout"
        with client.stream("POST", "/v1/chat/completions", json={**CHAT, "max_tokens": 64, "stream": True}) as stream:
            data = [line for line in stream.iter_lines() if line.startswith("data")]
        assert '"error"' in data[-1] and "time limit of 0.001 s" in data[-1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_row(tiny_lm, wait, stream):
    engine = ScriptedEngine({"tiny": tiny_lm}, until_cancelled)
    with serving(engine) as client:
        body = json.dumps({**CHAT, "stream": stream, "n": 2})
        with _connection(client) as connection:
            connection.sendall(_head("chat/completions", len(body)) + body.encode())
            wait(lambda: len(engine.tickets) == 2)
            if stream:
                assert b"text/event-stream" in connection.recv(65536)
        wait(lambda: all(ticket.done for ticket in engine.tickets))
        assert all(ticket.cancelled == "the client has gone" for ticket in engine.tickets)


def _spoilt(rng: random.Random, body: dict) -> bytes:
    """A body of random keys and values, or with bytes changed, lost or added."""
    values = [None, True, -1, 0, 2**70, 1.5, float("nan"), "", "x", "\x00", "�", [], {}, [[]], {"a": {}}, [None] * 50]
    names = [*body, "stop", "n", "diffusion", "tools", "tool_choice", "response_format", "logit_bias", "stream_options",
             "generation_config", "chat_template_kwargs", "suffix", "prompt", "messages", "logprobs"]  # fmt: skip
    spoilt = dict(body)
    for _ in range(rng.choice([0, 1, 1, 2])):
        spoilt[rng.choice(names)] = rng.choice(values)
    if rng.random() < 0.3:
        spoilt["diffusion"] = {rng.choice(["steps", "threshold", "remask", "cache", "regex", "x"]): rng.choice(values)}
    data = bytearray(json.dumps(spoilt).encode())
    for _ in range(rng.choice([0, 0, 0, 1, 4])):
        place = rng.randrange(len(data))
        data[place : place + rng.randint(0, 2)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 2)))
    return bytes(data)


def test_two_hundred_bad_bodies_are_answered_and_none_breaks_the_server(quick):
    rng, counts = random.Random(0), {}
    for number in range(200):
        path, body = rng.choice(
            [("chat/completions", CHAT), ("completions", {"prompt": "a"}), ("tokenize", {"prompt": "a"})]
        )
        headers = {"Content-Type": "application/json"}
        response = quick.post(f"/v1/{path}", content=_spoilt(rng, body), headers=headers)
        assert response.status_code in (200, 400, 404), (number, response.text)
        if response.status_code != 200:
            message = response.json()["error"]["message"]
            assert message and "\n" not in message and "Traceback" not in message
        counts[response.status_code] = counts.get(response.status_code, 0) + 1
    assert counts[400] > 100 and counts.get(200, 0) > 5
    assert quick.post("/v1/chat/completions", json=CHAT).status_code == 200


@pytest.mark.slow
def test_random_cancels_leave_the_engine_free(tiny_lm, wait):
    """Proves that clients that go at any moment leave no row taken, and that later answers are right."""
    with serving(Engine({"tiny": tiny_lm}, EngineOptions(rows=2, queue=4)), max_length=256) as client:
        expected = client.post("/v1/chat/completions", json={**CHAT, "seed": 0}).json()["choices"]
        rng, statuses = random.Random(1), []

        def ask():
            with contextlib.suppress(httpx.TimeoutException), httpx.Client(base_url=client.base_url) as own:
                limit = rng.choice([0.02, 0.1, 0.3, 10])
                body = {**CHAT, "max_tokens": rng.choice([8, 64, 128]), "stream": rng.random() < 0.5}
                statuses.append(own.post("/v1/chat/completions", json=body, timeout=limit).status_code)

        threads = [threading.Thread(target=ask) for _ in range(30)]
        for thread in threads:
            thread.start()
            time.sleep(rng.random() * 0.1)
        for thread in threads:
            thread.join(60)
        wait(lambda: client.engine.stats()["running"] == client.engine.stats()["waiting"] == 0)
        assert set(statuses) <= {200, 429}
        assert client.post("/v1/chat/completions", json={**CHAT, "seed": 0}).json()["choices"] == expected
