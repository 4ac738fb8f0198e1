"""Greedy causal decoding of a base, next to `transformers` generate in the same run.

    python -m benchmarks.decode [--model=models/SmolLM2-135M-Instruct.Q4_1.gguf] [--dtypes=float32,bfloat16]
                                [--batches=1,8] [--formats=nf4,int4,int8] [--peer] [--out=DIR]

The ways take turns and give the same number of tokens after the same prompts; medians. "XLA alone" is the same program
without the C++ matmuls of `ops.few_rows`. `same` counts the rows whose tokens are those of the first way. A pass is
the time of one more token: (n tokens - 1 token) / (n - 1). The figures of `--formats` are passes over quantised bases.
"One bare forward pass" is the model alone: a compiled call with the same weights and columns, its logits and their
argmax, which keeps nothing. What decoding takes beyond it is overhead.
"""

import argparse
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import difflm_jax
from benchmarks.common import add_report_flags, alternating, median_of, report
from difflm_jax.ops import few_rows
from difflm_jax.sampling import cycles
from difflm_jax.sampling.columns import ColumnModel
from difflm_jax.sampling.columns import Rows as ColumnRows

Rows = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--formats", default="")
    parser.add_argument("--prompt", type=int, default=48, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens")
    parser.add_argument("--peer", action="store_true", help="transformers and torch beside it")
    add_report_flags(parser, rounds=3)
    options = parser.parse_args()
    rows = []
    for dtype in options.dtypes.split(","):
        bases = {"dense": difflm_jax.load(options.model, causal=True, dtype=dtype)}
        for name in filter(None, options.formats.split(",")):
            bases[name] = difflm_jax.load(options.model, causal=True, dtype=dtype, quantization=name)
        peer = _transformers(bases["dense"], dtype) if options.peer else None
        for batch in map(int, options.batches.split(",")):
            rows += _table(bases, peer, dtype, batch, options)
    report("decode", options, rows, "tokens_per_second", {"native": few_rows.is_available()})


def _table(bases: dict, peer: Callable | None, dtype: str, batch: int, options: argparse.Namespace) -> list[dict]:
    rng = np.random.default_rng(0)
    prompts = rng.integers(1000, 20000, (batch, options.prompt)).tolist()
    ways = {} if peer is None else {"transformers generate": peer}
    for name, lm in bases.items():
        label = "here" if name == "dense" else f"here, {name}"
        if few_rows.is_available():
            ways[label] = _ours(lm)
        ways[f"{label}, XLA alone"] = _by_xla(_ours(lm))
        ways[f"{label}, one bare forward pass"] = _bare(lm, options)
    found: dict[str, Rows] = {}

    def timed(name: str, tokens: int) -> Callable[[int], None]:
        return lambda _: found.update({name: ways[name](prompts, tokens)})

    counts = (1, options.tokens)  # calls of the bare pass
    seconds = alternating({f"{name}/{n}": timed(name, n) for n in counts for name in ways}, options.rounds)
    table = []
    first = found[next(iter(ways))]
    for name in ways:
        one, all_ = (seconds[f"{name}/{n}"] for n in counts)
        pass_ = median_of([(b - a) / (options.tokens - 1) for a, b in zip(one, all_, strict=True)])
        table.append(
            {
                "way": f"{dtype}, batch {batch}: {name}",
                "tokens_per_second": batch * options.tokens / median_of(all_),
                "pass_ms": 1e3 * pass_,
                "same": "" if found[name] is None else sum(a == b for a, b in zip(found[name], first, strict=True)),
                "seconds": all_,
            }
        )
    return table


def _ours(lm: difflm_jax.LanguageModel) -> Callable[[Rows, int], Rows]:
    def generate(prompts: Rows, tokens: int) -> Rows:
        out = lm.generate(prompts, tokens, batch_size=len(prompts), stop_at_eos=False)
        return [row.tolist() for row in out.tokens]

    return generate


def _bare(lm: difflm_jax.LanguageModel, options: argparse.Namespace) -> Callable[[Rows, int], None]:
    """Returns a way that calls a compiled forward pass once per token after the prompt, and produces no tokens."""
    room = options.prompt + options.tokens

    def model_of(variables: dict) -> ColumnModel:
        return ColumnModel(lm.model, variables)

    prefill = jax.jit(lambda variables, tokens: model_of(variables).prefill(tokens, room))
    bare = jax.jit(lambda variables, columns, rows: model_of(variables).predict(columns, rows)[0].argmax(axis=-1))

    def passes(prompts: Rows, calls: int) -> None:
        tokens = jnp.asarray(prompts, jnp.int32)
        columns, lengths = prefill(lm.variables, tokens), jnp.full(len(tokens), options.prompt, jnp.int32)
        alone = jnp.ones((len(tokens), 1, 1), bool)
        rows = ColumnRows(tokens[:, -1:], lengths[:, None], alone, lengths)
        for _ in range(calls):
            jax.block_until_ready(bare(lm.variables, columns, rows))

    return passes


def _by_xla(way: Callable[[Rows, int], Rows]) -> Callable[[Rows, int], Rows]:
    """Returns `way` compiled separately, without `ops.few_rows`."""
    begin = jax.jit(lambda task, batch: task.begin(batch)[1])
    run = jax.jit(lambda task, batch, carry, most: task.loop(batch).run(carry, most), donate_argnums=2)

    def generate(prompts: Rows, tokens: int) -> Rows:
        own, available = (cycles._begin, cycles._cycles), few_rows.is_available
        cycles._begin, cycles._cycles, few_rows.is_available = begin, run, lambda: False
        try:
            return way(prompts, tokens)
        finally:
            (cycles._begin, cycles._cycles), few_rows.is_available = own, available

    return generate


def _transformers(lm: difflm_jax.LanguageModel, dtype: str) -> Callable[[Rows, int], Rows]:
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        lm.save_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def generate(prompts: Rows, tokens: int) -> Rows:
        tokens_BP = torch.tensor(prompts)
        whole = model.generate(
            tokens_BP,
            attention_mask=torch.ones_like(tokens_BP),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=lm.pad_token_id,
        )
        return whole[:, tokens_BP.shape[1] :].tolist()

    return generate


if __name__ == "__main__":
    main()
