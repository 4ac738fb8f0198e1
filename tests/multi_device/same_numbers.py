"""Four training steps and an evaluation on a tiny model, in several ways; prints the numbers of each as JSON.

python -m tests.multi_device.same_numbers '[{"micro_batches": 2, "mesh": [2, 2, 2], "quantization": "nf4"}]': 16 rows a
step in that many micro-batches on a mesh of data x fsdp x tensor devices.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.diffusion.extras.settings import Extras
from difflm_jax.diffusion.lossless import Draft
from difflm_jax.diffusion.weights import LossRule
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.distributed.sharding import batch_sharding, place, place_rows
from difflm_jax.evaluation.masked import Evaluator, summarise
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.models.transformer import Transformer
from difflm_jax.quant import QuantConfig, quantize
from difflm_jax.training.optimizer import clip_by_global_norm
from difflm_jax.training.step import StepOptions, TrainState, make_train_step
from tests.tiny import tiny_config, tiny_params

ROWS, LENGTH, MASK = 16, 20, 96

# Local layers and one without RoPE; the default attention_multiplier of 1 saturates the scores of random weights.
_GRANITE = {"model_type": "granite_swa", "sliding_window": 6, "layer_rope_theta": [0, 1e4, 1e4]}
# What is divided over `tensor` with the heads: norms over all of them, weights of each; and capped logits.
FAMILIES = {
    "qwen3": {},
    "olmo2": {"model_type": "olmo2"},
    "granite_swa": {**_GRANITE, "attention_multiplier": 0.06},
    "saturated": _GRANITE,
    "gemma2": {"model_type": "gemma2", "sliding_window": 6, "final_logit_softcapping": 3.0},
    "gemma4_text": {
        "model_type": "gemma4_text",
        "attention_multiplier": 0.06,
        "sliding_window": 6,
        "head_dim": 16,
        "global_head_dim": 32,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "cohere": {"model_type": "cohere", "use_qk_norm": True},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [0],
    },
}


def setting(quantization: str | None, family: str = "qwen3") -> tuple[dict, StepOptions, dict]:
    """(parameters, options of the step, fresh adapters)."""
    config = tiny_config(intermediate_size=64, **FAMILIES[family])
    params = tiny_params(config)
    lora_config = LoraConfig(r=4, lora_dropout=0.2, routed_experts=config.experts is not None)
    lora = init_lora(jax.random.key(1), params, lora_config, params["embed_tokens"]["weight"].mean(axis=0))
    if quantization is not None:
        params = quantized(params, QuantConfig(quantization, block_size=16))
    corruption = Corruption(
        DiffusionConfig("prefix", mask_token_id=MASK),
        scope="answer",
        mask_rate="row",
        loss=LossRule("masked", "inverse_rate"),
    )
    model = Transformer(config, lora=lora_config, mask_token_id=MASK, remat="full")
    return params, StepOptions(model, corruption, 8), lora


def quantized(params: dict, config: QuantConfig) -> dict:
    """The projections of `params` in the format of `config`, layer by layer as a loader does it."""

    def convert(path, leaf):
        if not any(str(key.key).endswith("_proj") for key in path) or leaf.ndim < 3:
            return leaf
        weights = leaf.reshape(-1, *leaf.shape[-2:])  # of layers, or of layers and experts
        stack = jax.tree.map(lambda *parts: jnp.stack(parts), *[quantize(weight, config) for weight in weights])
        return jax.tree.map(lambda part: part.reshape(*leaf.shape[:-2], *part.shape[1:]), stack)

    return jax.tree_util.tree_map_with_path(convert, params)


def rows_of_a_step() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, LENGTH + 1, ROWS).astype(np.int32)
    lengths[-1] = 0  # a filler row
    position = np.arange(LENGTH)
    rows = CleanBatch.of_rows(
        tokens=rng.integers(0, 90, (ROWS, LENGTH)).astype(np.int32),
        lengths=lengths,
        answer_mask=(position >= 4) & (position < lengths[:, None]),
        prompt_lengths=np.full(ROWS, 4, np.int32),
        example_ids=np.arange(ROWS, dtype=np.int32),
        strata=np.arange(ROWS) / ROWS,
    )
    return {name: np.asarray(field) for name, field in vars(rows).items() if field is not None}


def micro_batched(count: int) -> CleanBatch:
    """Returns `rows_of_a_step` as `count` micro-batches."""
    rows = rows_of_a_step()
    return CleanBatch(**{k: field.reshape(count, ROWS // count, *field.shape[1:]) for k, field in rows.items()})


# Besides the plain rule: everything that runs the model more than once, or each row twice.
OBJECTIVES = {
    "plain": {},
    "distillation": {
        "extras": Extras(distillation=0.7, on_policy=0.6, on_policy_tokens="own"),
        "loss": LossRule("masked", "inverse_rate", eos_token_id=5),
    },
    "draft": {
        "diffusion": DiffusionConfig("causal", 0, True, MASK, gated=True, noise="uniform", draft_length=3),
        "draft": Draft(rows=3, curriculum=(2, 3), anchors=2, answers="own", steps=4),
    },
    "complementary": {
        "extras": Extras(complementary=True, anneal_steps=6),
        "loss": LossRule("masked", "inverse_rate", average="answers"),
    },
}


def numbers(
    micro_batches: int,
    mesh: list[int],
    quantization: str | None = None,
    evaluated: bool = True,
    objective: str = "plain",
    trained: str = "adapter",
    family: str = "qwen3",
) -> dict:
    params, options, lora = setting(quantization, family)
    frozen, moving = {"params": params}, {"lora": lora}
    if trained == "all":
        frozen, moving = {}, {"params": params}
        options = dataclasses.replace(options, model=options.model.clone(lora=None))
    corruption = dataclasses.replace(options.corruption, **OBJECTIVES[objective])
    options = dataclasses.replace(options, corruption=corruption)
    mesh = make_mesh(*mesh)
    optimizer = optax.chain(clip_by_global_norm(1.0), optax.scale_by_adam())
    step = make_train_step(options, optimizer, lambda index: 1e-2, mesh)
    frozen = place(frozen, mesh)
    state = place(TrainState(jax.tree.map(jnp.copy, moving), optimizer.init(moving)), mesh)
    losses, norms = [], []
    for index in range(4):
        batch = place_rows(micro_batched(micro_batches), batch_sharding(mesh))
        state, metrics = step(frozen, state, batch, jax.random.key(5), index)
        losses.append(float(metrics["sums"].loss / metrics["sums"].weight))
        norms.append(float(metrics["grad_norm"]))
    evaluation = {}
    if evaluated:
        evaluate = Evaluator(options, mesh, [vars(micro_batched(1))], jax.random.key(9))
        evaluation = summarise(evaluate({**frozen, **state.trained}))
    leaves = jax.tree_util.tree_leaves_with_path(state.trained)
    sums = {jax.tree_util.keystr(path): float(np.abs(leaf).sum()) for path, leaf in leaves}
    return {
        "losses": losses,
        "norms": norms,
        "evaluation": evaluation,
        "trained": sums,
    }


def gradient(family: str, mesh: list[int], moved: float = 0.0) -> dict[str, list]:
    """Leaves of the first step's gradient of every factor; `moved`: by how much of itself each weight was changed."""
    params, options, lora = setting(None, family)
    rng = np.random.default_rng(7)
    nudge = np.random.default_rng(11)
    params = jax.tree.map(lambda x: x * jnp.float32(1 + moved * nudge.choice([-1, 1], size=x.shape)), params)
    lora = jax.tree.map(lambda x: jnp.where(x.any(), x, jnp.float32(0.05 * rng.normal(size=x.shape))), lora)
    mesh, rate = make_mesh(*mesh), 1e4  # so that the difference of two weights is their gradient
    step = make_train_step(options, optax.identity(), lambda index: rate, mesh)
    state = place(TrainState({"lora": jax.tree.map(jnp.copy, lora)}, optax.EmptyState()), mesh)
    batch = place_rows(micro_batched(2), batch_sharding(mesh))
    state, _ = step(place({"params": params}, mesh), state, batch, jax.random.key(5), 0)
    before, after = jax.tree_util.tree_leaves_with_path(lora), jax.tree.leaves(state.trained["lora"])
    return {
        jax.tree_util.keystr(path): ((np.asarray(old, np.float64) - np.asarray(new)) / rate).tolist()
        for (path, old), new in zip(before, after, strict=True)
    }


if __name__ == "__main__":
    print(json.dumps([numbers(**case) for case in json.loads(sys.argv[1])]))
