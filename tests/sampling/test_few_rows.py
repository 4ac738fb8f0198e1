"""Decoding with weights left in their stacks gives the same tokens as decoding with XLA only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.models.transformer import Transformer
from difflm_jax.ops import few_rows
from difflm_jax.quant.qtensor import QuantConfig, quantize
from difflm_jax.sampling import causal
from difflm_jax.sampling.batching import FillOptions
from difflm_jax.sampling.caches import Decoder
from difflm_jax.sampling.options import Sampling
from tests.tiny import tiny_config, tiny_params

pytestmark = pytest.mark.skipif(not few_rows.is_available(), reason="no C++ compiler here")

CONFIG = tiny_config(hidden_size=128, intermediate_size=256, num_hidden_layers=2, head_dim=32, vocab_size=160)
MIXTURE = tiny_config(
    model_type="qwen3_moe",
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_experts=4,
    num_experts_per_tok=2,
    mlp_only_layers=[0],
    head_dim=32,
    vocab_size=160,
)  # two stacks: a dense layer, then sparse ones
OPTIONS = FillOptions(Sampling(), batch_size=2)
PROMPTS = [np.arange(3, 9), np.array([5, 8, 5, 8, 5, 11, 40])]


def decoder(dtype, quantization: str | None = None, config=CONFIG) -> Decoder:
    params = tiny_params(config)
    params["embed_tokens"]["weight"] *= 0.2  # avoids near ties of greedy tokens
    if quantization:
        for module in ("self_attn", "mlp"):
            for projection in params["layers"][module].values():
                if "weight" in projection and projection["weight"].ndim == 3:
                    stack = [quantize(w, QuantConfig(quantization)) for w in projection["weight"]]
                    projection["weight"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack)
    model = Transformer(config, dtype=dtype, on_cpu=True)
    return Decoder({"params": params}, model, DiffusionConfig(attention="causal", mask_token_id=96, logit_shift=True))


@pytest.mark.parametrize(
    ("quantization", "config"), ((None, CONFIG), ("nf4", CONFIG), ("int8", CONFIG), (None, MIXTURE))
)
def test_greedy_tokens_are_those_of_xla(quantization: str | None, config, monkeypatch) -> None:
    model = decoder(jnp.float32, quantization, config)
    own = causal.continue_rows(model, PROMPTS, 12, OPTIONS)
    monkeypatch.setattr(few_rows, "is_available", lambda: False)
    jax.clear_caches()
    expected = causal.continue_rows(model, PROMPTS, 12, OPTIONS)
    jax.clear_caches()
    assert [row.tolist() for row in own.rows] == [row.tolist() for row in expected.rows]
    assert len({*map(int, np.concatenate(own.rows))}) > 3
