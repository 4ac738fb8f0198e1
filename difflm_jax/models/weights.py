"""The table of weights: the shape of each leaf of our tree, and its name in Hugging Face and GGUF files.

Our parameter tree is Hugging Face's with the layers stacked: `model.layers.{i}.self_attn.q_proj.weight` [out, in] is
row i of `layers/self_attn/q_proj/weight` [N, out, in]. Weights keep the [out, in] order, so import, export and PEFT
transpose nothing.
"""

import dataclasses
from collections.abc import Iterator

from difflm_jax.models.config import ModelConfig
from difflm_jax.models.experts import Experts, LayerStack

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
    """One leaf of our tree. `hf` and `gguf` contain `{layer}` if the leaf is stacked; `shape` is that of one layer.

    `fused` is the Hugging Face name of the tensor that contains this one along its first axis; "" if it is whole.
    `layers` are the layers that have the leaf. The names of routed experts also contain `{expert}`, and `shape` is that
    of one expert.
    """

    path: tuple[str, ...]
    hf: str
    gguf: str
    shape: tuple[int, ...]
    fused: str = ""
    layers: tuple[int, ...] = ()
    experts: int = 0

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes of our leaf, before `shape`: layers, then experts."""
        return ((len(self.layers), self.experts) if self.experts else (len(self.layers),)) if self.stacked else ()

    @property
    def quantisable(self) -> bool:
        """Whether a quantised base stores this leaf quantised: projections are, but not embedding, head or biases."""
        return self.path[-2] in PROJECTIONS and self.path[-1] == "weight"

    @property
    def hf_names(self) -> list[str]:
        """The Hugging Face names of this leaf, in the order of its stack, or the one name of an unstacked leaf."""
        return self._expand(self.hf)

    @property
    def gguf_names(self) -> list[str]:
        """The GGUF names of this leaf, in the same order."""
        return self._expand(self.gguf)

    @property
    def fused_names(self) -> list[str]:
        """The Hugging Face names of the tensors with this leaf: its own, or the fused ones that contain it."""
        return self._expand(self.fused or self.hf)

    def _expand(self, pattern: str) -> list[str]:
        if not self.stacked:
            return [pattern]
        experts = range(self.experts) if "{expert}" in pattern else (0,)
        return [pattern.format(layer=i, expert=x) for i in self.layers for x in experts]


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf of one layer. `module` is its path in our tree; `hf` is its Hugging Face path, given for mixtures only.

    `experts` is the number of routed experts that each have the leaf. `fused` is the tensor that stores all of them in
    a checkpoint.
    """

    module: str
    gguf: str
    shape: tuple[int, ...]
    name: str = "weight"
    hf: str = ""
    experts: int = 0
    fused: str = ""


def table(config: ModelConfig) -> tuple[Row, ...]:
    """Returns the rows of a model, in the order in which a checkpoint is read and written."""
    vocabulary, hidden = config.vocab_size, config.hidden_size
    rows = [Row(("embed_tokens", "weight"), "model.embed_tokens.weight", "token_embd.weight", (vocabulary, hidden))]
    for stack in config.stacks:
        rows += [_row(config, stack, leaf) for leaf in _layer_leaves(config.of_stack(stack), stack.sparse)]
    for leaf in _norm_leaves(config, "norm", "output_norm", (hidden,)):
        rows.append(Row(("norm", leaf.name), f"model.norm.{leaf.name}", f"output_norm.{leaf.name}", leaf.shape))
    if not config.tie_word_embeddings:
        rows.append(Row(("lm_head", "weight"), "lm_head.weight", "output.weight", (vocabulary, hidden)))
    return tuple(rows)


def joined_rows(config: ModelConfig) -> list[tuple[Row, ...]]:
    """Groups the rows of `table` by tensor of Hugging Face's checkpoints; a fused tensor has several, in its order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in table(config):
        groups.setdefault((row.path[0], row.fused or row.hf), []).append(row)
    return [tuple(rows) for rows in groups.values()]


def hf_module(config: ModelConfig, projection: str) -> str:
    """Returns the path, within a layer of Hugging Face's model, of the module with our `projection` as its weight."""
    block, name = PROJECTIONS[projection]
    return f"{block}.{_renamed(config, name)}"


def projections_of(config: ModelConfig) -> tuple[str, ...]:
    """Returns the projections of a model, except those of routed experts."""
    mixture = config.experts
    has_mlp = mixture is None or mixture.shared_width > 0 or not all(mixture.sparse)
    names = PROJECTIONS if has_mlp else [name for name, (block, _) in PROJECTIONS.items() if block != "mlp"]
    return tuple(name for name in names if config.gated_mlp or name != "gate_proj")


def fused_name(config: ModelConfig, projection: str) -> str | None:
    """Returns the Hugging Face module that fuses our `projection` with others, or None."""
    return next((name for name, parts in config.fused if projection in parts), None)


def _renamed(config: ModelConfig, name: str) -> str:
    return dict(config.names).get(name, name)


def _row(config: ModelConfig, stack: LayerStack, leaf: _Leaf) -> Row:
    *block, name = leaf.module.split(".")
    tensor = (leaf.name,) if leaf.name else ()

    def hf(module: str) -> str:
        return ".".join(["model.layers.{layer}", *block, module, *tensor])

    path, gguf = (stack.name, *block, name, *tensor), ".".join(["blk.{layer}", leaf.gguf, *tensor])
    if leaf.hf:
        fused = f"model.layers.{{layer}}.{leaf.fused}" if leaf.fused else ""
        return Row(path, f"model.layers.{{layer}}.{leaf.hf}", gguf, leaf.shape, fused, stack.layers, leaf.experts)
    fused = fused_name(config, name)
    return Row(path, hf(_renamed(config, name)), gguf, leaf.shape, hf(fused) if fused else "", stack.layers)


def _layer_leaves(config: ModelConfig, sparse: bool) -> Iterator[_Leaf]:
    hidden, heads, kv_heads, head = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    q, kv = heads * head, kv_heads * head
    places = dict(zip(config.norms, _GGUF_NORMS, strict=True))
    before_attention, after_attention, before_mlp, after_mlp = config.norms
    yield from _norm_leaves(config, before_attention, places[before_attention], (hidden,))
    for name, shape, bias in (
        ("q_proj", (q, hidden), config.qkv_bias),
        ("k_proj", (kv, hidden), config.qkv_bias),
        ("v_proj", (kv, hidden), config.qkv_bias),
        ("o_proj", (hidden, q), config.o_bias),
    ):
        if config.has_values or name != "v_proj":
            yield from _linear_leaves(name, shape, bias)
    if config.qk_norm is not None:
        shapes = {"head": ((head,), (head,)), "each": ((heads, head), (kv_heads, head)), "all": ((q,), (kv,))}
        for name, shape in zip(("q_norm", "k_norm"), shapes[config.qk_norm], strict=True):
            yield _Leaf(f"self_attn.{name}", _GGUF[name], shape)
    if config.sinks:
        yield _Leaf("self_attn.sinks", "attn_sinks", (heads,), name="")
    for place in (after_attention, before_mlp):
        yield from _norm_leaves(config, place, places[place], (hidden,))
    yield from _mixture_leaves(config, config.experts) if sparse else _mlp_leaves(config)
    yield from _norm_leaves(config, after_mlp, places[after_mlp], (hidden,))
    if config.layer_scalar:
        yield _Leaf("layer_scalar", "layer_output_scale", (1,), name="")


def _mlp_leaves(config: ModelConfig) -> Iterator[_Leaf]:
    hidden, mlp = config.hidden_size, config.intermediate_size
    for name, shape in (("gate_proj", (mlp, hidden)), ("up_proj", (mlp, hidden)), ("down_proj", (hidden, mlp))):
        if config.gated_mlp or name != "gate_proj":
            yield from _linear_leaves(name, shape, config.mlp_bias)
    if config.activation == "xielu":  # its parameters, and two constants that checkpoints also store
        for name, shape in (("alpha_p", (1,)), ("alpha_n", (1,)), ("beta", ()), ("eps", ())):
            yield _Leaf("mlp.act_fn", "ffn_act", shape, name=name)


def _mixture_leaves(config: ModelConfig, experts: Experts) -> Iterator[_Leaf]:
    names, count, hidden = experts.names, experts.count, config.hidden_size
    router = f"{names.block}.{names.router}"
    yield _Leaf("mlp.router", "ffn_gate_inp", (count, hidden), hf=f"{router}.weight")
    if experts.router_bias:
        yield _Leaf("mlp.router", "ffn_gate_inp", (count,), name="bias", hf=f"{router}.bias")
    if names.correction:
        shape = (1,) * (names.correction_axes - 1) + (count,)
        yield _Leaf("mlp.router", "exp_probs_b", shape, name="correction", hf=f"{names.block}.{names.correction}")
    theirs = dict(names.projections)
    for name, shape in _gated_shapes(hidden, experts.width):
        module, gguf = f"mlp.experts.{name}", f"{_GGUF[name]}_exps"
        hf = f"{names.block}.experts.{{expert}}.{theirs.get(name, name)}"
        fused = (
            "" if names.stored == "each" else f"{names.block}.{names.down if name == 'down_proj' else names.gate_up}"
        )
        yield _Leaf(module, gguf, shape, hf=f"{hf}.weight", experts=count, fused=fused)
        if experts.bias:
            bias = f"{fused}_bias" if fused else ""
            yield _Leaf(module, gguf, shape[:1], name="bias", hf=f"{hf}.bias", experts=count, fused=bias)
    if experts.shared_width:
        for name, shape in _gated_shapes(hidden, experts.shared_width):
            module, hf = f"mlp.shared.{name}", f"{names.block}.{names.shared}.{name}"
            yield _Leaf(module, f"{_GGUF[name]}_shexp", shape, hf=f"{hf}.weight")
        if names.shared_gate:
            hf = f"{names.block}.{names.shared_gate}.weight"
            yield _Leaf("mlp.shared_gate", "ffn_gate_inp_shexp", (1, hidden), hf=hf)


def _gated_shapes(hidden: int, width: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    return ("gate_proj", (width, hidden)), ("up_proj", (width, hidden)), ("down_proj", (hidden, width))


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
