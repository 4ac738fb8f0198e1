"""Opens a checkpoint, with the adapter on it, as a `LanguageModel`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from difflm_jax.checkpoint.diffusion_config import read_diffusion_config
from difflm_jax.checkpoint.hf import check_quantization
from difflm_jax.checkpoint.peft import load_adapter
from difflm_jax.checkpoint.source import Source, open_source
from difflm_jax.data.mask_token import choose_mask_token, token_of_id
from difflm_jax.diffusion.config import ATTENTION_RULES, BLOCK_RULES, DiffusionConfig
from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.models.transformer import Transformer
from difflm_jax.quant import QuantConfig
from difflm_jax.sampling.options import check_algorithm
from difflm_jax.utils.dtypes import AUTO, DTYPES, fastest_dtype


def load(
    source: str | Path,
    causal: bool = False,
    attention: str | None = None,
    logit_shift: bool | None = None,
    quantization: str | QuantConfig | None = None,
    dtype: str = "bfloat16",
    adapter: str | Path | None = None,
    mask_token: str | None = None,
    revision: str | None = None,
    block_length: int | None = None,
) -> LanguageModel:
    """Loads a Hugging Face directory, a hub id or a `.gguf` file, with a PEFT adapter if one is given.

    `attention` ("full", "prefix", "block" with its `block_length`) and `logit_shift`: None takes what the adapter or
    the merged checkpoint was trained for, else "full" and False. `causal=True` is the base's own attention (with the
    shift it was trained with). `quantization` holds the projections in "nf4", "int4" or "int8" (a `QuantConfig` sets
    the block size too); a checkpoint that bitsandbytes quantised stays as it is. `dtype` "auto" is what this machine
    computes fastest (`difflm_jax.utils.dtypes`). Without an adapter the model is the
    checkpoint as stored. Raises `UserError` for anything that cannot be represented.
    """
    if causal:
        attention, logit_shift = "causal", True if logit_shift is None else logit_shift
    lm = open_model(
        source,
        attention,
        logit_shift,
        dtype,
        adapter,
        mask_token,
        revision,
        quantization=quantization,
        block_length=block_length,
    )
    return lm.with_weights()


def open_model(
    source: str | Path,
    attention: str | None = None,
    logit_shift: bool | None = None,
    dtype: str = "bfloat16",
    adapter: str | Path | None = None,
    mask_token: str | None = None,
    revision: str | None = None,
    algorithm: str | None = None,
    quantization: str | QuantConfig | None = None,
    block_length: int | None = None,
) -> LanguageModel:
    """As `load`, but without the weights: tokenizer, mask token, adapter and shapes, all checked."""
    if dtype == AUTO:
        dtype = fastest_dtype()
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join((AUTO, *DTYPES))}")
    if isinstance(quantization, str):
        quantization = QuantConfig(quantization)
    opened = open_source(str(source), revision)
    check_quantization(opened, quantization)
    tokenizer = opened.load_tokenizer()
    loaded = load_adapter(adapter, opened.config) if adapter is not None else None
    own = (loaded.diffusion_config if loaded else read_diffusion_config(opened.path)) or {}
    trained_for = {**opened.diffusion, **own}
    mask_token_id = choose_mask_token(
        tokenizer,
        opened.config.vocab_size,
        mask_token or own.get("mask_token") or token_of_id(tokenizer, opened.diffusion.get("mask_token_id")),
    )
    if not mask_token and mask_token_id != trained_for.get("mask_token_id", mask_token_id):
        raise UserError(
            f"{source}: the mask token was {trained_for['mask_token_id']} in training, but the tokenizer's "
            f"{tokenizer.mask_token!r} is {mask_token_id}: name the right one with mask_token"
        )
    if loaded is not None and loaded.mask_token_id not in (None, mask_token_id):
        raise UserError(
            f"{adapter}: the adapter's mask row has id {loaded.mask_token_id}, but the mask token "
            f"{tokenizer.mask_token!r} has id {mask_token_id}: name the adapter's with mask_token"
        )
    attention = attention or trained_for.get("attention", "full")
    if attention not in ATTENTION_RULES:
        raise UserError(f"attention={attention!r} is not one of {', '.join(ATTENTION_RULES)}")
    block_length = _block_length(attention, block_length, trained_for)
    algorithm = algorithm or trained_for.get("algorithm", "confidence")
    check_algorithm(algorithm)
    model = Transformer(
        config=opened.config,
        lora=loaded.lora_config if loaded else None,
        mask_token_id=mask_token_id,
        dtype=DTYPES[dtype],
        on_cpu=jax.default_backend() == "cpu",
    )
    diffusion = DiffusionConfig(
        attention=attention,
        block_length=block_length,
        logit_shift=bool(trained_for.get("logit_shift", False)) if logit_shift is None else logit_shift,
        mask_token=tokenizer.mask_token,
        mask_token_id=mask_token_id,
        algorithm=algorithm,
        mask_is_trained=_mask_is_trained(opened, mask_token_id),
        gated=bool(trained_for.get("gated", False)),
        noise=trained_for.get("noise") or "mask",
        draft_length=trained_for.get("draft_length") or 0,
    )
    return LanguageModel(
        source=opened,
        model=model,
        params={},
        tokenizer=tokenizer,
        diffusion=diffusion,
        lora=jax.tree.map(jnp.asarray, loaded.lora) if loaded else None,
        quantization=quantization or next(iter(opened.stored.values()), None),
        adapter_knows_masks=loaded is not None and loaded.diffusion_config is not None,
    )


def _mask_is_trained(source: Source, mask_token_id: int) -> bool:
    """Whether masks were trained in the weights themselves: a diffusion model of others, or one that ours was merged
    into or every weight of which was trained."""
    own = read_diffusion_config(source.path) or {}
    if own.get("mask_is_trained"):
        return own.get("mask_token_id") == mask_token_id
    return source.diffusion.get("mask_token_id") == mask_token_id


def _block_length(attention: str, block_length: int | None, trained_for: Mapping[str, Any]) -> int:
    """The block length of attention in blocks, 0 for every other rule. Raises `UserError`."""
    if attention not in BLOCK_RULES:
        if block_length:
            raise UserError(f"block_length={block_length} belongs to attention='block', not to {attention!r}")
        return 0
    length = block_length or trained_for.get("block_length")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise UserError(f"attention={attention!r} needs block_length, a positive integer, not {length!r}")
    return length
