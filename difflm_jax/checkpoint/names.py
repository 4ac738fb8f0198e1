"""Third-party tensor names (diffusion checkpoints, PEFT), and access to leaves of a tree by path."""

import re
from collections.abc import Mapping
from typing import Any

# Buffers that old checkpoints contain next to the weights. Their values follow from `config.json`.
REDUNDANT_SUFFIXES = (".rotary_emb.inv_freq",)


_LAYER_MODULES = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip

# Names in third-party checkpoints: pattern -> Hugging Face's name.
FOREIGN = {
    "llada2": {
        "model.word_embeddings.weight": "model.embed_tokens.weight",
        **{
            f"model.layers.{{layer}}.{theirs}": f"model.layers.{{layer}}.{ours}"
            for theirs, ours in {
                "attention.query_key_value.weight": "self_attn.query_key_value.weight",
                "attention.dense.weight": "self_attn.o_proj.weight",
                "attention.query_layernorm.weight": "self_attn.q_norm.weight",
                "attention.key_layernorm.weight": "self_attn.k_norm.weight",
                "mlp.gate.expert_bias": "mlp.gate.e_score_correction_bias",
            }.items()
        },
    },
    "llada": {
        "model.transformer.wte.weight": "model.embed_tokens.weight",
        "model.transformer.ln_f.weight": "model.norm.weight",
        "model.transformer.ff_out.weight": "lm_head.weight",
        **{
            f"model.transformer.blocks.{{layer}}.{theirs}.weight": f"model.layers.{{layer}}.{ours}.weight"
            for theirs, ours in {
                "attn_norm": "input_layernorm",
                "q_proj": "self_attn.q_proj",
                "k_proj": "self_attn.k_proj",
                "v_proj": "self_attn.v_proj",
                "attn_out": "self_attn.o_proj",
                "ff_norm": "post_attention_layernorm",
                "ff_proj": "mlp.gate_proj",
                "up_proj": "mlp.up_proj",
                "ff_out": "mlp.down_proj",
            }.items()
        },
    },
    "nemotron_labs_diffusion": {
        "encoder.embed_tokens.weight": "model.embed_tokens.weight",
        "encoder.norm.weight": "model.norm.weight",
        "diffusion_head.weight": "lm_head.weight",
        **{
            f"encoder.layers.{{layer}}.{module}.weight": f"model.layers.{{layer}}.{module}.weight"
            for module in _LAYER_MODULES
        },
    },
}


def from_foreign(names: str, tensor: str) -> str:
    """Returns Hugging Face's name of a tensor, from the table `FOREIGN[names]`; an unknown name is unchanged."""
    layer = re.search(r"\.(\d+)\.", tensor)
    pattern = tensor.replace(layer[0], ".{layer}.", 1) if layer else tensor
    found = FOREIGN[names].get(pattern)
    return tensor if found is None else found.format(layer=layer and layer[1])


def peft_mask_row(decoder: str = "model") -> str:
    """Returns the PEFT key of the trained mask row [1, D]. `decoder`: path of the decoder in transformers' model."""
    return f"base_model.model.{decoder}.embed_tokens.token_adapter.trainable_tokens_delta"


PEFT_MASK_ROW = peft_mask_row()


def get_path(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Returns the leaf of a nested dictionary at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def set_path(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    """Sets `leaf` at `path` of a nested dictionary and creates missing dictionaries."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
