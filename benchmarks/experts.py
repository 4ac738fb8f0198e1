"""A mixture of experts on a CPU: a LoRA step compared with transformers + peft, matmuls, and compile time by depth.

    python -m benchmarks.experts [--what=step,products,compile] [--rounds=5] [--out=DIR]

step: rank 16 on the attention projections of a small random Qwen3-MoE, rows of equal shape, float32; the peer with
transformers' two implementations of experts for a CPU. Rounds alternate; the second step of each turn is timed.
products: the tokens of a layer times the matrices of their experts: the loop of `ops.grouped`, `jax.lax.ragged_dot`, a
copy of its expert's matrix for each row, and every row times every expert. compile: 4 and 48 layers, shapes only.
"""

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import difflm_jax
from benchmarks.common import add_report_flags, alternating, median_of, report
from benchmarks.compile import compile_seconds
from benchmarks.train import full_rows
from difflm_jax.config import default_config
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.diffusion.weights import LossRule
from difflm_jax.distributed.mesh import make_mesh
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.ops.grouped import grouped_matmul
from difflm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from difflm_jax.training.step import StepOptions, TrainState, make_train_step
from tests.byte_tokenizer import byte_tokenizer

MODEL = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 32,
    "num_experts_per_tok": 4, "norm_topk_prob": True,
}  # fmt: skip
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
LAYERS = (4, 48)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="step,products,compile")
    add_report_flags(parser, rounds=5)
    options = parser.parse_args()
    if "step" in options.what:
        _steps(options)
    if "products" in options.what:
        _products(options)
    if "compile" in options.what:
        _compile(options)


def _steps(options: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    data = full_rows(MODEL["vocab_size"])[0]
    with tempfile.TemporaryDirectory() as directory:
        AutoModelForCausalLM.from_config(Qwen3MoeConfig(**MODEL)).save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
        ways = {"difflm_jax": _our_step(difflm_jax.load(directory, dtype="float32"), data)}
        for kind in ("eager", "grouped_mm"):  # batched_mm copies an expert's matrices for each row: 20 times slower
            ways[f"transformers + peft, {kind}"] = _torch_step(directory, kind, data)
        seconds = alternating(ways, options.rounds, warm_up=2, settle=1)
    best = min(median_of(times) for name, times in seconds.items() if name != "difflm_jax")
    rows = [
        {"way": name, "step_seconds": median_of(times), "times_best_peer": best / median_of(times), "seconds": times}
        for name, times in seconds.items()
    ]
    report("experts_step", options, rows, "step_seconds")


def _our_step(lm: difflm_jax.LanguageModel, data: dict[str, np.ndarray]) -> Callable[[int], Any]:
    settings = default_config()
    model = lm.model.clone(lora=LORA, remat="save_dots")
    optimizer = make_optimizer(settings)
    rule = Corruption(lm.diffusion, scope="answer", mask_rate="row", loss=LossRule("masked"))
    step = make_train_step(
        StepOptions(model, rule, 512), optimizer, learning_rate_schedule(settings, 1000), make_mesh(1)
    )
    lora = {"lora": init_lora(jax.random.key(0), lm.params, LORA, jnp.zeros(lm.config.hidden_size))}
    state = TrainState(lora, optimizer.init(lora))

    def run(_: int) -> Any:
        nonlocal state
        state, metrics = step({"params": lm.params}, state, CleanBatch(**data), jax.random.key(1), 0)
        return metrics

    return run


def _torch_step(directory: str, kind: str, data: dict[str, np.ndarray]) -> Callable[[int], None]:
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation=kind)
    model = get_peft_model(model, PeftConfig(r=16, lora_alpha=32, target_modules=list(TARGETS)))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    tokens, answers = torch.tensor(data["tokens"][0]).long(), torch.tensor(np.array(data["answer_mask"][0]))
    labels = torch.where(answers, tokens, -100)
    seen = torch.zeros((len(tokens), 1, tokens.shape[1], tokens.shape[1]))

    def run(_: int) -> None:
        logits = model(tokens, attention_mask=seen, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def _products(options: argparse.Namespace) -> None:
    experts, out, hidden, per_token = 32, 384, 512, 4
    w = jax.random.normal(jax.random.key(0), (experts, out, hidden))
    table = []
    for tokens in (1, 16, 1024):
        chosen = jnp.sort(jax.random.randint(jax.random.key(1), (tokens * per_token,), 0, experts))
        sizes = jnp.bincount(chosen, length=experts)
        rows = jax.random.normal(jax.random.key(2), (len(chosen), hidden))
        ways = {
            "loop over groups": (lambda x, w, sizes: grouped_matmul(x, [w], sizes), rows, w, sizes),
            "jax.lax.ragged_dot": (
                lambda x, w, sizes: jax.lax.ragged_dot(x, jnp.swapaxes(w, 1, 2), sizes),
                rows,
                w,
                sizes,
            ),
            "a copy for each row": (lambda x, w, chosen: jnp.einsum("md,mfd->mf", x, w[chosen]), rows, w, chosen),
            "every expert": (lambda x, w: jnp.einsum("md,xfd->mxf", x, w), rows[:tokens], w),
        }
        if tokens > 64:
            del ways["a copy for each row"]  # 3 GB
        calls = {name: (jax.jit(way), arguments) for name, (way, *arguments) in ways.items()}
        seconds = alternating(
            {name: lambda _, call=call: call[0](*call[1]) for name, call in calls.items()}, options.rounds, 1, 1
        )
        table += [
            {"way": f"{tokens} tokens: {name}", "milliseconds": 1e3 * median_of(times), "seconds": times}
            for name, times in seconds.items()
        ]
    report("experts_products", options, table, "milliseconds")


def _ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, jnp.swapaxes(w, 1, 2), sizes)


def _compile(options: argparse.Namespace) -> None:
    seconds: dict[int, list[float]] = {layers: [] for layers in LAYERS}
    mixture = {"model_type": "qwen3_moe", "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
    for _ in range(options.rounds):
        for layers in LAYERS:
            seconds[layers].append(compile_seconds(layers, 128, mixture, with_lowering=True))
    base = median_of(seconds[LAYERS[0]])
    rows = [
        {"way": f"{layers} layers", "compile_seconds": median_of(times), "of_4_layers": median_of(times) / base,
         "seconds": times}
        for layers, times in seconds.items()
    ]  # fmt: skip
    report("experts_compile", options, rows, "compile_seconds")


if __name__ == "__main__":
    main()
