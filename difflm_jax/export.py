"""Writes what a training run made as a PEFT adapter or as a (merged) Hugging Face checkpoint.

    python -m difflm_jax.export --run=DIR --to=peft|merged --out=DIR

`--model` and `--adapter` name the parts where there is no run directory, or where the base has moved.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from difflm_jax.cli import define_model_flags, load_from_flags, run_command, suggest_next
from difflm_jax.errors import UserError
from difflm_jax.loading import read_run_config
from difflm_jax.utils.files import check_new_directory

FLAGS = flags.FlagValues()
define_model_flags(FLAGS)
flags.DEFINE_enum("to", "peft", ["peft", "merged"], "What to write.", flag_values=FLAGS)
flags.DEFINE_string("out", "", "The directory to write; it must not hold anything yet.", flag_values=FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Loads the base with its adapter and writes `--out`."""
    if not flag_values.out:
        raise UserError("name the directory to write with --out")
    check_new_directory(Path(flag_values.out).expanduser(), lambda _: flag_values.to == "peft")
    if flag_values.run and flag_values.to == "peft" and read_run_config(Path(flag_values.run)).trained == "all":
        raise UserError(f"{flag_values.run} trained every weight, and has no adapter: export it with --to=merged")
    lm = load_from_flags(flag_values)
    if lm.lora is None and not flag_values.run:
        raise UserError("there is no adapter to export: name one with --adapter, or a run with --run")
    if flag_values.to == "merged":
        merged = lm.merge() if lm.lora is not None else lm
        if merged.provenance:
            print(merged.provenance)
        merged.save_pretrained(flag_values.out)
    else:
        lm.save_adapter(flag_values.out)
    print(f"wrote {flag_values.out}")
    suggest_next(f'difflm generate {_reopened(flag_values)} --prompt="..."')


def _reopened(flag_values: flags.FlagValues) -> str:
    """The flags that open what was written."""
    if flag_values.to == "merged":
        return f"--model={flag_values.out}"
    base = flag_values.model or read_run_config(Path(flag_values.run)).model
    return f"--model={base} --adapter={flag_values.out}"


def command(argv: Sequence[str]) -> int:
    """Runs the command line `argv` and returns the exit status."""
    return run_command(main, FLAGS, __doc__, argv)


if __name__ == "__main__":
    sys.exit(command(sys.argv))
