"""The one table of weights: the shape of each leaf of our tree, and its name in Hugging Face's and GGUF's spelling.

Our parameter tree is Hugging Face's with the layers stacked: `model.layers.{i}.self_attn.q_proj.weight` [out, in] is
row i of `layers/self_attn/q_proj/weight` [N, out, in]. Weights keep the [out, in] order, so import, export and PEFT
transpose nothing.
"""

import dataclasses
from collections.abc import Iterator

from difflm_jax.models.config import ModelConfig

# The projections that LoRA can adapt, with the module path of each within a layer.
PROJECTIONS = {
    name: (block, name)
    for block, names in {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    }.items()
    for name in names
}
_GGUF = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_GGUF_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")  # in the order of `Norms`


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of our tree: `hf` and `gguf` have `{layer}` in them if the leaf is stacked; `shape` is one layer's.

    `fused` is the Hugging Face name of the tensor that this one is a part of, along its first axis; "" if it is whole.
    """

    path: tuple[str, ...]
    hf: str
    gguf: str
    shape: tuple[int, ...]
    fused: str = ""

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

    def fused_names(self, num_layers: int) -> list[str]:
        """The Hugging Face names of the tensors that hold this leaf: its own, or those that it is a part of."""
        return self._expand(self.fused or self.hf, num_layers)

    def _expand(self, pattern: str, num_layers: int) -> list[str]:
        return [pattern.format(layer=i) for i in range(num_layers)] if self.stacked else [pattern]


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf of one layer. `module` is its path in our tree."""

    module: str
    gguf: str
    shape: tuple[int, ...]
    name: str = "weight"

    @property
    def path(self) -> tuple[str, ...]:
        return ("layers", *self.module.split("."), *((self.name,) if self.name else ()))


def table(config: ModelConfig) -> tuple[Row, ...]:
    """The rows of a model, in the order in which a checkpoint is read and written."""
    vocabulary, hidden = config.vocab_size, config.hidden_size
    rows = [Row(("embed_tokens", "weight"), "model.embed_tokens.weight", "token_embd.weight", (vocabulary, hidden))]
    rows += [_row(config, leaf) for leaf in _layer_leaves(config)]
    for leaf in _norm_leaves(config, "norm", "output_norm", (hidden,)):
        rows.append(Row(("norm", leaf.name), f"model.norm.{leaf.name}", f"output_norm.{leaf.name}", leaf.shape))
    if not config.tie_word_embeddings:
        rows.append(Row(("lm_head", "weight"), "lm_head.weight", "output.weight", (vocabulary, hidden)))
    return tuple(rows)


def joined_rows(config: ModelConfig) -> list[tuple[Row, ...]]:
    """The rows of `table`, those together that Hugging Face's checkpoints hold in one tensor, in their order there."""
    groups: dict[str, list[Row]] = {}
    for row in table(config):
        groups.setdefault(row.fused or row.hf, []).append(row)
    return [tuple(rows) for rows in groups.values()]


def hf_module(config: ModelConfig, projection: str) -> str:
    """The path within a layer of Hugging Face's model of the module that has our `projection` as its weight."""
    block, name = PROJECTIONS[projection]
    return f"{block}.{_renamed(config, name)}"


def projections_of(config: ModelConfig) -> tuple[str, ...]:
    """The projections that a model has."""
    return tuple(name for name in PROJECTIONS if config.gated_mlp or name != "gate_proj")


def fused_name(config: ModelConfig, projection: str) -> str | None:
    """The Hugging Face module that holds our `projection` together with others, if there is one."""
    return next((name for name, parts in config.fused if projection in parts), None)


def _renamed(config: ModelConfig, name: str) -> str:
    return dict(config.names).get(name, name)


def _row(config: ModelConfig, leaf: _Leaf) -> Row:
    *block, name = leaf.module.split(".")

    def hf(module: str) -> str:
        return ".".join(["model.layers.{layer}", *block, module, *((leaf.name,) if leaf.name else ())])

    fused = fused_name(config, name)
    gguf = ".".join(["blk.{layer}", leaf.gguf, *((leaf.name,) if leaf.name else ())])
    return Row(leaf.path, hf(_renamed(config, name)), gguf, leaf.shape, hf(fused) if fused else "")


def _layer_leaves(config: ModelConfig) -> Iterator[_Leaf]:
    hidden, heads, kv_heads, head = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    q, kv, mlp = heads * head, kv_heads * head, config.intermediate_size
    places = dict(zip(config.norms, _GGUF_NORMS, strict=True))
    before_attention, after_attention, before_mlp, after_mlp = config.norms
    yield from _norm_leaves(config, before_attention, places[before_attention], (hidden,))
    for name, shape, bias in (
        ("q_proj", (q, hidden), config.qkv_bias),
        ("k_proj", (kv, hidden), config.qkv_bias),
        ("v_proj", (kv, hidden), config.qkv_bias),
        ("o_proj", (hidden, q), config.o_bias),
    ):
        yield from _linear_leaves(name, shape, bias)
    if config.qk_norm is not None:
        shapes = {"head": ((head,), (head,)), "each": ((heads, head), (kv_heads, head)), "all": ((q,), (kv,))}
        for name, shape in zip(("q_norm", "k_norm"), shapes[config.qk_norm], strict=True):
            yield _Leaf(f"self_attn.{name}", _GGUF[name], shape)
    if config.sinks:
        yield _Leaf("self_attn.sinks", "attn_sinks", (heads,), name="")
    for place in (after_attention, before_mlp):
        yield from _norm_leaves(config, place, places[place], (hidden,))
    for name, shape in (("gate_proj", (mlp, hidden)), ("up_proj", (mlp, hidden)), ("down_proj", (hidden, mlp))):
        if name in projections_of(config):
            yield from _linear_leaves(name, shape, config.mlp_bias)
    if config.activation == "xielu":  # its parameters, and the two constants that checkpoints hold as well
        for name, shape in (("alpha_p", (1,)), ("alpha_n", (1,)), ("beta", ()), ("eps", ())):
            yield _Leaf("mlp.act_fn", "ffn_act", shape, name=name)
    yield from _norm_leaves(config, after_mlp, places[after_mlp], (hidden,))


def _linear_leaves(name: str, shape: tuple[int, int], bias: bool) -> Iterator[_Leaf]:
    module = ".".join(PROJECTIONS[name])
    yield _Leaf(module, _GGUF[name], shape)
    if bias:
        yield _Leaf(module, _GGUF[name], shape[:1], name="bias")


def _norm_leaves(config: ModelConfig, module: str | None, gguf: str, shape: tuple[int, ...]) -> Iterator[_Leaf]:
    if module is None:
        return
    yield _Leaf(module, gguf, shape)
    if config.norm_bias:
        yield _Leaf(module, gguf, shape, name="bias")
