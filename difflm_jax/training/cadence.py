"""Decides after which steps of a phase a metrics line is due, or an evaluation with samples and a checkpoint."""

import dataclasses
import math
from typing import Any

import numpy as np

from difflm_jax.data.stored import column
from difflm_jax.training.phase import PhaseData

MOST_EVALUATION = 0.1  # largest share of a phase's work for evaluations, unless `eval_interval` is set


@dataclasses.dataclass(frozen=True)
class Cadence:
    """When lines and evaluations are due. Depends only on sizes and config keys, so a resumed run agrees.

    Steps count from 1 to `total`.
    evaluation_steps: the work of one evaluation with its samples, in training steps, estimated from sizes.
    """

    total: int
    log_interval: int
    evaluation_interval: int
    evaluation_steps: float = 0.0

    @classmethod
    def of(cls, data: PhaseData) -> "Cadence":
        """Returns the cadence that the config keys of a phase set.

        `eval_interval` counts optimiser steps. If it is 0, there are `log_frequency_per_epoch` evaluations per epoch,
        or fewer if they would exceed a tenth of the work.
        """
        config, total = data.config, data.steps
        work = evaluation_work(data) / training_work(data)
        by_frequency = max(1, min(total, data.plan.steps_per_epoch) // max(1, config.log_frequency_per_epoch))
        affordable = math.ceil(work * (1 / MOST_EVALUATION - 1))
        interval = config.eval_interval or min(max(by_frequency, affordable), total)
        return cls(total, config.log_interval, interval, work)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation, samples and a checkpoint follow `step`. They always follow the last one."""
        return step % self.evaluation_interval == 0 or step == self.total

    def evaluations_after(self, step: int) -> int:
        """Returns the number of evaluations that are still due after `step`."""
        every = self.evaluation_interval
        return self.total // every - step // every + (self.total % every > 0 and step < self.total)

    def logs(self, step: int) -> bool:
        """Whether a metrics line follows `step`."""
        return step % self.log_interval == 0 or self.evaluates(step)


def training_work(data: PhaseData) -> float:
    """Returns the work of one optimiser step, in tokens of one forward pass.

    The backward pass counts as two forward passes, and recomputation (`remat`) as one more.
    """
    passes = 3 if data.config.remat == "none" else 4
    return passes * float(data.plan.lengths.sum()) / data.plan.steps_per_epoch


def evaluation_work(data: PhaseData) -> float:
    """Returns the work of one evaluation and its samples, in tokens of one forward pass."""
    config, lengths = data.config, _lengths(data.test_rows)
    if not len(lengths):
        return 0.0
    rows = lengths[: config.eval_rows or None]
    sampled = config.sample_prompts * config.diffusion_steps * (config.sample_tokens + float(lengths.mean()))
    return float(rows.sum()) + sampled


def _lengths(rows: Any) -> np.ndarray:
    return column(rows, "length").astype(np.int64)
