"""Generation with real attention against references in torch: every cache, every rule, batched and padded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import difflm_jax
from difflm_jax import UserError
from difflm_jax.sampling import caches
from difflm_jax.sampling.loop import Canvas, Plan
from difflm_jax.sampling.options import Sampling
from tests.oracles import samplers as oracle
from tests.oracles.torch_decoding import FastDllmCache, Uncached
from tests.tiny_checkpoint import save_tiny_model

MASK = 259


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def torch_model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def load(model_dir):
    """Models by (attention, block length, shift), each loaded once."""
    return functools.cache(
        lambda attention, block=None, shift=False: difflm_jax.load(
            model_dir, attention=attention, block_length=block, logit_shift=shift, dtype="float32"
        )
    )


def prompts(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 250, n).tolist() for n in (9, 3, 17)]


def compare(lm, references, max_new_tokens, seeds=range(2), **options):
    """Compares answers to three prompts in one batch with `references(prompt length)(row) -> (tokens, passes)`."""
    for seed in seeds:
        rows = prompts(seed)
        out = lm.generate(rows, max_new_tokens=max_new_tokens, stop_at_eos=False, **options)
        for i, prompt in enumerate(rows):
            row = torch.tensor(prompt + [MASK] * max_new_tokens)
            expected, passes = references(len(prompt))(row)
            answer = expected[len(prompt) :].numpy()
            ends = np.flatnonzero(np.isin(answer, lm.eos_token_ids))
            answer = answer[: ends[0] + 1] if len(ends) else answer
            assert out.tokens[i].tolist() == answer.tolist()
            assert out.steps[i] == passes
            assert out.committed[i] == max_new_tokens


@pytest.mark.parametrize(
    ("cache", "refresh", "shift"),
    [("prefix", None, False), ("prefix", 3, True), ("dual", None, True), ("dual", 2, False)],
)
def test_fast_dllm_caches(load, torch_model, cache, refresh, shift):
    """Threshold decoding in blocks, cached: the same tokens and passes as torch with real past keys and values."""

    def references(prompt):
        kept = FastDllmCache(torch_model, cache == "dual", shift, refresh or 10**9)
        rule = functools.partial(oracle.threshold_rule, tau=0.12)
        return lambda row: oracle.fast_dllm(kept, row, prompt, 6, MASK, rule)

    options = {} if refresh is None else {"refresh_interval": refresh}
    compare(load("full", None, shift), references, 18, block_length=6, threshold=0.12, cache=cache, **options)


@pytest.mark.parametrize(("attention", "shift"), [("full", False), ("prefix", False), ("prefix", True)])
def test_factor_decoding_of_a_real_model(load, torch_model, attention, shift):
    def references(prompt):
        denoise = Uncached(torch_model, attention, prompt, shift=shift)
        rule = functools.partial(oracle.factor_rule, factor=1.7)
        return lambda row: oracle.fast_dllm(denoise, row, prompt, 8, MASK, rule)

    compare(load(attention, None, shift), references, 16, block_length=8, factor=1.7)


@pytest.mark.parametrize(("block", "steps", "shift"), [(4, 8, True), (5, 4, False), (1, 128, True)])
def test_block_attention_decodes_as_without_a_cache(load, torch_model, block, steps, shift):
    """The exact cache of the prompt and of finished blocks: tokens of a torch loop that has none, and of our own."""
    lm, length = load("block", block, shift), 4 * block

    def references(prompt):
        denoise = Uncached(torch_model, "block", prompt, block, shift)
        return lambda row: oracle.llada(denoise, row, prompt, block, min(steps, length), MASK)

    compare(lm, references, length, steps=steps, algorithm="probability")
    cached = lm.generate(prompts(), max_new_tokens=length, steps=steps)
    uncached = lm.generate(prompts(), max_new_tokens=length, steps=steps, cache="none")
    assert [t.tolist() for t in cached.tokens] == [t.tolist() for t in uncached.tokens]


@pytest.mark.parametrize(("attention", "block"), [("prefix", None), ("block", 4)])
def test_exact_caches_give_the_logits_of_a_whole_forward(load, attention, block, monkeypatch):
    """Compares the confidence of every committed token with and without a cache, up to rounding."""
    lm = load(attention, block, True)
    found = []
    whole = caches.fill_on("cpu")

    def recording(*arguments):
        carry = whole(*arguments)
        found.append(np.asarray(carry.confidence))
        return carry

    monkeypatch.setattr("difflm_jax.sampling.batching.fill_on", lambda platform: recording)
    for cache in ("auto", "none"):
        lm.generate(prompts(), max_new_tokens=16, steps=8, block_length=block, stop_at_eos=False, cache=cache)
    assert found[0].any()
    np.testing.assert_allclose(found[0], found[1], rtol=2e-4, atol=1e-7)


def test_block_one_with_the_shift_is_greedy_decoding_of_the_base(load, model_dir):
    block, causal = load("block", 1, True), difflm_jax.load(model_dir, causal=True, dtype="float32")
    for seed in range(3):
        rows = prompts(seed)
        expected = causal.generate(rows, max_new_tokens=12)
        found = block.generate(rows, max_new_tokens=12)
        assert [t.tolist() for t in found.tokens] == [t.tolist() for t in expected.tokens]
        assert found.steps.tolist() == expected.steps.tolist()


def test_block_answers_are_cut_at_the_wanted_length(load):
    lm = load("block", 4)
    whole = lm.generate(prompts(), max_new_tokens=12, steps=12, eos_penalty=float("inf"))
    cut = lm.generate(prompts(), max_new_tokens=10, steps=12, eos_penalty=float("inf"))  # a pass per mask of 3 blocks
    assert [len(t) for t in cut.tokens] == [10, 10, 10]
    assert [t[:8].tolist() for t in cut.tokens] == [t[:8].tolist() for t in whole.tokens]


@pytest.mark.parametrize("attention", ["full", "block"])
def test_gaps_of_texts_are_filled_under_every_rule(load, torch_model, attention):
    """Several gaps a row, rows of different lengths; under `block` a gap does not see the text behind its block."""
    lm = load(attention, 4 if attention == "block" else None, True)
    rng = np.random.default_rng(1)
    canvases = []
    for length, gaps in ((20, (5, 6, 7, 13)), (12, (3, 9, 10)), (9, ()), (26, (2, 24, 25))):
        row = rng.integers(0, 250, length)
        row[list(gaps)] = MASK
        canvases.append(row)
    out = lm.infill(canvases, algorithm="probability")
    for row, found, steps in zip(canvases, out.tokens, out.steps, strict=True):
        prompt = int((row == MASK).argmax()) if (row == MASK).any() else len(row)
        denoise = Uncached(torch_model, attention, prompt, 4, True)
        expected = torch.tensor(row)
        for first in range(prompt, len(row), 4 if attention == "block" else len(row)):
            end = min(len(row), first + (4 if attention == "block" else len(row)))
            while (expected[first:end] == MASK).any():
                logits = oracle.forbid(denoise(expected), MASK)
                inside = torch.zeros(len(row), dtype=torch.bool)
                inside[first:end] = True
                (at,) = oracle.best(oracle.score("probability", logits), (expected == MASK) & inside, 1)
                expected[at] = logits[at].argmax()
        assert found.tolist() == expected.tolist()
        assert steps == (row == MASK).sum()


def test_a_row_with_gaps_is_filled_as_it_is_alone_and_in_no_more_passes_than_were_asked_for(load):
    """Under `block` attention, where the blocks with gaps share the passes, by a deadline too."""
    lm = load("block", 4, False)
    few, many = [70, 71, 72, *[MASK] * 4, 75], [70, 71, 72, *[MASK] * 16]
    seen = []
    alone, both = (
        lm.infill([few], steps=4),
        lm.infill([many, few], steps=4, on_pass=lambda p: seen.append(list(p.rows))),
    )
    assert both.tokens[1].tolist() == alone.tokens[0].tolist()
    assert both.steps.tolist() == [4, alone.steps[0]]
    assert seen == [[0, 1]] * 7  # one batch: four passes of the second row in its only block, then three blocks more
    apart = [70, 71, 72, *[MASK] * 4, *[80] * 16, *[MASK] * 4]
    for steps in (2, 4, 8):
        assert lm.infill([apart], steps=steps, algorithm="steady").steps[0] <= steps


def test_guidance_is_that_of_the_definition(load, torch_model):
    """l_u + (w + 1)(l_c - l_u), where every given token of the unconditional row is a mask."""
    weight = 0.7

    def references(prompt):
        plain = Uncached(torch_model, "full", prompt)

        def denoise(row):
            unknown = row.clone()
            unknown[:prompt] = MASK
            conditional, unconditional = plain(row).double(), plain(unknown).double()
            return unconditional + (weight + 1) * (conditional - unconditional)

        return lambda row: oracle.llada(denoise, row, prompt, 5, 10, MASK)

    compare(load("full"), references, 10, block_length=5, steps=10, algorithm="probability", cfg_scale=weight)


@pytest.mark.parametrize(
    ("attention", "cache"), [("full", "none"), ("full", "dual"), ("prefix", "auto"), ("block", "auto")]
)
def test_guided_rows_do_not_depend_on_their_batch(load, attention, cache):
    lm = load(attention, 4 if attention == "block" else None, True)
    options = {"max_new_tokens": 8, "block_length": 4, "cfg_scale": 0.5, "cache": cache, "temperature": 0.5}
    together = lm.generate(prompts(), **options)
    for i, prompt in enumerate(prompts()):
        assert lm.generate([prompt], **options).tokens[0].tolist() == together.tokens[i].tolist()


def test_a_new_prompt_another_threshold_and_another_batch_do_not_compile_again(load):
    lm = load("full")
    options = {"max_new_tokens": 8, "block_length": 4, "cache": "dual"}
    rng = np.random.default_rng(0)
    lm.generate([rng.integers(0, 250, 5).tolist()] * 4, threshold=0.5, temperature=0.3, **options)
    before = caches.fill_on("cpu")._cache_size()
    for length in (1, 7, 11, 15, 16):
        for threshold in (0.3, 0.9):
            row = rng.integers(0, 250, length).tolist()
            lm.generate([row, row, row], threshold=threshold, temperature=0.1 + threshold, seed=length, **options)
    assert caches.fill_on("cpu")._cache_size() == before
    lm.generate([rng.integers(0, 250, 40).tolist()] * 4, threshold=0.5, temperature=0.3, **options)
    assert caches.fill_on("cpu")._cache_size() == before + 1


def test_one_prompt_takes_the_time_of_one_row_and_its_answer_is_that_of_a_full_batch(load):
    lm = load("full")
    options = {"max_new_tokens": 8, "block_length": 4}
    alone = lm.generate(prompts()[:1], batch_size=1, **options)
    before = caches.fill_on("cpu")._cache_size()
    assert lm.generate(prompts()[:1], **options).tokens[0].tolist() == alone.tokens[0].tolist()
    assert caches.fill_on("cpu")._cache_size() == before  # reuses the program of one row
    full = lm.generate(prompts()[:1] * 16, batch_size=16, **options)
    assert caches.fill_on("cpu")._cache_size() == before + 1
    assert all(row.tolist() == alone.tokens[0].tolist() for row in full.tokens)


@pytest.mark.parametrize("algorithm", ["probability", "steady", "origin"])
def test_another_number_of_passes_does_not_compile_again(load, algorithm):
    lm = load("full")
    options = {"max_new_tokens": 16, "algorithm": algorithm, "stop_at_eos": False}
    most = lm.generate(prompts(), steps=16, **options)
    before = caches.fill_on("cpu")._cache_size()
    fewer = [lm.generate(prompts(), steps=steps, **options).steps.max() for steps in (12, 8, 4, 2)]
    assert caches.fill_on("cpu")._cache_size() == before
    assert most.steps.max() > fewer[0] > fewer[1] > fewer[2] > fewer[3] == 2


def test_the_sampler_as_compiled_for_gpus_gives_the_same_answers(load, monkeypatch):
    """Its options are names that XLA knows, on whatever it runs."""
    lm = load("prefix")
    expected = lm.generate(prompts(), max_new_tokens=8)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    before = caches.fill_on("gpu")._cache_size()
    found = lm.generate(prompts(), max_new_tokens=8)
    assert caches.fill_on("gpu")._cache_size() == before + 1
    assert [row.tolist() for row in found.tokens] == [row.tolist() for row in expected.tokens]


def test_no_logits_outside_the_active_block_are_made(load):
    """The compiled sampler has no array of vocabulary size for all columns of the canvas."""
    lm = load("full")
    canvas = Canvas(
        tokens=jnp.full((2, 72), MASK),
        valid=jnp.ones((2, 72), bool),
        fillable=jnp.ones((2, 72), bool),
        prompt_lengths=jnp.full(2, 64),
        steps=jnp.full((2, 2), 4),
        quotas=jnp.ones((2, 2, 4), jnp.int32),
        keys=jax.random.split(jax.random.key(0), 2),
    )
    sampling = Sampling(algorithm="confidence", schedule="even")
    plan = Plan(64, 2, 4, 4)
    decoder = caches.Decoder(lm.variables, lm.model, lm.diffusion, (2,))
    text = caches.fill_on("cpu").lower(decoder, plan, canvas, sampling).as_text()
    assert "2x4x264xf32" in text
    assert "2x72x264" not in text
    assert "144x264" not in text


def test_stop_strings_end_text_and_tokens(load):
    lm = load("full")
    whole = lm.generate(prompts(), max_new_tokens=16, eos_penalty=float("inf"))
    for i, text in enumerate(whole.texts):
        stop = text[5:7]
        cut = lm.generate([prompts()[i]], max_new_tokens=16, eos_penalty=float("inf"), stop=["never there", stop])
        assert cut.texts[0] == text[: text.index(stop)]
        decoded = lm.tokenizer.decode(cut.tokens[0].tolist())
        assert stop in decoded
        assert stop not in lm.tokenizer.decode(cut.tokens[0][:-1].tolist())


def test_tokens_per_pass_are_reported(load):
    out = load("full").generate(prompts(), max_new_tokens=12, steps=4, stop_at_eos=False)
    assert out.steps.tolist() == [4, 4, 4]
    assert out.tokens_per_pass.tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "block"}, "needs block_length"),
        ({"attention": "block", "block_length": 0}, "needs block_length"),
        ({"attention": "prefix", "block_length": 4}, "belongs to attention='block'"),
    ],
)
def test_block_length_goes_with_block_attention(model_dir, options, message):
    with pytest.raises(UserError, match=message):
        difflm_jax.load(model_dir, **options)


def test_block_length_travels_with_the_checkpoint(load, tmp_path):
    load("block", 4, True).save_pretrained(tmp_path / "merged")
    back = difflm_jax.load(tmp_path / "merged", dtype="float32")
    assert (back.attention, back.block_length, back.logit_shift) == ("block", 4, True)
    with pytest.raises(UserError, match="decodes in blocks of 4"):
        back.generate("Hi", block_length=8, max_new_tokens=16)


@pytest.mark.parametrize("options", [{}, {"algorithm": "steady"}, {"algorithm": "random", "seed": 4}], ids=str)
@pytest.mark.parametrize(("attention", "block"), [("full", None), ("block", 4), ("block_causal", 4)])
def test_steps_bound_the_passes_of_all_blocks_together(load, attention, block, options):
    """Regression: with 6 passes for 4 blocks every block got 2. Only the first two should."""
    lm = load(attention, block)
    given = {"max_new_tokens": 16, "block_length": 4, "stop_at_eos": False, **options}
    rows = [[5] * 8, [7] * 12] if attention == "block_causal" else prompts()
    out = lm.generate(rows, steps=6, **given)
    assert (out.steps == 6).all() if "algorithm" not in options else (out.steps <= 6).all()
    assert all(len(tokens) == 16 and (tokens != lm.mask_token_id).all() for tokens in out.tokens)
    assert [t.tolist() for t in lm.generate(rows[1:], steps=6, **given).tokens] == [t.tolist() for t in out.tokens[1:]]
    with pytest.raises(UserError, match="steps=3: max_new_tokens=16 are 4 blocks of 4, and each takes at least"):
        lm.generate(rows, steps=3, **given)


def test_steps_bound_the_passes_of_gaps_in_several_blocks(load):
    lm = load("block", 4)
    mask = lm.mask_token_id
    canvases = [[5, 6, *[mask] * 3, 7, *[mask] * 7], [5, *[mask] * 2, 8, 9], [5, mask, *[7] * 9, mask, mask]]
    out = lm.infill(canvases, steps=4)
    assert out.steps.tolist() == [4, 2, 3]
    assert lm.infill(canvases[:1], steps=4).tokens[0].tolist() == out.tokens[0].tolist()
    with pytest.raises(UserError, match="steps=2: row 1 has masks in 3 blocks of 4"):
        lm.infill(canvases, steps=2)


def test_no_more_passes_are_scheduled_than_there_are_masks(load):
    """Regression: `origin` took 124 passes for a canvas of 16 masks in 128 steps."""
    assert load("full").generate(prompts(), max_new_tokens=16, algorithm="origin", steps=128).steps.max() <= 16
