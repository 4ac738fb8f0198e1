"""The peer of `benchmarks.accelerator`: transformers + peft, and bitsandbytes, on the same card."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import figures
from difflm_jax.checkpoint.source import read_model_config
from difflm_jax.models.lora import ADAPTABLE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def training(name: str, keys: dict[str, str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times a step as in the original system, or with the best settings; micro-batches halve until they fit."""
    best = "best" in name
    model = random_model(options.model, quantised="nf4" in name)
    if not best:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    rank = {"r": 16, "lora_alpha": 32, "target_modules": list(ADAPTABLE)}
    model = get_peft_model(model, LoraConfig(**rank), autocast_adapter_dtype=not best)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=best and DEVICE == "cuda")
    shape = (options.rows, options.length)
    tokens = torch.tensor(np.random.default_rng(0).integers(10, model.config.vocab_size - 1, shape), device=DEVICE)
    weights = memory(torch.cuda.memory_allocated) if DEVICE == "cuda" else ""
    micro = options.rows

    def step() -> None:
        for rows in tokens.split(micro):
            seen = torch.ones((len(rows), 1, shape[1], shape[1]), dtype=torch.bool, device=DEVICE)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=not best):
                logits = model(rows, attention_mask=seen, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows.flatten())
            (loss * len(rows) / len(tokens)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def steps(count: int) -> None:
        for _ in range(count):
            step()
        synchronised()

    begun = time.perf_counter()
    while True:
        try:
            steps(1)
            break
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            micro //= 2
            if not micro:
                raise
        torch.cuda.empty_cache()
    first = time.perf_counter() - begun
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = figures.timed(steps, options)
    config = figures.configuration(options, figures.SETTINGS)
    found = figures.training_figures(config, read_model_config(options.model), seconds, options)
    peak = memory(torch.cuda.max_memory_allocated) if DEVICE == "cuda" else ""
    memories = {"peak_gib": peak, "weights_gib": weights}
    return [{**found, **memories, "first_seconds": round(first, 1), "micro_batch": micro}]


def generation(name: str, keys: dict[str, str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times generation with the whole canvas in every pass and the logits of the answer only."""
    model = random_model(options.model).eval()
    sizes = figures.batch_sizes(keys)
    return [figures.generation_figures(size, answering(model, size), options) for size in sizes]


def answering(model: Any, batch: int) -> Callable[[int], None]:
    """Returns a function that answers `batch` prompts a given number of times."""
    generated, passes = figures.GENERATED, figures.PASSES
    mask_id = model.config.vocab_size - 1
    prompt = torch.randint(10, mask_id, (batch, figures.PROMPT), device=DEVICE)
    canvas = torch.cat([prompt, prompt.new_full((batch, generated), mask_id)], dim=1)
    seen = torch.ones((batch, 1, canvas.shape[1], canvas.shape[1]), dtype=torch.bool, device=DEVICE)
    first, quota = prompt.shape[1], generated // passes

    @torch.inference_mode()
    def answers(count: int) -> None:
        for _ in range(count):
            tokens = canvas.clone()
            for _ in range(passes):
                hidden = model.model(tokens, attention_mask=seen, use_cache=False).last_hidden_state
                logits = model.lm_head(hidden[:, first - 1 : -1])
                logits[..., mask_id] = -torch.inf
                probability, chosen = torch.softmax(logits.float(), -1).max(-1)
                best = torch.where(tokens[:, first:] == mask_id, probability, -torch.inf).topk(quota).indices
                tokens[:, first:].scatter_(1, best, chosen.gather(1, best))
        synchronised()

    return answers


def random_model(source: str, quantised: bool = False) -> Any:
    config = AutoConfig.from_pretrained(source)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if not quantised:
        return model
    import bitsandbytes

    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            held = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            held.weight = bitsandbytes.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            parent, _, own = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), own, held.to(DEVICE))
    model.is_loaded_in_4bit = True
    return model


def synchronised() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def memory(read: Any) -> float:
    return round(read() / 2**30, 2)
