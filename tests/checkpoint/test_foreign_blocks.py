"""Third-party checkpoints whose classes are those of transformers with another mask.

Stable-DiffCoder and Nemotron-Labs-Diffusion are small random models of transformers here, decoded as in their
published code.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Ministral3Config, Ministral3ForCausalLM

import difflm_jax
from difflm_jax import UserError
from difflm_jax.diffusion.config import DiffusionConfig, Layout
from tests.byte_tokenizer import byte_tokenizer
from tests.checkpoint.test_foreign import reference_answer
from tests.oracles.torch_decoding import bias_of

V = 264
_SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu", "max_position_embeddings": 256,
    "initializer_range": 0.02, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 258, "bos_token_id": 1,
}  # fmt: skip
# The published config.json of each, with small sizes. Stable-DiffCoder's has neither mask nor block length.
DIFFCODER = {
    **_SIZES, "model_type": "llama", "architectures": ["StableDiffcoderForCausalLM"], "rms_norm_eps": 1e-6,
    "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"},
    "pad_token_id": 256, "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 500000.0, "use_cache": True,
}  # fmt: skip
YARN = {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 16, "rope_theta": 1000000.0, "rope_type": "yarn",
}  # fmt: skip
NEMOTRON = {
    **_SIZES, "model_type": "nemotron_labs_diffusion", "architectures": ["NemotronLabsDiffusionModel"],
    "auto_map": {"AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel"},
    "ar_loss_weight": 1.0, "attn_implementation": "sdpa", "block_size": 6, "dlm_loss_weight": None,
    "dlm_paradigm": "bidirectional", "dp_varying_mask_ratio": False, "mask_token_id": 100, "rms_norm_eps": 1e-05,
    "rope_parameters": YARN, "sliding_window": None, "use_cache": False,
}  # fmt: skip


def random_model(published):
    """Builds the transformers model that the published class subclasses (Llama) or copies (Ministral 3)."""
    torch.manual_seed(0)
    kinds = (LlamaConfig, LlamaForCausalLM) if published is DIFFCODER else (Ministral3Config, Ministral3ForCausalLM)
    left_out = ("model_type", "architectures", "auto_map", "attn_implementation", "torch_dtype")
    config = kinds[0](**{key: value for key, value in published.items() if key not in left_out})
    config._attn_implementation = "eager"
    model = kinds[1](config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def written(directory, published, model):
    byte_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(published))
    names = {"model.": "encoder.", "lm_head.": "diffusion_head."} if published is NEMOTRON else {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        tensors[name] = tensor.contiguous()
    save_file(tensors, directory / "model.safetensors")
    return directory


@torch.no_grad()
def logits_of(model, row: torch.Tensor, seen: np.ndarray) -> torch.Tensor:
    return model(row[None], attention_mask=bias_of(seen), use_cache=False).logits[0]


def block_causal(length: int, block: int) -> np.ndarray:
    number = np.arange(length) // block
    return number[None] <= number[:, None]


def causal_context(length: int, start: int, end: int) -> np.ndarray:
    """Returns the mask: tokens before the block start:end are causal, and the block sees them and itself."""
    index = np.arange(length)
    in_block = (index >= start) & (index < end)
    return (index[None] <= index[:, None]) | (in_block[:, None] & (index[None] < end))


@pytest.fixture(scope="module")
def diffcoder(tmp_path_factory):
    model = random_model(DIFFCODER)
    return model, written(tmp_path_factory.mktemp("diffcoder"), DIFFCODER, model)


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory):
    model = random_model(NEMOTRON)
    return model, written(tmp_path_factory.mktemp("nemotron"), NEMOTRON, model)


def trained_for(lm):
    return lm.attention, lm.block_length, lm.logit_shift, lm.algorithm, lm.mask_token_id


TOKENS = np.random.default_rng(3).integers(101, 250, (3, 40))  # without the mask tokens


def test_stable_diffcoder_sees_blocks_of_four_and_fills_them_as_published(diffcoder):
    """Its model_type is llama; the class in its config identifies it."""
    model, directory = diffcoder
    lm = difflm_jax.load(directory, dtype="float32")
    assert trained_for(lm) == ("block_causal", 4, False, "probability", 5)
    expected = torch.stack([logits_of(model, torch.tensor(row), block_causal(40, 4)) for row in TOKENS])
    np.testing.assert_allclose(np.asarray(lm(TOKENS)), expected.numpy(), atol=2e-4, rtol=1e-4)
    prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :12].tolist(), TOKENS[2, :3].tolist()]
    out = lm.generate(prompts, max_new_tokens=8, steps=8, stop_at_eos=False)
    for prompt, found in zip(prompts, out.tokens, strict=True):
        reference = lambda row, block: logits_of(model, row, block_causal(len(row), block))  # noqa: E731
        assert found.tolist() == reference_answer(reference, prompt, 8, 5, 4, False, False)[: len(found)]


def test_nemotrons_context_is_causal_and_its_block_is_not(nemotron):
    model, directory = nemotron
    lm = difflm_jax.load(directory, dtype="float32")
    assert trained_for(lm) == ("causal_context", 6, False, "probability", 100)
    starts = np.array([34, 11, 0])
    ends = starts + 6
    ours = np.asarray(lm(TOKENS, prompt_lengths=starts))
    for row, logits, start, end in zip(TOKENS, ours, starts, ends, strict=True):
        expected = logits_of(model, torch.tensor(row[:end]), causal_context(end, start, end))
        np.testing.assert_allclose(logits[:end], expected.numpy(), atol=2e-4, rtol=1e-4)
    causal = difflm_jax.load(directory, causal=True, dtype="float32")
    expected = torch.stack([logits_of(model, torch.tensor(row), np.tri(40, dtype=bool)) for row in TOKENS])
    np.testing.assert_allclose(np.asarray(causal(TOKENS)), expected.numpy(), atol=2e-4, rtol=1e-4)


def nemotrons_answer(model, prompt: list[int], blocks: int, length: int, mask: int) -> list[int]:
    """Fills blocks of masks, the most confident first. Each block then joins the causal context."""
    row = torch.tensor(prompt)
    for _ in range(blocks):
        start, end = len(row), len(row) + length
        row = torch.cat([row, torch.full((length,), mask)])
        while (open_ := (row == mask).nonzero()[:, 0]).numel():
            logits = logits_of(model, row, causal_context(end, start, end))[open_]
            logits[:, mask] = -torch.inf
            best = logits.softmax(-1).max(-1).values.argmax()
            row[open_[best]] = logits[best].argmax()
    return row[len(prompt) :].tolist()


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_nemotrons_finished_blocks_join_the_causal_context(nemotron, cache):
    """Three blocks and prompts of any length in one batch, with and without the exact cache."""
    model, directory = nemotron
    lm = difflm_jax.load(directory, dtype="float32")
    prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :3].tolist(), TOKENS[2, :14].tolist()]
    out = lm.generate(prompts, max_new_tokens=18, steps=18, stop_at_eos=False, cache=cache)
    as_block = lm.with_diffusion(attention="block").generate(prompts, max_new_tokens=18, steps=18, stop_at_eos=False)
    for prompt, found in zip(prompts, out.tokens, strict=True):
        expected = nemotrons_answer(model, prompt, 3, 6, 100)
        ends = [i + 1 for i, token in enumerate(expected) if token in lm.eos_token_ids]
        assert found.tolist() == expected[: ends[0] if ends else None]
    assert any(a.tolist() != b.tolist() for a, b in zip(out.tokens, as_block.tokens, strict=True))  # the rule matters


def test_nemotron_verifies_its_own_blocks_and_writes_what_transformers_writes(nemotron):
    """Linear self-speculation writes the text of the same weights decoded from left to right."""
    model, directory = nemotron
    lm = difflm_jax.load(directory, dtype="float32")
    prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :3].tolist()]
    out = lm.generate(prompts, max_new_tokens=10, verify="base")
    limits = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    for prompt, found in zip(prompts, out.tokens, strict=True):
        tokens = torch.tensor([prompt])
        expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), **limits)[0, len(prompt) :].tolist()
        assert found.tolist() == expected


def test_likelihood_under_a_causal_context_is_that_of_its_training_mask(nemotron):
    """In the published training mask, a noisy block sees itself and the clean tokens before it, which are causal."""
    length, block = 12, 3
    ours = DiffusionConfig("causal_context", block)
    index = np.tile(np.arange(length), 2)[None]
    rows = Layout(index, np.ones_like(index, bool), np.zeros(1, np.int32))
    noisy = np.arange(2 * length) < length
    found = np.asarray(ours.view(rows, noisy_T=noisy).mask[0])
    q, k = np.arange(2 * length)[:, None], np.arange(2 * length)[None]
    clean_q, clean_k = q >= length, k >= length
    block_q, block_k = q % length // block, k % length // block
    expected = (
        ((block_q == block_k) & ~clean_q & ~clean_k)
        | ((block_q > block_k) & clean_k & ~clean_q)
        | ((q >= k) & clean_k & clean_q)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("published", "change", "named"),
    [
        (NEMOTRON, {"dlm_paradigm": "autoregressive"}, "dlm_paradigm=autoregressive"),
        (NEMOTRON, {"sliding_window": 8}, "sliding_window=8"),
        (NEMOTRON, {"some_new_gate": 1}, "some_new_gate: not known for model_type 'nemotron_labs_diffusion'"),
        (NEMOTRON, {"block_size": "six"}, "block_length must be an integer"),
        (DIFFCODER, {"some_new_gate": 1}, "some_new_gate: not known for model_type 'llama'"),
    ],
)
def test_what_would_change_the_result_is_refused(published, change, named, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**published, **change}))
    save_file({"lm_head.weight": torch.zeros(V, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=named) as error:
        difflm_jax.load(tmp_path)
    assert "\n" not in str(error.value)
