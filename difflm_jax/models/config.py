"""Reads the shape of a model from a Hugging Face `config.json`, and refuses unsupported keys by name."""

import dataclasses
import math
from typing import Any

from difflm_jax.errors import UserError
from difflm_jax.models.experts import Experts, LayerStack, experts_of, stacks_of, unstated
from difflm_jax.models.families import FAMILIES, Family, Structure
from difflm_jax.models.layer_kinds import Heads, global_heads, layer_kinds
from difflm_jax.models.refused import refusal
from difflm_jax.models.rope import RopeConfig

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "xielu")
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu2": "relu2", "xielu": "xielu",
}  # fmt: skip

# Keys that change the result in ways this model does not represent. They must have one of these values, unless the
# family reads them.
_ONLY = {
    "hidden_act": tuple(_ACTIVATIONS),
    "hidden_activation": (*_ACTIVATIONS, None),
    "pretraining_tp": (1, None),
    "num_experts": (0, 1, None),
    "num_local_experts": (0, 1, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "no_rope_layers": (None, []),
    "rope_interleaved": (False, None),
    "qk_layernorm": (False, None),
    "use_bias": (False, None),
    "clip_qkv": (None,),
    "quantization_config": (None,),  # `checkpoint.source` removes the supported kinds
    "auto_map": (None, {}),
}
_BIDIRECTIONAL = "use_bidirectional_attention"

_READ = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "sliding_window", "use_sliding_window", "layer_types", "max_window_layers", "original_max_position_embeddings",
    _BIDIRECTIONAL,
}  # fmt: skip

# Keys about training, storage or serving, which change nothing here.
_NEUTRAL = {
    "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "initializer_range", "torch_dtype", "dtype", "transformers_version", "transformers.js_config", "use_cache",
    "_name_or_path", "_attn_implementation_autoset", "is_llama_config", "resid_pdrop", "embd_pdrop",
    "residual_dropout", "embedding_dropout", "hidden_dropout", "cache_implementation", "eod_token_id",
    "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id",
    "problem_type", "name_or_path", "is_decoder", "mask_token_id", "_sliding_window_pattern",
}  # fmt: skip

KNOWN_KEYS = _READ | _NEUTRAL | set(_ONLY)

# The type of a key that is present and not null. Integers are checked where they are read.
_NUMBERS = (
    "rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon", "rope_theta", "rope_local_base_freq",
    "partial_rotary_factor", "sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "embedding_multiplier", "residual_multiplier", "attention_multiplier",
    "logits_scaling", "logit_scale",
)  # fmt: skip
_TYPES = {
    "a string": (str, ("model_type",)),
    "a number": ((int, float), _NUMBERS),
    "an object": (dict, ("rope_scaling", "rope_parameters")),
    "a list": (list, ("layer_types",)),
    "true or false": (
        bool, ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_bias", "use_qkv_bias",
               "attention_out_bias", "use_parallel_residual", "use_qk_norm"),
    ),
}  # fmt: skip
_MAX_LAYERS, _MAX_SIZE = 10_000, 2**31 - 1  # names and shapes are built from these before any file is read


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Structure):
    """A decoder: its sizes, and (inherited) how its family differs from Llama.

    `vocab_size` is the number of embedding rows, which may exceed the tokenizer's. `head_dim` need not be
    `hidden_size / num_heads`. `windows` has one entry per layer: a token sees keys at a smaller distance (0: all keys).
    `layer_ropes` has the index of each layer's RoPE in `ropes`; None in `ropes` means no RoPE. `attention_scale`
    multiplies the scores and `logit_scale` the logits. A cap c turns x into c tanh(x / c).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    ropes: tuple[RopeConfig | None, ...]
    layer_ropes: tuple[int, ...]
    windows: tuple[int, ...]
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    max_position_embeddings: int
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_scale: float
    attention_softcap: float | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    global_heads: Heads | None = None  # heads of layers without a window, if they differ from the others
    has_values: bool = True  # if False, `k_proj` also returns the values
    experts: Experts | None = None  # the mixtures; None if every layer is dense
    decoder: str = "model"  # path of the decoder in transformers' model

    @property
    def rope(self) -> RopeConfig:
        """The RoPE of all layers, or the first one if they differ."""
        return next(rope for rope in self.ropes if rope is not None)

    @property
    def stacks(self) -> tuple[LayerStack, ...]:
        """The layers as stacked in the tree of weights: one stack per run of layers of the same kind."""
        sparse = (False,) * self.num_layers if self.experts is None else self.experts.sparse
        return stacks_of(sparse, tuple(self.global_heads is not None and not window for window in self.windows))

    def of_stack(self, stack: LayerStack) -> "ModelConfig":
        """Returns the config of a stack's layers: this one, or with their heads and RoPE if `global_heads` is set."""
        if self.global_heads is None:
            return self
        layer = stack.layers[0]
        local = Heads(self.num_kv_heads, self.head_dim)
        heads = local if self.windows[layer] else self.global_heads
        return dataclasses.replace(
            self,
            num_kv_heads=heads.number,
            head_dim=heads.size,
            has_values=heads.has_values,
            ropes=(self.ropes[self.layer_ropes[layer]],),
            layer_ropes=(0,) * self.num_layers,
            global_heads=None,
        )

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "ModelConfig":
        """Reads the dictionary of a `config.json`. Raises `UserError` if this model cannot represent it."""
        _check_types(hf)
        model_type = hf.get("model_type")
        family = FAMILIES.get(model_type)
        if family is None:
            raise UserError(f"config.json: {refusal(hf, sorted(FAMILIES))}")
        _check_known(hf, family)
        defaults = family.defaults if family.experts is None else unstated(family.defaults, family.experts, hf)
        hf = {**defaults, **{key: value for key, value in hf.items() if value is not None or key not in family.refuses}}
        _check_refused(hf, family)
        heads = _integer(hf, "num_attention_heads")
        hidden = _integer(hf, "hidden_size")
        layers = _integer(hf, "num_hidden_layers")
        head_dim = _integer(hf, "head_dim") if hf.get("head_dim") else hidden // heads
        kv_heads = _integer(hf, "num_key_value_heads") if hf.get("num_key_value_heads") else heads
        kinds = layer_kinds(hf, family, layers)
        config = cls(
            **_structure(hf, family),
            **_multipliers(hf, family, hidden, head_dim),
            model_type=model_type,
            vocab_size=_integer(hf, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_integer(hf, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=float(hf.get(family.epsilon) or 1e-6),
            activation=_activation(hf, family),
            ropes=kinds.ropes,
            layer_ropes=kinds.layer_ropes,
            windows=kinds.windows,
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=_flag(hf, family.qkv_bias),
            o_bias=_flag(hf, family.o_bias),
            mlp_bias=_flag(hf, family.mlp_bias),
            max_position_embeddings=_longest(hf, kinds.ropes),
            global_heads=global_heads(hf, family, kinds.windows, Heads(kv_heads, head_dim)),
            experts=experts_of(hf, family.experts, layers),
        )
        config._check()
        return config

    def _check(self) -> None:
        for config in map(self.of_stack, self.stacks):
            if config.num_heads % config.num_kv_heads:
                raise UserError(
                    f"config.json: num_attention_heads={config.num_heads} is not a multiple of "
                    f"num_key_value_heads={config.num_kv_heads}"
                )
            if config.head_dim % 2:
                raise UserError(f"config.json: head_dim={config.head_dim} must be even")
            for rope in filter(None, config.ropes):
                rope.rotated(config.head_dim)


def unknown_keys(hf: dict[str, Any]) -> list[str]:
    """Returns the keys of a `config.json` that nothing here reads, so that the caller can report them."""
    family = FAMILIES.get(hf.get("model_type"), Family())
    return sorted(set(hf) - KNOWN_KEYS - _own_keys(family))


def _own_keys(family: Family) -> set[str]:
    """Returns the keys that a family reads in addition to the common ones."""
    named = (family.epsilon, family.activation, family.qkv_bias, family.o_bias, family.mlp_bias, family.qk_norm_key)
    heads = ("num_global_key_value_heads", "attention_k_eq_v", "per_layer_config") if family.global_heads else ()
    own = {*family.reads, *family.defaults, *family.refuses, *heads, *(key for key in named if isinstance(key, str))}
    return own if family.experts is None else own | family.experts.keys()


def _check_known(hf: dict[str, Any], family: Family) -> None:
    model_type = hf["model_type"]
    for key, allowed in _ONLY.items():
        if key in hf and hf[key] not in allowed and (key not in _own_keys(family) or key == family.activation):
            raise UserError(f"config.json: {key}={_short(hf[key])} is not supported for model_type {model_type!r}")
    if hf.get(_BIDIRECTIONAL) not in (None, False, "vision"):  # "vision" (Gemma 4): image tokens only
        raise UserError(
            f"config.json: {_BIDIRECTIONAL}={_short(hf[_BIDIRECTIONAL])}: such a model is an encoder already, and has "
            "no causal base to convert"
        )
    known = _own_keys(family)
    if experts := [key for key in hf if "expert" in key and key not in known and hf[key] not in (0, 1, None, False)]:
        raise UserError(
            f"config.json: {experts[0]}={_short(hf[experts[0]])} is not supported for model_type {model_type!r}"
        )


def _check_refused(hf: dict[str, Any], family: Family) -> None:
    for key, meaning in family.refuses.items():
        if hf.get(key):
            raise UserError(
                f"config.json: {key}={_short(hf[key])} ({meaning}) is not supported for model_type {hf['model_type']!r}"
            )


def _structure(hf: dict[str, Any], family: Family) -> dict[str, Any]:
    fields = {field.name: getattr(family.structure, field.name) for field in dataclasses.fields(Structure)}
    if family.qk_norm_key is not None and not hf.get(family.qk_norm_key):
        fields["qk_norm"] = None
    if "use_parallel_residual" in family.reads and hf.get("use_parallel_residual"):
        fields["parallel_block"] = True
        fields["norms"] = fields["norms"]._replace(before_mlp=None)
    return fields


def _multipliers(hf: dict[str, Any], family: Family, hidden: int, head_dim: int) -> dict[str, Any]:
    def number(key: str, default: float | None) -> float | None:
        value = hf.get(key) if key in family.reads else None
        if value is not None and not value > 0:
            raise UserError(f"config.json: {key} must be a positive number, not {_short(value)}")
        return default if value is None else float(value)

    return {
        "embedding_multiplier": math.sqrt(hidden) if family.scaled_embedding else number("embedding_multiplier", 1.0),
        "residual_multiplier": number("residual_multiplier", 1.0),
        "attention_scale": number("attention_multiplier", number("query_pre_attn_scalar", float(head_dim)) ** -0.5),
        "attention_softcap": number("attn_logit_softcapping", None),
        "logit_scale": number("logit_scale", 1.0) / number("logits_scaling", 1.0),
        "logit_softcap": number("final_logit_softcapping", None),
    }


def _activation(hf: dict[str, Any], family: Family) -> str:
    name = hf.get(family.activation) or "silu"
    if name not in _ACTIVATIONS:
        raise UserError(f"config.json: {family.activation}={_short(name)} is not supported")
    if family.scaled_embedding and name == "gelu":  # Gemma's releases say gelu but use the tanh approximation
        return "gelu_tanh"
    if name == "xielu" and family.structure.gated_mlp:
        raise UserError(f"config.json: {family.activation}='xielu' is not supported for {hf['model_type']!r}")
    return _ACTIVATIONS[name]


def _flag(hf: dict[str, Any], key: str | bool) -> bool:
    return key if isinstance(key, bool) else bool(hf.get(key, False))


def _longest(hf: dict[str, Any], ropes: tuple[RopeConfig | None, ...]) -> int:
    """Returns the longest supported row.

    LongRoPE uses other frequencies beyond the original length. They are not implemented, so that length is the limit.
    """
    longest = _integer(hf, "max_position_embeddings")
    if any(rope is not None and rope.type == "longrope" for rope in ropes):
        return min(longest, int(ropes[0].option("original_max_position_embeddings")))
    return longest


def _check_types(hf: dict[str, Any]) -> None:
    for wording, (kind, keys) in _TYPES.items():
        for key in keys:
            value = hf.get(key)
            wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
            if value is not None and (wrong or (isinstance(value, float) and not math.isfinite(value))):
                raise UserError(f"config.json: {key} must be {wording}, not {_short(value)}")


def _integer(hf: dict[str, Any], key: str) -> int:
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UserError(f"config.json: {key} must be a positive integer, not {_short(value)}")
    if value > (_MAX_LAYERS if key == "num_hidden_layers" else _MAX_SIZE):
        raise UserError(f"config.json: {key}={_short(value)} is too large to be meant")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
