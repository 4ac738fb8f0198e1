"""Tokens per second of speculative decoding and of its base's own greedy decoding: same weights, dtype and prompts.

    python -m benchmarks.lossless --model=MODEL --adapter=RUN/sft_model --data=FILE [--rows=8 --max_new_tokens=96]

Both decode the same prompts at batch 1 with their caches, in turns. Figures are medians over `--rounds`, after
a first round that compiles. `--bases=dense:bfloat16,int8:bfloat16,nf4:bfloat16` names formats and dtypes.
`--passes` prints the time of a pass of 1, 2, 4, ... rows instead.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import difflm_jax
from benchmarks.common import add_report_flags, alternating, median_of, report
from difflm_jax.evaluation.tasks import read_questions
from difflm_jax.lm import LanguageModel
from difflm_jax.sampling.columns import ColumnModel, Rows

CONTEXT = 192  # columns of the cache that a timed pass reads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--data", required=True, help="rows with prompts, as for evaluate")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--bases", default="dense:bfloat16,int8:bfloat16,nf4:bfloat16")
    parser.add_argument("--strategies", default="one_pass:2,one_pass:4,likeliest:4,lookup:4", help="strategy:drafts")
    parser.add_argument("--passes", action="store_true")
    add_report_flags(parser, rounds=3)
    options = parser.parse_args()
    found = []
    for base in options.bases.split(","):
        held, dtype = base.split(":")
        quantization = None if held == "dense" else held
        lm = difflm_jax.load(options.model, adapter=options.adapter, dtype=dtype, quantization=quantization)
        found += passes(lm, base, options) if options.passes else decoded(lm, base, options)
    report("lossless", options, found, "ms_per_pass" if options.passes else "of_base")


def decoded(lm: LanguageModel, name: str, options: argparse.Namespace) -> list[dict]:
    """Returns a record for the base and one for each strategy."""
    rows = lm.prompts.all([question.prompt for question in read_questions(options.data, options.rows)])
    given, outs = {"max_new_tokens": options.max_new_tokens, "batch_size": 1}, {}

    def way(key: str, model: LanguageModel, **drafting):
        def run(_: int) -> None:
            outs[key] = model.generate(rows, **given, **drafting)

        return run

    ways = {f"{name} base": way(f"{name} base", lm.base())}
    for each in options.strategies.split(","):
        strategy, length = each.split(":")
        key = f"{name} {each}"
        ways[key] = way(key, lm, strategy=strategy, draft_length=int(length))
    seconds = alternating(ways, options.rounds)
    base_seconds = median_of(seconds[f"{name} base"])
    lines = []
    for key, taken in seconds.items():
        out = outs[key]
        tokens = sum(map(len, out.tokens))
        same = [a.tolist() == b.tolist() for a, b in zip(out.tokens, outs[f"{name} base"].tokens, strict=True)]
        lines.append(
            {
                "way": key,
                "tokens_per_second": tokens / median_of(taken),
                "of_base": base_seconds / median_of(taken),
                "tokens_per_pass": tokens / int(out.steps.sum()),
                "ms_per_pass": 1000 * median_of(taken) / int(out.steps.sum()),
                "same_rows": f"{sum(same)} of {len(same)}",
                "seconds": taken,
            }
        )
    return lines


def passes(lm: LanguageModel, name: str, options: argparse.Namespace) -> list[dict]:
    """Times a pass over a cache of `CONTEXT` columns, by rows; "adapter": on for all rows but one."""
    model = ColumnModel(lm.model, lm.variables)
    columns = jax.jit(lambda tokens: model.prefill(tokens, CONTEXT))(jnp.full((1, CONTEXT), 5, jnp.int32))

    def one(count: int, gated: bool):
        step = jnp.arange(count)
        rows = Rows(
            tokens=jnp.full((1, count), 7, jnp.int32),
            positions=CONTEXT + step[None],
            sees=(step <= step[:, None])[None],
            lengths=jnp.array([CONTEXT]),
            gate=(step > 0)[None] if gated else None,
        )
        run = jax.jit(lambda columns: model.predict(columns, rows)[0].argmax(axis=-1))
        return lambda _: run(columns)

    ways = {f"{name} {count} rows": one(count, False) for count in (1, 2, 4, 8, 16, 32)}
    ways |= {f"{name} {count} rows, adapter": one(count, True) for count in (8, 32)}
    seconds = alternating(ways, max(options.rounds, 7), warm_up=2)
    return [{"way": key, "ms_per_pass": 1000 * float(np.median(taken))} for key, taken in seconds.items()]


if __name__ == "__main__":
    main()
