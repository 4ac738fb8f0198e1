"""The training loop of one phase: reads batches, runs steps, evaluates, saves checkpoints and writes metrics."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from difflm_jax.config.schema import build
from difflm_jax.data.batches import prefetch
from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.diffusion.extras.settings import Extras
from difflm_jax.diffusion.lossless import Draft, accepted_drafts
from difflm_jax.diffusion.weights import LossRule
from difflm_jax.distributed.processes import agreed, is_writer
from difflm_jax.distributed.sharding import batch_sharding, place, place_rows, rows_of_process
from difflm_jax.errors import RunInterruptedError, UserError, one_line
from difflm_jax.evaluation.masked import Evaluator, by_rate, summarise
from difflm_jax.models.transformer import Transformer
from difflm_jax.training.cadence import Cadence
from difflm_jax.training.checkpoints import Checkpoints, Restored, shapes_of
from difflm_jax.training.clean_copies import CleanCopies, clean_copies
from difflm_jax.training.interruption import StopRequest
from difflm_jax.training.meter import Measured, Meter, Throughput
from difflm_jax.training.metrics import MetricsLog
from difflm_jax.training.monitoring import Duties, Heartbeat, Profile, StepResult
from difflm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from difflm_jax.training.phase import PHASE_SCOPE, PhaseData
from difflm_jax.training.step import StepOptions, TrainState, make_train_step
from difflm_jax.training.tracking import Tracker

UNEVALUATED = {"evaluation_due": True}  # metrics of a checkpoint whose evaluation was prevented by a signal

# Each phase draws its noise from its own stream of the run's seed, and evaluation from another.
_PHASE_STREAM = {"pretrain": 0, "sft": 1}
_EVALUATION_STREAM = 2


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase to train: its data, the model, and the collections that are not trained."""

    data: PhaseData
    model: Transformer
    diffusion: DiffusionConfig
    frozen: dict[str, Any]
    mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where a phase writes. Everything is in the run's `directory`."""

    directory: Path
    checkpoints: Checkpoints
    log: MetricsLog
    samples: MetricsLog
    tracker: Tracker
    on_evaluation: Callable[[dict[str, Any], int], None]  # (trained collections, step): logs sample generations


def run_phase(
    phase: Phase, initial: TrainState, resumed: Restored | None, out: Outputs, stop: StopRequest
) -> TrainState:
    """Trains to the end of the phase and returns its best state.

    Training starts from `resumed` if it is given, else from `initial`, which is donated. The best state has the lowest
    `eval_loss`; without a test split it is the last one. Raises `RunInterruptedError` after a signal, and `UserError`
    after `max_nonfinite_steps` consecutive non-finite steps, both after a checkpoint. Also raises `UserError` if
    `resumed` is of a later step than the phase has, or if the last checkpoint could not be written.
    """
    data, total = phase.data, phase.data.steps
    options = step_options(data.name, data.config, phase.model, phase.diffusion, data.eos_id, total)
    train_step = make_train_step(
        options, make_optimizer(data.config), learning_rate_schedule(data.config, total), phase.mesh
    )
    evaluate = make_evaluator(phase, options)
    shapes, cadence = shapes_of(initial), Cadence.of(data)
    print(f"{data.name}: {data.describe()}, an evaluation every {cadence.evaluation_interval}", flush=True)
    print("\n".join([*data.advice(), f"{data.name}: compiling the training step"]), flush=True)
    done, state = (resumed.step, resumed.state) if resumed else (0, initial)
    if done > total:
        raise UserError(
            f"{out.directory}: the checkpoint of {data.name} is of step {done}, but the phase has only {total} steps "
            "now: set max_steps back, or begin in another output_dir"
        )
    if resumed and resumed.metrics.get("evaluation_due"):
        _evaluate_late(evaluate, phase, resumed, out, stop)
    meter = make_meter(phase, cadence, out, resumed)
    heartbeat = Heartbeat(out.directory, data.config.heartbeat_seconds, data.name, total)
    duties = Duties(heartbeat, _profile(data, out), meter)
    copies = clean_copies(data, options, phase.mesh, phase.frozen)
    next_batch, key = _reader(phase, done, copies), phase_key(data.name, data.config.seed)

    with contextlib.closing(duties):
        for step in range(done + 1, total + 1):
            duties.before(step)
            batch, waited = next_batch()
            state, metrics = train_step(phase.frozen, state, batch, key, step - 1)
            duties.after(step, StepResult(metrics, waited))
            due = cadence.evaluates(step)
            if not (stop.reached() or due or meter.gave_up):
                continue
            meter.settle()
            heartbeat.beat(step, "evaluating and saving")
            record = _evaluate(evaluate, phase, state, step, out, stop) if due else {}
            _save(step, state, {"meter": meter.state(), **(UNEVALUATED if record is None else record)}, out)
            if meter.gave_up:
                _stop_at_nonfinite(phase, meter, out)
            if stop.reached() and (step < total or record is None):
                _stop_at_signal(phase, stop.reached(), step, out)
            meter.restart_clock()
    release(state)  # it is on disk, so memory need not hold it and the best state
    return _best_state(data.name, total, shapes, out)


def make_meter(phase: Phase, cadence: Cadence, out: Outputs, resumed: Restored | None) -> Meter:
    """Builds the meter of a phase, with its counts at the time `resumed` was saved."""
    config, everything = phase.data.config, phase.data.train_batches()
    measured = Measured(
        phase.data.name,
        cadence,
        Throughput(phase.model, phase.mesh.size),
        lambda step: phase.data.origins(everything[step]["example_ids"]),
        config.max_nonfinite_steps,
    )
    return Meter(measured, out.log, out.tracker, resumed.metrics["meter"] if resumed else None)


def _profile(data: PhaseData, out: Outputs) -> Profile:
    settings = data.config.profile
    return Profile(out.directory / "profile" / data.name, settings.first_step, settings.steps)


def _reader(phase: Phase, done: int, copies: CleanCopies | None) -> Callable[[], tuple[CleanBatch, float]]:
    """Returns a function that gives the next batch after step `done`, on the mesh, and the seconds waited for it.

    `copies` adds the clean copies that it keeps.
    """
    config, sharding = phase.data.config, batch_sharding(phase.mesh)
    local_rows = rows_of_process(phase.mesh, config.batch_size)
    iterator = prefetch(phase.data.train_batches(local_rows), done, config.dataloader_num_workers)

    def next_batch() -> tuple[CleanBatch, float]:
        began = time.perf_counter()
        batch = next(iterator)
        waited = time.perf_counter() - began
        return place_rows(CleanBatch(**batch) if copies is None else copies.added(batch), sharding), waited

    return next_batch


def release(state: TrainState) -> None:
    """Frees the memory of a state, even if something still refers to it."""
    jax.tree.map(lambda leaf: leaf.delete(), state)


def _evaluate(
    evaluate: Evaluator | None, phase: Phase, state: TrainState, step: int, out: Outputs, stop: StopRequest
) -> dict[str, Any] | None:
    """Evaluates, generates samples, writes both and returns the `eval_*` fields of a metrics line.

    Returns None if a signal came before the samples. Then nothing is written, and the resumed run evaluates.
    """
    record = evaluation_record(evaluate, phase, state.trained, stop.reached)
    if record is None or stop.reached():
        return None
    out.on_evaluation(state.trained, step)
    if record:
        out.log.append({"phase": phase.data.name, "step": step, **record})
        out.tracker.log(phase.data.name, record, step)
    return record


def _evaluate_late(
    evaluate: Evaluator | None, phase: Phase, resumed: Restored, out: Outputs, stop: StopRequest
) -> None:
    """Runs the evaluation that a signal prevented when `resumed` was saved."""
    record = _evaluate(evaluate, phase, resumed.state, resumed.step, out, stop)
    if record is None:
        _stop_at_signal(phase, stop.reached(), resumed.step, out)
    if agreed(out.log.flush() and out.samples.flush()):
        out.checkpoints.amend(resumed.step, {**record, **dict.fromkeys(UNEVALUATED, False)})


def _save(step: int, state: TrainState, metrics: dict[str, Any], out: Outputs) -> None:
    """Saves a checkpoint if all lines up to it are on disk. While lines wait for room, no checkpoint is saved."""
    if agreed(out.log.flush() and out.samples.flush()):
        out.checkpoints.save(step, state, metrics)


def _best_state(name: str, total: int, shapes: TrainState, out: Outputs) -> TrainState:
    out.checkpoints.finish(total)
    best = out.checkpoints.restore_best(shapes)
    if best is None:
        raise UserError(f"{out.directory}: no checkpoint of {name} can be read; the same command trains it again")
    return best.state


def _stop_at_nonfinite(phase: Phase, meter: Meter, out: Outputs) -> None:
    """Ends the run after too many non-finite steps. A checkpoint has been written."""
    kept = _keep_batch(phase, meter.last_nonfinite, out.directory / "nonfinite")
    raise UserError(
        f"{phase.data.name}: {meter.gave_up} consecutive steps, up to step {meter.last_nonfinite}, had a loss or "
        f"gradient that is not finite; none of them changed anything; {kept}, the rows of each are in {out.log.path}; "
        f"the same command resumes from checkpoint {out.checkpoints.latest()}, after them"
    )


def _stop_at_signal(phase: Phase, signal: str, step: int, out: Outputs) -> None:
    """Ends the run after a signal. A checkpoint has been written."""
    raise RunInterruptedError(
        f"stopped by {signal} after step {step} of {phase.data.steps} of {phase.data.name}; the same command resumes "
        f"from checkpoint {out.checkpoints.latest()}"
    )


def _keep_batch(phase: Phase, step: int, directory: Path) -> str:
    """Writes the batch of a non-finite step; returns a clause that says where it is."""
    target = directory / f"{phase.data.name}-step{step}.npz"
    try:
        if is_writer():
            target.parent.mkdir(exist_ok=True)
            np.savez(target, **phase.data.train_batches()[step - 1])
    except OSError as error:
        return f"the batch of the last one could not be written ({one_line(error)})"
    return f"the batch of the last one is in {target}"


def phase_key(name: str, seed: int) -> jax.Array:
    """Returns the key of all noise of a phase. Step `index` (from 0) folds its number in."""
    return jax.random.fold_in(jax.random.key(seed), _PHASE_STREAM[name])


def step_options(
    name: str, config: Any, model: Transformer, diffusion: DiffusionConfig, eos_id: int, steps: int
) -> StepOptions:
    """Builds the static options of a step of phase `name` from its config keys. `steps`: steps of the phase."""
    loss, extras = build(LossRule, config, eos_token_id=eos_id), build(Extras, config)
    corruption = build(Corruption, config, diffusion=diffusion, scope=PHASE_SCOPE[name], loss=loss, extras=extras)
    if config.objective == "draft":
        corruption = dataclasses.replace(corruption, draft=build(Draft, config, steps=steps))
    return StepOptions(model, corruption, config.loss_chunk, config.unroll_layers)


def make_evaluator(phase: Phase, options: StepOptions) -> Evaluator | None:
    """Builds the evaluator of the test split; returns None if there is no test split."""
    config = phase.data.config
    if len(phase.data.test_rows) == 0:
        return None
    data = phase.data.test_batches(rows_of_process(phase.mesh, config.batch_size))
    key = jax.random.fold_in(jax.random.key(config.seed), _EVALUATION_STREAM)
    return Evaluator(options, phase.mesh, (data[i] for i in range(len(data))), key)


def evaluation_record(
    evaluate: Evaluator | None, phase: Phase, trained: dict[str, Any], stop: Callable[[], Any] = lambda: False
) -> dict[str, Any] | None:
    """Returns the `eval_*` fields of a metrics line: empty without a test split, None if `stop` interrupted it."""
    if evaluate is None:
        return {}
    sums = evaluate({**phase.frozen, **trained}, stop)
    if sums is None:
        return None
    found = {f"eval_{name}": value for name, value in summarise(sums).items()}
    if phase.data.config.objective == "draft":
        drafted = accepted_drafts(sums.masked_correct, sums.masked_count)
        return found | {f"eval_{name}": value for name, value in drafted.items()}
    return found | {"eval_by_mask_rate": by_rate(sums)}


def initial_state(config: Any, trained: dict[str, Any], mesh: Mesh) -> TrainState:
    """Returns `trained` (not copied) with fresh optimiser moments, on the mesh."""
    return place(TrainState(trained, make_optimizer(config).init(trained)), mesh)
