"""Finds decoding settings for a model: quality against passes and tokens/s on held-out rows.

    difflm tune --run=DIR --data=FILE [--task=gsm8k --rows=64 --max_new_tokens=128 --plot=FILE.png]

Tries settings that suit the model, or those of `--try`, and prints a table. `*` marks settings that no other beats in
both quality and tokens/s. The fastest setting that is not significantly worse than the best becomes the default: it
is written into `diffusion_config.json` next to the weights, with its results.
"""

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from difflm_jax.checkpoint.diffusion_config import DIFFUSION_FILE, read_diffusion_config
from difflm_jax.errors import UserError, one_line
from difflm_jax.evaluation.results import environment
from difflm_jax.evaluation.sweep import Point, Trial, candidates, chosen, front, measured
from difflm_jax.evaluation.tasks import TASKS, read_questions
from difflm_jax.lm import LanguageModel
from difflm_jax.loading import spec_of_names
from difflm_jax.sampling.options import Sampling, of_sampling, sampling_options
from difflm_jax.utils.files import check_writable, write_whole
from difflm_jax.utils.progress import Progress
from difflm_jax.view.tables import print_table


def define_flags(flag_values: flags.FlagValues) -> None:
    """Defines the flags of `difflm tune`, except those of the model."""
    flags.DEFINE_string("data", "", "Held-out rows with answers.", flag_values=flag_values)
    flags.DEFINE_enum("task", "exact", list(TASKS), "What counts as right.", flag_values=flag_values)
    flags.DEFINE_integer("rows", 64, "Only the first rows (0: all).", lower_bound=0, flag_values=flag_values)
    flags.DEFINE_integer("max_new_tokens", 128, "Length of the answer's canvas.", flag_values=flag_values)
    flags.DEFINE_integer("batch_size", 16, "Questions answered together.", lower_bound=1, flag_values=flag_values)
    flags.DEFINE_multi_string(
        "try", [], "A setting, as 'algorithm=steady threshold=0.8'; once for each. Default: a sweep.",
        flag_values=flag_values,
    )  # fmt: skip
    flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0, flag_values=flag_values)
    flags.DEFINE_string("plot", "", "A picture of quality against tokens/s (png, svg, pdf).", flag_values=flag_values)
    flags.DEFINE_bool("write", True, "Write the chosen setting next to the weights.", flag_values=flag_values)


def main(flag_values: flags.FlagValues, load: Callable[..., LanguageModel]) -> None:
    """Prints the table, and writes the preset and the plot if asked to. `load` maps flags to a model."""
    if not flag_values.data:
        raise UserError("name the held-out rows with --data")
    if flag_values.plot:
        _figure_class()
        check_writable(flag_values.plot)
    tried = [_setting(words) for words in flag_values["try"].value]
    questions = read_questions(flag_values.data, flag_values.rows, flag_values.task)
    if not questions:
        raise UserError(f"--data={flag_values.data}: holds no rows")
    lm = load(flag_values, with_base=True)
    directory = _directory(flag_values) if flag_values.write else None
    trial = Trial(flag_values.max_new_tokens, flag_values.task, flag_values.batch_size, flag_values.seed)
    lm = lm.with_diffusion(preset="")  # an earlier preset must not affect this one
    settings = tried or candidates(lm, questions, trial)
    for options in settings:  # check all of them before the first run
        sampling_options(lm.attention, lm.algorithm, of_sampling(options))
    points = []
    with Progress("trying", "settings", len(settings)) as progress:
        for options in settings:
            points.append(measured(lm, questions, options, trial))
            progress.advance(1)
    best = chosen(points)
    _print(points, best, f"{len(questions)} rows of {flag_values.data}, task {flag_values.task}")
    if flag_values.plot:
        write_plot(flag_values.plot, points, best)
        print(f"wrote {flag_values.plot}")
    if directory is not None:
        evidence = {"data": _public_name(flag_values.data), "task": flag_values.task, "rows": len(questions)}
        evidence |= {"max_new_tokens": trial.max_new_tokens, **best.record(), **environment()}
        evidence["tried"] = [point.record() for point in points]
        write_preset(directory, best.options, evidence)
        print(f"wrote {directory / DIFFUSION_FILE}: {best.name}")


def _public_name(data: str) -> str:
    """Returns the name of the rows to publish; for a path outside the working directory, only its last part."""
    path = Path(data)
    if not path.is_absolute():
        return data
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def write_preset(directory: Path, options: dict[str, Any], evidence: dict[str, Any]) -> None:
    """Writes the preset into the `diffusion_config.json` of `directory`, atomically."""
    path = directory / DIFFUSION_FILE
    known = read_diffusion_config(directory)
    if known is None:
        raise UserError(f"{path}: no such file; only weights made by this library hold a preset (or: --nowrite)")
    known["preset"] = {"options": options, "evidence": evidence}
    write_whole(path, json.dumps(known, indent=2, sort_keys=True) + "\n")


def write_plot(path: str, points: Sequence[Point], best: Point) -> None:
    """Draws quality against tokens/s, with the front as a line."""
    figure = _figure_class()(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    best_ones = front(points)
    axes.plot([p.tokens_per_second for p in best_ones], [p.quality for p in best_ones], "-", color="0.7", zorder=1)
    for number, point in enumerate(points):
        marker = "*" if point is best else "o"
        size = 160 if point is best else 45
        label = f"{point.name} ({point.passes:.1f} passes)"
        axes.scatter(point.tokens_per_second, point.quality, size, f"C{number % 10}", marker, label=label, zorder=2)
    axes.set(xlabel="tokens/s", ylabel="right answers", ylim=(-0.05, 1.05))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:], dpi=150)
    write_whole(path, picture.getvalue())


def _print(points: Sequence[Point], best: Point, title: str) -> None:
    best_ones = front(points)
    print(f"\nDecoding settings ({title})")
    rows = []
    for point in sorted(points, key=lambda point: -point.tokens_per_second):
        low, high = point.record()["interval"]
        marks = ("*" if point in best_ones else "") + (" chosen" if point is best else "")
        figures = [f"{point.passes:.1f}", f"{point.tokens_per_second:.1f}"]
        rows.append([point.name, f"{point.quality:.2f}", f"[{low:.2f}, {high:.2f}]", *figures, marks])
    print_table(["setting", "right", "95 %", "passes", "tokens/s", ""], rows)


def _setting(words: str) -> dict[str, Any]:
    """Parses the options of one `--try`. Raises `UserError`."""
    types = {name: field.metadata["type"] for name, field in Sampling.__dataclass_fields__.items()}
    types |= {"block_length": int, "tokens_per_pass": int}
    found: dict[str, Any] = {}
    for word in words.split():
        name, is_given, value = word.partition("=")
        if not is_given or name not in types:
            raise UserError(f"--try: {word!r} is not an option of decoding, as algorithm=steady is")
        try:
            found[name] = {"true": True, "false": False}[value.lower()] if types[name] is bool else types[name](value)
        except (KeyError, ValueError) as error:
            raise UserError(f"--try: {word!r}: {name} is of type {types[name].__name__}") from error
    if found.get("block_length", 1) < 1 or found.get("tokens_per_pass", 1) < 1:
        raise UserError(f"--try: {words!r}: block_length and tokens_per_pass must be greater than 0")
    return found


def _directory(flag_values: flags.FlagValues) -> Path:
    """Returns the directory of the weights, which has their `diffusion_config.json`. Raises `UserError`."""
    spec = spec_of_names(flag_values.model, flag_values.adapter, flag_values.run)
    directory = Path(spec.adapter or spec.source).expanduser()
    if read_diffusion_config(directory) is None:
        raise UserError(f"{directory}: has no {DIFFUSION_FILE} to write into; --nowrite only prints the table")
    return directory


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"plots need matplotlib ({one_line(error)}): pip install -e '.[plot]'") from error
    return Figure


if __name__ == "__main__":
    from difflm_jax.cli import difflm

    sys.exit(difflm(["difflm", "tune", *sys.argv[1:]]))
