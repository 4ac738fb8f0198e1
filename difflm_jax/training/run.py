"""A training run: one directory, and one or two phases on the same weights. The same command resumes it."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from difflm_jax.checkpoint.diffusion_config import read_diffusion_config
from difflm_jax.checkpoint.memory import check_weights
from difflm_jax.config.files import CONVERTED, notes, phase_config, to_json
from difflm_jax.data.batches import describe, split
from difflm_jax.data.examples import Options
from difflm_jax.data.template_forms import read_template
from difflm_jax.data.tokenised import check_ids, tokenize
from difflm_jax.distributed.collectives import FSDP
from difflm_jax.distributed.mesh import check_model, make_mesh, row_shards
from difflm_jax.distributed.processes import by_one_process, is_writer
from difflm_jax.errors import RunInterruptedError, UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.loading import open_model, spec_of_config
from difflm_jax.models.config import ModelConfig
from difflm_jax.ops.attention_kernels import check_kernel
from difflm_jax.quant import QuantConfig
from difflm_jax.sampling.options import SPECULATIVE
from difflm_jax.training.checkpoints import Checkpoints, shapes_of
from difflm_jax.training.interruption import StopRequest, stop_request
from difflm_jax.training.loop import Outputs, Phase, initial_state, release, run_phase
from difflm_jax.training.metrics import SAMPLES_FILE, MetricsLog
from difflm_jax.training.optimizer import learning_rate_schedule
from difflm_jax.training.parameters import collections, save, start, with_trained
from difflm_jax.training.phase import PhaseData
from difflm_jax.training.regeneration import regenerate
from difflm_jax.training.resume import (
    SETTINGS_FILE,
    RunLock,
    check_config,
    check_data,
    describe_rows,
    is_finished,
    settle_dtype,
    write_identity,
)
from difflm_jax.training.samples import SampleLogger
from difflm_jax.training.step import TrainState
from difflm_jax.training.tracking import Tracker
from difflm_jax.utils.files import write_whole


def train(config: ConfigDict, force: bool = False, check_fit: bool = True) -> LanguageModel | None:
    """Runs every unfinished phase of `config`; returns the trained model, or None if nothing was left to do.

    Nothing is written to `output_dir` before the model, the adapter and all data have been read and checked.
    force: resumes a run whose configuration or data have changed. check_fit: refuses weights that exceed memory.
    Raises `UserError` for invalid input, and `RunInterruptedError` after a signal.
    """
    directory = Path(config.output_dir)
    config = settle_dtype(config)
    check_config(directory, config, force)
    if all(is_finished(directory / f"{phase}_model") for phase in config.phases):
        print(f"{directory}: this run is finished (remove the directory, or change output_dir, to train again)")
        return None
    lock = RunLock(directory)
    try:
        if directory.is_dir():  # else it is created and locked once the data are checked
            lock.take()
        return _train(config, lock, force, check_fit)
    finally:
        lock.release()


def _train(config: ConfigDict, lock: RunLock, force: bool, check_fit: bool) -> LanguageModel:
    directory = Path(config.output_dir)
    for note in notes(config):
        print(note)
    lm = open_configured(config)
    if check_fit:
        _check_fit(lm, config)
    rows = {phase: read_rows(config, phase, lm) for phase in config.phases}
    data = describe_rows(rows)
    check_data(directory, data, force)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_sizes(config, lm.config, lm.quantization, mesh)
    check_kernel(config.attention_kernel, config.dtype, mesh.devices.flat[0].platform)
    print(f"attention: {config.attention}, computed by {config.attention_kernel}")
    is_new = not directory.is_dir()
    lock.take()
    if is_new or not force:  # another run may have created it or trained into it meanwhile
        check_config(directory, config, force)
        check_data(directory, data, force)
    converted = directory / CONVERTED if config.convert_cache else None
    lm = lm.with_weights(converted, mesh if mesh.size > 1 else None)
    if config.objective == "draft" and config.draft.answers == "regenerate":
        rows = {phase: regenerated(config, phase, lm, rows[phase]) for phase in config.phases}
    lm = start(lm, config)
    frozen, trained = collections(lm, config, mesh)
    if "params" in trained:
        lm = dataclasses.replace(lm, params={})  # keep only the float32 masters in memory

    phases = [
        Phase(phase_data(config, name, lm, *rows[name]), lm.model, lm.diffusion, frozen, mesh) for name in config.phases
    ]
    for phase in phases:
        learning_rate_schedule(phase.data.config, phase.data.steps)  # raises if the warm-up is longer than the phase

    by_one_process(lambda: write_identity(directory, config, data), str(directory))
    log = MetricsLog(directory, enabled=is_writer())
    tracker = Tracker(config, enabled=is_writer())
    state = initial_state(phases[0].data.config, trained, mesh)
    try:
        with stop_request() as stop:
            for phase in phases:
                state = _run(phase, config, lm, state, log, tracker, stop)
                if stop.received and (phase is not phases[-1] or config.report.data):
                    raise RunInterruptedError(
                        f"stopped by {stop.received} after {phase.data.name}; the same command does what follows it"
                    )
    finally:
        tracker.finish()
    return with_trained(lm, state.trained)


def _check_fit(lm: LanguageModel, config: ConfigDict) -> None:
    """Raises `UserError` for weights that exceed the memory of this machine or of the mesh; prints a note if tight."""
    is_divided = config.mesh.fsdp != 1 or config.mesh.tensor != 1
    note = check_weights(lm, "--config.quantization", "--nocheck_fit", is_divided, config.trained == "all")
    if note:
        print(f"note: {note}")


def open_configured(config: ConfigDict) -> LanguageModel:
    """Opens the model that `config` names, without its weights, and prints its mask token. Raises `UserError`."""
    lm = open_model(spec_of_config(config))
    if config.objective == "draft":
        drafts = {"noise": config.draft.noise, "draft_length": config.draft.rows}
        lm = dataclasses.replace(lm, diffusion=lm.diffusion.causal())
        lm = lm.with_diffusion(algorithm=SPECULATIVE, gated=True, **drafts)
    if config.chat_template:
        lm.tokenizer.chat_template = read_template(config.chat_template)
    if config.adapter and lm.lora is None:
        raise UserError(
            f"adapter={config.adapter}: DoRA and saved modules are merged into the weights, and training does not "
            f"resume in them: write the merged model (difflm export --model={config.model} --adapter={config.adapter} "
            "--to=merged --out=DIR), and train on model=DIR"
        )
    if config.trained == "all" and lm.quantization is not None:
        raise UserError(
            f"model={config.model}: its weights are stored as {lm.quantization.format}, and codes cannot be trained: "
            "name a dense checkpoint, or set trained='adapter'"
        )
    print(f"mask token: {lm.tokenizer.mask_token!r} (id {lm.mask_token_id})")
    begun = config.adapter or config.model
    trained_for = {**lm.source.diffusion, **(read_diffusion_config(config.adapter or lm.source.path) or {})}
    for key in ("attention", "logit_shift"):
        if trained_for.get(key, config[key]) != config[key]:
            print(f"note: {begun} was trained with {key}={trained_for[key]!r}, and continues with {config[key]!r}")
    return lm


def _run(
    phase: Phase,
    config: ConfigDict,
    lm: LanguageModel,
    state: TrainState,
    log: MetricsLog,
    tracker: Tracker,
    stop: StopRequest,
) -> TrainState:
    """Trains one phase from where it stopped, saves its model, and returns its best state."""
    name, directory, shapes = phase.data.name, Path(config.output_dir), shapes_of(state)
    target = directory / f"{name}_model"
    settings = target / SETTINGS_FILE
    checkpoints = Checkpoints(directory / "checkpoints" / name, keep=config.keep_checkpoints)
    try:
        if target.is_dir():
            print(f"{name}: finished already")
            if not settings.is_file():  # the process ended between the two writes
                by_one_process(lambda: write_whole(settings, to_json(config)), str(settings))
            if (best := checkpoints.restore_best(shapes)) is None:
                raise UserError(f"{directory / 'checkpoints' / name}: no checkpoint can be read; remove {target}")
            return best.state
        resumed = checkpoints.restore_latest(shapes)
        step = resumed.step if resumed else 0
        if resumed:
            release(state)
        samples = MetricsLog(directory, SAMPLES_FILE, enabled=is_writer())
        for records in (log, samples):
            records.cut_back(config.phases, name, step, not (resumed and resumed.metrics.get("evaluation_due")))
        print(f"{name}: {'from step ' + str(step) if step else 'from the start'}; {describe(phase.data.train_rows)}")
        logger = SampleLogger(lm, phase.data, samples, tracker)
        out = Outputs(directory, checkpoints, log, samples, tracker, logger)
        best = run_phase(phase, state, resumed, out, stop)
        save(with_trained(lm, best.trained), target, name)
        by_one_process(lambda: write_whole(settings, to_json(config)), str(settings))
        print(f"{name}: wrote {target}")
        return best
    finally:
        checkpoints.close()


def phase_data(config: ConfigDict, name: str, lm: LanguageModel, train_rows: Any, test_rows: Any) -> PhaseData:
    """Returns the data of phase `name` of `config`."""
    return PhaseData(
        name, phase_config(config, name), train_rows, test_rows, lm.pad_token_id, lm.tokenizer.eos_token_id
    )


def read_rows(config: ConfigDict, name: str, lm: LanguageModel) -> tuple[Any, Any]:
    """Reads and tokenises the (training rows, test rows) of a phase. Raises `UserError`."""
    settings = phase_config(config, name)
    options = Options(
        phase=name,
        max_length=settings.max_length,
        answers=settings.answers,
        overlong=settings.overlong,
        bad_row_budget=settings.bad_row_budget,
        mask_token_id=lm.mask_token_id,
        debug=settings.debug,
        seed=settings.seed,
        columns=settings.data.columns,
        roles=settings.data.roles,
    )
    read = functools.partial(tokenize, settings.dataset, lm.tokenizer, options, settings.cache_dir or None)
    found: list[Any] = []
    by_one_process(lambda: found.append(read()), settings.dataset)  # process 0 tokenises; the others read its cache
    rows = found[0] if found else read()
    check_ids(rows, lm.tokenizer, lm.config.vocab_size)
    return split(rows, settings.test_size, settings.seed)


def regenerated(config: ConfigDict, name: str, lm: LanguageModel, rows: tuple[Any, Any]) -> tuple[Any, Any]:
    """Returns the (training rows, test rows) of a phase with the base's own answers."""
    settings, base = phase_config(config, name), lm.base()
    file = Path(config.output_dir) / "answers" / f"{name}.jsonl"
    most = config.draft.prompts
    counts = (most, max(most // 10, 1) if most else 0)
    return tuple(
        regenerate(split, base.decoder, file, settings.max_length, config.draft.answer_tokens, count)
        for split, count in zip(rows, counts, strict=True)
    )


def check_sizes(
    config: ConfigDict, model_config: ModelConfig, held: QuantConfig | None, mesh: Mesh | AbstractMesh
) -> None:
    """Raises `UserError` if rows or the model do not divide over the mesh, or if `max_length` is too long.

    held: how the base is quantised, or None.
    """
    parts = row_shards(mesh)
    for name in config.phases:
        batch_size = phase_config(config, name).batch_size
        if batch_size % parts:
            raise UserError(f"batch_size={batch_size} must be a multiple of mesh.data x mesh.fsdp = {parts}")
    check_model(model_config, held.block_size if held else 1, mesh)
    if mesh.shape[FSDP] > 1 and config.remat == "none":
        raise UserError("remat=none: with mesh.fsdp above 1 it would keep the gathered weights of all layers; use full")
    longest = model_config.max_position_embeddings
    if config.max_length > longest:
        raise UserError(f"max_length={config.max_length}: the model's max_position_embeddings are {longest}")
