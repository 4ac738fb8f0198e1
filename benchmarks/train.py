"""LoRA steps on real chat rows, compared with torch + peft: real tokens per second, without padding.

    python -m benchmarks.train [--model=models/SmolLM2-135M-Instruct.Q4_1.gguf] [--data=builtin:quickstart]
                               [--dtype=float32] [--examples=8] [--rounds=5] [--out=DIR]

The same work for all: rank 16 on the seven projections, only answers masked and scored, AdamW. The peer "as the
original trains" pads to the longest example of a batch, checkpoints every layer and computes all logits;
"best settings" does not checkpoint. Ours without and with packed rows, and with what all prompts begin with once
in a packed row (under prefix attention, which that needs; its tokens count for every example). Steps hold about as many
examples everywhere. Then the same step for both on full rows of equal shape. Rounds alternate, and the second
step of each turn is timed. Figures are medians.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import difflm_jax
from benchmarks.common import add_report_flags, alternating, gemm_flops, median_of, report
from difflm_jax.config import default_config
from difflm_jax.data.batches import batches, plan_batches
from difflm_jax.data.examples import Options
from difflm_jax.data.packing import BatchOptions
from difflm_jax.data.shared_prefix import shared_prefix
from difflm_jax.data.tokenised import tokenize
from difflm_jax.diffusion.corruption import CleanBatch, Corruption, corrupt
from difflm_jax.diffusion.weights import LossRule
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.models.flops import train_flops_per_token
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from difflm_jax.training.step import StepOptions, TrainState, make_train_step

LORA = LoraConfig(r=16, lora_alpha=32)
RULE = Corruption(scope="answer", mask_rate="row", loss=LossRule("masked"))
EQUAL = (8, 128)  # rows and tokens of the step of equal shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--data", default="builtin:quickstart")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--examples", type=int, default=8, help="examples of a step")
    parser.add_argument("--max_length", type=int, default=768)
    parser.add_argument("--row_length", type=int, default=384, help="of packed rows; no example may be longer")
    parser.add_argument("--loss_chunk", type=int, default=128, help="of our steps")
    parser.add_argument("--remat", default="save_dots", help="of our steps")
    parser.add_argument("--only", default="", help="words of the ways to run, separated by commas")
    add_report_flags(parser, rounds=5)
    options = parser.parse_args()

    lm = difflm_jax.load(options.model, dtype=options.dtype)
    rows = tokenize(options.data, lm.tokenizer, Options("sft", options.max_length, overlong="drop"))
    rows = rows.filter(lambda row: len(row["tokens"]) <= options.row_length)
    padded = {"batch_size": options.examples, "length_multiple": 1, "max_length": options.row_length}
    plain = batches_of(rows, **padded, pad_id=lm.pad_token_id)
    share = np.mean([len(row) for row in rows["tokens"][:1000]]) / options.row_length
    packed_rows = max(1, round(options.examples * share))
    packed = batches_of(rows, batch_size=packed_rows, batching="packed", max_length=options.row_length)
    shared = shared_batches(rows, options)
    ours = batches_of(rows, **{**padded, "length_multiple": 32}, batching="grouped")
    equal = full_rows(lm.config.vocab_size)
    with tempfile.TemporaryDirectory() as directory:
        lm.save_pretrained(directory)
        ways = {
            "torch + peft, as the original trains": _torch_way(directory, options.dtype, plain, True, lm),
            "torch + peft, best settings": _torch_way(directory, options.dtype, plain, False, lm),
            "difflm_jax, rows grouped by length": _our_way(lm, options, ours),
            "difflm_jax, packed rows": _our_way(lm, options, packed),
            "difflm_jax, packed rows, prompts' beginning once": _our_way(lm, options, shared, "prefix"),
            "torch + peft, best settings, equal shapes": _torch_way(directory, options.dtype, equal, False, lm),
            "difflm_jax, equal shapes": _our_way(lm, options, equal),
        }
    words = [word for word in options.only.split(",") if word]
    ways = {name: way for name, way in ways.items() if not words or any(word in name for word in words)}
    tokens = {name: [0] * options.rounds for name in ways}

    def counted(name: str) -> Callable[[int], Any]:
        def run(number: int) -> Any:
            count, result = ways[name](number)
            if number >= 0:
                tokens[name][number] = count
            return result

        return run

    # A width that is new compiles: two rounds before those that count, and the longest step is one of them.
    seconds = alternating({name: counted(name) for name in ways}, options.rounds, warm_up=2, settle=1)
    peak = gemm_flops(jnp.dtype(options.dtype))
    speeds = {name: median_of(np.array(tokens[name]) / np.array(seconds[name])) for name in ways}
    table = []
    for name, speed in speeds.items():
        peer = next(other for other in ways if other.endswith("equal shapes") == name.endswith("equal shapes"))
        flops = train_flops_per_token(lm.config, EQUAL[1], LORA) * speed
        table.append(
            {
                "way": name,
                "real_tokens_per_second": speed,
                "times_peer": speed / speeds[peer],
                "step_seconds": median_of(seconds[name]),
                "share_of_gemm_peak": flops / peak,
                "seconds": seconds[name],
            }
        )
    report(f"train_{options.dtype}", options, table, "real_tokens_per_second", {"gemm_gflops": peak / 1e9})


def real_tokens(batch: dict[str, np.ndarray]) -> int:
    """Counts the tokens of all examples of a batch; a shared prefix counts for each."""
    ids, first = np.unique(batch["example_ids"], return_index=True)
    return int(batch["lengths"].reshape(-1)[first][ids >= 0].sum())


def full_rows(vocab_size: int) -> list[dict[str, np.ndarray]]:
    """Returns one batch of rows without padding; half of each row is prompt."""
    tokens = np.random.default_rng(0).integers(10, vocab_size, EQUAL).astype(np.int32)
    count, length = EQUAL
    prompts = np.full(count, length // 2, np.int32)
    answers = np.broadcast_to(np.arange(length) >= length // 2, EQUAL)
    ids = np.arange(count, dtype=np.int32)
    batch = CleanBatch.of_rows(tokens, np.full(count, length, np.int32), answers, prompts, ids, ids / count)
    return [{name: np.asarray(field)[None] for name, field in vars(batch).items()}]


def batches_of(rows: Any, **options: Any) -> Any:
    """Returns one epoch of `rows` with its own plan."""
    return batches(rows, plan_batches(rows, BatchOptions(**options)))


def shared_batches(rows: Any, options: argparse.Namespace) -> Any:
    """Returns batches of one row with about as many examples as a step of the other ways."""
    prefix = shared_prefix(rows)
    mean = np.mean([len(row) for row in rows["tokens"][:1000]])
    length = prefix + round(options.examples * (mean - prefix))
    return batches_of(rows, batch_size=1, batching="shared", max_length=length, length_multiple=8)


def _our_way(
    lm: difflm_jax.LanguageModel, options: argparse.Namespace, data: Any, attention: str = "full"
) -> Callable[[int], tuple[int, Any]]:
    settings = default_config()
    model = lm.model.clone(lora=LORA, remat=options.remat)
    optimizer = make_optimizer(settings)
    schedule = learning_rate_schedule(settings, 1000)
    rule = dataclasses.replace(RULE, diffusion=lm.with_diffusion(attention=attention).diffusion)
    step = make_train_step(StepOptions(model, rule, options.loss_chunk), optimizer, schedule, make_mesh(1))
    lora = init_lora(jax.random.key(0), lm.params, LORA, jnp.zeros(lm.config.hidden_size))
    frozen = {"params": lm.params}
    state = TrainState({"lora": lora}, optimizer.init({"lora": lora}))
    compiled = set()

    def run(number: int) -> tuple[int, Any]:
        nonlocal state
        batch = data[number % len(data)]
        if number == -2:  # compile every width that will occur
            for each in range(options.rounds):
                shape = data[each % len(data)]["tokens"].shape
                if shape not in compiled:
                    compiled.add(shape)
                    state, _ = step(frozen, state, CleanBatch(**data[each % len(data)]), jax.random.key(1), 0)
        state, metrics = step(frozen, state, CleanBatch(**batch), jax.random.key(1), 0)
        return real_tokens(batch), metrics

    return run


def _torch_way(directory: str, dtype: str, data: Any, checkpoint: bool, lm: Any) -> Callable[[int], tuple[int, Any]]:
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, PeftConfig(r=16, lora_alpha=32, target_modules=list(LORA.target_modules)))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    rule = dataclasses.replace(RULE, diffusion=lm.diffusion)
    hide = jax.jit(lambda batch: corrupt(jax.random.key(1), batch, rule))

    def prepared(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = CleanBatch(**{name: field[0] for name, field in data[number % len(data)].items()})
        noisy = hide(batch)
        labels = np.where(np.asarray(noisy.weights) > 0, batch.tokens, -100)
        tokens = torch.tensor(np.array(noisy.tokens)).long()
        return tokens, torch.tensor(np.array(batch.segments) > 0), torch.tensor(labels).long()

    ready = {number: prepared(number) for number in range(-2, 40)}  # masking is not timed

    def run(number: int) -> tuple[int, None]:
        tokens, valid, labels = ready[number]
        seen = valid[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
        bias = torch.where(seen, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
        logits = model(tokens, attention_mask=bias, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return int(valid.sum()), None

    return run


if __name__ == "__main__":
    main()
