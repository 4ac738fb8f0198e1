"""The number and the widths of the steps of a run, from its data."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from difflm_jax.config.files import phase_config
from difflm_jax.data.packing import BatchPlan
from difflm_jax.lm import LanguageModel
from difflm_jax.training.run import phase_data, read_rows


@dataclasses.dataclass(frozen=True)
class Steps:
    """The optimiser steps of a phase. `widths` maps a width in columns to the number of steps of that width."""

    widths: Counter[int]

    @property
    def count(self) -> int:
        return self.widths.total()

    @property
    def mean_width(self) -> float:
        return sum(width * count for width, count in self.widths.items()) / max(self.count, 1)


def data_at_hand(config: ConfigDict, phase: str) -> bool:
    """Whether the rows of a phase and the tokenizer are local files, so no network is needed."""
    dataset, model = str(phase_config(config, phase).dataset), str(config.model)
    return Path(model).expanduser().exists() and Path(dataset.partition("[")[0]).expanduser().exists()


def read_steps(config: ConfigDict, phase: str, lm: LanguageModel) -> Steps:
    """Returns the steps of a phase, from its rows. Raises `UserError` as training would."""
    data = phase_data(config, phase, lm, *read_rows(config, phase, lm))
    widths = Counter(step_widths(data.plan).tolist())
    # Every epoch has about the same widths as the first. `max_steps` may end the phase within an epoch.
    share = data.steps / data.plan.steps_per_epoch
    scaled = {width: count * share for width, count in widths.items()}
    rounded = Counter({width: round(count) for width, count in scaled.items()})
    widest = max(rounded)
    rounded[widest] += data.steps - rounded.total()
    return Steps(rounded)


def step_widths(plan: BatchPlan) -> np.ndarray:
    """Returns the columns of each step of the first epoch: [steps per epoch]."""
    options, rows = plan.options, plan.epoch(0)
    if options.is_packed:
        return np.full(plan.steps_per_epoch, options.row_length)
    lengths = plan.lengths[rows.ids]
    longest = np.maximum.reduceat(lengths, np.arange(0, len(lengths), options.rows_per_step))
    return -(-longest // options.length_multiple) * options.length_multiple
