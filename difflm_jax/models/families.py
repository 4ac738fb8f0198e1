"""Model families as data: each row lists the differences from Llama and the keys of `config.json` that set them.

The rows follow the modelling code of transformers 5.23; `tests/models/test_oracle.py` compares them with it. To add a
family, add a row here and a tiny model there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from difflm_jax.models.experts import ExpertFamily, ExpertNames


class Norms(NamedTuple):
    """Hugging Face's names of the norms of a layer, by position; None if the layer lacks that norm."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


PRE = Norms("input_layernorm", None, "post_attention_layernorm", None)
POST = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
SANDWICH = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_GLM4 = Norms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
_PARALLEL = Norms("input_layernorm", None, None, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure:
    """The structure that all models of a family share. The defaults are Llama's."""

    norm: str = "rms"  # "layer" subtracts the mean first, "rms_once" rounds after the weight
    norm_offset: float = 0.0  # added to the weight of every norm
    norm_bias: bool = False
    norms: Norms = PRE
    parallel_block: bool = False  # attention and MLP read the same normalised input
    qk_norm: str | None = (
        None  # "head": one weight [E]; "each": one for each head [H, E]; "all": over all heads [H * E]
    )
    qk_norm_after_rope: bool = False
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)), or down(act(up(x))) if False
    rope_interleaved: bool = False  # a pair is elements 2i and 2i + 1 of a head, not i and i + E/2
    value_norm: bool = False  # values are normalised per head, without a weight
    layer_scalar: bool = False  # the output of a layer is multiplied by a stored number
    sinks: bool = False  # each head may attend to nothing, with a learned score
    names: tuple[tuple[str, str], ...] = ()  # modules of a layer: (our name, Hugging Face's) where they differ
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()  # tensors with several of our projections, joined by rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A row of the table. `defaults` are for keys that `config.json` may omit. A bias is a key or a constant.

    `windows` is the rule for layers with `sliding_window`:

    - "none" and "every";
    - "typed": layers that `layer_types` calls sliding. By default, one layer in `period` is global: the last, or the
      first with `first_is_global`;
    - "qwen", "qwen_even" and "qwen_every" require `use_sliding_window`. The first two are typed; by default layers
      from `max_window_layers` on, or even layers below it, are sliding.

    `rotated` is the rule for layers with RoPE: "all", "sliding", "unless_global" (sliding layers, or all in a model
    without a window), "no_rope_layers" or "layer_rope_theta". "typed" gives each type of layer its own RoPE.
    """

    structure: Structure = Structure()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reads: tuple[str, ...] = ()  # its own keys: multipliers, caps, and those of `windows` and `rotated`
    epsilon: str = "rms_norm_eps"
    activation: str = "hidden_act"
    qkv_bias: str | bool = "attention_bias"
    o_bias: str | bool = "attention_bias"
    mlp_bias: str | bool = False
    qk_norm_key: str | None = None  # the key that turns `structure.qk_norm` on
    windows: str = "none"
    period: int = 0
    first_is_global: bool = False
    rotated: str = "all"
    partial_rotary: bool = False
    longrope: bool = False  # any scaling is LongRoPE, under any name
    scaled_embedding: bool = False  # multiplied by the square root of the hidden size
    global_heads: bool = False  # global layers have their own head size, and may lack `v_proj`
    refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)  # keys that must be off, with their meaning
    experts: ExpertFamily | None = None  # None for a family of dense models


_RMS_OFFSET = {"norm_offset": 1.0}
_GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "rms_norm_eps": 1e-6}
_GEMMA4_NEUTRAL = ("vocab_size_per_layer_input", "use_double_wide_mlp", "top_k_experts", "moe_intermediate_size")
_CAPS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_GRANITE = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
_QKV = ("qkv_proj", ("q_proj", "k_proj", "v_proj"))
_GATE_UP = ("gate_up_proj", ("gate_proj", "up_proj"))
_GLM = {
    "head_dim": 128,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}
_LAYER_NORM = {"norm": "layer", "norm_bias": True}

_GEMMA4 = Family(
    structure=Structure(norm="rms_once", norms=SANDWICH, qk_norm="head", value_norm=True, layer_scalar=True),
    scaled_embedding=True, activation="hidden_activation", windows="typed", period=6, rotated="typed",
    partial_rotary=True, global_heads=True,
    reads=("use_bidirectional_attention", "final_logit_softcapping", "attention_multiplier", *_GEMMA4_NEUTRAL),
    refuses={"hidden_size_per_layer_input": "an embedding per layer, as in E2B and E4B",
             "num_kv_shared_layers": "layers without keys of their own, as in E2B and E4B",
             "enable_moe_block": "experts next to the MLP, as in 26B-A4B"},
    defaults={**_GEMMA, "hidden_activation": "gelu_pytorch_tanh", "attention_multiplier": 1.0,
              "sliding_window": 512, "num_key_value_heads": 4, "rope_theta": 1e4,
              "hidden_size_per_layer_input": 256, "global_head_dim": 512,
              "rope_parameters": {
                  "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                  "full_attention": {"rope_type": "proportional", "rope_theta": 1e6,
                                     "partial_rotary_factor": 0.25}}},
)  # fmt: skip

FAMILIES = {
    "llama": Family(mlp_bias="mlp_bias"),  # SmolLM2 too
    "mistral": Family(
        qkv_bias=False, o_bias=False, windows="every",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    # Qwen2 has biases of q, k and v only, whatever attention_bias says
    "qwen2": Family(qkv_bias=True, o_bias=False, windows="qwen"),
    "qwen3": Family(structure=Structure(qk_norm="head"), windows="qwen", defaults={"head_dim": 128}),
    "gemma": Family(
        structure=Structure(**_RMS_OFFSET), scaled_embedding=True,
        defaults={**_GEMMA, "hidden_act": "gelu_pytorch_tanh"},
        reads=("use_bidirectional_attention",),
    ),
    "gemma2": Family(
        structure=Structure(**_RMS_OFFSET, norms=SANDWICH), scaled_embedding=True, activation="hidden_activation",
        windows="typed", period=2,
        reads=("use_bidirectional_attention", *_CAPS),
        defaults={**_GEMMA, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
                  "num_key_value_heads": 4, "sliding_window": 4096,
                  "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": Family(
        structure=Structure(**_RMS_OFFSET, norms=SANDWICH, qk_norm="head"), scaled_embedding=True,
        activation="hidden_activation",
        windows="typed", period=6, rotated="typed",
        reads=("use_bidirectional_attention", "rope_local_base_freq", "sliding_window_pattern", *_CAPS),
        defaults={**_GEMMA, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
                  "sliding_window": 4096, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                  # sizes that the text_config of Gemma 3 4B omits
                  "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4,
                  "max_position_embeddings": 131_072},
    ),
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": dataclasses.replace(_GEMMA4, defaults={**_GEMMA4.defaults, "sliding_window": 1024}),
    "phi3": Family(
        structure=Structure(fused=(_QKV, _GATE_UP)), qkv_bias=False, o_bias=False, windows="every",
        partial_rotary=True, longrope=True, defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
    "olmo2": Family(structure=Structure(norms=POST, qk_norm="all"), defaults={"rms_norm_eps": 1e-5}),
    "olmo3": Family(
        structure=Structure(norms=POST, qk_norm="all"), windows="typed", period=4, rotated="typed",
        # transformers gives the local layers 500000 unless rope_parameters says otherwise
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 5e5},
    ),
    "granite": Family(mlp_bias="mlp_bias", reads=_GRANITE, defaults={"attention_multiplier": 1.0}),
    "granite_swa": Family(
        structure=Structure(sinks=True), mlp_bias="mlp_bias", windows="typed", period=4, first_is_global=True,
        rotated="layer_rope_theta", reads=(*_GRANITE, "layer_rope_theta"),
        defaults={"attention_multiplier": 1.0, "num_key_value_heads": 4, "sliding_window": 128, "rms_norm_eps": 1e-5,
                  "tie_word_embeddings": True},
    ),
    "smollm3": Family(
        mlp_bias="mlp_bias", windows="qwen", rotated="no_rope_layers",
        reads=("no_rope_layers", "no_rope_layer_interval"),
        defaults={"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True,
                  "no_rope_layer_interval": 4},
    ),
    "starcoder2": Family(
        structure=Structure(**_LAYER_NORM, gated_mlp=False, names=(("up_proj", "c_fc"), ("down_proj", "c_proj"))),
        epsilon="norm_epsilon", qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias", windows="every",
        defaults={"norm_epsilon": 1e-5, "num_key_value_heads": 2, "use_bias": True, "hidden_act": "gelu_pytorch_tanh",
                  "tie_word_embeddings": True},
    ),
    "cohere": Family(
        structure=Structure(norm="layer", norms=_PARALLEL, parallel_block=True, rope_interleaved=True, qk_norm="each"),
        epsilon="layer_norm_eps", qk_norm_key="use_qk_norm", reads=("logit_scale",),
        defaults={"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "rope_theta": 5e5, "tie_word_embeddings": True},
    ),
    "cohere2": Family(
        structure=Structure(norm="layer", norms=_PARALLEL, parallel_block=True, rope_interleaved=True),
        epsilon="layer_norm_eps", reads=("logit_scale", "sliding_window_pattern"), windows="typed", period=4,
        rotated="sliding",
        defaults={"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "sliding_window": 4096, "tie_word_embeddings": True},
    ),
    "stablelm": Family(
        structure=Structure(**_LAYER_NORM), epsilon="layer_norm_eps", qkv_bias="use_qkv_bias", o_bias=False,
        partial_rotary=True, reads=("use_parallel_residual",),
        defaults={"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
    ),
    "glm": Family(
        structure=Structure(rope_interleaved=True, fused=(_GATE_UP,)), o_bias=False, partial_rotary=True, defaults=_GLM
    ),
    "glm4": Family(
        structure=Structure(rope_interleaved=True, fused=(_GATE_UP,), norms=_GLM4), o_bias=False,
        partial_rotary=True, defaults=_GLM,
    ),
    "exaone4": Family(
        structure=Structure(norms=POST, qk_norm="head"), qkv_bias=False, o_bias=False, windows="typed", period=4,
        rotated="unless_global", reads=("sliding_window_pattern",),
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096},
    ),
    "seed_oss": Family(
        o_bias="attention_out_bias", mlp_bias="mlp_bias",
        defaults={"head_dim": 128, "num_key_value_heads": 8, "attention_bias": True},
    ),
    "helium": Family(
        structure=Structure(rope_interleaved=True), o_bias=False, mlp_bias="mlp_bias",
        defaults={"head_dim": 128, "rms_norm_eps": 1e-8, "rope_theta": 1e5},
    ),
    "ernie4_5": Family(
        structure=Structure(rope_interleaved=True), qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias",
        defaults={"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
                  "tie_word_embeddings": True},
    ),
    "hunyuan_v1_dense": Family(
        structure=Structure(qk_norm="head", qk_norm_after_rope=True,
                            names=(("q_norm", "query_layernorm"), ("k_norm", "key_layernorm"))),
        defaults={"rms_norm_eps": 1e-5},
    ),
    "apertus": Family(
        structure=Structure(qk_norm="head", gated_mlp=False,
                            norms=Norms("attention_layernorm", None, "feedforward_layernorm", None)),
        defaults={
            "rms_norm_eps": 1e-5, "hidden_act": "xielu", "rope_theta": 12e6,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "low_freq_factor": 1.0,
                                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        },
    ),
    "arcee": Family(
        structure=Structure(gated_mlp=False), mlp_bias="mlp_bias",
        defaults={"rms_norm_eps": 1e-5, "hidden_act": "relu2"},
    ),
    "nemotron": Family(
        structure=Structure(**_LAYER_NORM, **_RMS_OFFSET, gated_mlp=False), epsilon="norm_eps", mlp_bias="mlp_bias",
        partial_rotary=True, defaults={"norm_eps": 1e-5, "hidden_act": "relu2", "partial_rotary_factor": 0.5},
    ),
    "ministral": Family(
        qkv_bias=False, o_bias=False, windows="typed", period=0,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "ministral3": Family(
        qkv_bias=False, o_bias=False, windows="every",
        defaults={
            "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0,
                                "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
                                "original_max_position_embeddings": 16384},
        },
    ),
    "qwen3_moe": Family(
        structure=Structure(qk_norm="head"), windows="qwen_every",
        experts=ExpertFamily(layers="qwen", normalised="norm_topk_prob"),
        defaults={"num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
                  "decoder_sparse_step": 1},
    ),
    "mixtral": Family(
        qkv_bias=False, o_bias=False, windows="every",
        experts=ExpertFamily(
            names=ExpertNames(block="block_sparse_moe",
                              projections=(("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")),
                              in_memory=(("mlp", "block_sparse_moe"),)),
            width="intermediate_size",
        ),
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts": 8,
                  "num_experts_per_tok": 2},
    ),
    "qwen2_moe": Family(
        qkv_bias="qkv_bias", o_bias=False, windows="qwen_even",
        experts=ExpertFamily(
            names=ExpertNames(shared="shared_expert", shared_gate="shared_expert_gate"),
            layers="qwen", normalised="norm_topk_prob", shared="shared_expert_intermediate_size",
        ),
        defaults={"qkv_bias": True, "num_experts": 60, "num_experts_per_tok": 4, "decoder_sparse_step": 1,
                  "moe_intermediate_size": 1408,
                  "shared_expert_intermediate_size": 5632},
    ),
    "olmoe": Family(
        structure=Structure(qk_norm="all"),
        experts=ExpertFamily(width="intermediate_size", normalised="norm_topk_prob"),
        defaults={"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
    ),
    "granitemoe": Family(
        reads=_GRANITE,
        experts=ExpertFamily(
            names=ExpertNames(block="block_sparse_moe", router="router.layer", module="block_sparse_moe.experts",
                              stored="fused", gate_up="input_linear.weight", down="output_linear.weight",
                              in_memory=(("router", "router.layer"),)),
            width="intermediate_size",
        ),
        defaults={"attention_multiplier": 1.0, "num_experts": 8, "num_experts_per_tok": 2},
    ),
    "ernie4_5_moe": Family(  # with use_bias its output head has a bias too: refused
        structure=Structure(rope_interleaved=True), qkv_bias=False, o_bias=False,
        reads=("moe_norm_min",),
        experts=ExpertFamily(
            names=ExpertNames(correction="moe_statics.e_score_correction_bias", correction_axes=2,
                              shared="shared_experts", in_memory=(("mlp.gate.moe_statics", "mlp.moe_statics"),)),
            count=("moe_num_experts", "num_experts"), per_token=("moe_k", "num_experts_per_tok"), layers="ernie",
            shared="moe_num_shared_experts", shared_is_count=True,
        ),
        defaults={"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True,
                  "moe_intermediate_size": 1536, "moe_num_experts": 64, "moe_k": 6,
                  "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
                  "moe_layer_end_index": -1, "moe_layer_interval": 1},
    ),
    "glm4_moe": Family(  # LLaDA 2 too, under other names (`checkpoint.foreign`)
        structure=Structure(qk_norm="head"), qk_norm_key="use_qk_norm", o_bias=False, partial_rotary=True,
        experts=ExpertFamily(
            names=ExpertNames(correction="gate.e_score_correction_bias", shared="shared_experts"),
            count=("n_routed_experts", "num_experts", "num_local_experts"), layers="first_dense", score="sigmoid",
            normalised="norm_topk_prob", scale="routed_scaling_factor", groups=("n_group", "topk_group"),
            shared="n_shared_experts", shared_is_count=True,
        ),
        reads=("num_mtp_layers", "num_nextn_predict_layers"),
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5,
                  "n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408,
                  "n_shared_experts": 1,
                  "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
                  "norm_topk_prob": True},
    ),
    "gpt_oss": Family(
        structure=Structure(sinks=True), windows="typed", period=2,
        experts=ExpertFamily(
            names=ExpertNames(router="router", stored="interleaved"), width="intermediate_size",
            router_bias=True, bias=True, clamped=True,
        ),
        defaults={
            "head_dim": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "sliding_window": 128,
            "attention_bias": True, "num_experts": 128, "num_experts_per_tok": 4, "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702, "rope_theta": 150000.0, "initial_context_length": 4096,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0,
                                "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096},
        },
    ),
    "jais2": Family(
        structure=Structure(**_LAYER_NORM, gated_mlp=False), epsilon="layer_norm_eps", mlp_bias="mlp_bias",
        defaults={"layer_norm_eps": 1e-5, "hidden_act": "relu2", "attention_bias": True, "mlp_bias": True},
    ),
}  # fmt: skip
