"""The data of a phase: its rows, the plan of their batches, and which tokens are scored."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from difflm_jax.data.batches import batches, plan_batches
from difflm_jax.data.packing import BatchOptions, BatchPlan

if TYPE_CHECKING:
    import datasets
    import grain

FEW_STEPS = 20  # a phase with fewer optimiser steps prints a note
PHASE_SCOPE = {"pretrain": "all", "sft": "answer"}


@dataclasses.dataclass(frozen=True)
class PhaseData:
    """The rows of a phase. `config` is the one resolved for it (`difflm_jax.config.files.phase_config`)."""

    name: str
    config: Any
    train_rows: datasets.Dataset
    test_rows: datasets.Dataset
    pad_id: int
    eos_id: int

    @functools.cached_property
    def plan(self) -> BatchPlan:
        """The plan of which training examples share a row, and which rows share a step. Computed once."""
        return plan_batches(self.train_rows, self.batch_options)

    @functools.cached_property
    def batch_options(self) -> BatchOptions:
        """The options that turn the training rows into batches."""
        config, answers_only = self.config, PHASE_SCOPE[self.name] == "answer"
        # A common prefix of prompts is shared only if prompts are never masked.
        batching = "packed" if config.batching == "shared" and not answers_only else config.batching
        return BatchOptions(
            batch_size=config.batch_size,
            max_length=config.max_length,
            accumulation=config.gradient_accumulation_steps,
            batching=batching,
            length_multiple=config.length_multiple,
            answer_padding=(config.answer_padding or config.block_length) if answers_only else 0,
            pad_id=self.pad_id,
            eos_id=self.eos_id,
            seed=config.seed,
            row_examples=config.row_examples,
        )

    @property
    def steps(self) -> int:
        """Optimiser steps of the phase: those of all epochs, or `max_steps` if that is fewer."""
        steps = self.plan.steps_per_epoch * self.config.epochs
        return min(steps, self.config.max_steps) if self.config.max_steps else steps

    def train_batches(self, local_rows: np.ndarray | None = None) -> grain.MapDataset:
        """Returns the batches of all epochs. `local_rows` is as in `difflm_jax.data.batches.batches`."""
        return batches(self.train_rows, self.plan, epochs=self.config.epochs, local_rows=local_rows)

    def test_batches(self, local_rows: np.ndarray | None = None) -> grain.MapDataset:
        """Returns the batches of one evaluation: the first `eval_rows` test rows in order, one micro-batch per step."""
        rows = self.test_rows
        if self.config.eval_rows:
            rows = rows.select(range(min(len(rows), self.config.eval_rows)))
        options = dataclasses.replace(self.batch_options, accumulation=1, shuffle=False)
        return batches(rows, plan_batches(rows, options), strata="rows", local_rows=local_rows)

    def origins(self, example_ids: np.ndarray) -> dict[str, Any]:
        """Returns the ids of the examples in a batch, and their origins in the data set."""
        ids = example_ids.reshape(-1)
        ids = list(dict.fromkeys(ids[ids >= 0].tolist()))
        return {"example_ids": ids, "rows": self.train_rows.select(ids)["origin"][:]}

    def advice(self) -> list[str]:
        """Returns a note if the phase has too few steps to change much; empty otherwise."""
        config, rows = self.config, self.plan.options.rows_per_step
        if self.steps >= FEW_STEPS or self.steps == config.max_steps:
            return []
        return [
            f"note: {self.name} makes only {self.steps} optimiser steps of {rows} rows (batch_size="
            f"{config.batch_size} x gradient_accumulation_steps={config.gradient_accumulation_steps}), which changes "
            f"little: lower these, or raise epochs={config.epochs}, for {FEW_STEPS} or more"
        ]

    def describe(self) -> str:
        """Describes in one line how rows are batched, and the share of real tokens among the computed ones."""
        plan, options = self.plan, self.plan.options
        rows = plan.epoch(0).num_rows
        examples = f", {len(self.train_rows) / rows:.1f} examples a row" if options.is_packed else ""
        shared = f", the first {plan.shared} tokens of all of them once" if plan.shared else ""
        return (
            f"batching {options.batching}: {rows:,} rows an epoch{examples}{shared}, {plan.real_share:.1%} real "
            f"tokens, {self.steps:,} steps of {options.rows_per_step} rows"
        )
