"""The parameters that training changes: an adapter over a frozen base, or every weight (`trained`)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from difflm_jax.config.files import lora_config
from difflm_jax.distributed.processes import by_one_process
from difflm_jax.distributed.sharding import place, place_leaf, to_host
from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.models.lora import LoraConfig, init_lora
from difflm_jax.models.weights import projections_of

Collections = dict[str, Any]  # collections of the model by name: "params", "lora"


def start(lm: LanguageModel, config: ConfigDict) -> LanguageModel:
    """Returns the model that training starts from, with a fresh adapter if one is trained and the model has none.

    The mask's embedding starts at the mean embedding of the tokenizer's tokens. (Unused rows of a pretrained table are
    near zero, a known cause of spikes at high mask rates.) If masks were trained in the checkpoint, or in an adapter
    with the checkpoint's embedding, that embedding is kept. Raises `UserError` if the adapter contradicts the config.
    """
    lm = lm.with_model(lm.model.clone(remat=config.remat, attention_kernel=config.attention_kernel))
    table_VD = lm.params["embed_tokens"]["weight"]
    if lm.mask_is_trained or lm.adapter_knows_masks:
        mask_row_D = table_VD[lm.mask_token_id]
    else:
        rows = min(len(lm.tokenizer), lm.config.vocab_size)
        mask_row_D = jnp.mean(table_VD[:rows].astype(jnp.float32), axis=0)
    if config.trained == "all":
        table_VD = table_VD.at[lm.mask_token_id].set(mask_row_D.astype(table_VD.dtype))
        if lm.mesh is not None:
            table_VD = place_leaf(("embed_tokens", "weight"), table_VD, lm.mesh)
        return dataclasses.replace(lm, params={**lm.params, "embed_tokens": {"weight": table_VD}})
    settings = lora_config(config).of_model(projections_of(lm.config))
    if lm.lora is None:
        own_row_D = mask_row_D if config.train_mask_row else None
        return lm.with_adapter(init_lora(jax.random.key(config.seed), lm.params, settings, own_row_D), settings)
    _check_same_shape(lm.model.lora, settings, config.adapter)
    lora = lm.lora
    if config.train_mask_row:
        lora = {"mask_row": mask_row_D.astype(jnp.float32), **lora}
    elif "mask_row" in lora:
        raise UserError(f"adapter={config.adapter} has a trained mask row: set train_mask_row=true")
    return lm.with_adapter(lora, settings)


def collections(lm: LanguageModel, config: ConfigDict, mesh: Mesh) -> tuple[Collections, Collections]:
    """Returns the (frozen, trained) collections of the model from `start`, on the mesh. `trained` may be donated.

    Weights are trained in float32; adapters are copied.
    """
    if config.trained == "all":
        return {}, place({"params": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), lm.params)}, mesh)
    return place({"params": lm.params}, mesh), place({"lora": jax.tree.map(jnp.copy, lm.lora)}, mesh)


def with_trained(lm: LanguageModel, trained: Mapping[str, Any]) -> LanguageModel:
    """Returns the model with the collections `trained`; weights are cast to the model's dtype."""
    if "params" in trained:
        params = jax.tree.map(lambda leaf: leaf.astype(lm.model.dtype), trained["params"])
        return dataclasses.replace(lm.with_diffusion(mask_is_trained=True), params=params)
    return dataclasses.replace(lm.with_adapter(trained["lora"], lm.model.lora), adapter_knows_masks=True)


def save(lm: LanguageModel, directory: Path, phase: str) -> None:
    """Writes the model from `with_trained`: an adapter, or a Hugging Face checkpoint. All processes must call this."""
    notes = f"Trained by difflm_jax, phase `{phase}`; settings in `training_config.json`."
    if lm.lora is None:
        dataclasses.replace(lm, provenance=notes).save_pretrained(directory)
        return
    lm = dataclasses.replace(lm, lora=jax.tree.map(to_host, lm.lora))
    by_one_process(lambda: lm.save_adapter(directory, notes), str(directory))


def _check_same_shape(loaded: LoraConfig, wanted: LoraConfig, adapter: str) -> None:
    for key in ("r", "lora_alpha", "target_modules", "routed_experts", "use_rslora"):
        have, want = getattr(loaded, key), getattr(wanted, key)
        if (set(have) != set(want)) if key == "target_modules" else (have != want):
            raise UserError(f"adapter={adapter} has {key}={have}, but lora_config.{key}={want}: make them equal")
