"""Noise rows per second of the draft objective: a step here, and of the same objective in torch + peft.

    python -m benchmarks.lossless_training --model=DIRECTORY_OR_GGUF [--batch=4 --length=192 --anchors=8 --rows=4]

The peer is a plain loop with transformers and peft: the clean rows without the adapter and without a gradient, their
key-value cache, and then the noise rows after each anchor under a mask of four dimensions. The loss is the
cross-entropy with the base's choices, and AdamW updates the adapter. Both get the same tokens and sizes, in turns.

Each is timed in two ways: with the clean rows in each step, and with their keys kept from an earlier epoch. The
training loop keeps them from the second epoch on.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import difflm_jax
from benchmarks.common import add_report_flags, alternating, median_of, report
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.diffusion.lossless import Draft
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.distributed.sharding import batch_sharding, place, place_rows
from difflm_jax.models.lora import ADAPTABLE, LoraConfig, init_lora
from difflm_jax.training.clean_copies import CleanCopies
from difflm_jax.training.optimizer import clip_by_global_norm
from difflm_jax.training.step import StepOptions, TrainState, make_train_step

PROMPT = 64  # columns without an anchor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--anchors", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--chunk", type=int, default=512)
    add_report_flags(parser, rounds=5)
    options = parser.parse_args()
    tokens = np.random.default_rng(0).integers(10, 40_000, (options.batch, options.length)).astype(np.int32)
    lm = difflm_jax.load(options.model, dtype=options.dtype, causal=True)
    ways = {"difflm_jax": ours(lm, tokens, options, kept=True)}
    ways["difflm_jax, clean rows in each step"] = ours(lm, tokens, options, kept=False)
    ways |= peers(tokens, options)
    noise = options.batch * options.anchors * options.rows
    seconds = alternating(ways, options.rounds, warm_up=2)
    found = [
        {
            "way": name,
            "noise_rows_per_second": noise / median_of(taken),
            "step_seconds": median_of(taken),
            "seconds": taken,
        }
        for name, taken in seconds.items()
    ]
    report("lossless_training", options, found, "noise_rows_per_second")


def ours(lm: Any, tokens: np.ndarray, options: argparse.Namespace, kept: bool) -> Callable[[int], Any]:
    """Returns a step of the training loop's own program. `kept`: with clean copies, as in the second epoch."""
    lora_config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0)
    lora = init_lora(jax.random.key(0), lm.params, lora_config, None)
    diffusion = lm.with_diffusion(gated=True, noise="uniform", draft_length=options.rows).diffusion
    draft = Draft(rows=options.rows, curriculum=(options.rows,), anchors=options.anchors)
    model = lm.model.clone(lora=lora_config, remat=options.remat)
    optimizer = optax.chain(clip_by_global_norm(1.0), optax.scale_by_adam())
    mesh = make_mesh(1, 1, 1)
    step_options = StepOptions(model, Corruption(diffusion, scope="answer", draft=draft), options.chunk)
    step = make_train_step(step_options, optimizer, lambda _: 1e-3, mesh)
    frozen = place({"params": lm.params}, mesh)
    state = place(TrainState({"lora": lora}, optimizer.init({"lora": lora})), mesh)
    column, (batch, length) = np.arange(options.length), tokens.shape
    rows = CleanBatch.of_rows(
        tokens=tokens,
        lengths=np.full(batch, length, np.int32),
        answer_mask=np.broadcast_to(column >= PROMPT, tokens.shape),
        prompt_lengths=np.full(batch, PROMPT, np.int32),
        example_ids=np.arange(batch, dtype=np.int32),
        strata=np.arange(batch) / batch,
    )
    fields = {name: np.asarray(x)[None] for name, x in vars(rows).items() if x is not None}
    copies = CleanCopies(step_options, mesh, frozen, 4.0, 64) if kept else None

    def run(number: int) -> Any:
        nonlocal state
        batch = CleanBatch(**fields) if copies is None else copies.added(fields)
        batch = place_rows(batch, batch_sharding(mesh))
        state, metrics = step(frozen, state, batch, jax.random.key(5), jnp.int32(number + 2))
        return metrics["grad_norm"]

    return run


def peers(tokens: np.ndarray, options: argparse.Namespace) -> dict[str, Callable[[int], Any]]:
    """Returns the same step in torch, transformers and peft, with clean rows in each step or with their keys kept."""
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, DynamicCache

    path, dtype = Path(options.model), getattr(torch, options.dtype)
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    base = AutoModelForCausalLM.from_pretrained(path.parent if where else path, dtype=dtype, **where)
    adapter = PeftConfig(r=16, lora_alpha=32, target_modules=list(ADAPTABLE))
    model = get_peft_model(base, adapter).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    clean = torch.tensor(tokens).long()
    batch, length, count = *clean.shape, options.anchors * options.rows
    depth = torch.arange(count) % options.rows + 1
    own = (torch.arange(count) // options.rows)[:, None] == (torch.arange(count) // options.rows)
    own &= torch.arange(count) <= torch.arange(count)[:, None]
    weights = 0.8 ** (depth - 1).float()
    rng = np.random.default_rng(1)

    def columns() -> list[tuple[Any, Any]]:
        with torch.no_grad(), model.disable_adapter():
            out = model(clean, use_cache=True, logits_to_keep=1)
        return [(layer.keys, layer.values) for layer in out.past_key_values.layers]

    found = columns()

    def run(kept: bool, _: int) -> None:
        anchors = np.stack(
            [rng.permutation(np.arange(PROMPT, length - options.rows - 2))[: options.anchors] for _ in tokens]
        )
        at = torch.tensor(np.repeat(anchors, options.rows, axis=1))
        cache = DynamicCache()
        for i, (keys, values) in enumerate(found if kept else columns()):
            cache.update(keys, values, i)
        known = torch.arange(length) <= at[..., None]
        seen = torch.cat([known, own.expand(batch, -1, -1)], dim=-1)[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        noise = torch.randint(0, base.config.vocab_size, (batch, count))
        logits = model(noise, attention_mask=mask, position_ids=at + depth, past_key_values=cache).logits
        targets = clean.gather(1, at + depth + 1)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        (losses.view(batch, count) * weights).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {
        "torch + peft": functools.partial(run, False),
        "torch + peft, keys kept": functools.partial(run, True),
    }


if __name__ == "__main__":
    main()
