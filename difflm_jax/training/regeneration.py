"""Generates the base's own answers to the prompts of a data set, the best training data for a drafting adapter.

This stage of a run precedes its phases. Answers are written to `output_dir/answers/` batch by batch. The same command
resumes where it stopped, and reuses all answers that it finds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from difflm_jax.data.chat import Encoded
from difflm_jax.data.examples import Example
from difflm_jax.data.tokenised import stored_rows
from difflm_jax.distributed.processes import is_writer
from difflm_jax.errors import UserError
from difflm_jax.sampling.batching import FillOptions
from difflm_jax.sampling.caches import Decoder
from difflm_jax.sampling.causal import continue_rows
from difflm_jax.sampling.options import Sampling

if TYPE_CHECKING:
    import datasets

SHORTEST = 3  # tokens of the shortest answer with something to draft
_GREEDY = Sampling(algorithm="probability", schedule="even")


def regenerate(
    rows: datasets.Dataset,
    decoder: Decoder,
    file: Path,
    max_length: int,
    answer_tokens: int,
    count: int = 0,
    batch_size: int = 16,
) -> datasets.Dataset:
    """Returns at most `count` of `rows` (0: all) with the greedy answers of `decoder` in place of their own.

    `file` stores answers by prompt and limit. An answer ends with an end-of-sequence token, after `answer_tokens`, or
    at `max_length`. Rows whose answer is shorter than 3 tokens are left out. Raises `UserError` if none is left.
    """
    if count and count < len(rows):
        rows = rows.select(np.linspace(0, len(rows) - 1, count).astype(int))
    prompts = [_prompt(row["tokens"], row["prompt_length"]) for row in rows.select_columns(["tokens", "prompt_length"])]
    limits = [min(answer_tokens, max_length - len(prompt)) for prompt in prompts]
    names = [_name(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    known = _read(file)
    wanted = {name: i for i, name in enumerate(names) if name not in known and limits[i] >= SHORTEST}
    # Batch prompts of equal limits and similar lengths: little padding, and few programs to compile.
    order = sorted(wanted.values(), key=lambda i: (limits[i], len(prompts[i])))
    _answer(order, prompts, limits, names, known, decoder, file, batch_size)
    return _with_answers(rows, prompts, [known.get(name, []) for name in names])


def _answer(
    order: Sequence[int],
    prompts: Sequence[np.ndarray],
    limits: Sequence[int],
    names: Sequence[str],
    known: dict[str, list[int]],
    decoder: Decoder,
    file: Path,
    batch_size: int,
) -> None:
    """Generates the answers to the prompts `order` in batches, and adds them to `known` and `file`."""
    if known:
        print(f"answers: {len(known):,} found in {file}", flush=True)
    if is_writer():
        file.parent.mkdir(parents=True, exist_ok=True)
    began, done, tokens = time.perf_counter(), 0, 0
    while done < len(order):
        limit = limits[order[done]]
        batch = [i for i in order[done : done + batch_size] if limits[i] == limit]
        options = FillOptions(_GREEDY, batch_size=batch_size)
        found = continue_rows(decoder, [prompts[i] for i in batch], limit, options).rows
        lines = []
        for i, answer in zip(batch, found, strict=True):
            known[names[i]] = answer.tolist()
            lines.append(json.dumps({"prompt": names[i], "answer": known[names[i]]}) + "\n")
        if is_writer():
            with file.open("a") as stream:
                stream.write("".join(lines))
        done, tokens = done + len(batch), tokens + sum(map(len, found))
        seconds = time.perf_counter() - began
        print(f"answers: {done:,} of {len(order):,}, {tokens / seconds:.0f} tokens/s", flush=True)


def _prompt(tokens: Sequence[int], prompt_length: int) -> np.ndarray:
    """Returns the tokens before the first answer token, or the first half of a row without an answer."""
    has_answer = prompt_length < len(tokens)
    return np.asarray(tokens[: prompt_length if has_answer else max(len(tokens) // 2, 1)], np.int32)


def _name(prompt: np.ndarray, limit: int) -> str:
    return hashlib.blake2b(prompt.tobytes() + str(limit).encode(), digest_size=12).hexdigest()


def _read(file: Path) -> dict[str, list[int]]:
    """Returns the stored answers. An incomplete last line is ignored, so its answer is generated again."""
    known = {}
    if file.is_file():
        for line in file.read_text().splitlines():
            try:
                record = json.loads(line)
                known[record["prompt"]] = record["answer"]
            except (ValueError, KeyError, TypeError):
                continue
    return known


def _with_answers(
    rows: datasets.Dataset, prompts: Sequence[np.ndarray], answers: Sequence[list[int]]
) -> datasets.Dataset:
    kept = [i for i, answer in enumerate(answers) if len(answer) >= SHORTEST]
    if not kept and len(rows):
        raise UserError(f"draft.answers=regenerate: no answer of the base has {SHORTEST} tokens: raise max_length")
    made = []
    for row, i in zip(rows.select(kept), kept, strict=True):
        tokens = np.concatenate([prompts[i], answers[i]]).astype(np.int32)
        encoded = Encoded(tokens, np.arange(len(tokens)) >= len(prompts[i]))
        made.append(Example(encoded, row["content_hash"], row["origin"]))
    return stored_rows(made)
