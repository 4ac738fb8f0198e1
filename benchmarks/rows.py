"""Milliseconds of a cached forward pass by its rows: the cost of verifying m drafts against plain decoding.

    python -m benchmarks.rows [--model=DIR or hub id] [--ways="bfloat16; int8; nf4"] [--rows=1,2,4,8,16,32] [--out=DIR]

Only the model's `config.json` is needed; weights are random. A way is a dtype, or a quantised base that computes in
bfloat16 (`nf4 dtype=float32`: in another). A pass reads a cache of `--columns` tokens and computes float32 logits of
each row, and their argmax. Ways and numbers of rows take turns; figures are medians. `weights_ms` is the
time to read the weights once, if the device's memory bandwidth is known. No pass of few rows is faster.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator import random_params
from benchmarks.common import add_report_flags, alternating, median_of, report
from difflm_jax.checkpoint.source import read_model_config
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.transformer import Transformer
from difflm_jax.planning.chips import CHIPS
from difflm_jax.quant import QuantConfig
from difflm_jax.sampling.columns import ColumnModel, Rows
from difflm_jax.utils.dtypes import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-4B-Instruct-2507")
    parser.add_argument("--ways", default="bfloat16; int8; nf4", help="separated by semicolons")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64", help="separated by commas")
    parser.add_argument("--columns", type=int, default=512, help="tokens in the cache")
    add_report_flags(parser, rounds=7)
    options = parser.parse_args()
    counts = [int(count) for count in options.rows.split(",")]
    config = read_model_config(options.model)
    found = []
    for way in (way.strip() for way in options.ways.split(";") if way.strip()):  # one base in memory at a time
        dtype, held = _of_way(way)
        params = random_params(config, dtype, held)
        passes = {count: _pass(config, params, dtype, count, options.columns) for count in counts}
        seconds = alternating({f"{count}": run for count, run in passes.items()}, options.rounds, settle=1)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        for count in counts:
            ms = 1e3 * median_of(seconds[str(count)])
            one = 1e3 * median_of(seconds[str(counts[0])])
            found.append({"way": way, "rows": count, "ms": ms, "of_fewest": ms / one, "weights_ms": _read_ms(size)})
    report("rows", options, found, "ms")


def _of_way(way: str) -> tuple[Any, QuantConfig | None]:
    name, *pairs = way.split()
    keys = dict(pair.split("=", 1) for pair in pairs)
    if name in DTYPES:
        return DTYPES[name], None
    return DTYPES[keys.get("dtype", "bfloat16")], QuantConfig(name)


def _pass(config: ModelConfig, params: Any, dtype: Any, count: int, columns: int) -> Any:
    """Returns a function that runs one pass of `count` rows and returns the chosen tokens."""
    model = Transformer(config, None, config.vocab_size - 1, dtype, on_cpu=jax.default_backend() == "cpu")

    @functools.partial(jax.jit, static_argnums=2)
    def prefill(params: Any, tokens_BP: jax.Array, room: int) -> Any:
        return ColumnModel(model, {"params": params}).prefill(tokens_BP, room)

    @jax.jit
    def choices(params: Any, cache: Any, rows: Rows) -> jax.Array:
        return ColumnModel(model, {"params": params}).predict(cache, rows)[0].argmax(axis=-1)

    cache = prefill(params, jnp.full((1, columns), 7, jnp.int32), columns)
    step = jnp.arange(count)
    rows = Rows(
        tokens=(step[None] * 31 + 5) % config.vocab_size,
        positions=columns + step[None],
        sees=(step <= step[:, None])[None],
        lengths=jnp.full((1,), columns, jnp.int32),
    )
    return lambda _: choices(params, cache, rows)


def _read_ms(size: int) -> float | str:
    """Returns the milliseconds to read `size` bytes on this device, by its data sheet; "" if unknown."""
    kind = jax.devices()[0].device_kind.lower()
    chip = next((chip for name, chip in CHIPS.items() if name in kind), None)
    return 1e3 * size / chip.bandwidth if chip and chip.bandwidth else ""


if __name__ == "__main__":
    main()
