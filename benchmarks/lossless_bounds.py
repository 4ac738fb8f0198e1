"""Least milliseconds of a cached forward pass on a named chip by its rows, without the chip.

    python -m benchmarks.lossless_bounds [--model=NAME or DIR] [--chip=h200] [--ways="bfloat16; int8; nf4"] [--out=DIR]

A pass reads the weights and the cache once, and computes its matmuls. With the chip's memory bandwidth and peak
FLOP/s (data sheets, `difflm_jax.planning.chips`) this gives two times; the larger one bounds the pass from below.
Dequantisation and kernel launches are not counted. `benchmarks.rows` measures the same passes on a chip.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import add_report_flags, report
from difflm_jax.checkpoint.hf import abstract_params
from difflm_jax.errors import UserError
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.flops import Work, forward_flops
from difflm_jax.models.transformer import Transformer
from difflm_jax.planning.chips import CHIPS, Chip
from difflm_jax.planning.models import known_shape
from difflm_jax.quant import QuantConfig
from difflm_jax.sampling.columns import ColumnModel

ROWS = (1, 2, 4, 5, 8, 13, 16, 25, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-4b", help="a name that `difflm plan` knows")
    parser.add_argument("--chip", default="h200", choices=sorted(CHIPS))
    parser.add_argument("--ways", default="bfloat16; int8; nf4", help="separated by semicolons")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="separated by commas")
    parser.add_argument("--columns", type=int, default=512, help="tokens in the cache")
    add_report_flags(parser, rounds=1)
    options = parser.parse_args()
    config, chip = known_shape(options.model), CHIPS[options.chip]
    counts = [int(count) for count in options.rows.split(",")]
    if config is None:
        raise UserError(f"--model={options.model}: no shape of this name is known")
    found = []
    for way in (way.strip() for way in options.ways.split(";") if way.strip()):
        bounds = [_bound(config, way, count, options.columns, chip) for count in counts]
        found += [{**bound, "of_fewest": bound["ms"] / bounds[0]["ms"]} for bound in bounds]
    report("lossless_bounds", options, found, "ms")


def _bound(config: ModelConfig, way: str, count: int, columns: int, chip: Chip) -> dict[str, Any]:
    """Returns the least milliseconds of a pass of `count` rows over `columns` cached tokens on `chip`."""
    params = abstract_params(config, jnp.bfloat16, None if way == "bfloat16" else QuantConfig(way))
    model = Transformer(config, None, config.vocab_size - 1, jnp.bfloat16, on_cpu=False)
    cache = jax.eval_shape(functools.partial(_prefill, model, columns), params)
    pairs = count * (columns + (count + 1) / 2)
    flops = forward_flops(config, None, Work(count, pairs, count))
    read_ms, compute_ms = 1e3 * _bytes((params, cache)) / chip.bandwidth, 1e3 * flops / chip.flops
    return {"way": way, "rows": count, "read_ms": read_ms, "compute_ms": compute_ms, "ms": max(read_ms, compute_ms)}


def _prefill(model: Transformer, columns: int, params: Any) -> Any:
    return ColumnModel(model, {"params": params}).prefill(jnp.zeros((1, columns), jnp.int32), columns)


def _bytes(tree: Any) -> int:
    """Counts the bytes of the arrays of `tree`; two int4 or NF4 codes share a byte."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
