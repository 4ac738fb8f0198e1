"""The model that a person names: a checkpoint, an adapter on it, or a training run, which knows both."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from difflm_jax.config.files import CONVERTED, load_run_config
from difflm_jax.config.files import quantization as quantization_of
from difflm_jax.distributed.mesh import check_model, make_mesh
from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.loading import open_model
from difflm_jax.quant import QuantConfig


def load_named(
    model: str = "",
    adapter: str = "",
    run: str = "",
    dtype: str | None = None,
    quantization: str | None = None,
    revision: str = "",
    mask_token: str = "",
    mesh: Sequence[str] = (),
    with_base: bool = False,
) -> LanguageModel:
    """Loads `model` with `adapter`, or what the training run in the directory `run` made, onto the devices of `mesh`.

    What is not given is as in the run; without one `dtype` is bfloat16 and weights are held as stored (`quantization`
    "none" holds them so against the run). `model` beside `run`: where its base lies now. `mesh`: devices along data,
    fsdp and tensor (one device where it is empty; with several processes rows are divided over all). `with_base`: and
    the `origin` of a run that trained every weight. Raises `UserError`.
    """
    held, converted, origin = None, None, ""
    if run:
        if adapter:
            raise UserError("give an adapter or a run, not both")
        config = read_run_config(Path(run))
        origin = (model or config.model) if config.trained == "all" else ""
        dtype, revision = dtype or config.dtype, revision or ("" if model else config.revision)
        model, adapter = trained_model(Path(run), config, model)
        held = quantization_of(config)
        if config.convert_cache and dtype == config.dtype and quantization in (None, held.format if held else "none"):
            converted = Path(run) / CONVERTED
    if not model:
        raise UserError("name a model or a training run: model=... or run=...")
    if quantization:
        held = None if quantization == "none" else QuantConfig(quantization)
    lm = open_model(
        model,
        adapter=adapter or None,
        dtype=dtype or "bfloat16",
        mask_token=mask_token or None,
        revision=None if origin else revision or None,
        quantization=held,
    )
    lm = lm.with_weights(converted, _mesh(mesh, lm))
    return with_origin(lm, origin, revision) if with_base and origin else lm


def trained_model(run: Path, config: ConfigDict, model: str = "") -> tuple[str, str | None]:
    """(model, adapter) that the last finished phase of a run has made; `model` is where its base lies now.

    Of a run that trained every weight it is the phase's own checkpoint, without an adapter and without a base.
    """
    for phase in reversed(config.phases):
        made = run / f"{phase}_model"
        if config.trained == "adapter" and (made / "adapter_config.json").is_file():
            return model or config.model, str(made)
        if config.trained == "all" and (made / "config.json").is_file():
            return str(made), None
    raise UserError(f"{run}: no phase of this run is finished (no {' or '.join(f'{p}_model' for p in config.phases)})")


def with_origin(lm: LanguageModel, source: str, revision: str = "") -> LanguageModel:
    """`lm`, every weight of which was trained, beside the causal model at `source` that it was made from."""
    dtype = jnp.dtype(lm.model.dtype).name
    base = open_model(source, "causal", True, dtype, mask_token=lm.tokenizer.mask_token, revision=revision or None)
    return dataclasses.replace(lm, origin=base.with_weights(mesh=lm.mesh))


def _mesh(sizes: Sequence[str], lm: LanguageModel) -> Mesh | None:
    """The mesh that a flag names; with several processes and none named, rows are divided over all devices."""
    if not sizes and jax.process_count() == 1:
        return None
    try:
        numbers = [int(size) for size in sizes or ("-1", "1", "1")]
    except ValueError as error:
        raise UserError(f"mesh={','.join(sizes)}: must be three integers") from error
    if len(numbers) != 3:
        raise UserError(f"mesh={','.join(sizes)}: must be three integers: data, fsdp, tensor")
    mesh = make_mesh(*numbers)
    check_model(lm.config, lm.quantization.block_size if lm.quantization else 1, mesh)
    return mesh if mesh.size > 1 else None


def read_run_config(run: Path) -> ConfigDict:
    """The configuration that a training run wrote beside its results."""
    path = run / "config.json"
    if not path.is_file():
        raise UserError(f"{run}: not a training run (no config.json)")
    return load_run_config(path)
