"""Exports the result of a training run as a PEFT adapter or as a (merged) Hugging Face checkpoint.

    python -m difflm_jax.export --run=DIR --to=peft|merged --out=DIR

`--model` and `--adapter` name the parts if there is no run directory, or if the base has moved.
`--push_to_hub=OWNER/NAME` also uploads it; the model card names the base and the run's last evaluation.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from difflm_jax.checkpoint.hub import add_figures, check_push, push
from difflm_jax.checkpoint.peft import WEIGHTS_FILE
from difflm_jax.cli import define_model_flags, load_from_flags, run_command, suggest_next
from difflm_jax.distributed.processes import is_writer
from difflm_jax.errors import UserError
from difflm_jax.loading import read_run_config
from difflm_jax.training.metrics import METRICS_FILE, read_metrics
from difflm_jax.utils.files import check_new_directory

FLAGS = flags.FlagValues()
define_model_flags(FLAGS)
flags.DEFINE_enum("to", "peft", ["peft", "merged"], "What to write.", flag_values=FLAGS)
flags.DEFINE_string("out", "", "The directory to write; it must not hold anything yet.", flag_values=FLAGS)
flags.DEFINE_string("push_to_hub", "", "Upload it as this model (owner/name) of the hub, too.", flag_values=FLAGS)
flags.DEFINE_bool("private", False, "With --push_to_hub: a new repository is private.", flag_values=FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Loads the base with its adapter and writes `--out`."""
    if not flag_values.out:
        raise UserError("name the directory to write with --out")
    check_new_directory(Path(flag_values.out).expanduser(), lambda _: flag_values.to == "peft")
    if flag_values.run and flag_values.to == "peft" and read_run_config(Path(flag_values.run)).trained == "all":
        raise UserError(f"{flag_values.run} trained every weight, and has no adapter: export it with --to=merged")
    if flag_values.push_to_hub:
        check_push(flag_values.push_to_hub)
    elif flag_values.private:
        raise UserError("--private belongs to --push_to_hub")
    lm = load_from_flags(flag_values)
    if lm.lora is None and lm.origin is not None and flag_values.to == "peft":
        raise UserError(f"{flag_values.adapter}: is a PEFT adapter as it stands; --to=merged writes the merged model")
    if lm.lora is None and lm.origin is None and not flag_values.run:
        raise UserError("there is no adapter to export: name one with --adapter, or a run with --run")
    if flag_values.to == "merged":
        merged = lm.merge() if lm.lora is not None else lm
        if merged.provenance:
            print(merged.provenance)
        merged.save_pretrained(flag_values.out)
    else:
        before = _weights_hash(flag_values.out)
        lm.save_adapter(flag_values.out)
        if before not in (None, _weights_hash(flag_values.out)):
            print(f"note: {flag_values.out} held an adapter with other weights, which is replaced", file=sys.stderr)
    if flag_values.run and is_writer():
        config, evaluations = read_run_config(Path(flag_values.run)), _evaluations(flag_values.run)
        if evaluations:
            add_figures(Path(flag_values.out), config.dataset, evaluations[-1])
    print(f"wrote {flag_values.out}")
    if flag_values.push_to_hub and is_writer():
        print(f"uploaded to {push(Path(flag_values.out), flag_values.push_to_hub, flag_values.private)}")
    suggest_next(f'difflm generate {_reopened(flag_values)} --prompt="..."')


def _evaluations(run: str) -> list[dict[str, Any]]:
    """Returns the records of a run's evaluations; an empty list if it has no log."""
    if not (Path(run) / METRICS_FILE).is_file():
        return []
    return [record for record in read_metrics(run) if "masked_nll" in record and "eval_loss" in record]


def _weights_hash(directory: str) -> str | None:
    """Returns a hash of the weights of the adapter in `directory`; None if it has none."""
    path = Path(directory).expanduser() / WEIGHTS_FILE
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _reopened(flag_values: flags.FlagValues) -> str:
    """Returns the flags that open the exported model."""
    if flag_values.to == "merged":
        return f"--model={flag_values.out}"
    base = flag_values.model or read_run_config(Path(flag_values.run)).model
    return f"--model={base} --adapter={flag_values.out}"


def command(argv: Sequence[str]) -> int:
    """Runs the command line `argv` and returns the exit status."""
    return run_command(main, FLAGS, __doc__, argv)


if __name__ == "__main__":
    sys.exit(command(sys.argv))
