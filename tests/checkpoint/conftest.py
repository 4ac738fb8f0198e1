"""Tiny random models of every family, built with transformers, and our logits for them."""

import functools
from collections.abc import Callable
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from difflm_jax.checkpoint.names import get_path, set_path
from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.lora import LoraConfig
from difflm_jax.models.transformer import Transformer, head_logits
from difflm_jax.models.weights import PROJECTIONS
from tests.tiny import hidden_states

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# name -> config class of transformers and its own options; together they cover every leaf of the table
FAMILIES = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "llama_bias": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "tie_word_embeddings": False}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen3_tied": (transformers.Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Runs a test once per family."""
    return request.param


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., transformers.PreTrainedModel]:
    """`tiny_model(family, **config)`: a random float32 model with no parameter left at one or zero."""

    def make(family: str, **config: Any) -> transformers.PreTrainedModel:
        kind, own = FAMILIES[family]
        torch.manual_seed(len(family))
        model = transformers.AutoModelForCausalLM.from_config(kind(**{**_SIZES, **own, **config})).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture(scope="session")
def random_lora() -> Callable[[dict[str, Any], LoraConfig], dict[str, Any]]:
    """`random_lora(params, config)`: a `lora` tree without zero factors."""

    def make(params: dict[str, Any], config: LoraConfig) -> dict[str, Any]:
        rng = np.random.default_rng(3)
        lora: dict[str, Any] = {"mask_row": rng.normal(size=32)}
        for projection in config.target_modules:
            layers, out_dim, in_dim = get_path(params["layers"], PROJECTIONS[projection])["weight"].shape
            for factor, shape in (("lora_A", (layers, config.r, in_dim)), ("lora_B", (layers, out_dim, config.r))):
                set_path(lora, ("layers", *PROJECTIONS[projection], factor), 0.2 * rng.normal(size=shape))
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), lora)

    return make


@pytest.fixture(scope="session")
def tokens_BL() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 96, (2, 11))


@pytest.fixture(scope="session")
def our_logits() -> Callable[..., np.ndarray]:
    """`our_logits(config, params, tokens_BL, ...)`: [B, L, V] under causal attention, as transformers computes them."""

    def logits(
        config: ModelConfig,
        params: dict[str, Any],
        tokens_BL: np.ndarray,
        lora: dict[str, Any] | None = None,
        lora_config: LoraConfig | None = None,
        mask_token_id: int | None = None,
    ) -> np.ndarray:
        model = Transformer(config, lora=lora_config, mask_token_id=mask_token_id)
        variables = {"params": params} if lora is None else {"params": params, "lora": lora}
        valid_BL = jnp.ones(tokens_BL.shape, bool)
        lengths_B = jnp.zeros(len(tokens_BL), jnp.int32)
        hidden = hidden_states(model, DiffusionConfig("causal"), variables, jnp.asarray(tokens_BL), valid_BL, lengths_B)
        return np.asarray(head_logits(config, params, lora, mask_token_id, hidden))

    return logits


@pytest.fixture(scope="session")
def their_logits() -> Callable[..., np.ndarray]:
    """Returns the logits of a torch model."""

    def logits(model: torch.nn.Module, tokens_BL: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(tokens_BL)).logits.float().numpy()

    return logits


@pytest.fixture(scope="session")
def assert_same_weights() -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    """Asserts that our tree has every tensor of a torch state dict in its place, bit for bit, and nothing else."""

    def check(params: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
        seen = 0
        for name, tensor in state.items():
            parts = name.removeprefix("model.").split(".")
            layer = int(parts.pop(1)) if parts[0] == "layers" else None
            leaf = params
            for part in parts:
                leaf = leaf[part]
            leaf = leaf if layer is None else leaf[layer]
            assert str(leaf.dtype) == str(tensor.dtype).removeprefix("torch."), name
            np.testing.assert_array_equal(np.asarray(leaf, np.float32), tensor.float().numpy(), err_msg=name)
            seen += leaf.size
        assert seen == sum(leaf.size for leaf in _leaves(params))

    return check


def _leaves(tree: Any) -> list[Any]:
    return [leaf for branch in tree.values() for leaf in _leaves(branch)] if isinstance(tree, dict) else [tree]


@pytest.fixture
def read_once(monkeypatch):
    """Caches the reading of a .gguf file, which takes `gguf` seconds. transformers reads it three times."""
    kept = functools.cache(gguf.GGUFReader)
    for name in ("gguf.GGUFReader", "difflm_jax.checkpoint.gguf.weights.GGUFReader"):
        monkeypatch.setattr(name, lambda path: kept(str(path)))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per character, with a chat template. Byte-level, as transformers assumes for every Qwen2 tokenizer."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyzĠ.?!"]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}",
    )
