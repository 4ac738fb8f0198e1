"""What a phase trains on: its rows, the one plan of their batches, and what is scored in them."""

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

FEW_STEPS = 20  # a phase of fewer optimiser steps is warned about
PHASE_SCOPE = {"pretrain": "all", "sft": "answer"}


@dataclasses.dataclass(frozen=True)
class PhaseData:
    """The rows of a phase. `config` is resolved for it (`difflm_jax.config.files.phase_config`)."""

    name: str
    config: Any
    train_rows: datasets.Dataset
    test_rows: datasets.Dataset
    pad_id: int
    eos_id: int

    @functools.cached_property
    def plan(self) -> BatchPlan:
        """Which training examples share a row, and which rows share a step. Made once, for all who read batches."""
        return plan_batches(self.train_rows, self.batch_options)

    @functools.cached_property
    def batch_options(self) -> BatchOptions:
        """How the training rows become batches."""
        config, answers_only = self.config, PHASE_SCOPE[self.name] == "answer"
        # A common beginning of prompts is shared only where prompts are never masked.
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
        )

    @property
    def steps(self) -> int:
        """Optimiser steps of the phase: those of all epochs, at most `max_steps`."""
        steps = self.plan.steps_per_epoch * self.config.epochs
        return min(steps, self.config.max_steps) if self.config.max_steps else steps

    def train_batches(self, local_rows: np.ndarray | None = None) -> grain.MapDataset:
        """The batches of all epochs; `local_rows` as in `difflm_jax.data.batches.batches`."""
        return batches(self.train_rows, self.plan, epochs=self.config.epochs, local_rows=local_rows)

    def test_batches(self, local_rows: np.ndarray | None = None) -> grain.MapDataset:
        """The batches of one evaluation: the first `eval_rows` test rows in order, one micro-batch per step."""
        rows = self.test_rows
        if self.config.eval_rows:
            rows = rows.select(range(min(len(rows), self.config.eval_rows)))
        options = dataclasses.replace(self.batch_options, accumulation=1, shuffle=False)
        return batches(rows, plan_batches(rows, options), strata="rows", local_rows=local_rows)

    def origins(self, example_ids: np.ndarray) -> dict[str, Any]:
        """The examples of a batch, and where in the data set they come from."""
        ids = example_ids.reshape(-1)
        ids = list(dict.fromkeys(ids[ids >= 0].tolist()))
        return {"example_ids": ids, "rows": self.train_rows.select(ids)["origin"][:]}

    def advice(self) -> list[str]:
        """Notes about a phase that trains almost nothing."""
        config, rows = self.config, self.plan.options.rows_per_step
        if self.steps >= FEW_STEPS or self.steps == config.max_steps:
            return []
        return [
            f"note: {self.name} makes only {self.steps} optimiser steps of {rows} rows (batch_size="
            f"{config.batch_size} x gradient_accumulation_steps={config.gradient_accumulation_steps}), which changes "
            f"little: lower these, or raise epochs={config.epochs}, for {FEW_STEPS} or more"
        ]

    def describe(self) -> str:
        """One line: how rows are arranged, and the share of real tokens in what is computed."""
        plan, options = self.plan, self.plan.options
        rows = plan.epoch(0).num_rows
        examples = f", {len(self.train_rows) / rows:.1f} examples a row" if options.is_packed else ""
        shared = f", the first {plan.shared} tokens of all of them once" if plan.shared else ""
        return (
            f"batching {options.batching}: {rows:,} rows an epoch{examples}{shared}, {plan.real_share:.1%} real "
            f"tokens, {self.steps:,} steps of {options.rows_per_step} rows"
        )
