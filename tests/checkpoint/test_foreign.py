"""Third-party diffusion checkpoints: small random instances of their published architectures, written in torch."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import difflm_jax
from difflm_jax import UserError
from tests.byte_tokenizer import byte_tokenizer

D, F, H, K, E, N, V = 32, 48, 4, 2, 8, 2, 264
MASK = 259

# The published config.json of each, with small sizes.
LLADA = {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "attention_dropout": 0.0,
    "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False,
    "block_group_size": 1, "block_type": "llama", "d_model": D, "embedding_dropout": 0.0, "embedding_size": V,
    "eos_token_id": 258, "flash_attention": False, "include_bias": False, "include_qkv_bias": False,
    "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02,
    "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": 250,
    "max_sequence_length": 256, "mlp_hidden_size": F, "mlp_ratio": 4, "multi_query_attention": None, "n_heads": H,
    "n_kv_heads": H, "n_layers": N, "pad_token_id": 256, "precision": "amp_bf16", "residual_dropout": 0.0,
    "rms_norm_eps": 1e-5, "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
    "transformers_version": "4.46.3", "use_cache": False, "vocab_size": V, "weight_tying": False,
}  # fmt: skip
_QWEN = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": N, "num_attention_heads": H,
    "num_key_value_heads": K, "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "rope_scaling": None, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": False,
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28, "torch_dtype": "bfloat16",
    "eos_token_id": 258, "pad_token_id": 256, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "llada": LLADA,
    "dream": {
        **_QWEN, "model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": MASK, "use_mrope": False,
        "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
    },
    "a2d-mdlm": {**_QWEN, "model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"], "head_dim": 16,
                 "attention_bias": False, "mask_token_id": MASK},
    "a2d-bd3lm": {**_QWEN, "model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"], "head_dim": 16,
                  "attention_bias": False, "mask_token_id": MASK},
    "sdar": {**_QWEN, "model_type": "sdar", "architectures": ["SDARForCausalLM"], "head_dim": 16,
             "auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"}, "attention_bias": False,
             "fuse_cross_entropy": True, "mask_token_id": MASK},
}  # fmt: skip
# (attention, block length, shift, sampling algorithm, mask id)
TRAINED_FOR = {
    "llada": ("full", 0, False, "probability", 250),
    "dream": ("full", 0, True, "entropy", MASK),
    "a2d-mdlm": ("full", 0, False, "probability", MASK),
    "a2d-bd3lm": ("block_causal", 32, False, "probability", MASK),
    "sdar": ("block_causal", 4, False, "probability", MASK),
}
_HF = {
    "norm1": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "norm2": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj", "layers": "model.layers", "embed": "model.embed_tokens", "norm": "model.norm",
    "head": "lm_head",
}  # fmt: skip
_OLMO = {
    "norm1": "attn_norm", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out", "norm2": "ff_norm",
    "gate": "ff_proj", "up": "up_proj", "down": "ff_out", "layers": "model.transformer.blocks",
    "embed": "model.transformer.wte", "norm": "model.transformer.ln_f", "head": "model.transformer.ff_out",
}  # fmt: skip


class Reference:
    """The decoder of a family in torch and float32: pre-norm, rotated halves, SwiGLU; random weights by name."""

    def __init__(self, family: str):
        self.family, config = family, CONFIGS[family]
        self.names = _OLMO if family == "llada" else _HF
        self.kv = H if family == "llada" else K
        self.width = config.get("head_dim", E)
        self.theta, self.epsilon = config["rope_theta"], config["rms_norm_eps"]
        random = torch.Generator().manual_seed(len(family))

        def weight(*shape: int, centre: float = 0.0) -> torch.Tensor:
            return centre + 0.3 * torch.randn(*shape, generator=random)

        sizes = {"q": (H * self.width, D), "k": (self.kv * self.width, D), "v": (self.kv * self.width, D),
                 "o": (D, H * self.width), "gate": (F, D), "up": (F, D), "down": (D, F)}  # fmt: skip
        tensors = {f"{self.names[part]}.weight": weight(V, D) for part in ("embed", "head")}
        tensors[f"{self.names['norm']}.weight"] = weight(D, centre=1.0)
        for layer in range(N):
            at = f"{self.names['layers']}.{layer}."
            for part, shape in sizes.items():
                tensors[f"{at}{self.names[part]}.weight"] = weight(*shape)
                if family == "dream" and part in "qkv":
                    tensors[f"{at}{self.names[part]}.bias"] = weight(shape[0])
            for part in ("norm1", "norm2"):
                tensors[f"{at}{self.names[part]}.weight"] = weight(D, centre=1.0)
            for part in ("q_norm", "k_norm") if family.startswith(("a2d", "sdar")) else ():
                tensors[f"{at}self_attn.{part}.weight"] = weight(self.width, centre=1.0)
        self.tensors = tensors

    def __call__(self, tokens: torch.Tensor, block: int = 0) -> torch.Tensor:
        """Logits [L, V] of tokens [L]; with `block` a token sees its own block (counted from 0) and those before."""
        index = torch.arange(len(tokens))
        seen = index[None, :] // block <= index[:, None] // block if block else torch.ones(len(tokens), len(tokens))
        x = self.tensors[f"{self.names['embed']}.weight"][tokens]
        angle = index[:, None] * self.theta ** (-torch.arange(0, self.width, 2) / self.width)
        self._cos, self._sin = (torch.cat([f(angle)] * 2, dim=-1)[:, None] for f in (torch.cos, torch.sin))
        for layer in range(N):
            at = f"{self.names['layers']}.{layer}."
            x = x + self._attend(self._norm(x, at + self.names["norm1"]), at, seen.bool())
            h = self._norm(x, at + self.names["norm2"])
            gated = torch.nn.functional.silu(self._linear(h, at + self.names["gate"]))
            x = x + self._linear(gated * self._linear(h, at + self.names["up"]), at + self.names["down"])
        return self._linear(self._norm(x, self.names["norm"]), self.names["head"])

    def _attend(self, h: torch.Tensor, at: str, seen: torch.Tensor) -> torch.Tensor:
        q, k, v = (self._linear(h, at + self.names[part]).view(len(h), -1, self.width) for part in "qkv")
        if f"{at}self_attn.q_norm.weight" in self.tensors:
            q, k = self._norm(q, f"{at}self_attn.q_norm"), self._norm(k, f"{at}self_attn.k_norm")
        q, k = self._rotated(q), self._rotated(k)
        k, v = (x.repeat_interleave(H // self.kv, dim=1) for x in (k, v))
        scores = torch.einsum("qhe,khe->hqk", q, k) / self.width**0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        return self._linear(torch.einsum("hqk,khe->qhe", weights, v).flatten(1), at + self.names["o"])

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self._cos + torch.cat([-second, first], dim=-1) * self._sin

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.tensors[f"{name}.weight"]

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ self.tensors[f"{name}.weight"].T
        return y + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else y


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    """(family, directory, reference)"""
    directory = tmp_path_factory.mktemp("field") / f"Tiny-{request.param}-v0.1"
    reference = Reference(request.param)
    write(directory, request.param, reference, CONFIGS[request.param])
    return request.param, directory, reference


def write(directory, family, reference, config):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    if family == "dream":  # it has its own tokenizer class, with Qwen's files
        path = directory / "tokenizer_config.json"
        named = {**json.loads(path.read_text()), "tokenizer_class": "DreamTokenizer",
                 "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}  # fmt: skip
        path.write_text(json.dumps(named))
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in reference.tensors.items()}, directory / "model.safetensors"
    )


def test_logits_and_what_it_was_trained_for(checkpoint):
    family, directory, reference = checkpoint
    lm = difflm_jax.load(directory, dtype="float32")
    found = (lm.attention, lm.block_length, lm.logit_shift, lm.algorithm, lm.mask_token_id)
    assert found == TRAINED_FOR[family]
    tokens = torch.randint(0, 250, (3, 45), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([reference(row, lm.block_length) for row in tokens])
    np.testing.assert_allclose(np.asarray(lm(tokens.numpy())), expected.numpy(), atol=2e-4, rtol=1e-4)
    lengths = np.array([45, 7, 18])  # padding on the left and prompts of any length change nothing
    valid = np.arange(45) >= 45 - lengths[:, None]
    padded = np.asarray(lm(tokens.numpy(), attention_mask=valid, prompt_lengths=lengths // 2))
    for row, length in enumerate(lengths):
        alone = reference(tokens[row, 45 - length :], lm.block_length)
        np.testing.assert_allclose(padded[row, 45 - length :], alone.numpy(), atol=2e-4, rtol=1e-4)


def reference_answer(reference, prompt, count, mask, block, shift, by_entropy):
    """Fills one mask per pass: the most confident (probability or entropy) of the first block that has masks."""
    row = torch.tensor([*prompt, *[mask] * count])
    while (open_ := (row == mask).nonzero()[:, 0]).numel():
        if block:
            open_ = open_[open_ // block == open_[0] // block]
        logits = reference(row, block).index_fill(1, torch.tensor([mask]), -torch.inf)
        logits = (torch.roll(logits, 1, dims=0) if shift else logits)[open_]
        probability = logits.softmax(-1)
        score = torch.special.xlogy(probability, probability).sum(-1) if by_entropy else probability.max(-1).values
        best = score.argmax()
        row[open_[best]] = logits[best].argmax()
    return row[len(prompt) :].tolist()


def test_it_generates_without_flags(checkpoint):
    """Prompts of any length in one batch. With block-causal models they end within a block, which the answer fills."""
    family, directory, reference = checkpoint
    attention, block, shift, algorithm, mask = TRAINED_FOR[family]
    lm = difflm_jax.load(directory, dtype="float32")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 250, n).tolist() for n in (9, 3, 12)]
    out = lm.generate(prompts, max_new_tokens=8, steps=8, stop_at_eos=False)
    ends = set(lm.eos_token_ids)
    for prompt, found in zip(prompts, out.tokens, strict=True):
        expected = reference_answer(reference, prompt, 8, mask, block, shift, algorithm == "entropy")
        cut = next((i + 1 for i, token in enumerate(expected) if token in ends), len(expected))
        assert found.tolist() == expected[:cut]
    if attention == "block_causal":
        uncached = lm.generate(prompts, max_new_tokens=8, steps=8, stop_at_eos=False, cache="none")
        assert [row.tolist() for row in uncached.tokens] == [row.tolist() for row in out.tokens]
        canvas = [[*prompts[0], mask, 5, mask, mask, *prompts[1], mask]]
        filled = lm.infill(canvas, steps=8).tokens[0].tolist()
        assert [b for a, b in zip(canvas[0], filled, strict=True) if a != mask] == [a for a in canvas[0] if a != mask]
        assert mask not in filled


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llada", {"block_type": "sequential"}, "block_type=sequential"),
        ("llada", {"scale_logits": True}, "scale_logits=True"),
        ("llada", {"include_qkv_bias": True}, "include_qkv_bias=True"),
        ("llada", {"some_new_gate": 1}, "some_new_gate: not known for model_type 'llada'"),
        ("llada", {"d_model": None}, "hidden_size must be a positive integer"),
        ("dream", {"use_mrope": True}, "use_mrope=True"),
        ("dream", {"some_new_gate": 1}, "some_new_gate"),
        ("sdar", {"block_size": "four"}, "block_length must be an integer"),
        ("sdar", {"num_experts": 8}, "num_experts=8"),
        ("a2d-mdlm", {"loophole_enabled": True}, "loophole_enabled"),
        ("sdar", {"mask_token_id": 300}, "mask token was 300"),
    ],
)
def test_what_would_change_the_result_is_refused(family, change, named, tmp_path):
    directory = tmp_path / f"Tiny-{family}"
    write(directory, family, Reference(family), {**CONFIGS[family], **change})
    with pytest.raises(UserError, match=named) as error:
        difflm_jax.load(directory)
    assert "\n" not in str(error.value)


def test_flags_win_over_what_a_checkpoint_was_trained_for(tmp_path):
    directory = tmp_path / "Tiny-sdar"
    write(directory, "sdar", Reference("sdar"), CONFIGS["sdar"])
    lm = difflm_jax.load(
        directory, attention="block_causal", block_length=8, mask_token="<|im_start|>", logit_shift=True
    )
    assert (lm.block_length, lm.mask_token_id, lm.logit_shift) == (8, 257, True)
    assert difflm_jax.load(directory, attention="full").attention == "full"
