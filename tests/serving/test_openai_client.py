"""The real `openai` client against a running server: streaming or not, one thread or an event loop."""

import asyncio
import json

import numpy as np
import openai
import pytest
from openai.types import Completion
from openai.types import completion_create_params as text_params
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_params

from difflm_jax.serving.schemas import REFUSED, ChatRequest, CompletionRequest

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def sdk(client):
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="any", max_retries=0)


def events(client, path: str, **body):
    """The data of a stream's events, as sent; the last must be [DONE]."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(text) for text in data]


def test_a_chat_is_what_generate_answers(sdk, tiny_lm):
    answer = sdk.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=12, extra_body={"diffusion": {"steps": 6}}
    )
    expected = tiny_lm.generate([MESSAGES], max_new_tokens=12, steps=6)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", expected.texts[0])
    assert answer.usage.prompt_tokens == len(tiny_lm.prompts.prompt(MESSAGES))
    assert answer.usage.completion_tokens == len(expected.tokens[0])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert choice.finish_reason == ("stop" if int(expected.tokens[0][-1]) in tiny_lm.eos_token_ids else "length")
    assert answer.diffusion == {
        "passes": int(expected.steps[0]),
        "tokens_per_pass": pytest.approx(len(expected.tokens[0]) / expected.steps[0], abs=1e-3),
        "algorithm": "confidence",
        "acceptance": None,
        "seed": answer.diffusion["seed"],
    }


@pytest.mark.parametrize("options", [{}, {"stop": ["Y"]}, {"seed": 3, "temperature": 1.0}])
def test_joined_deltas_are_the_answer(sdk, options):
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16, "seed": 1, **options}
    whole = sdk.chat.completions.create(**asked)
    stream = list(sdk.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    content = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert content == whole.choices[0].message.content
    assert stream[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in stream if c.choices][-1] == whole.choices[0].finish_reason
    assert stream[-1].choices == [] and stream[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in stream[:-1])
    assert len({chunk.id for chunk in stream}) == 1


def test_an_event_loop_reads_several_streams_at_once(client):
    async def ask(sdk, seed: int) -> str:
        stream = await sdk.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=16, stream=True, seed=seed, temperature=1.0
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="any", max_retries=0) as sdk:
            return await asyncio.gather(*(ask(sdk, seed) for seed in (0, 1, 2, 0)))

    texts = asyncio.run(together())
    assert texts[0] == texts[3] and len(set(texts)) == 3


def test_every_object_is_valid_under_the_types_of_the_client(client):
    chat = {"messages": MESSAGES, "max_tokens": 12, "n": 2, "stream_options": {"include_usage": True}}
    for chunk in events(client, "/v1/chat/completions", **chat, diffusion={"drafts": True, "steps": 4}):
        ChatCompletionChunk.model_validate(chunk, strict=True)
    text = {"prompt": ["Hi", "you"], "max_tokens": 12, "n": 2, "logprobs": 2}
    chunks = events(client, "/v1/completions", **text, stream_options={"include_usage": True})
    for chunk in chunks:
        for choice in chunk["choices"]:  # null before the end, as OpenAI sends it; the client has no type for a chunk
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        Completion.model_validate(chunk, strict=True)
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1, 2, 3}
    del chat["stream_options"]
    ChatCompletion.model_validate(client.post("/v1/chat/completions", json=chat).json(), strict=True)
    Completion.model_validate(client.post("/v1/completions", json=text).json(), strict=True)


def test_a_completion_continues_a_text_and_echoes_it(sdk, tiny_lm):
    expected = tiny_lm.generate([tiny_lm.prompts.canvas("Once")], max_new_tokens=8, steps=8).texts[0]
    answer = sdk.completions.create(model="tiny", prompt="Once", max_tokens=8)
    assert answer.choices[0].text == expected
    assert (
        sdk.completions.create(model="tiny", prompt="Once", max_tokens=8, echo=True).choices[0].text
        == "Once" + expected
    )
    tokens = tiny_lm.prompts.canvas("Once").tolist()
    assert sdk.completions.create(model="tiny", prompt=tokens, max_tokens=8).choices[0].text == expected
    both = sdk.completions.create(model="tiny", prompt=["Once", "Twice"], max_tokens=8)
    assert both.choices[0].text == expected and both.choices[1].index == 1
    stream = sdk.completions.create(model="tiny", prompt="Once", max_tokens=8, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Once" + expected


def test_a_suffix_makes_it_an_infilling(sdk, tiny_lm):
    before, after = (tiny_lm.prompts.canvas(text).tolist() for text in ("def f(", "return x"))
    canvas = [*before, *[tiny_lm.mask_token_id] * 6, *after]
    filled = tiny_lm.infill([canvas], steps=6).tokens[0][len(before) : len(before) + 6]
    asked = {"model": "tiny", "prompt": "def f(", "suffix": "return x", "max_tokens": 6}
    answer = sdk.completions.create(**asked)
    assert answer.choices[0].text == tiny_lm.tokenizer.decode(filled.tolist(), skip_special_tokens=True)
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(before) + len(after), 6)
    stream = sdk.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_the_base_is_a_model_of_its_own(sdk, tiny_lm):
    assert [model.id for model in sdk.models.list()] == ["tiny", "tiny:base"]
    assert sdk.models.retrieve("tiny:base").diffusion["attention"] == "causal"
    answer = sdk.chat.completions.create(model="tiny:base", messages=MESSAGES, max_tokens=8)
    expected = tiny_lm.base().generate([MESSAGES], max_new_tokens=8, steps=8)
    assert answer.model == "tiny:base" and answer.choices[0].message.content == expected.texts[0]


def test_errors_are_those_that_the_client_knows(sdk):
    with pytest.raises(openai.NotFoundError, match="there is no 'gpt-5' here; there are tiny, tiny:base"):
        sdk.chat.completions.create(model="gpt-5", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="presence_penalty: not supported") as caught:
        sdk.chat.completions.create(model="tiny", messages=MESSAGES, presence_penalty=0.5)
    assert caught.value.param == "presence_penalty"
    with pytest.raises(openai.BadRequestError, match="more than the 256") as caught:
        sdk.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=300)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match=r"did you mean diffusion\.threshold"):
        sdk.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"diffusion": {"treshold": 0.9}})


@pytest.mark.parametrize(
    ("kind", "params"), [(ChatRequest, chat_params), (CompletionRequest, text_params)], ids=["chat", "completion"]
)
def test_every_field_of_the_client_is_honoured_or_refused_by_name(kind, params):
    own = {**params.CompletionCreateParamsBase.__annotations__, "stream": bool}
    assert len(own) > 15
    assert [name for name in own if name not in kind.model_fields and name not in REFUSED] == []


def test_tokenize_counts_what_a_prompt_takes(client, tiny_lm):
    said = client.post("/v1/tokenize", json={"messages": MESSAGES, "return_token_strs": True}).json()
    np.testing.assert_array_equal(said["tokens"], tiny_lm.prompts.prompt(MESSAGES))
    assert (said["count"], said["max_model_len"], len(said["token_strs"])) == (len(said["tokens"]), 256, said["count"])
    assert client.post("/v1/tokenize", json={"prompt": "Hi"}).json()["tokens"] == tiny_lm.prompts.canvas("Hi").tolist()
