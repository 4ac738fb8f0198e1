"""Draws the metrics of training runs: loss, masked NLL, and evaluations by mask rate.

    python -m difflm_jax.plot --run=DIR[,DIR ...] --out=FILE.png

The suffix of FILE sets the format (png, svg, pdf). Requires matplotlib: pip install -e '.[plot]'.
"""

import io
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from difflm_jax.cli import run_command, suggest_next
from difflm_jax.errors import UserError, one_line
from difflm_jax.training.metrics import METRICS_FILE, read_metrics
from difflm_jax.utils.files import check_writable, write_whole

FLAGS = flags.FlagValues()
flags.DEFINE_list("run", [], "Output directories of training runs, separated by commas.", flag_values=FLAGS)
flags.DEFINE_string("out", "", "The picture to write.", flag_values=FLAGS)

FORMATS = ("png", "svg", "pdf")
STYLES = (":", "--", "-.", "-", (0, (5, 1)))  # line styles


def main(flag_values: flags.FlagValues) -> None:
    """Writes one figure of all runs."""
    if not flag_values.run:
        raise UserError("name a training run with --run")
    for name in flag_values.run:
        if not (Path(name) / METRICS_FILE).is_file():
            raise UserError(f"--run={name}: not a training run (no {METRICS_FILE} there)")
    if not flag_values.out:
        raise UserError("name the picture to write with --out=FILE.png")
    out = Path(flag_values.out)
    if out.suffix.removeprefix(".") not in FORMATS:
        raise UserError(f"--out={flag_values.out}: must end in {', '.join('.' + name for name in FORMATS)}")
    check_writable(out)
    runs = {name: read_run(name) for name in flag_values.run}
    picture = io.BytesIO()
    draw(runs).savefig(picture, format=out.suffix[1:], dpi=150)
    write_whole(out, picture.getvalue())
    print(f"wrote {out}")
    suggest_next(f"difflm evaluate --run={flag_values.run[0]} --data=FILE")


def read_run(directory: str) -> list[dict[str, Any]]:
    """Reads the records of a run and adds `at`: steps since its first phase began. Raises `UserError` if none."""
    records, before, phase, last = [], 0, None, 0
    for record in read_metrics(directory):
        if "phase" not in record or "step" not in record:
            continue
        if record["phase"] != phase:
            before, phase, last = before + last, record["phase"], 0
        last = max(last, record["step"])
        records.append({**record, "at": before + record["step"]})
    if not any("loss" in record or "eval_loss" in record for record in records):
        raise UserError(f"{directory}: its metrics hold no step yet")
    return records


def draw(runs: dict[str, list[dict[str, Any]]]) -> Any:
    """Returns a matplotlib figure with four panels. Each run has its own colour."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"plots need matplotlib ({one_line(error)}): pip install -e '.[plot]'") from error
    figure = Figure(figsize=(12, 8), layout="constrained")
    (loss, nll), (by_time, by_rate) = figure.subplots(2, 2)
    labels = _labels(list(runs))
    buckets = sorted({bucket for records in runs.values() for bucket in _buckets(records)})
    styles = {bucket: STYLES[number % len(STYLES)] for number, bucket in enumerate(buckets)}  # the same in every run
    for number, (name, records) in enumerate(runs.items()):
        colour, label = f"C{number % 10}", labels[name]
        for axes, key in ((loss, "loss"), (nll, "masked_nll")):
            axes.plot(*_series(records, key), color=colour, linewidth=1, alpha=0.8, label=label)
            evaluated = _series(records, f"eval_{key}")
            axes.plot(*evaluated, "o-", color=colour, markersize=4, markerfacecolor="white", label=f"{label}, held out")
        _draw_evaluations(by_time, by_rate, records, label, colour, None if len(runs) == 1 else styles)
        for axes in (loss, nll, by_time):
            _mark_phases(axes, records, "0.5" if len(runs) == 1 else colour)
    for axes, title, unit in (
        (loss, "Loss (as trained on)", "weighted nats a token"),
        (nll, "Masked NLL", "nats a hidden token"),
        (by_time, "Held out, by mask rate", "nats a hidden token"),
        (by_rate, "Last evaluation of each phase", "nats a hidden token"),
    ):
        axes.set(title=title, ylabel=unit, xlabel="mask rate" if axes is by_rate else "optimiser steps")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    return figure


def _labels(names: list[str]) -> dict[str, str]:
    """Returns the labels of runs: the directory names, or the paths if names are equal or hidden (`_run`)."""
    short = {name: Path(name).name for name in names}
    alike = len(set(short.values())) < len(names)
    return {name: f"./{name}" if alike or label[:1] in ("", "_") else label for name, label in short.items()}


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Returns (steps, values) of the records with `key`. Non-finite values leave a gap."""
    found = [(record["at"], record[key]) for record in records if record.get(key) is not None]
    return [at for at, _ in found], [y if math.isfinite(y) else math.nan for _, y in found]


def _buckets(records: list[dict[str, Any]]) -> list[str]:
    """Returns the buckets of mask rates in a run's evaluations."""
    return sorted({bucket for record in records for bucket in record.get("eval_by_mask_rate") or ()})


def _draw_evaluations(
    by_time: Any, by_rate: Any, records: list[dict[str, Any]], label: str, colour: str, styles: dict[str, Any] | None
) -> None:
    """Draws NLL over the steps, a line per bucket of mask rates, and over the rates for the last one of each phase.

    styles: the line style of each bucket, if several runs share the panel.
    """
    only = styles is None
    evaluations = [record for record in records if record.get("eval_by_mask_rate")]
    for number, bucket in enumerate(_buckets(records)):
        points = [(r["at"], r["eval_by_mask_rate"][bucket]["masked_nll"]) for r in evaluations
                  if bucket in r["eval_by_mask_rate"]]  # fmt: skip
        name = bucket if only else f"{label} {bucket}"
        by_time.plot(
            *zip(*points, strict=True),
            color=f"C{number}" if only else colour,
            linestyle="-" if only else styles[bucket],
            marker="o",
            markersize=3,
            label=name,
        )
    last = {record["phase"]: record["eval_by_mask_rate"] for record in evaluations}
    for number, (phase, rates) in enumerate(last.items()):
        middles = [sum(map(float, bucket.split("-"))) / 2 for bucket in sorted(rates)]
        values = [rates[bucket]["masked_nll"] for bucket in sorted(rates)]
        style = {"marker": "o", "linestyle": STYLES[-2 - number % 3], "color": f"C{number}" if only else colour}
        by_rate.plot(middles, values, label=phase if only else f"{label}, {phase}", **style)


def _mark_phases(axes: Any, records: list[dict[str, Any]], colour: str) -> None:
    """Draws a vertical line at each change of phase."""
    for before, after in itertools.pairwise(records):
        if before["phase"] != after["phase"]:
            axes.axvline(before["at"], color=colour, linewidth=0.8, linestyle="--")
            axes.annotate(after["phase"], (before["at"], 1), xycoords=("data", "axes fraction"), xytext=(3, -12),
                          textcoords="offset points", fontsize="small", color=colour)  # fmt: skip


def command(argv: Sequence[str]) -> int:
    """Runs the command line `argv` and returns the exit status."""
    return run_command(main, FLAGS, __doc__, argv)


if __name__ == "__main__":
    sys.exit(command(sys.argv))
