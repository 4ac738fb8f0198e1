"""Chat rows to batches: rows per minute that one core tokenises and packs, compared with a plain loop.

    python -m benchmarks.data [--data=builtin:quickstart_facts] [--out=DIR]

Ours reads, checks, renders the chat template, tokenises, marks answers, stores, plans and fills packed batches. The
peer does the work of the original system's collator, in batches: the chat template and the tokenizer with padding.
"""

import argparse
import itertools
import tempfile
import time

import difflm_jax
from benchmarks.common import add_report_flags, alternating, median_of, report
from difflm_jax.data.batches import batches, plan_batches
from difflm_jax.data.examples import Options
from difflm_jax.data.formats import parse_row
from difflm_jax.data.packing import BatchOptions
from difflm_jax.data.sources import open_source
from difflm_jax.data.tokenised import tokenize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct.Q4_1.gguf", help="whose tokenizer")
    parser.add_argument("--data", default="builtin:quickstart_facts")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=768)
    add_report_flags(parser, rounds=3)
    options = parser.parse_args()
    tokenizer = difflm_jax.load(options.model).tokenizer
    facts, parts = {}, {"tokenise and store": [], "plan and fill packed batches": []}

    def ours(_: int) -> None:
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            rows = tokenize(options.data, tokenizer, Options("sft", options.max_length), directory)
            parts["tokenise and store"].append(time.perf_counter() - start)
            start = time.perf_counter()
            plan = plan_batches(rows, BatchOptions(options.batch_size, options.max_length, batching="packed"))
            data = batches(rows, plan)
            for step in range(len(data)):
                data[step]
            parts["plan and fill packed batches"].append(time.perf_counter() - start)
            facts.update(rows=len(rows), real_tokens=round(plan.real_share, 4))

    def peer(_: int) -> None:
        rows = iter(open_source(options.data).rows())
        while chunk := list(itertools.islice(rows, options.batch_size)):
            messages = [parse_row(row.load())[1].messages for row in chunk]
            texts = tokenizer.apply_chat_template(messages, tokenize=False)
            tokenizer(texts, padding=True, max_length=options.max_length, truncation=True, return_tensors="np")

    seconds = alternating({"difflm_jax": ours, "as the original's collator": peer}, options.rounds)
    seconds |= {f"  of which {name}": times[1:] for name, times in parts.items()}
    table = [
        {"way": name, "rows_per_minute": 60 * facts["rows"] / median_of(times), "seconds": times}
        for name, times in seconds.items()
    ]
    report("data", options, table, "rows_per_minute", facts)


if __name__ == "__main__":
    main()
