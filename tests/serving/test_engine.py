"""The engine gives the tokens of `lm.generate` under any load."""

import asyncio
import dataclasses
import gc
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import difflm_jax
from difflm_jax.errors import UserError
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.sampling.grammar.grammar import Grammar
from difflm_jax.sampling.options import sampling_options
from difflm_jax.serving.engine import Engine, EngineOptions
from difflm_jax.serving.requests import Busy, Finished, Request, Ticket
from difflm_jax.serving.work import Row, Work
from tests.tiny_checkpoint import save_tiny_model

PROMPTS = ["Hi", "A rather longer prompt than the first one, of several chunks.", "42?", "What is it? " * 4]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def adapter_of(lm, seed, rank=4, **config):
    config = LoraConfig(r=rank, lora_alpha=8, **config)
    lora = init_lora(jax.random.key(seed), lm.params, config, jnp.full(32, 0.2 - 0.1 * seed))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(seed + 1), x.shape), lora), config


@pytest.fixture(scope="module")
def base(model_dir):
    return difflm_jax.load(model_dir, causal=True, dtype="float32")


@pytest.fixture(scope="module")
def models(model_dir, base):
    """One model for each way of decoding, with a random adapter where it has one."""
    full = difflm_jax.load(model_dir, attention="full", dtype="float32")
    adapted = full.with_adapter(*adapter_of(full, 0))
    drafts = {"attention": "causal", "logit_shift": True, "gated": True, "noise": "uniform", "draft_length": 3}
    lora, config = adapter_of(full, 0)
    drafter = full.with_adapter({"layers": lora["layers"]}, config).with_diffusion(algorithm="speculative", **drafts)
    return {
        "causal": base,
        "full": adapted,
        "shifted": adapted.with_diffusion(logit_shift=True),
        "prefix": adapted.with_diffusion(attention="prefix", logit_shift=True),
        "block": adapted.with_diffusion(attention="block", block_length=4),
        "shifted block": adapted.with_diffusion(attention="block", block_length=4, logit_shift=True),
        "block_causal": adapted.with_diffusion(attention="block_causal", block_length=4),
        "speculative": drafter,
    }


def request(lm, name, prompt, max_new_tokens=12, steps=12, **options):
    given = {key: options.pop(key) for key in ("block_length", "seed", "copy", "stop", "logprobs") if key in options}
    sampling = sampling_options(lm.attention, lm.algorithm, options)
    tokens = lm.prompts.prompt(prompt)
    return Request(name, tokens, sampling, max_new_tokens=max_new_tokens, steps=steps, **given)


def generated(lm, request):
    """Returns the answer of `lm.generate` to a request."""
    sampling = {
        key: value
        for key, value in vars(request.sampling).items()
        if value is not None and value != type(request.sampling).__dataclass_fields__[key].default
    }
    if sampling["algorithm"] == "speculative" or lm.attention == "causal" or "threshold" in sampling:
        sampling.pop("schedule", None)
    given = {"steps": request.steps, "block_length": request.block_length, "seed": request.seed}
    given["grammar"] = request.grammar
    return lm.generate(
        [request.tokens] * (request.copy + 1), request.max_new_tokens, stop=request.stop, **given, **sampling
    )


def assert_same(finished, expected, copy=0):
    assert finished.error is None
    np.testing.assert_array_equal(finished.tokens, expected.tokens[copy])
    assert finished.passes == expected.steps[copy]


OPTIONS = {
    "causal": [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.2, "top_p": 0.9, "copy": 1}],
    "speculative": [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.2, "top_p": 0.9, "copy": 1}],
    "full": [{"steps": 6}, {"temperature": 0.8, "seed": 3}, {"block_length": 4, "threshold": 0.2}, {"cfg_scale": 0.5}],
    "shifted": [{"steps": 6}, {"block_length": 4, "temperature": 0.7, "copy": 1}, {"block_length": 4, "seed": 3}],
    "prefix": [{"steps": 6}, {"block_length": 6, "threshold": 0.2}, {"temperature": 0.8, "algorithm": "entropy"}],
    "block": [{"steps": 6}, {"threshold": 0.2}, {"temperature": 0.8, "seed": 3}, {"algorithm": "steady", "steps": 6}],
    "shifted block": [{"steps": 6}, {"threshold": 0.2}, {"temperature": 0.8}],
    "block_causal": [{"steps": 6}, {"threshold": 0.2}, {"temperature": 0.8}],
}


FAST = ("causal", "full", "shifted block")
KINDS = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in OPTIONS]


@pytest.mark.parametrize("name", KINDS)
def test_a_full_batch_of_mixed_options_gives_what_each_request_gives_alone(models, name):
    """Proves it for temperatures, seeds, thresholds and algorithms side by side, against one call of generate each."""
    lm = models[name]
    asked = [
        request(lm, name, prompt, **{"steps": 12, **options}) for options in OPTIONS[name] for prompt in PROMPTS[:2]
    ]
    with Engine(models, EngineOptions(rows=8, chunk=16)) as engine:
        together = [engine.submit(one) for one in asked]
        for one, ticket in zip(asked, together, strict=True):
            assert_same(ticket.result(60), generated(lm, one), one.copy)
        apart = name in ("shifted", "prefix")  # rows of one block length share passes, and these ask for several
        assert max(engine.stats()["batches"]) > (1 if apart else 2)


def test_updates_only_ever_add_to_what_is_final(models):
    lm = models["block"]
    asked = dataclasses.replace(request(lm, "block", "Hi"), drafts=True, logprobs=2)
    with Engine(models) as engine:
        events = list(engine.submit(asked))
    assert isinstance(events[-1], Finished)
    assert len(events[-1].logprobs) == len(events[-1].tokens)
    for probability, token in zip(events[-1].logprobs, events[-1].tokens, strict=True):
        assert probability.token == token == probability.candidates[0][0]
        assert probability.logprob == pytest.approx(probability.candidates[0][1])
        assert probability.logprob < 0
    for before, after in itertools.pairwise(events):
        np.testing.assert_array_equal(before.tokens, after.tokens[: len(before.tokens)])


@pytest.mark.parametrize("strategy", ["two_pass", pytest.param("one_pass", marks=pytest.mark.slow)])
def test_probabilities_of_drafted_tokens_are_those_of_the_base(models, base, strategy):
    """A cycle of two passes gave accepted tokens what the drafting pass thought of them."""
    drafter = models["speculative"]
    weak = drafter.with_adapter(jax.tree.map(lambda x: 0.01 * x, drafter.lora), drafter.model.lora)
    with Engine({"base": base, "weak": weak}) as engine:
        expected = engine.submit(request(base, "base", "Hi", logprobs=1)).result(60)
        found = engine.submit(request(weak, "weak", "Hi", logprobs=1, strategy=strategy)).result(60)
    assert found.acceptance > 0.5
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert [one.token for one in found.logprobs] == found.tokens.tolist()
    np.testing.assert_allclose(
        [one.logprob for one in found.logprobs], [one.logprob for one in expected.logprobs], atol=1e-3
    )


def test_an_infilled_canvas_is_that_of_infill(models):
    lm = models["full"]
    canvas = np.array([5, 6, lm.mask_token_id, 7, lm.mask_token_id, lm.mask_token_id, 9], np.int32)
    sampling = sampling_options(lm.attention, lm.algorithm, {})
    with Engine(models) as engine:
        finished = engine.submit(Request("full", canvas, sampling, infill=True, steps=3)).result(60)
    expected = lm.infill([canvas], steps=3)
    assert_same(finished, expected)
    assert (finished.completion_tokens, finished.finish_reason) == (3, "stop")


def test_a_stop_string_ends_the_work_at_once(models):
    lm = models["causal"]
    text = lm.generate("Hi", max_new_tokens=100, steps=100).texts[0]
    asked = request(lm, "causal", "Hi", max_new_tokens=100, steps=100, stop=(text[4:7],))
    with Engine(models) as engine:
        finished = engine.submit(asked).result(60)
    np.testing.assert_array_equal(finished.tokens, generated(lm, asked).tokens[0])
    assert finished.finish_reason == "stop"
    assert finished.passes == len(finished.tokens)


def test_a_stop_string_around_many_special_tokens_ends_an_answer(models):
    """They have no text, so the string began further back than was looked; the answer was told to be too long."""
    lm = models["causal"]
    special = next(i for i in lm.tokenizer.all_special_ids if i not in (*lm.eos_token_ids, lm.mask_token_id))
    work = Work(Ticket(request(lm, "causal", "Hi", stop=("ab",))), lm, None, 0, Row())
    ends = [lm.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "ab"]
    whole = np.array([*ends[0], *[special] * 60, *ends[1]], np.int32)
    work.row.final = lambda: whole[:-1]
    assert work.told() is None
    work.row.done, work.row.answer = True, lambda: whole
    finished = work.told()
    assert (finished.finish_reason, len(finished.tokens)) == ("stop", len(whole))


def test_a_shared_beginning_is_computed_once_and_changes_nothing(models):
    """A system prompt, and the turn before, answer included."""
    lm = models["causal"]
    first = request(lm, "causal", "You are terse, and you answer in rhymes. " * 2)
    with Engine(models, EngineOptions(chunk=16)) as engine:
        answer = engine.submit(first).result(60)
        turn = np.concatenate([first.tokens, answer.tokens, np.arange(5, 25, dtype=np.int32)])
        second = dataclasses.replace(first, tokens=turn)
        found = engine.submit(second).result(60)
        stats = engine.stats()
    assert answer.cached_tokens == 0
    assert found.cached_tokens == (len(first.tokens) + len(answer.tokens) - 1) // 16 * 16
    assert stats["cache_found"] == found.cached_tokens
    assert_same(found, generated(lm, second))


def test_kept_beginnings_stay_within_their_bytes(models):
    lm = models["causal"]
    with Engine(models, EngineOptions(chunk=16, cache_bytes=20_000)) as engine:
        for number in range(3):
            engine.submit(request(lm, "causal", f"{number} " * 40, max_new_tokens=2, steps=2)).result(60)
        assert 0 < engine.stats()["cache_bytes"] <= 20_000


def test_adapters_of_one_base_share_a_batch_and_answer_as_each_does_alone(models):
    """Of different ranks and targets, and the base itself under the same rule."""
    full = models["full"]
    bare = dataclasses.replace(full, model=full.model.clone(lora=None), lora=None)
    family = {
        "bare": bare,
        "one": full,
        "two": bare.with_adapter(*adapter_of(bare, 2, rank=2, target_modules=("q_proj", "down_proj"))),
    }
    asked = [request(lm, name, prompt, steps=6) for name, lm in family.items() for prompt in PROMPTS[:2]]
    with Engine(family) as engine:
        tickets = [engine.submit(one) for one in asked]
        for one, ticket in zip(asked, tickets, strict=True):
            assert_same(ticket.result(60), generated(family[one.model], one))
        assert max(engine.stats()["batches"]) > 2
    answers = {one.model: tuple(generated(family[one.model], one).tokens[0]) for one in asked}
    assert len(set(answers.values())) == 3


def test_drafting_adapters_of_one_base_share_a_batch(models):
    one = models["speculative"]
    lora, config = adapter_of(one, 3)
    family = {"one": one, "two": one.with_adapter({"layers": lora["layers"]}, config)}
    asked = [request(lm, name, "Hi", lookup=False) for name, lm in family.items()]
    with Engine(family) as engine:
        for ticket, asks in [(engine.submit(asks), asks) for asks in asked]:
            assert_same(ticket.result(60), generated(family[asks.model], asks))


def test_a_row_that_fails_does_not_end_the_others(models):
    lm = models["causal"]
    good, bad = request(lm, "causal", "Hi"), request(lm, "causal", "Hi", copy=1)
    bad = dataclasses.replace(bad, logit_bias=tuple((token, float("nan")) for token in range(3)))
    with Engine(models) as engine:
        tickets = [engine.submit(one) for one in (good, bad, good)]
        found = [ticket.result(60) for ticket in tickets]
    assert [one.finish_reason for one in found] == ["length", "failed", "length"]
    assert "NaN" in found[1].error
    assert_same(found[2], generated(lm, good))


def test_rows_that_are_free_take_requests_that_come_at_once(models):
    """A queue shorter than the answers of one request refused it on an idle engine."""
    with Engine(models, EngineOptions(rows=3, queue=0)) as engine:
        asked = request(models["causal"], "causal", "Hi", max_new_tokens=400, steps=400)
        tickets = [engine.submit(dataclasses.replace(asked, copy=copy)) for copy in range(3)]
        assert not engine.stats()["ready"]
        with pytest.raises(Busy):
            engine.submit(asked)
        for ticket in tickets:
            ticket.cancel()
        assert {ticket.result(60).finish_reason for ticket in tickets} == {"cancelled"}
        assert engine.stats()["ready"]


def test_a_full_queue_refuses_and_cancelled_rows_make_room(models):
    lm = models["causal"]
    asked = request(lm, "causal", "Hi", max_new_tokens=400, steps=400)
    with Engine(models, EngineOptions(rows=1, queue=2)) as engine:
        running = engine.submit(asked)
        next(iter(running))
        waiting = [engine.submit(asked) for _ in range(2)]
        with pytest.raises(Busy):
            engine.submit(asked)
        for ticket in (running, *waiting):
            ticket.cancel()
        assert running.result(60).finish_reason == "cancelled"
        assert len(running.result().tokens) < 400
        assert [ticket.result(60).passes for ticket in waiting] == [0, 0]
        assert engine.submit(request(lm, "causal", "Hi")).result(60).finish_reason == "length"


def test_a_request_ends_when_its_time_is_over(models):
    asked = request(models["causal"], "causal", "Hi", max_new_tokens=400, steps=400)
    with Engine(models) as engine:
        finished = engine.submit(dataclasses.replace(asked, time_limit=0.01)).result(60)
    assert finished.finish_reason == "cancelled"
    assert "time limit" in finished.error


def test_drained_and_closed_engines_take_nothing_and_leave_no_ticket_open(models):
    lm = models["causal"]
    with Engine(models, EngineOptions(rows=2)) as engine:
        tickets = [engine.submit(request(lm, "causal", "Hi", max_new_tokens=400, steps=400)) for _ in range(5)]
        assert not engine.drain(0.01)
        with pytest.raises(Busy, match="shutting down"):
            engine.submit(request(lm, "causal", "Hi"))
    assert {ticket.result(0).finish_reason for ticket in tickets} <= {"cancelled", "length", "stop"}


def test_an_event_loop_reads_a_ticket(models):
    asked = request(models["causal"], "causal", "Hi")

    async def read(engine):
        return [event async for event in engine.submit(asked)]

    with Engine(models) as engine:
        events = asyncio.run(read(engine))
    np.testing.assert_array_equal(events[-1].tokens, generated(models["causal"], asked).tokens[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 2}, "one token a pass"), ({"max_new_tokens": 600, "steps": 600}, "max_position_embeddings")],
)
def test_what_cannot_be_answered_is_refused_before_it_waits(models, options, message):
    with Engine(models) as engine, pytest.raises(UserError, match=message):
        engine.submit(request(models["causal"], "causal", "Hi", **options))


@pytest.mark.slow
def test_hundreds_of_random_requests_are_answered_right_or_cancelled(models):
    """Proves that no row is wrong, nothing deadlocks and memory is flat under 300 requests of random options."""
    rng = np.random.default_rng(0)
    names, sampled = ("causal", "block"), [{}, {"temperature": 0.8}, {"temperature": 1.1, "top_p": 0.9}]
    cases = [
        request(models[name], name, prompt, seed=seed, **options)
        for name in names
        for prompt in PROMPTS[:2]
        for seed in (0, 7)
        for options in sampled
    ]
    expected = [generated(models[case.model], case) for case in cases]
    alive = []
    with Engine(models, EngineOptions(rows=8, queue=400, chunk=16, cache_bytes=100_000)) as engine:
        for _ in range(3):
            picked = rng.integers(len(cases), size=100)
            tickets = [engine.submit(cases[pick]) for pick in picked]
            for ticket in rng.choice(tickets, 20, replace=False):
                ticket.cancel()
            for pick, ticket in zip(picked, tickets, strict=True):
                finished = ticket.result(300)
                if finished.finish_reason != "cancelled":
                    assert_same(finished, expected[pick])
                else:
                    whole = expected[pick].tokens[0]
                    np.testing.assert_array_equal(finished.tokens, whole[: len(finished.tokens)])
            del tickets, ticket
            gc.collect()
            alive.append(sum(x.nbytes for x in jax.live_arrays()))
        assert engine.stats()["requests"] == 300
        assert engine.stats()["failed"] == 0
    assert alive[2] <= alive[1] * 1.02


def test_rows_under_a_grammar_share_a_batch_with_others(models):
    choices = ["a red one", "a green one", "neither of them"]
    for name in ("causal", "speculative"):
        lm = models[name]
        free = request(lm, name, "Hi", max_new_tokens=24, steps=24)
        bound = dataclasses.replace(free, grammar=Grammar.choice(choices))
        drawn = dataclasses.replace(bound, sampling=sampling_options(lm.attention, lm.algorithm, {"temperature": 2.0}))
        with Engine(models) as engine:
            tickets = [engine.submit(one) for one in (free, bound, drawn)]
            found = [ticket.result(120) for ticket in tickets]
        assert_same(found[0], generated(lm, free))
        for finished in found[1:]:
            assert finished.finish_reason == "stop"
            assert lm.answers.decode(finished.tokens) in choices


@pytest.mark.slow
def test_canvases_keep_to_a_grammar_as_generate_does_and_leave_other_rows_alone(models):
    """Proves for canvases, answers beside a prompt, and blocks, greedy and drawn, the tokens of `lm.generate`."""
    regular = Grammar.regex(r"(\d{2,3}-)+[ab]{3}x?")
    schema = {"type": "object", "properties": {"size": {"enum": [1, 22]}}, "required": ["size"]}
    parsed = Grammar.json_schema({**schema, "additionalProperties": False})
    asked = []
    for name in ("full", "prefix", "shifted block"):
        lm = models[name]
        free = request(lm, name, "Hi there", max_new_tokens=16, steps=8)
        bound = dataclasses.replace(free, grammar=regular, logprobs=0)
        drawn = sampling_options(lm.attention, lm.algorithm, {"temperature": 1.5})
        left = sampling_options(lm.attention, lm.algorithm, {"algorithm": "left_to_right"})
        asked += [free, bound, dataclasses.replace(bound, sampling=drawn, seed=3)]
        if name == "full":
            asked.append(dataclasses.replace(free, grammar=parsed, sampling=left, steps=16))
    expected = [generated(models[one.model], one) for one in asked]
    with Engine(models, EngineOptions(rows=4)) as engine:
        tickets = [engine.submit(one) for one in asked]
        found = [ticket.result(300) for ticket in tickets]
    for one, finished, alone in zip(asked, found, expected, strict=True):
        assert_same(finished, alone)
        if one.grammar is regular:
            assert re.fullmatch(r"(\d{2,3}-)+[ab]{3}x?", models[one.model].answers.decode(finished.tokens))
        elif one.grammar is parsed:
            assert json.loads(models[one.model].answers.decode(finished.tokens))["size"] in (1, 22)


def test_a_canvas_refuses_a_grammar_that_it_cannot_keep_to(models):
    lm = models["full"]
    asked = dataclasses.replace(request(lm, "full", "Hi"), grammar=Grammar.json_object())
    with Engine({"full": lm}) as engine:
        with pytest.raises(UserError, match="give algorithm='left_to_right'"):
            engine.submit(asked)
        with pytest.raises(UserError, match="not to an infilling"):
            engine.submit(dataclasses.replace(asked, infill=True))
        with pytest.raises(UserError, match="shortest answer has 30 tokens"):
            engine.submit(dataclasses.replace(asked, grammar=Grammar.choice(["x" * 30])))
