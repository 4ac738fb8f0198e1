"""What the commands share: flags parsed by absl, errors as one line, the model that flags name."""

import copy
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from difflm_jax.compilation import keep_compiled
from difflm_jax.config import CONVERTED, load_config, quantization
from difflm_jax.dtypes import AUTO, DTYPES
from difflm_jax.errors import UserError, exit_with_errors, one_line
from difflm_jax.hosts import connect, define_host_flags
from difflm_jax.lm import LanguageModel
from difflm_jax.loading import open_model
from difflm_jax.mesh import check_model, make_mesh
from difflm_jax.quant import FORMATS, QuantConfig


def run_command(
    main: Callable[[flags.FlagValues], int | None],
    flag_values: flags.FlagValues,
    usage: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses `argv` (the process's own by default) and runs `main(flag_values)`; returns the exit status.

    Bad flags and every `UserError` print one line that begins with `error:`; `--debug_traceback` shows the traceback.
    """
    argv = list(sys.argv if argv is None else argv)
    flag_values = copy.deepcopy(flag_values)  # a second command in the same process starts from the defaults
    flags.DEFINE_bool("debug_traceback", False, "Show the traceback of an error.", flag_values=flag_values)
    if any(item in ("--help", "-h", "-help") for item in argv[1:]):
        print(usage.strip(), flag_values.main_module_help() or flag_values.get_help(), sep="\n\n")
        return 0

    def command() -> int | None:
        try:
            rest = flag_values(argv)
        except flags.Error as error:
            raise UserError(one_line(error)) from error
        if rest[1:]:
            raise UserError(f"unexpected argument {rest[1]!r} (flags are written --name=value)")
        keep_compiled()
        return main(flag_values)

    return exit_with_errors(command, debug_traceback="--debug_traceback" in argv)


def define_model_flags(flag_values: flags.FlagValues) -> None:
    """The flags that name a model (a checkpoint, the adapter or the run on top of it) and the devices for it."""
    define_host_flags(flag_values)
    flags.DEFINE_list(
        "mesh", [], "Devices along data, fsdp and tensor (-1: what is left), as 1,4,2; default: one device.",
        flag_values=flag_values,
    )  # fmt: skip
    flags.DEFINE_string("model", "", "Hugging Face directory, hub id or .gguf file.", flag_values=flag_values)
    flags.DEFINE_string("adapter", "", "PEFT adapter directory.", flag_values=flag_values)
    flags.DEFINE_string(
        "run", "", "Output directory of a training run: what it trained, on its model.", flag_values=flag_values
    )
    flags.DEFINE_string("revision", "", "Revision of a hub id.", flag_values=flag_values)
    flags.DEFINE_enum(
        "dtype",
        None,
        [*DTYPES, AUTO],
        "Default: the run's, else bfloat16; auto: what is fastest here.",
        flag_values=flag_values,
    )
    flags.DEFINE_enum(
        "quantization",
        None,
        ["none", *FORMATS],
        "How the projections are held; default: as in the run.",
        flag_values=flag_values,
    )
    flags.DEFINE_string(
        "mask_token", "", "The mask token, where the rule's choice is not wanted.", flag_values=flag_values
    )


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


def load_from_flags(flag_values: flags.FlagValues, with_base: bool = False) -> LanguageModel:
    """Loads what `--model`, `--adapter` and `--run` name, onto the devices of `--mesh`, of all processes.

    `with_base`: and the `origin` of a run that trained every weight.
    """
    connect(flag_values)
    model, adapter, dtype = flag_values.model, flag_values.adapter, flag_values.dtype
    mask_token, revision = flag_values.mask_token, flag_values.revision
    held, converted, origin = None, None, ""
    if flag_values.run:
        if adapter:
            raise UserError("give --adapter or --run, not both")
        run = Path(flag_values.run)
        config = read_run_config(run)
        origin = (model or config.model) if config.trained == "all" else ""
        dtype, revision = dtype or config.dtype, revision or ("" if model else config.revision)
        model, adapter = trained_model(run, config, model)
        held = quantization(config)
        converted = run / CONVERTED if config.convert_cache else None
    if not model:
        raise UserError("name a model with --model, or a training run with --run")
    if flag_values.quantization:
        held = None if flag_values.quantization == "none" else QuantConfig(flag_values.quantization)
    lm = open_model(
        model,
        adapter=adapter or None,
        dtype=dtype or "bfloat16",
        mask_token=mask_token or None,
        revision=None if origin else revision or None,
        quantization=held,
    )
    lm = lm.with_weights(converted, _mesh(flag_values.mesh, lm))
    return with_origin(lm, origin, revision) if with_base and origin else lm


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
        raise UserError(f"--mesh={','.join(sizes)}: must be three integers") from error
    if len(numbers) != 3:
        raise UserError(f"--mesh={','.join(sizes)}: must be three integers: data, fsdp, tensor")
    mesh = make_mesh(*numbers)
    check_model(lm.config, lm.quantization.block_size if lm.quantization else 1, mesh)
    return mesh if mesh.size > 1 else None


def read_run_config(run: Path) -> ConfigDict:
    """The configuration that a training run wrote beside its results."""
    path = run / "config.json"
    if not path.is_file():
        raise UserError(f"{run}: not a training run (no config.json)")
    return load_config(str(path))
