"""Finds the common beginning of all prompts of a data set: a system prompt, instructions, worked examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from difflm_jax.data.stored import tables

if TYPE_CHECKING:
    import datasets


def shared_prefix(rows: datasets.Dataset) -> int:
    """Returns the number of tokens that all tokenised examples begin with, not counting a prompt's last token.

    The last token of a prompt never counts: with the logit shift, its state predicts the answer's first token, which
    differs between examples.
    """
    prefix = None
    for table in tables(rows, ["tokens", "prompt_length"]):
        tokens = table["tokens"].combine_chunks()
        lengths, flat = tokens.value_lengths().to_numpy(), tokens.flatten().to_numpy()
        starts = np.cumsum(lengths) - lengths
        prefix = flat[: lengths[0]] if prefix is None else prefix
        prefix = prefix[: max(table["prompt_length"].to_numpy().min() - 1, 0)]
        is_common = (flat[starts[:, None] + np.arange(len(prefix))] == prefix).all(axis=0)
        prefix = prefix[: len(prefix) if is_common.all() else is_common.argmin()]
    return 0 if prefix is None else len(prefix)
