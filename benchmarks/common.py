"""Shared code of the benchmarks: alternating timing, the machine, and a report as table, JSON and plot."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np


def alternating(
    ways: Mapping[str, Callable[[int], Any]], rounds: int, warm_up: int = 1, settle: int = 0
) -> dict[str, list[float]]:
    """Returns the seconds of each way in each round. Ways alternate; each is called with the number of the round.

    The `warm_up` rounds compile and fill caches. They have the numbers -warm_up ... -1 and are not counted. At each
    turn a way first runs `settle` times untimed. The first step of a library after one of another is up to 1.4 times
    as slow as the following ones, which are typical of a run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-warm_up, rounds):
        for name, way in ways.items():
            for _ in range(settle if number >= 0 else 0):
                jax.block_until_ready(way(number))
            start = time.perf_counter()
            jax.block_until_ready(way(number))
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def machine() -> dict[str, Any]:
    """Describes the machine and the versions."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    device = jax.devices()[0].device_kind
    return {"cpu": cpu, "cores": os.cpu_count(), "load_at_start": load, "device": device, "jax": jax.__version__}


def gemm_flops(dtype: Any, size: int = 2048) -> float:
    """Returns the FLOP/s of the best of five square matmuls, as an upper bound."""
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda a, b: a @ b)
    seconds = alternating({"product": lambda _: product(x, x)}, 5)["product"]
    return 2 * size**3 / min(seconds)


def add_report_flags(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", default="", help="directory for NAME.json and NAME.png")


def report(
    name: str, options: argparse.Namespace, rows: Sequence[Mapping[str, Any]], figure: str, facts: Mapping | None = None
) -> None:
    """Prints `rows` (each with a "way") as a table; with `--out`, saves them as JSON and plots their `figure`."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "seconds"))
    cells = [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    for line in (columns, *cells):
        first, *rest = (text.ljust(widths[0]) if i == 0 else text.rjust(widths[i]) for i, text in enumerate(line))
        print("  ".join([first, *rest]), flush=True)
    record = {"machine": machine(), "options": vars(options), **(facts or {}), "ways": list(rows)}
    print(json.dumps({**record["machine"], **(facts or {})}), flush=True)
    if options.out:
        directory = Path(options.out)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _plot(directory / f"{name}.png", name, rows, figure)


def median_of(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def _text(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else (f"{value:,.0f}" if isinstance(value, float) else str(value))
    )


def _plot(path: Path, title: str, rows: Sequence[Mapping[str, Any]], figure: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if isinstance(row.get(figure), (int, float))]
    fig, axes = pyplot.subplots(figsize=(8, 0.5 * len(shown) + 1.2), layout="constrained")
    bars = axes.barh(np.arange(len(shown)), [row[figure] for row in shown])
    axes.bar_label(bars, labels=[_text(float(row[figure])) for row in shown], padding=3)
    axes.set_yticks(np.arange(len(shown)), [row["way"] for row in shown])
    axes.invert_yaxis()
    axes.set_xlabel(figure.replace("_", " "))
    axes.set_title(title)
    fig.savefig(path, dpi=120)
    pyplot.close(fig)
