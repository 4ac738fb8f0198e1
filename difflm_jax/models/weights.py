"""The one table of weights: the shape of each leaf of our tree, and its name in Hugging Face's and GGUF's spelling.

Our parameter tree is Hugging Face's with the layers stacked: `model.layers.{i}.self_attn.q_proj.weight` [out, in] is
row i of `layers/self_attn/q_proj/weight` [N, out, in]. Weights keep the [out, in] order, so import, export and PEFT
transpose nothing.
"""

import dataclasses

from difflm_jax.models.config import ModelConfig

# module -> (dimensions of its weight, the config flag that gives it a bias, the flag without which it is absent, GGUF)
_LAYER_MODULES = {
    "input_layernorm": (("D",), None, None, "attn_norm"),
    "self_attn.q_proj": (("Q", "D"), "qkv_bias", None, "attn_q"),
    "self_attn.k_proj": (("K", "D"), "qkv_bias", None, "attn_k"),
    "self_attn.v_proj": (("K", "D"), "qkv_bias", None, "attn_v"),
    "self_attn.o_proj": (("D", "Q"), "o_bias", None, "attn_output"),
    "self_attn.q_norm": (("E",), None, "qk_norm", "attn_q_norm"),
    "self_attn.k_norm": (("E",), None, "qk_norm", "attn_k_norm"),
    "post_attention_layernorm": (("D",), None, None, "ffn_norm"),
    "mlp.gate_proj": (("F", "D"), "mlp_bias", None, "ffn_gate"),
    "mlp.up_proj": (("F", "D"), "mlp_bias", None, "ffn_up"),
    "mlp.down_proj": (("D", "F"), "mlp_bias", None, "ffn_down"),
}

# The projections that LoRA can adapt, with the module path of each within a layer.
PROJECTIONS = {path.split(".")[1]: tuple(path.split(".")) for path in _LAYER_MODULES if path.endswith("_proj")}


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of our tree: `hf` and `gguf` have `{layer}` in them if the leaf is stacked; `shape` is one layer's."""

    path: tuple[str, ...]
    hf: str
    gguf: str
    shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf

    @property
    def quantisable(self) -> bool:
        """Whether a quantised base holds this leaf in its format: projections, but not embedding, head or biases."""
        return self.path[-2] in PROJECTIONS and self.path[-1] == "weight"

    def hf_names(self, num_layers: int) -> list[str]:
        """The Hugging Face names of this leaf, one a layer in order, or the one name of an unstacked leaf."""
        return self._expand(self.hf, num_layers)

    def gguf_names(self, num_layers: int) -> list[str]:
        """The same in GGUF's spelling."""
        return self._expand(self.gguf, num_layers)

    def _expand(self, pattern: str, num_layers: int) -> list[str]:
        return [pattern.format(layer=i) for i in range(num_layers)] if self.stacked else [pattern]


def table(config: ModelConfig) -> tuple[Row, ...]:
    """The rows of a model, in the order in which a checkpoint is read and written."""
    size = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "E": config.head_dim,
        "Q": config.num_heads * config.head_dim,
        "K": config.num_kv_heads * config.head_dim,
    }
    rows = [Row(("embed_tokens", "weight"), "model.embed_tokens.weight", "token_embd.weight", (size["V"], size["D"]))]
    for module, (dimensions, bias_flag, flag, gguf) in _LAYER_MODULES.items():
        if flag is not None and not getattr(config, flag):
            continue
        shape = tuple(size[letter] for letter in dimensions)
        leaves = [("weight", shape)]
        if bias_flag is not None and getattr(config, bias_flag):
            leaves.append(("bias", shape[:1]))
        for leaf, leaf_shape in leaves:
            rows.append(
                Row(
                    ("layers", *module.split("."), leaf),
                    f"model.layers.{{layer}}.{module}.{leaf}",
                    f"blk.{{layer}}.{gguf}.{leaf}",
                    leaf_shape,
                )
            )
    rows.append(Row(("norm", "weight"), "model.norm.weight", "output_norm.weight", (size["D"],)))
    if not config.tie_word_embeddings:
        rows.append(Row(("lm_head", "weight"), "lm_head.weight", "output.weight", (size["V"], size["D"])))
    return tuple(rows)
