"""The loop of one phase: batches in, steps, evaluations and checkpoints at their times, metrics out."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from difflm_jax.checkpoint.state import Checkpoints
from difflm_jax.data.pipeline import batches, prefetch
from difflm_jax.diffusion.corruption import CleanBatch, Corruption
from difflm_jax.diffusion.objective import LossSums
from difflm_jax.models.transformer import Transformer
from difflm_jax.training.evaluation import Evaluator, add_sums, by_rate, summarise
from difflm_jax.training.flops import mfu, train_flops_per_token
from difflm_jax.training.mesh import batch_sharding, replicated
from difflm_jax.training.metrics import MetricsLog, progress_line
from difflm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from difflm_jax.training.step import StepOptions, TrainState, make_train_step
from difflm_jax.training.tracking import Tracker

PHASE_SCOPE = {"pretrain": "all", "sft": "answer"}

# Each phase draws its noise from its own stream of the run's seed; evaluation has one of its own.
_PHASE_STREAM = {"pretrain": 0, "sft": 1}
_EVALUATION_STREAM = 2


@dataclasses.dataclass(frozen=True)
class Phase:
    """Everything that one phase needs: `config` is resolved for it (`difflm_jax.config.phase_config`)."""

    name: str
    config: Any
    model: Transformer
    params: dict[str, Any]
    mesh: Mesh
    train_rows: Any
    test_rows: Any
    pad_id: int
    eos_id: int


OnEvaluation = Callable[[dict[str, Any], int], None]  # (lora, step): logs sample generations


def run_phase(
    phase: Phase,
    initial: TrainState,
    checkpoints: Checkpoints,
    log: MetricsLog,
    tracker: Tracker,
    on_evaluation: OnEvaluation,
) -> TrainState:
    """Trains to the end of the phase, from its latest checkpoint if it has one; returns the best state.

    Best is the lowest `eval_loss`; without a test split it is the last.
    """
    config = phase.config
    data = make_batches(phase, phase.train_rows, train=True)
    steps_per_epoch = -(-len(phase.train_rows) // (config.batch_size * config.gradient_accumulation_steps))
    total = min(len(data), config.max_steps) if config.max_steps else len(data)
    interval = max(1, min(total, steps_per_epoch) // max(1, config.log_frequency_per_epoch))
    options = step_options(phase)
    optimizer = make_optimizer(config)
    train_step = make_train_step(options, optimizer, learning_rate_schedule(config, total), phase.mesh)
    evaluate = make_evaluator(phase, options)
    key = jax.random.fold_in(jax.random.key(config.seed), _PHASE_STREAM[phase.name])

    state, done, tokens = initial, checkpoints.latest() or 0, 0
    if done:
        state = checkpoints.restore(done, initial)
        tokens = checkpoints.metrics(done)["tokens"]
    # The initial arrays may be kept elsewhere (the best state of the phase before), and a step donates its state.
    state = jax.tree.map(lambda x: x.copy(), state)
    meter = Meter(phase, log, tracker, total, tokens)
    iterator = prefetch(data, done, config.dataloader_num_workers)
    sharding = batch_sharding(phase.mesh)

    pending = None  # metrics are read one step late, so that the host never waits for the step it has just started
    for step in range(done, total):
        batch = jax.device_put(CleanBatch(**next(iterator)), sharding)
        state, metrics = train_step(phase.params, state, batch, key, step)
        if pending is not None:
            meter.add(*pending)
        pending = (step + 1, metrics)
        if (step + 1) % interval == 0 or step + 1 == total:
            meter.add(*pending)
            pending = None
            meter.write(step + 1)
            record = evaluation_record(evaluate, phase, state.lora)
            if record:
                log.append({"phase": phase.name, "step": step + 1, **record})
                tracker.log(phase.name, record, step + 1)
            on_evaluation(state.lora, step + 1)
            checkpoints.save(step + 1, state, {"tokens": meter.tokens, **record})
            meter.restart_clock()
    checkpoints.wait()
    return checkpoints.restore(checkpoints.best() or checkpoints.latest(), initial)


def make_batches(phase: Phase, rows: Any, train: bool) -> Any:
    """The batches of a split, by `data.pipeline.batches`; test batches are in order, one micro-batch each."""
    config = phase.config
    return batches(
        rows,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps if train else 1,
        epochs=config.epochs if train else 1,
        seed=config.seed,
        shuffle=train,
        length_multiple=config.length_multiple,
        max_length=config.max_length,
        pad_id=phase.pad_id,
        answer_padding=(config.answer_padding or config.block_length) if PHASE_SCOPE[phase.name] == "answer" else 0,
        eos_id=phase.eos_id,
    )


def step_options(phase: Phase) -> StepOptions:
    """The static part of a phase's step, from its config keys."""
    config = phase.config
    corruption = Corruption(
        scope=PHASE_SCOPE[phase.name],
        mask_rate=config.mask_rate,
        min_rate=config.min_mask_probability,
        max_rate=config.max_mask_probability,
        loss_tokens=config.loss_tokens,
        loss_weight=config.loss_weight,
        attention=config.attention,
        logit_shift=config.logit_shift,
        block_length=config.block_length,
    )
    return StepOptions(phase.model, corruption, config.loss_chunk)


def make_evaluator(phase: Phase, options: StepOptions) -> Evaluator | None:
    """The evaluator of the test split, or None where there is none."""
    if len(phase.test_rows) == 0:
        return None
    data = make_batches(phase, phase.test_rows, train=False)
    count = min(len(data), phase.config.eval_batches) if phase.config.eval_batches else len(data)
    key = jax.random.fold_in(jax.random.key(phase.config.seed), _EVALUATION_STREAM)
    return Evaluator(options, phase.mesh, (data[i] for i in range(count)), key)


def evaluation_record(evaluate: Evaluator | None, phase: Phase, lora: dict[str, Any]) -> dict[str, Any]:
    """The `eval_*` fields of a metrics line; empty without a test split."""
    if evaluate is None:
        return {}
    sums = evaluate(phase.params, lora)
    return {**{f"eval_{name}": value for name, value in summarise(sums).items()}, "eval_by_mask_rate": by_rate(sums)}


class Meter:
    """Adds up the metrics of steps between two lines of the log, and their time."""

    def __init__(self, phase: Phase, log: MetricsLog, tracker: Tracker, total: int, tokens: int):
        self.tokens = tokens  # real tokens since the phase began
        self._phase, self._log, self._tracker, self._total = phase, log, tracker, total
        self._sums: LossSums | None = None
        self._last: dict[str, Any] = {}
        self._clock = time.perf_counter()

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Reads the metrics of a finished step, and writes a line where one is due."""
        sums = jax.device_get(metrics["sums"])
        self._last = {name: float(metrics[name]) for name in ("learning_rate", "grad_norm")}
        self._sums = add_sums(self._sums, sums)
        self.tokens += int(sums.tokens)
        if step % self._phase.config.log_interval == 0:
            self.write(step)

    def write(self, step: int) -> None:
        """Writes the line of the steps since the last one; does nothing if there were none."""
        if self._sums is None:
            return
        now = time.perf_counter()
        seconds = max(now - self._clock, 1e-9)
        speed = float(self._sums.tokens) / seconds
        config, model = self._phase.config, self._phase.model
        flops = train_flops_per_token(model.config, config.max_length, model.lora, remat="none")
        record = {
            "phase": self._phase.name,
            "step": step,
            **summarise(self._sums),
            **self._last,
            "tokens": self.tokens,
            "tokens_per_second": speed,
            "mfu": mfu(speed * flops, jax.devices()[0].device_kind, self._phase.mesh.size),
        }
        self._log.append(record)
        self._tracker.log(self._phase.name, {name: record[name] for name in record if name != "phase"}, step)
        print(progress_line(record, self._total), flush=True)
        self._sums, self._clock = None, now

    def restart_clock(self) -> None:
        """Leaves what happened since the last line (an evaluation, a save) out of the next line's speed."""
        self._clock = time.perf_counter()


def initial_state(config: Any, lora: dict[str, Any], mesh: Mesh) -> TrainState:
    """Adapters with fresh moments, on the mesh."""
    return jax.device_put(TrainState(lora, make_optimizer(config).init(lora)), replicated(mesh))
