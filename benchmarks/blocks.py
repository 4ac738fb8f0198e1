"""Block decoding of a batch: all rows in step, each row in its own block, and rows that take turns.

    python -m benchmarks.blocks --run=runs/quickstart [--attention=block] [--cache=auto] [--max_new_tokens=128]
             [--block_length=32] [--rows=24] [--batch_size=8] [--samplers=threshold,steady] [--to_the_end] [--out=DIR]

"in step": rows enter a block together, batch by batch. "own blocks": each row enters the next block when it is done
with one. "in turn": more rows than places, as in `generate`; a finished row makes room for the next. All give the
same answers (`same` counts them). Passes of the batch are forward passes over all its rows; a row-pass is wasted where
a row takes no step: it waits, is finished, or only writes the keys of its finished block. `--to_the_end` forbids an end
of sequence, so that every answer has all its tokens; `--ends=40` lets every 40th token of the vocabulary end an answer,
so that lengths differ as those of real answers do. The adapter is merged into the weights first.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.common import add_report_flags, alternating, median_of, report
from benchmarks.generate import load_models
from difflm_jax.evaluation.tasks import read_questions
from difflm_jax.evaluation.tasks.exact import normalised
from difflm_jax.lm import LanguageModel
from difflm_jax.sampling.batching import Filled, FillOptions, answer_plan, fill_answers
from difflm_jax.sampling.caches import Decoder
from difflm_jax.sampling.loop import Loop
from difflm_jax.sampling.options import sampling_options

SAMPLERS = {"one": {}, "threshold": {}, "steady": {"algorithm": "steady"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a finished training run")
    parser.add_argument("--data", default="builtin:quickstart_heldout")
    parser.add_argument("--attention", default="block", help="block, or own: that of the run")
    parser.add_argument("--cache", default="auto")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--block_length", type=int, default=32)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--samplers", default="one,threshold,steady")
    parser.add_argument("--ways", default="in step,own blocks,in turn")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--ends", type=int, default=0)
    parser.add_argument("--to_the_end", action="store_true")
    parser.add_argument("--dtype", default="")
    add_report_flags(parser, rounds=3)
    options = parser.parse_args()
    questions = read_questions(options.data, options.rows)
    lm = load_models(Path(options.run), options.block_length, options.dtype)[
        "block" if options.attention == "block" else None
    ]
    prompts = [np.asarray(lm.prompts.prompt(question.messages), np.int32) for question in questions]
    table, count = [], []
    Loop.step = _counted(Loop.step, count)
    for name in options.samplers.split(","):
        table += _table(lm, prompts, [question.reference for question in questions], name, count, options)
    report("blocks", options, table, "tokens_per_second")


def _table(
    lm: LanguageModel, prompts: list, references: list[str], name: str, count: list[int], options: argparse.Namespace
) -> list:
    ways = _ways(lm, name, options)
    found: dict[str, Filled] = {}
    passes: dict[str, int] = {}

    def run(way: str) -> None:
        count.clear()
        found[way] = ways[way](prompts)
        jax.effects_barrier()
        passes[way] = len(count)

    seconds = alternating({way: lambda _, way=way: run(way) for way in ways}, options.rounds)
    table, first, ends = [], next(iter(found.values())), _decoder(lm, options).eos_token_ids
    for way, filled in found.items():
        texts = [lm.answers.decode(_cut(row, ends)) for row in filled.rows]
        tokens = sum(len(_cut(row, ends)) for row in filled.rows)
        table.append(
            {
                "way": f"{name}, {way}",
                "exact": sum(normalised(a) == normalised(b) for a, b in zip(texts, references, strict=True)),
                "same": sum((a == b).all() for a, b in zip(filled.rows, first.rows, strict=True)),
                "passes_per_row": float(filled.passes.mean()),
                "passes_of_batches": passes[way],
                "wasted": 1 - float(filled.passes.sum()) / (passes[way] * options.batch_size),
                "tokens_per_second": tokens / median_of(seconds[way]),
                "seconds": seconds[way],
            }
        )
    return table


def _ways(lm: LanguageModel, name: str, options: argparse.Namespace) -> dict[str, Callable[[list], Filled]]:
    length, size = options.max_new_tokens, options.batch_size
    given = {"cache": options.cache, "algorithm": "probability", **SAMPLERS[name]}
    given |= {"eos_penalty": float("inf")} if options.to_the_end else {}
    given |= {} if name == "one" else {"threshold": options.threshold}
    sampling = sampling_options(lm.attention, lm.algorithm, given)
    block = None if options.attention == "block" else options.block_length
    plan = answer_plan(lm.diffusion, length, length, block, sampling)
    fill = FillOptions(sampling, steps=length, batch_size=size)

    decoder = _decoder(lm, options)

    def batches(prompts: list, in_step: bool) -> Filled:
        own = dataclasses.replace(plan, in_step=in_step)
        parts = [
            fill_answers(decoder, prompts[at : at + size], length, own, fill) for at in range(0, len(prompts), size)
        ]
        return Filled(
            [row for part in parts for row in part.rows],
            np.concatenate([part.committed for part in parts]),
            np.concatenate([part.passes for part in parts]),
        )

    ways = {
        "in step": lambda prompts: batches(prompts, in_step=True),
        "own blocks": lambda prompts: batches(prompts, in_step=False),
        "in turn": lambda prompts: fill_answers(decoder, prompts, length, plan, fill),
    }
    return {way: ways[way] for way in options.ways.split(",")}


def _decoder(lm: LanguageModel, options: argparse.Namespace) -> Decoder:
    if not options.ends:
        return lm.decoder
    return lm.decoder.replace(eos_token_ids=tuple(range(0, lm.config.vocab_size, options.ends)))


def _counted(step: Callable, count: list[int]) -> Callable:
    """Returns `Loop.step` with a host callback per pass, whose time is negligible."""

    def counted(self: Loop, carry: Any) -> Any:
        jax.debug.callback(lambda: count.append(1))
        return step(self, carry)

    return counted


def _cut(row: np.ndarray, ends: tuple[int, ...]) -> np.ndarray:
    at = np.flatnonzero(np.isin(row, ends))
    return row[: at[0] + 1] if len(at) else row


if __name__ == "__main__":
    main()
