"""Tests reading GGUF files against the weights they were written from and transformers' own GGUF loading."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from gguf import (
    MODEL_ARCH_NAMES,
    MODEL_TENSORS,
    TENSOR_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    RopeScalingType,
)
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from difflm_jax.checkpoint.hf import load_params, save_pretrained
from difflm_jax.checkpoint.source import open_source
from difflm_jax.errors import UserError
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.rope import RopeConfig, inverse_frequencies
from tests.checkpoint.gguf_files import gguf_architecture, write_gguf
from tests.families import torch_model
from tests.tiny import params_from_state_dict

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def matrices_of(model) -> dict[str, torch.Tensor]:
    tied = model.config.tie_word_embeddings
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


@pytest.fixture
def refusal(tmp_path, tiny_model):
    """`refusal(family, **what to write)`: the error line for a refused file."""

    def run(family: str = "llama", **options) -> str:
        path = write_gguf(tmp_path / "model.gguf", tiny_model(family), **options)
        with pytest.raises(UserError) as caught:
            load_params(open_source(str(path)), "float32")
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        return str(caught.value)

    return run


# ---- weights


def test_every_tensor_of_every_family(family, tmp_path, tiny_model, assert_same_weights):
    model = tiny_model(family)
    source = open_source(str(write_gguf(tmp_path / "model.gguf", model)))
    assert dict(source.shapes) == {name: tuple(tensor.shape) for name, tensor in matrices_of(model).items()}
    assert_same_weights(load_params(source, "float32"), matrices_of(model))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_stored_type_as_transformers_reads_it(family, kind, tmp_path, tiny_model, assert_same_weights):
    head = {"head_dim": 128} if family == "qwen3" else {}  # transformers does not read it from the file
    model = tiny_model(family, intermediate_size=64, **head)
    path = write_gguf(tmp_path / "model.gguf", model, GGMLQuantizationType[kind])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert not torch.equal(theirs.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    assert_same_weights(load_params(open_source(str(path)), "float32"), matrices_of(theirs))


def test_the_checkpoint_made_from_a_file(family, tmp_path, tiny_model, tiny_tokenizer, tokens_BL, their_logits):
    model = tiny_model(family)
    source = open_source(str(write_gguf(tmp_path / "model.gguf", model)))
    params = load_params(source, "float32")
    theirs = their_logits(model, tokens_BL)
    save_pretrained(tmp_path / "out", params, source.config, source.hf_config, tiny_tokenizer, "", {})
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    np.testing.assert_allclose(their_logits(again, tokens_BL), theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


# ---- config


def test_the_config_is_that_of_the_model(family, tmp_path, tiny_model):
    model = tiny_model(family, rope_parameters={"rope_type": "default", "rope_theta": 1e5})
    ours = open_source(str(write_gguf(tmp_path / "model.gguf", model))).config
    theirs = ModelConfig.from_hf(model.config.to_dict() | ({"model_type": "llama"} if family == "mistral" else {}))
    assert ours == theirs
    assert ours.rope == RopeConfig(1e5)


def test_one_key_value_head_a_query_head_where_the_file_names_none(tmp_path, tiny_model):
    model = tiny_model("llama", num_key_value_heads=4)
    path = write_gguf(tmp_path / "model.gguf", model, leave_out=["llama.attention.head_count_kv"])
    assert open_source(str(path)).config.num_kv_heads == 4


def test_gemma_3(tmp_path):
    """Norms are stored with 1 added. llama.cpp hard-codes the local RoPE base and the pattern of layers."""
    model = torch_model("gemma3_text", head_dim=16, num_hidden_layers=7, sliding_window=8, query_pre_attn_scalar=16)
    source = open_source(str(write_gguf(tmp_path / "model.gguf", model)))
    assert source.config == ModelConfig.from_hf(model.config.to_dict())
    assert source.config.windows == (8, 8, 8, 8, 8, 0, 8)
    params = load_params(source, "float32")
    expected = params_from_state_dict(source.config, {k: v.numpy() for k, v in model.state_dict().items()})
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-6), params, expected)


def test_gemma_3_with_the_keys_of_newer_converters(tmp_path):
    """The pattern as a period or one entry per layer, the local RoPE base, and scaling of only the global layers."""
    ropes = {"sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}  # fmt: skip
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    settings = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "rope_parameters": ropes}
    for pattern, layer_types in (([True, False, False, True], types), (2, types[:2] * 2)):
        model = torch_model("gemma3_text", layer_types=layer_types, **settings)

        def keys(writer: GGUFWriter, pattern=pattern):
            writer.add_sliding_window_pattern(pattern)
            writer.add_rope_freq_base_swa(5e3)
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(8.0)

        source = open_source(str(write_gguf(tmp_path / "model.gguf", model, metadata=keys)))
        assert source.config == ModelConfig.from_hf(model.config.to_dict())


def test_sizes_of_local_layers_alone_are_named(tmp_path):
    """Gemma 4's keys in a file with the architecture gemma3."""
    model = torch_model("gemma3_text", head_dim=16)
    path = write_gguf(tmp_path / "model.gguf", model, metadata=lambda writer: writer.add_key_length_swa(8))
    with pytest.raises(UserError, match=r"cannot be represented: gemma3\.attention\.key_length_swa"):
        open_source(str(path))


QWEN3_MOE = {
    "head_dim": 16, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_qwen3_moe_as_transformers_reads_it(kind, tmp_path, our_logits, their_logits):
    """One tensor per layer has gate, up or down of all experts. transformers assumes a width of 768."""
    model = torch_model("qwen3_moe", **QWEN3_MOE, moe_intermediate_size=768)
    path = write_gguf(tmp_path / "model.gguf", model, GGMLQuantizationType[kind])
    source = open_source(str(path))
    assert source.config == ModelConfig.from_hf(model.config.to_dict())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    tokens_BL = np.random.default_rng(0).integers(3, 100, (2, 12))
    expected = their_logits(theirs, tokens_BL)
    ours = our_logits(source.config, load_params(source, "float32"), tokens_BL)
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (np.abs(their_logits(model, tokens_BL) - expected).max() > 1e-4) == (kind != "F32")


_MIXTURES = {
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4, "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
                   "attention_multiplier": 0.2, "logits_scaling": 2.5},
}  # fmt: skip


@pytest.mark.parametrize("model_type", _MIXTURES)
def test_other_mixtures_are_the_models_that_their_files_were_made_of(model_type, tmp_path, our_logits, their_logits):
    """Names are those of the gguf package; rows of q and k are permuted where llama.cpp's converter does it."""
    model = torch_model(model_type, num_hidden_layers=2, num_experts_per_tok=2, **_MIXTURES[model_type])
    path = write_gguf(tmp_path / "model.gguf", model)
    written = {re.sub(r"\.\d+\.", ".{bid}.", each.name).rpartition(".")[0] for each in GGUFReader(path).tensors}
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == gguf_architecture(model_type))
    assert written <= {TENSOR_NAMES[each] for each in MODEL_TENSORS[architecture]}
    source = open_source(str(path))
    tokens_BL = np.random.default_rng(0).integers(3, 100, (2, 12))
    expected = their_logits(model, tokens_BL)
    ours = our_logits(source.config, load_params(source, "float32"), tokens_BL)
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()


def test_experts_of_another_number_and_what_llama_cpp_does_not_read(tmp_path):
    model = torch_model("qwen3_moe", **QWEN3_MOE, moe_intermediate_size=32)
    path = write_gguf(tmp_path / "a.gguf", model, metadata=lambda writer: writer.add_expert_count(3))
    with pytest.raises(UserError, match=r"unknown .*blk\.0\.ffn_down_exps\.weight"):
        load_params(open_source(str(path)), "float32")
    path = write_gguf(tmp_path / "b.gguf", model, metadata=lambda writer: writer.add_expert_weights_norm(False))
    with pytest.raises(UserError, match=r"qwen3moe\.expert_weights_norm=false"):
        open_source(str(path))
    path = write_gguf(tmp_path / "c.gguf", model, leave_out=["qwen3moe.expert_feed_forward_length"])
    with pytest.raises(UserError, match=r"metadata lacks qwen3moe\.expert_feed_forward_length"):
        open_source(str(path))


def rope_of(model, path: Path, *scaling, tensors=None) -> RopeConfig:
    def metadata(writer: GGUFWriter) -> None:
        for name, *values in scaling:
            getattr(writer, name)(*values)

    return open_source(str(write_gguf(path, model, metadata=metadata, tensors=tensors))).config.rope


def test_rope_scaling_keys(tmp_path, tiny_model):
    model, path = tiny_model("qwen2"), tmp_path / "model.gguf"
    linear = ("add_rope_scaling_type", RopeScalingType.LINEAR)
    yarn = ("add_rope_scaling_type", RopeScalingType.YARN)
    factor, original = ("add_rope_scaling_factor", 4.0), ("add_rope_scaling_orig_ctx_len", 16)
    beta = ("add_rope_scaling_yarn_beta_fast", 16.0)
    expected_yarn = (("factor", 4.0), ("original_max_position_embeddings", 16))
    assert rope_of(model, path, ("add_rope_scaling_type", RopeScalingType.NONE)) == RopeConfig(1e4)
    assert rope_of(model, path, linear, factor) == RopeConfig(1e4, "linear", (("factor", 4.0),))
    assert rope_of(model, path, factor) == RopeConfig(1e4, "linear", (("factor", 4.0),))
    assert rope_of(model, path, yarn, factor, original) == RopeConfig(1e4, "yarn", expected_yarn)
    with_beta = rope_of(model, path, yarn, factor, original, beta)
    assert with_beta == RopeConfig(1e4, "yarn", (("beta_fast", 16.0), *expected_yarn))


def test_frequency_factors_of_llama_3(tmp_path, tiny_model):
    model = tiny_model("llama", head_dim=64, rope_parameters=LLAMA3)
    plain = 5e5 ** -(np.arange(0, 64, 2) / 64)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    factors = (plain / scaled.numpy()).astype(np.float32)
    assert 1 in factors.round(3) and 8 in factors.round(3) and len(set(factors.round(3))) > 2
    head_size = ("add_key_length", 64), ("add_value_length", 64)
    rope = rope_of(model, tmp_path / "model.gguf", *head_size, tensors={"rope_freqs.weight": factors})
    np.testing.assert_allclose(inverse_frequencies(rope, 64)[0], scaled, rtol=1e-6)
    assert rope == ModelConfig.from_hf(model.config.to_dict()).rope
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not the scaling of Llama 3\.1"):
        rope_of(model, tmp_path / "b.gguf", *head_size, tensors={"rope_freqs.weight": factors**1.1})


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda w: w.add_rope_scaling_type(RopeScalingType.LONGROPE), "rope.scaling.type 'longrope'"),
        (lambda w: w.add_rope_scaling_attn_factors(1.2), "llama.rope.scaling.attn_factor"),
        (lambda w: w.add_sliding_window(16), "llama.attention.sliding_window"),
        (lambda w: w.add_expert_count(8), "metadata lacks llama.expert_used_count"),
        (lambda w: w.add_logit_scale(0.5), "llama.logit_scale"),
        (lambda w: w.add_attention_scale(0.5), "llama.attention.scale"),
        (lambda w: w.add_residual_scale(0.5), "llama.residual_scale"),
        (lambda w: w.add_causal_attention(False), "llama.attention.causal"),
        (lambda w: w.add_rope_dimension_count(4), "llama.rope.dimension_count=4 differs from the head size 8"),
        (lambda w: w.add_value_length(16), "llama.attention.value_length=16 differs from the head size 8"),
        (lambda w: w.add_key_length(7) or w.add_value_length(7), "head_dim=7 must be even"),
        (lambda w: w.add_head_count([4, 4, 2]), "attention.head_count must be one positive number"),
        (lambda w: w.add_head_count(0), "attention.head_count must be one positive number"),
        (lambda w: w.add_head_count_kv([2, 2, 1]), "num_key_value_heads must be a positive integer, not [2, 2, 1]"),
        (lambda w: w.add_uint16("split.count", 3), "one of 3 parts; join them with gguf-split --merge"),
        (lambda w: w.add_string("general.architecture", "mamba"), "architecture 'mamba' is not supported"),
    ],
)
def test_what_cannot_be_represented_is_named(refusal, add, message):
    assert message in refusal(metadata=add)


def test_keys_at_the_value_that_changes_nothing_are_read(tmp_path, tiny_model):
    """Converters write these keys for every architecture."""
    model = tiny_model("llama")

    def neutral(writer):
        writer.add_causal_attention(True)
        writer.add_attention_scale((model.config.hidden_size // model.config.num_attention_heads) ** -0.5)
        writer.add_sliding_window(model.config.max_position_embeddings)
        writer.add_rope_scaling_attn_factors(1.0)
        for add in (writer.add_logit_scale, writer.add_residual_scale, writer.add_embedding_scale):
            add(1.0)
        writer.add_expert_count(0)

    plain = open_source(str(write_gguf(tmp_path / "plain.gguf", model)))
    assert open_source(str(write_gguf(tmp_path / "neutral.gguf", model, metadata=neutral))).config == plain.config


def test_a_type_that_numpy_cannot_dequantise_is_named(refusal):
    message = refusal(leave_out=["blk.1.ffn_norm.weight"], tensors={"blk.1.ffn_norm.weight": np.zeros(32, np.int8)})
    assert "blk.1.ffn_norm.weight has type I8" in message


# ---- damaged files


def test_unknown_and_missing_tensors_in_one_error(refusal):
    message = refusal(
        leave_out=["blk.1.ffn_up.weight", "blk.2.attn_norm.weight"],
        tensors={"blk.0.ffn_gate_inp.weight": np.zeros((32, 4), np.float32)},
    )
    assert "1 unknown (blk.0.ffn_gate_inp.weight)" in message
    assert "2 missing (model.layers.2.input_layernorm.weight, model.layers.1.mlp.up_proj.weight)" in message


def test_a_misshapen_tensor(refusal):
    message = refusal(leave_out=["output_norm.weight"], tensors={"output_norm.weight": np.zeros(31, np.float32)})
    assert "1 misshapen (model.norm.weight [31] for [32])" in message


@pytest.mark.parametrize("key", ["llama.block_count", "llama.context_length", "llama.attention.head_count"])
def test_a_missing_key(refusal, key):
    assert f"metadata lacks {key}" in refusal(leave_out=[key])


def test_no_embedding(refusal):
    assert "has no token_embd.weight" in refusal(leave_out=["token_embd.weight"])


@pytest.mark.parametrize("keep", [0, 4, 30, 0.1, 0.5, 0.999])
def test_a_truncated_file(keep, tmp_path, tiny_model):
    path = write_gguf(tmp_path / "model.gguf", tiny_model("llama"))
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(UserError, match=r"model\.gguf: not a complete GGUF file"):
        open_source(str(path))


def test_an_alien_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(UserError, match="not a complete GGUF file"):
        open_source(str(tmp_path / "model.gguf"))


# ---- real files


@pytest.mark.slow
@pytest.mark.usefixtures("optimised", "read_once")
def test_real_weights_and_logits_are_those_of_transformers(smollm2, assert_same_weights, our_logits, their_logits):
    """A real llama-architecture file: all 272 dequantised tensors bit for bit, logits to 1e-4, the greedy answer."""
    source = open_source(str(smollm2))
    params = load_params(source, "float32")
    theirs = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    assert len(source.shapes) == 272
    assert_same_weights(params, matrices_of(theirs))
    tokenizer = source.load_tokenizer()
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    start = len(tokenizer(prompt).input_ids)
    tokens_BL = np.asarray([tokenizer(prompt + "The capital of France is Paris.<|im_end|>").input_ids])
    ours, expected = our_logits(source.config, params, tokens_BL), their_logits(theirs.eval(), tokens_BL)
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
    np.testing.assert_array_equal(ours[0, start - 1 : -1].argmax(-1), tokens_BL[0, start:])
