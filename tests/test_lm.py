"""The public face: logits, generation and infilling, against transformers and against themselves."""

import json
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import difflm_jax
from difflm_jax import UserError
from difflm_jax.models.lora import LoraConfig, init_lora
from tests.tiny_checkpoint import save_tiny_model

PROMPTS = ["Hi", "A rather longer prompt than the first one.", "42?"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=[("full", False), ("full", True), ("prefix", False), ("prefix", True)])
def lm(request, model_dir):
    """A model under each attention rule with a random adapter."""
    return randomly_adapted(model_dir, *request.param)


@pytest.fixture(scope="module", params=[("full", False), ("prefix", True)])
def one_of_two(request, model_dir):
    """The same, for what compiles often: each rule and each shift once."""
    return randomly_adapted(model_dir, *request.param)


def randomly_adapted(model_dir, attention, shift):
    lm = difflm_jax.load(model_dir, attention=attention, logit_shift=shift, dtype="float32")
    config = LoraConfig(r=4)
    lora = init_lora(jax.random.key(0), lm.params, config, jnp.full(32, 0.2))
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), lora)
    return lm.with_adapter(lora, config)


def test_causal_generation_is_the_librarys_greedy_decoding(model_dir):
    lm = difflm_jax.load(model_dir, causal=True, dtype="float32")
    torch_model = AutoModelForCausalLM.from_pretrained(model_dir)
    for prompt in PROMPTS:
        tokens = lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = torch_model.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False)[
                0, len(tokens) :
            ]
        found = lm.generate(prompt, max_new_tokens=12)
        assert found.tokens[0].tolist() == expected.tolist()
        assert found.steps[0] == len(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 12},
        {"steps": 4, "algorithm": "probability"},
        {"steps": 6, "block_length": 4},
        {"steps": 6, "temperature": 0.7, "seed": 3},
    ],
    ids=str,
)
def test_a_row_is_the_same_alone_and_in_a_batch(one_of_two, options):
    lm = one_of_two
    together = lm.generate(PROMPTS, max_new_tokens=12, **options)
    for i, prompt in enumerate(PROMPTS):
        alone = lm.generate(prompt, max_new_tokens=12, **options)
        assert alone.tokens[0].tolist() == together.tokens[i].tolist()
        assert alone.texts[0] == together.texts[i]
        assert alone.steps[0] == together.steps[i]
    in_twos = lm.generate(PROMPTS, max_new_tokens=12, batch_size=2, **options)
    assert in_twos.texts == together.texts


def test_answers_hold_no_mask_and_at_most_one_eos_at_their_end(lm):
    out = lm.generate(PROMPTS * 4, max_new_tokens=16, steps=5, temperature=1.5, batch_size=12)
    for tokens in out.tokens:
        assert (tokens != lm.mask_token_id).all()
        assert not np.isin(tokens[:-1], lm.eos_token_ids).any()


def test_prompt_forms_mean_the_same(lm):
    messages = [{"role": "user", "content": "Hi"}]
    text = lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    tokens = lm.tokenizer(text)["input_ids"]
    forms = ["Hi", ["Hi"], [messages], messages, [tokens], tokens, np.array([tokens])]
    answers = [lm.generate(form, max_new_tokens=6, steps=3).texts for form in forms]
    assert all(answer == answers[0] for answer in answers)


def test_generation_equals_infilling_of_the_same_canvas(lm):
    """The cached path of `generate` and the whole-canvas path of `infill` are two ways to the same answer."""
    prompt = np.asarray(lm.tokenizer("some prompt")["input_ids"])
    canvas = np.concatenate([prompt, np.full(10, lm.mask_token_id)])
    infilled = lm.infill([canvas], steps=10).tokens[0]
    out = lm.generate([prompt], max_new_tokens=10, steps=10).tokens[0]
    if not np.isin(infilled, lm.eos_token_ids).any():  # an EOS ends an answer, but not an infilled text
        assert infilled[len(prompt) :].tolist() == out.tolist()
    else:
        assert out.tolist() == infilled[len(prompt) :][: len(out)].tolist()


def test_infill_fills_exactly_the_masks_of_several_gaps(lm):
    texts = ["ab<|mask|><|mask|>cd<|mask|>e", "x<|mask|>yz", "nothing to do"]
    out = lm.infill(texts, steps=2)
    for text, tokens in zip(texts, out.tokens, strict=True):
        before = np.asarray(lm.tokenizer(text)["input_ids"])
        assert (tokens != lm.mask_token_id).all()
        np.testing.assert_array_equal(tokens[before != lm.mask_token_id], before[before != lm.mask_token_id])
    assert out.steps.tolist() == [2, 1, 0]
    assert lm.infill(texts[1], steps=2).tokens[0].tolist() == out.tokens[1].tolist()


def test_an_adapter_comes_back_as_it_was_saved(lm, model_dir, tmp_path):
    lm.save_adapter(tmp_path / "adapter")
    back = difflm_jax.load(model_dir, adapter=tmp_path / "adapter", dtype="float32")
    assert (back.attention, back.logit_shift, back.mask_token_id) == (lm.attention, lm.logit_shift, lm.mask_token_id)
    tokens = np.array([[3, 4, lm.mask_token_id, 6]])
    np.testing.assert_array_equal(back(tokens), lm(tokens))


def test_merging_keeps_the_logits(lm, tmp_path):
    tokens = np.array([[3, 4, lm.mask_token_id, 6], [9, 9, 1, 2]])
    merged = lm.merge()
    np.testing.assert_allclose(merged(tokens), lm(tokens), atol=2e-4)
    merged.save_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(difflm_jax.load(tmp_path / "merged", dtype="float32")(tokens), lm(tokens), atol=2e-4)


def test_bfloat16_is_near_float32(model_dir):
    tokens = np.random.default_rng(0).integers(0, 250, (2, 20))
    exact = np.asarray(difflm_jax.load(model_dir, dtype="float32")(tokens))
    rounded = difflm_jax.load(model_dir, dtype="bfloat16")(tokens)
    assert rounded.dtype == jnp.float32
    assert np.abs(np.asarray(rounded) - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm.generate("Hi", max_new_tokens=0), "max_new_tokens must be a positive integer"),
        (lambda lm: lm.generate("Hi", seed=1.5), "seed must be an integer in"),
        (lambda lm: lm.generate([[1.7, 2.2]]), "tokens must be integers, not float64"),
        (lambda lm: lm.generate([[2**40]]), "holds a token outside"),
        (lambda lm: lm.generate(["Hi", [10**9]]), r"holds a token outside .* \(prompt 2 of 2\)"),
        (lambda lm: lm.log_likelihood("ab", "cd"), "takes a list of prompts"),
        (lambda lm: lm.log_likelihood(["ab"], ["c", "d"]), "a list of as many answers"),
        (lambda lm: lm.generate("Hi", max_new_tokens=10, block_length=3), "multiple of block_length"),
        (
            lambda lm: lm.generate("Hi", max_new_tokens=12, block_length=4, steps=2),
            "steps=2: .* 3 blocks of 4",
        ),
        (lambda lm: lm.generate("Hi", max_new_tokens=8, temperature=-1), "temperature"),
        (lambda lm: lm.generate("Hi", max_new_tokens=8, algorithm="best"), "algorithm='best'"),
        (lambda lm: lm.generate("Hi", max_new_tokens=1000), "max_position_embeddings"),
        (lambda lm: lm.generate([[1, 2, 9999]], max_new_tokens=8), "holds a token outside"),
        (lambda lm: lm.generate("<|mask|>", max_new_tokens=8), "use infill"),
        (lambda lm: lm.generate([[]], max_new_tokens=8), "at least one token"),
        (lambda lm: lm([[1, 2, 9999]]), "the batch holds a token outside 0..263"),
        (lambda lm: lm([1, 2, 3]), r"expected \[batch, length\]"),
    ],
)
def test_bad_calls_say_what_is_wrong(lm, call, message):
    with pytest.raises(UserError, match=message):
        call(lm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"attention": "sideways"}, "attention='sideways'"),
        ({"quantization": "nf5"}, "quantization='nf5'"),
        ({"quantization": "nf4"}, r"quantization_block_size=64 does not divide the input features of .*q_proj \(32\)"),
        ({"mask_token": "<|im_end|>"}, "end-of-sequence"),
    ],
)
def test_bad_loads_say_what_is_wrong(model_dir, options, message):
    with pytest.raises(UserError, match=message):
        difflm_jax.load(model_dir, **options)


def test_with_the_shift_the_first_token_cannot_be_a_mask(model_dir):
    shifted = difflm_jax.load(model_dir, logit_shift=True, dtype="float32")
    with pytest.raises(UserError, match="first token"):
        shifted.infill("<|mask|>ab")


def test_stories260k_tells_its_story(shared_data):
    """A real pretrained checkpoint decodes greedily to the text that llama2.c prints."""
    directory = shared_data / "stories260K"
    expected = json.loads((directory / "expected_greedy.json").read_text())
    lm = difflm_jax.load(directory, causal=True, dtype="float32")
    count = len(expected["greedy_ids"]) - len(expected["prompt_ids"])
    out = lm.generate([expected["prompt_ids"]], max_new_tokens=count, steps=count)
    assert out.tokens[0].tolist() == expected["greedy_ids"][len(expected["prompt_ids"]) :]
    assert out.texts[0].strip() == expected["text"].strip()


def test_log_likelihood_of_the_base_is_that_of_the_library_and_of_a_diffusion_model_has_an_error(model_dir):
    lm = difflm_jax.load(model_dir, attention="prefix", logit_shift=True, dtype="float32")
    answers = ["Yes.", "No, never.", "0"]
    found = lm.base().log_likelihood(PROMPTS, answers)
    torch_model = AutoModelForCausalLM.from_pretrained(model_dir)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        rows = lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        ids = lm.tokenizer(answer)["input_ids"] + [lm.tokenizer.eos_token_id]
        with torch.no_grad():
            logits = torch_model(torch.tensor([rows + ids])).logits[0, len(rows) - 1 : -1]
        logits[:, lm.mask_token_id] = -torch.inf
        expected = torch.log_softmax(logits, -1)[torch.arange(len(ids)), torch.tensor(ids)].sum()
        assert found.values[i] == pytest.approx(float(expected), rel=1e-4)
        assert (found.tokens[i], found.standard_errors[i]) == (len(ids), 0)
    diffusion = lm.log_likelihood(PROMPTS, answers, samples=8)
    assert (diffusion.values < 0).all() and (diffusion.standard_errors > 0).all()
    as_tokens = lm.log_likelihood([rows], [ids], samples=8)
    assert as_tokens.values[0] == pytest.approx(diffusion.values[2], rel=1e-4)


def test_a_program_that_generates_waits_for_no_library_that_it_does_not_need():
    code = "import sys, difflm_jax.generate; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "transformers" in loaded and not loaded & {"datasets", "grain", "orbax.checkpoint", "wandb"}
