"""The loop of one phase: batches in, steps, evaluations and checkpoints at their times, metrics out."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from difflm_jax.config.schema import build
from difflm_jax.data.batches import batches, plan_batches, prefetch
from difflm_jax.data.packing import Batching
from difflm_jax.diffusion.config import DiffusionConfig
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.diffusion.lossless import Draft, accepted_drafts
from difflm_jax.distributed.processes import agreed, is_writer
from difflm_jax.distributed.sharding import batch_sharding, place, place_rows, rows_of_process
from difflm_jax.errors import RunInterruptedError, UserError, one_line
from difflm_jax.evaluation.masked import Evaluator, by_rate, summarise
from difflm_jax.models.transformer import Transformer
from difflm_jax.training.checkpoints import Checkpoints, Restored
from difflm_jax.training.interruption import StopRequest
from difflm_jax.training.meter import Meter, throughput
from difflm_jax.training.metrics import MetricsLog
from difflm_jax.training.monitoring import Heartbeat, Profile
from difflm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from difflm_jax.training.step import StepOptions, TrainState, make_train_step
from difflm_jax.training.tracking import Tracker

PHASE_SCOPE = {"pretrain": "all", "sft": "answer"}

# Each phase draws its noise from its own stream of the run's seed; evaluation has one of its own.
_PHASE_STREAM = {"pretrain": 0, "sft": 1}
_EVALUATION_STREAM = 2


@dataclasses.dataclass(frozen=True)
class Phase:
    """Everything that one phase needs: `config` is resolved for it (`difflm_jax.config.files.phase_config`)."""

    name: str
    config: Any
    model: Transformer
    diffusion: DiffusionConfig
    frozen: dict[str, Any]  # collections of the model that are not trained
    mesh: Mesh
    train_rows: Any
    test_rows: Any
    pad_id: int
    eos_id: int

    @functools.cached_property
    def plan(self) -> Batching:
        """Which examples of the training rows share a row, and which rows a step."""
        config = self.config
        return plan_batches(
            self.train_rows,
            rows_per_step=config.batch_size * config.gradient_accumulation_steps,
            batching=batching_of(self),
            max_length=config.max_length,
            length_multiple=config.length_multiple,
            answer_padding=answer_padding(self),
            seed=config.seed,
        )

    @property
    def steps(self) -> int:
        """Of all epochs, or `max_steps`."""
        steps = self.plan.steps_per_epoch * self.config.epochs
        return min(steps, self.config.max_steps) if self.config.max_steps else steps


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where a phase writes: everything in `directory`, which is the run's."""

    directory: Path
    checkpoints: Checkpoints
    log: MetricsLog
    samples: MetricsLog
    tracker: Tracker
    on_evaluation: Callable[[dict[str, Any], int], None]  # (what is trained, step): logs sample generations


def run_phase(
    phase: Phase, initial: TrainState, resumed: Restored | None, out: Outputs, stop: StopRequest
) -> TrainState:
    """Trains to the end of the phase, from `resumed` if it is given, else from `initial`, which is used up; returns the
    best state.

    Best is the lowest `eval_loss`; without a test split it is the last. Raises `RunInterruptedError` after a signal,
    and `UserError` after `max_nonfinite_steps` steps in a row that were not finite, each with a checkpoint written.
    """
    config = phase.config
    data = make_batches(phase, phase.train_rows, train=True)
    total = phase.steps
    interval = max(1, min(total, phase.plan.steps_per_epoch) // max(1, config.log_frequency_per_epoch))
    options = step_options(phase)
    schedule = learning_rate_schedule(config, total)
    train_step = make_train_step(options, make_optimizer(config), schedule, phase.mesh)
    evaluate = make_evaluator(phase, options)
    key = phase_key(phase)

    print(f"{phase.name}: {data_line(phase)}", flush=True)
    done, state, saved = (resumed.step, resumed.state, resumed.metrics["meter"]) if resumed else (0, initial, None)
    if done > total:
        raise UserError(
            f"{out.directory}: the checkpoint of {phase.name} is of step {done}, but the phase has only {total} steps "
            "now: set max_steps back, or begin in another output_dir"
        )
    everything = make_batches(phase, phase.train_rows, train=True, whole=True)
    speed = throughput(phase.model, config.max_length, phase.mesh.size)
    meter = Meter(
        phase.name, out.log, out.tracker, total, speed, functools.partial(rows_of_step, phase, everything), saved
    )
    heartbeat = Heartbeat(out.directory, config.heartbeat_seconds)
    profile = Profile(out.directory / "profile" / phase.name, config.profile.first_step, config.profile.steps)
    iterator = prefetch(data, done, config.dataloader_num_workers)
    sharding = batch_sharding(phase.mesh)

    pending = None  # metrics are read one step late, so that the host never waits for the step it has just started
    with contextlib.closing(profile):
        for step in range(done + 1, total + 1):
            heartbeat.beat(phase.name, step - 1, total, "training")
            profile.before(step)
            began = time.perf_counter()
            host_batch = next(iterator)
            waited = time.perf_counter() - began
            batch = place_rows(CleanBatch(**host_batch), sharding)
            state, metrics = train_step(phase.frozen, state, batch, key, step - 1)
            profile.after(step, metrics)
            if pending is not None:
                meter.add(*pending)
                if pending[0] % config.log_interval == 0:
                    meter.write(pending[0])
            pending = (step, metrics, waited)
            due = step % interval == 0 or step == total
            signal = stop.reached()
            in_a_row = meter.nonfinite_in_a_row
            if not (due or signal or in_a_row >= config.max_nonfinite_steps):
                continue
            meter.add(*pending)
            pending, in_a_row = None, max(in_a_row, meter.nonfinite_in_a_row)
            if in_a_row >= config.max_nonfinite_steps:
                meter.nonfinite_in_a_row = 0  # it ends this run, and not the one that goes on from its checkpoint
            if due or step % config.log_interval == 0:
                meter.write(step)
            heartbeat.beat(phase.name, step, total, "evaluating and saving")
            record = _evaluate(evaluate, phase, state, step, out) if due else {}
            _save(step, state, {"meter": meter.state(), **record}, out)
            if in_a_row >= config.max_nonfinite_steps:
                _stop_at_nonfinite(phase, in_a_row, meter.last_nonfinite, everything, out)
            if signal and step < total:
                _stop_at_signal(phase, signal, step, total, out)
            meter.restart_clock()
    released(state)  # it is on the disk, and need not lie beside the best one
    return _best_state(phase, total, initial, out)


def released(state: TrainState) -> None:
    """Frees the memory of a state, whoever refers to it; what is left tells shapes and shardings."""
    jax.tree.map(lambda leaf: leaf.delete(), state)


def _evaluate(evaluate: Evaluator | None, phase: Phase, state: TrainState, step: int, out: Outputs) -> dict[str, Any]:
    """The `eval_*` fields of a metrics line, written and shown together with sample generations."""
    record = evaluation_record(evaluate, phase, state.trained)
    if record:
        out.log.append({"phase": phase.name, "step": step, **record})
        out.tracker.log(phase.name, record, step)
    out.on_evaluation(state.trained, step)
    return record


def _save(step: int, state: TrainState, metrics: dict[str, Any], out: Outputs) -> None:
    """A checkpoint implies that every line up to it is on the disk: while lines wait for room, none is begun."""
    if agreed(out.log.flush() and out.samples.flush()):
        out.checkpoints.save(step, state, metrics)


def _best_state(phase: Phase, total: int, initial: TrainState, out: Outputs) -> TrainState:
    out.checkpoints.finish(total)
    best = out.checkpoints.restore_best(initial)
    if best is None:
        raise UserError(f"{out.directory}: no checkpoint of {phase.name} can be read; the same command trains it again")
    return best.state


def _stop_at_signal(phase: Phase, signal: str, step: int, total: int, out: Outputs) -> None:
    out.checkpoints.settle()
    raise RunInterruptedError(
        f"stopped by {signal} after step {step} of {total} of {phase.name}; the same command goes on from checkpoint "
        f"{out.checkpoints.latest()}"
    )


def phase_key(phase: Phase) -> jax.Array:
    """The key from which all noise of a phase comes; step `index` (from 0) folds its number in."""
    return jax.random.fold_in(jax.random.key(phase.config.seed), _PHASE_STREAM[phase.name])


def rows_of_step(phase: Phase, data: Any, step: int) -> dict[str, Any]:
    """The rows of step `step` (from 0): their ids, and where in the data set they come from."""
    ids = data[step]["example_ids"].reshape(-1)
    ids = list(dict.fromkeys(ids[ids >= 0].tolist()))
    return {"example_ids": ids, "rows": phase.train_rows.select(ids)["origin"][:]}


def _stop_at_nonfinite(phase: Phase, in_a_row: int, last: int, data: Any, out: Outputs) -> None:
    """Keeps the batch of the `last` step that was not finite, and ends the run."""
    out.checkpoints.settle()
    target = out.directory / "nonfinite" / f"{phase.name}-step{last}.npz"
    try:
        if is_writer():
            target.parent.mkdir(exist_ok=True)
            np.savez(target, **data[last - 1])
        where = f"the batch of the last one is in {target}"
    except OSError as error:
        where = f"the batch of the last one could not be written ({one_line(error)})"
    raise UserError(
        f"{phase.name}: {in_a_row} steps in a row, up to step {last}, had a loss or gradient that is not finite; none "
        f"of them changed anything; {where}, the rows of each are in {out.log.path}; the same command goes on behind "
        f"them from checkpoint {out.checkpoints.latest()}"
    )


def make_batches(phase: Phase, rows: Any, train: bool, whole: bool = False) -> Any:
    """The batches of a split, by `data.pipeline.batches`; test batches are in order, one micro-batch each.

    They hold the rows of this process, or with `whole` of all.
    """
    config = phase.config
    return batches(
        rows,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps if train else 1,
        epochs=config.epochs if train else 1,
        seed=config.seed,
        shuffle=train,
        batching=batching_of(phase),
        length_multiple=config.length_multiple,
        max_length=config.max_length,
        pad_id=phase.pad_id,
        answer_padding=answer_padding(phase),
        eos_id=phase.eos_id,
        local_rows=None if whole else rows_of_process(phase.mesh, config.batch_size),
    )


def data_line(phase: Phase) -> str:
    """How the rows of a phase are arranged, and what share of what is computed is real tokens."""
    plan = phase.plan
    rows = plan.epoch(0).num_rows
    examples = f", {len(phase.train_rows) / rows:.1f} examples a row" if plan.is_packed else ""
    shared = f", the first {plan.shared} tokens of all of them once" if plan.shared else ""
    return (
        f"batching {plan.kind}: {rows:,} rows an epoch{examples}{shared}, {plan.real_share:.1%} real tokens, "
        f"{phase.steps:,} steps of {plan.rows_per_step} rows"
    )


def batching_of(phase: Phase) -> str:
    """`batching` of the phase: what all prompts begin with is shared only where prompts are never masked."""
    batching = phase.config.batching
    return "packed" if batching == "shared" and PHASE_SCOPE[phase.name] != "answer" else batching


def answer_padding(phase: Phase) -> int:
    """To a multiple of what answers are filled up with EOS tokens; 0: they are not."""
    return (phase.config.answer_padding or phase.config.block_length) if PHASE_SCOPE[phase.name] == "answer" else 0


def step_options(phase: Phase) -> StepOptions:
    """The static part of a phase's step, from its config keys."""
    config = phase.config
    scope = PHASE_SCOPE[phase.name]
    corruption = build(Corruption, config, diffusion=phase.diffusion, scope=scope, eos_token_id=phase.eos_id)
    if config.objective == "draft":
        corruption = dataclasses.replace(corruption, draft=build(Draft, config, steps=phase.steps))
    return StepOptions(phase.model, corruption, config.loss_chunk, config.unroll_layers)


def make_evaluator(phase: Phase, options: StepOptions) -> Evaluator | None:
    """The evaluator of the test split, or None where there is none."""
    if len(phase.test_rows) == 0:
        return None
    rows = phase.test_rows
    if phase.config.eval_rows:
        rows = rows.select(range(min(len(rows), phase.config.eval_rows)))
    data = make_batches(phase, rows, train=False)
    key = jax.random.fold_in(jax.random.key(phase.config.seed), _EVALUATION_STREAM)
    return Evaluator(options, phase.mesh, (data[i] for i in range(len(data))), len(rows), key)


def evaluation_record(evaluate: Evaluator | None, phase: Phase, trained: dict[str, Any]) -> dict[str, Any]:
    """The `eval_*` fields of a metrics line; empty without a test split."""
    if evaluate is None:
        return {}
    sums = evaluate({**phase.frozen, **trained})
    found = {f"eval_{name}": value for name, value in summarise(sums).items()}
    if phase.config.objective == "draft":
        drafted = accepted_drafts(sums.masked_correct, sums.masked_count)
        return found | {f"eval_{name}": value for name, value in drafted.items()}
    return found | {"eval_by_mask_rate": by_rate(sums)}


def initial_state(config: Any, trained: dict[str, Any], mesh: Mesh) -> TrainState:
    """What is trained (taken over, not copied) with fresh moments, on the mesh."""
    return place(TrainState(trained, make_optimizer(config).init(trained)), mesh)
