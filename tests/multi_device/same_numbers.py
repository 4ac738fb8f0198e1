"""Four training steps and an evaluation on a tiny model; prints their numbers and a checksum of the adapters as JSON.

python -m tests.multi_device.same_numbers MICRO_BATCHES DATA FSDP TENSOR: 16 rows a step, in that many micro-batches.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.lora import LoraConfig, init_lora
from difflm_jax.models.transformer import Transformer
from difflm_jax.training.evaluation import Evaluator, summarise
from difflm_jax.training.mesh import batch_sharding, make_mesh, place, place_rows
from difflm_jax.training.optimizer import clip_by_global_norm
from difflm_jax.training.step import StepOptions, TrainState, make_train_step
from tests.tiny import tiny_config, tiny_params

ROWS, LENGTH, MASK = 16, 20, 96


def main(micro_batches: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> None:
    config = tiny_config()
    params = tiny_params(config)
    lora_config = LoraConfig(r=4, lora_dropout=0.2)
    lora = init_lora(jax.random.key(1), params, lora_config, params["embed_tokens"]["weight"].mean(axis=0))
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, LENGTH + 1, ROWS).astype(np.int32)
    lengths[-1] = 0  # a filler row
    position = np.arange(LENGTH)
    rows = {
        "tokens": rng.integers(0, 90, (ROWS, LENGTH)).astype(np.int32),
        "lengths": lengths,
        "answer_mask": (position >= 4) & (position < lengths[:, None]),
        "prompt_lengths": np.full(ROWS, 4, np.int32),
        "example_ids": np.arange(ROWS, dtype=np.int32),
        "row_index": np.arange(ROWS, dtype=np.int32),
    }

    def split(count: int) -> dict[str, np.ndarray]:
        return {name: field.reshape(count, ROWS // count, *field.shape[1:]) for name, field in rows.items()}

    mesh = make_mesh(data, fsdp, tensor)
    corruption = Corruption(
        scope="answer", mask_rate="row", loss_tokens="masked", loss_weight="inverse_rate", attention="prefix"
    )
    model = Transformer(config, attention="prefix", lora=lora_config, mask_token_id=MASK, remat="full")
    options = StepOptions(model, corruption, 8)
    optimizer = optax.chain(clip_by_global_norm(1.0), optax.scale_by_adam())
    step = make_train_step(options, optimizer, lambda index: 1e-2, mesh)
    params = place(params, mesh)
    state = place(TrainState(lora, optimizer.init(lora)), mesh)
    losses, norms = [], []
    for index in range(4):
        batch = place_rows(CleanBatch(**split(micro_batches)), batch_sharding(mesh))
        state, metrics = step(params, state, batch, jax.random.key(5), index)
        losses.append(float(metrics["sums"].loss / metrics["sums"].weight))
        norms.append(float(metrics["grad_norm"]))
    evaluation = summarise(Evaluator(options, mesh, [split(1)], jax.random.key(9))(params, state.lora))
    adapters = {jax.tree_util.keystr(k): np.abs(v).sum() for k, v in jax.tree_util.tree_leaves_with_path(state.lora)}
    print(
        json.dumps(
            {
                "devices": jax.device_count(),
                "losses": losses,
                "norms": norms,
                "evaluation": evaluation,
                "adapters": {name: float(jnp.asarray(value)) for name, value in adapters.items()},
            }
        )
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
