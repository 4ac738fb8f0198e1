"""Opens a model by name: a checkpoint, an adapter on it, or a training run, as one `ModelSpec`."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from difflm_jax.checkpoint.diffusion_config import read_diffusion_config
from difflm_jax.checkpoint.hf import check_quantization
from difflm_jax.checkpoint.memory import check_weights
from difflm_jax.checkpoint.peft import Adapter, load_adapter
from difflm_jax.checkpoint.peft_merged import merged_source
from difflm_jax.checkpoint.source import Source, open_source
from difflm_jax.checkpoint.tokenizer import chat_template, has_tokenizer, load_tokenizer
from difflm_jax.config.files import CONVERTED, load_run_config
from difflm_jax.config.files import quantization as quantization_of
from difflm_jax.data.mask_token import choose_mask_token, token_of_id
from difflm_jax.diffusion.config import ATTENTION_RULES, BLOCK_RULES, DiffusionConfig
from difflm_jax.distributed.mesh import check_model, make_mesh
from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.models.transformer import Transformer
from difflm_jax.quant import QuantConfig
from difflm_jax.sampling.batching import check_positive
from difflm_jax.sampling.options import check_algorithm, of_sampling, sampling_options
from difflm_jax.utils.dtypes import AUTO, DTYPES, fastest_dtype


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A request for a model: its source, and how it is stored, computed and used.

    source, revision: a Hugging Face directory, a hub id (at a revision), or a .gguf file. adapter: a PEFT directory.
    attention, block_length, logit_shift, algorithm: None takes the values from training.
    origin: the causal model that `source` was trained from, if every weight was trained.
    converted: a cache directory for a quantised base.
    """

    source: str
    adapter: str | None = None
    revision: str | None = None
    dtype: str = "bfloat16"
    quantization: QuantConfig | None = None
    mask_token: str | None = None
    attention: str | None = None
    block_length: int | None = None
    logit_shift: bool | None = None
    algorithm: str | None = None
    origin: "ModelSpec | None" = None
    converted: Path | None = None

    def causal(self) -> "ModelSpec":
        """Returns the spec of the same weights as a causal language model."""
        return dataclasses.replace(self, attention="causal", block_length=None, logit_shift=True)


def load(  # noqa: PLR0913 - the public face, kept stable
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
    check_fit: bool = True,
) -> LanguageModel:
    """Loads a Hugging Face directory, a hub id or a `.gguf` file, with a PEFT adapter if one is given.

    `attention` ("full", "prefix", "block" with its `block_length`) and `logit_shift`: None takes the values of the
    adapter or merged checkpoint, else "full" and False. `causal=True` is the base's own attention (with the
    shift it was trained with). `quantization` stores the projections in "nf4", "int4" or "int8" (a `QuantConfig` sets
    the block size too); a checkpoint that bitsandbytes quantised stays unchanged. `dtype` "auto" is the fastest on this
    machine (`difflm_jax.utils.dtypes`). Without an adapter the model is the checkpoint as stored.
    `check_fit` refuses weights that exceed the memory of this machine before they are read, and prints a note if they
    leave little of it. Raises `UserError` for that and for anything that is not supported.
    """
    if causal:
        attention, logit_shift = "causal", True if logit_shift is None else logit_shift
    spec = ModelSpec(
        source=str(source),
        adapter=None if adapter is None else str(adapter),
        revision=revision,
        dtype=dtype,
        quantization=QuantConfig(quantization) if isinstance(quantization, str) else quantization,
        mask_token=mask_token,
        attention=attention,
        block_length=block_length,
        logit_shift=logit_shift,
    )
    lm = open_model(spec)
    if check_fit and (note := check_weights(lm, "quantization", "check_fit=False")):
        print(f"note: {note}", file=sys.stderr)
    return lm.with_weights()


def load_model(
    spec: ModelSpec,
    mesh: Sequence[str] = (),
    with_base: bool = False,
    check: Callable[[LanguageModel], None] | None = None,
) -> LanguageModel:
    """Opens `spec` and reads its weights onto the devices of `mesh`: how many along data, fsdp and tensor.

    An empty `mesh` is one device, or with several processes all devices along data. `with_base` also loads
    the origin of `spec`, if any. `check` is called with the model before its weights are read.
    """
    lm = open_model(spec)
    if check is not None:
        check(lm)
    lm = lm.with_weights(spec.converted, _mesh(mesh, lm))
    return with_origin(lm, spec.origin) if with_base and spec.origin else lm


def with_origin(lm: LanguageModel, origin: ModelSpec) -> LanguageModel:
    """Returns `lm` with its causal origin, in the dtype and on the devices of `lm`."""
    spec = dataclasses.replace(
        origin.causal(), dtype=jnp.dtype(lm.model.dtype).name, mask_token=lm.tokenizer.mask_token
    )
    return dataclasses.replace(lm, origin=open_model(spec).with_weights(mesh=lm.mesh))


def spec_of_config(config: ConfigDict) -> ModelSpec:
    """Returns the spec of the model that a training run starts from."""
    return ModelSpec(
        source=config.model,
        adapter=config.adapter or None,
        revision=config.revision or None,
        dtype=config.dtype,
        quantization=quantization_of(config),
        mask_token=config.mask_token or None,
        attention=config.attention,
        block_length=config.block_length or None,
        logit_shift=config.logit_shift,
        algorithm=config.algorithm,
    )


def spec_of_names(
    model: str = "",
    adapter: str = "",
    run: str = "",
    dtype: str | None = None,
    quantization: str | None = None,
    revision: str = "",
    mask_token: str = "",
) -> ModelSpec:
    """Returns the spec of `model` with `adapter`, or of the result of the training run in the directory `run`.

    Missing values are those of the run. Without a run, `dtype` is bfloat16 and weights stay as stored; `quantization`
    "none" also overrides that of a run. `model` next to `run` is the new location of its base. Raises `UserError`.
    """
    if not run and not model:
        raise UserError("name a model or a training run: model=... or run=...")
    if run and adapter:
        raise UserError("give an adapter or a run, not both")
    if run:
        spec = _spec_of_run(Path(run), model, revision)
    else:
        spec = ModelSpec(model, adapter or None, revision or None)
    stored = _stored(quantization, spec.quantization, run)
    same = stored == spec.quantization and dtype in (None, spec.dtype)
    return dataclasses.replace(
        spec,
        dtype=dtype or spec.dtype,
        quantization=stored,
        mask_token=mask_token or None,
        converted=spec.converted if same else None,
    )


def _spec_of_run(run: Path, model: str, revision: str) -> ModelSpec:
    config = read_run_config(run)
    base = ModelSpec(model or config.model, revision=revision or ("" if model else config.revision) or None)
    made, adapter = trained_model(run, config, model)
    return ModelSpec(
        source=made,
        adapter=adapter,
        revision=base.revision if adapter else None,
        dtype=config.dtype,
        quantization=quantization_of(config),
        origin=None if adapter else base,
        converted=run / CONVERTED if config.convert_cache else None,
    )


def _stored(named: str | None, own: QuantConfig | None, run: str) -> QuantConfig | None:
    """Returns the quantisation that a flag names, with the block size and scales of the run."""
    if named is None or (own and own.format == named):
        return own
    if named == "none":
        return None
    if not run:
        return QuantConfig(named)
    config = read_run_config(Path(run))
    return QuantConfig(named, config.quantization_block_size, config.double_quantization)


def trained_model(run: Path, config: ConfigDict, model: str = "") -> tuple[str, str | None]:
    """Returns (model, adapter) of the last finished phase of a run. `model` is the location of its base.

    For a run that trained every weight, the model is the phase's own checkpoint, without an adapter and a base.
    """
    for phase in reversed(config.phases):
        made = run / f"{phase}_model"
        if config.trained == "adapter" and (made / "adapter_config.json").is_file():
            return model or config.model, str(made)
        if config.trained == "all" and (made / "config.json").is_file():
            return str(made), None
    raise UserError(f"{run}: no phase of this run is finished (no {' or '.join(f'{p}_model' for p in config.phases)})")


def read_run_config(run: Path) -> ConfigDict:
    """Reads the configuration that a training run wrote next to its results."""
    path = run / "config.json"
    if not run.is_dir():
        raise UserError(f"{run}: no such directory; name a training run")
    if (run / "adapter_config.json").is_file():
        raise UserError(f"{run}: is an adapter, not a training run: name it with --adapter, or name its run")
    if not path.is_file():
        raise UserError(f"{run}: not a training run (no config.json)")
    return load_run_config(path)


def open_model(spec: ModelSpec) -> LanguageModel:
    """Opens the model of `spec` without its weights, and checks tokenizer, mask token, adapter and shapes."""
    dtype = fastest_dtype() if spec.dtype == AUTO else spec.dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join((AUTO, *DTYPES))}")
    source = open_source(str(spec.source), spec.revision)
    check_quantization(source, spec.quantization)
    adapter = load_adapter(spec.adapter, source.config) if spec.adapter is not None else None
    origin = None
    if adapter is not None and adapter.lora is None:
        if spec.quantization is not None:
            raise UserError(
                f"{spec.adapter}: {adapter.weight_changes} is merged into the weights, and cannot be kept next to "
                f"{spec.quantization.format}: write the merged model first (difflm export --model={spec.source} "
                f"--adapter={spec.adapter} --to=merged --out=DIR), and quantise that"
            )
        origin = open_model(dataclasses.replace(spec.causal(), adapter=None))
        source = merged_source(source, spec.adapter)
    tokenizer = _tokenizer(source, spec.adapter, adapter)
    own = read_diffusion_config(source.path) or {}
    trained_for = {**source.diffusion, **own, **((adapter and adapter.diffusion_config) or {})}
    mask_token_id = _mask_token(spec, source, tokenizer, trained_for, adapter)
    diffusion = DiffusionConfig(
        **_rule(spec, trained_for),
        mask_token=tokenizer.mask_token,
        mask_token_id=mask_token_id,
        mask_is_trained=_mask_is_trained(source, own, mask_token_id),
    )
    model = Transformer(
        config=source.config,
        lora=adapter.lora_config if adapter else None,  # also None if it was merged
        mask_token_id=mask_token_id,
        dtype=DTYPES[dtype],
        on_cpu=jax.default_backend() == "cpu",
    )
    return LanguageModel(
        source=source,
        model=model,
        params={},
        tokenizer=tokenizer,
        diffusion=diffusion,
        lora=jax.tree.map(jnp.asarray, adapter.lora) if adapter and adapter.lora is not None else None,
        quantization=spec.quantization or next(iter(source.stored.values()), None),
        provenance=f"The adapter ({adapter.weight_changes}) was merged into the weights." if origin else "",
        adapter_knows_masks=adapter is not None and adapter.diffusion_config is not None,
        origin=origin,
    )


def _tokenizer(source: Source, directory: str | None, adapter: Adapter | None) -> Any:
    """Returns the tokenizer and chat template of the adapter if it includes them, else the checkpoint's."""
    if adapter is None:
        return source.load_tokenizer()
    path = Path(directory).expanduser()
    if has_tokenizer(path):
        tokenizer, what = load_tokenizer(path), "tokenizer and chat template"
    else:
        tokenizer, what = source.load_tokenizer(), "chat template"
        template = chat_template(path)
        if template is None:
            return tokenizer
        tokenizer.chat_template = template
    if adapter.diffusion_config is None:  # our adapters always include them
        print(f"note: {path}: its own {what} are used", file=sys.stderr)
    return tokenizer


def _mask_token(
    spec: ModelSpec, source: Source, tokenizer: Any, trained_for: Mapping[str, Any], adapter: Adapter | None
) -> int:
    """Returns the id of the mask token and adds it to the tokenizer. Raises `UserError` if it was not trained."""
    named = trained_for.get("mask_token") or token_of_id(tokenizer, trained_for.get("mask_token_id"))
    is_new = spec.mask_token and spec.attention != "causal" and spec.mask_token not in tokenizer.get_vocab()
    found = choose_mask_token(tokenizer, source.config.vocab_size, spec.mask_token or named)
    if is_new:
        print(
            f"note: mask_token={spec.mask_token!r} is no token of {spec.source}; it takes the free row {found} of the "
            "embedding",
            file=sys.stderr,
        )
    if not spec.mask_token and found != trained_for.get("mask_token_id", found):
        raise UserError(
            f"{spec.source}: the mask token was {trained_for['mask_token_id']} in training, but the tokenizer's "
            f"{tokenizer.mask_token!r} is {found}: name the right one with mask_token"
        )
    if adapter is not None and adapter.mask_token_id not in (None, found):
        raise UserError(
            f"{spec.adapter}: the adapter's mask row has id {adapter.mask_token_id}, but the mask token "
            f"{tokenizer.mask_token!r} has id {found}: name the adapter's with mask_token"
        )
    return found


def _rule(spec: ModelSpec, trained_for: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `DiffusionConfig` for the use of a model: as requested, else as trained."""
    attention = spec.attention or trained_for.get("attention", "full")
    if attention not in ATTENTION_RULES:
        raise UserError(f"attention={attention!r} is not one of {', '.join(ATTENTION_RULES)}")
    algorithm = spec.algorithm or trained_for.get("algorithm", "confidence")
    check_algorithm(algorithm)
    shift = trained_for.get("logit_shift", False) if spec.logit_shift is None else spec.logit_shift
    return {
        "attention": attention,
        "block_length": _block_length(attention, spec.block_length, trained_for),
        "logit_shift": bool(shift),
        "algorithm": algorithm,
        "gated": bool(trained_for.get("gated", False)),
        "noise": trained_for.get("noise") or "mask",
        "draft_length": trained_for.get("draft_length") or 0,
        "preset": _preset(spec, attention, trained_for),
    }


def _preset(spec: ModelSpec, attention: str, trained_for: Mapping[str, Any]) -> str:
    """Returns the tuned decoding options as JSON; "" if the model is used with other settings than when tuned."""
    preset = trained_for.get("preset")
    own = trained_for.get("attention", "full"), trained_for.get("algorithm", "confidence")
    if not preset or spec.algorithm not in (None, own[1]) or attention != own[0]:
        return ""
    options = preset.get("options")
    if not isinstance(options, dict):
        raise UserError(f"{spec.adapter or spec.source}: diffusion_config.json: preset must hold options")
    try:
        sampling_options("causal" if trained_for.get("gated") else attention, own[1], of_sampling(options))
        for name in ("block_length", "tokens_per_pass"):
            check_positive(name, options.get(name, 1))
    except UserError as error:
        raise UserError(f"{spec.adapter or spec.source}: diffusion_config.json: preset: {error}") from error
    return json.dumps(preset, sort_keys=True)


def _block_length(attention: str, block_length: int | None, trained_for: Mapping[str, Any]) -> int:
    """Returns the block length of block attention, 0 for other rules. Raises `UserError`."""
    if attention not in BLOCK_RULES:
        if block_length:
            raise UserError(f"block_length={block_length} belongs to attention='block', not to {attention!r}")
        return 0
    length = block_length or trained_for.get("block_length")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise UserError(f"attention={attention!r} needs block_length, a positive integer, not {length!r}")
    return length


def _mask_is_trained(source: Source, own: Mapping[str, Any], mask_token_id: int) -> bool:
    """Whether the weights themselves were trained on masks.

    True for third-party diffusion models, merged adapters of ours, and models with every weight trained.
    """
    if own.get("mask_is_trained"):
        return own.get("mask_token_id") == mask_token_id
    return source.diffusion.get("mask_token_id") == mask_token_id


def _mesh(sizes: Sequence[str], lm: LanguageModel) -> Mesh | None:
    """Returns the mesh that a flag names. With several processes, the default shards rows over all devices."""
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
