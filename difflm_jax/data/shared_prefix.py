"""What all prompts of a data set begin with: a system prompt, instructions, worked examples."""

import datasets
import numpy as np

_READ_ROWS = 10_000


def shared_prefix(dataset: datasets.Dataset) -> int:
    """How many tokens all examples of tokenised rows begin with, before the last token of any prompt.

    The last token of a prompt is never counted: with the logit shift its state predicts the answer's first token, and
    the answers differ.
    """
    prefix = None
    for table in dataset.select_columns(["tokens", "answer_mask"]).with_format("arrow").iter(batch_size=_READ_ROWS):
        tokens, answer_mask = (table[name].combine_chunks() for name in ("tokens", "answer_mask"))
        lengths = tokens.value_lengths().to_numpy()
        starts = np.cumsum(lengths) - lengths
        flat, in_answer = tokens.flatten().to_numpy(), answer_mask.flatten().to_numpy(zero_copy_only=False)
        place = np.arange(len(flat))
        first_answers = np.minimum.reduceat(np.where(in_answer, place, len(flat)), starts) - starts
        prompts = np.minimum(first_answers, lengths)
        prefix = flat[: lengths[0]] if prefix is None else prefix
        prefix = prefix[: max(prompts.min() - 1, 0)]
        is_common = (flat[starts[:, None] + np.arange(len(prefix))] == prefix).all(axis=0)
        prefix = prefix[: len(prefix) if is_common.all() else is_common.argmin()]
    return 0 if prefix is None else len(prefix)
