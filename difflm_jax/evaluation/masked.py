"""Evaluation on a test split with fixed masks: every call uses the same rows, rates and masks, at any batch size."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from difflm_jax.diffusion.corruption import CleanBatch
from difflm_jax.diffusion.objective import RATE_BUCKETS, LossSums
from difflm_jax.distributed.sharding import batch_sharding, place_rows
from difflm_jax.training.step import StepOptions, make_eval_step
from difflm_jax.utils.progress import Progress


def add_sums(a: LossSums | None, b: LossSums) -> LossSums:
    """Adds two `LossSums` on the host."""
    b = jax.tree.map(lambda x: np.asarray(x, np.float64), b)
    return b if a is None else jax.tree.map(np.add, a, b)


def summarise(sums: LossSums) -> dict[str, Any]:
    """Returns loss (weighted, as in training), masked_nll (nats per masked token), masked_accuracy and perplexity.

    Perplexity is exp(masked_nll). A model with experts also has `expert_load`: the tokens of the busiest expert over
    the average, as the mean over layers. It is 1 if experts have equal loads, and X / K if all tokens go to the same K
    of X experts.
    """
    count = float(np.sum(sums.masked_count))
    nll = float(np.sum(sums.masked_nll)) / count if count else None
    tokens_NX = sums.expert_tokens
    has_load = tokens_NX is not None and np.sum(tokens_NX) > 0
    load = {"expert_load": float(np.mean(np.max(tokens_NX, axis=1) / np.mean(tokens_NX, axis=1)))} if has_load else {}
    return {
        "loss": float(sums.loss) / float(sums.weight) if sums.weight else None,
        "masked_nll": nll,
        "masked_accuracy": float(np.sum(sums.masked_correct)) / count if count else None,
        "perplexity": float(np.exp(nll)) if nll is not None else None,
        **load,
    }


def by_rate(sums: LossSums) -> dict[str, dict[str, float]]:
    """Returns masked_nll, masked_accuracy and perplexity for every bucket of mask rates with a masked token."""
    buckets = {}
    for i in range(RATE_BUCKETS):
        if sums.masked_count[i]:
            nll = float(sums.masked_nll[i] / sums.masked_count[i])
            buckets[f"{i / RATE_BUCKETS:.1f}-{(i + 1) / RATE_BUCKETS:.1f}"] = {
                "masked_nll": nll,
                "masked_accuracy": float(sums.masked_correct[i] / sums.masked_count[i]),
                "perplexity": float(np.exp(nll)),
            }
    return buckets


class Evaluator:
    """Runs the evaluation step over a fixed list of batches.

    Batches built with `strata="rows"` stratify rates over the whole split. Rates then do not depend on how rows are
    batched or packed.
    """

    def __init__(
        self,
        options: StepOptions,
        mesh: Mesh,
        batches: Iterable[dict[str, np.ndarray]],
        key: jax.Array,
    ):
        plain = dataclasses.replace(options, corruption=options.corruption.for_evaluation())
        self._step = make_eval_step(plain, mesh)
        self._batches = [CleanBatch(**batch) for batch in batches]
        self._sharding = batch_sharding(mesh)
        self._key = key

    def __call__(self, variables: Any, stop: Callable[[], Any] = lambda: False) -> LossSums | None:
        """Returns the sums of `variables` over all batches, on the host in float64; None if `stop` returns true.

        `stop` is called before each batch, in every process.
        """
        total = None
        with Progress("evaluating", "batches", len(self._batches)) as progress:
            for batch in self._batches:
                if stop():
                    return None
                total = add_sums(total, self._step(variables, place_rows(batch, self._sharding), self._key))
                progress.advance()
        return total
