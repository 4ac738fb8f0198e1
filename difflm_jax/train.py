"""Converts a causal language model into a masked-diffusion one by training.

    python -m difflm_jax.train --config=configs/pretrain.py [--config.learning_rate=1e-4 ...]
                               [--hyper_parameters_json='{"epochs": 2}'] [--preview]

The same command resumes an unfinished run. Exit status: 0 finished, 75 stopped by SIGTERM or Ctrl-C with a
checkpoint saved (start it again), 1 an error. `--preview` shows the rows that the first step of each phase would see,
with their masks, and exits. It reads no weights and writes only the cache of tokenised data.
"""

import shlex
import sys
from collections.abc import Sequence

from absl import flags

from difflm_jax.cli import connect_from_flags, define_host_flags, run_command, suggest_next
from difflm_jax.config.docs import help_text
from difflm_jax.config.files import load_config, take_overrides
from difflm_jax.config.schema import KEYS
from difflm_jax.data.columns import parse_naming
from difflm_jax.distributed.processes import is_writer
from difflm_jax.errors import UserError, exit_with_errors
from difflm_jax.evaluation.lossless import print_texts
from difflm_jax.evaluation.report import Decodings, print_report
from difflm_jax.evaluation.tasks import read_questions
from difflm_jax.loading import ModelSpec, load_model, spec_of_names, with_origin
from difflm_jax.training.preview import preview
from difflm_jax.training.run import train

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", "", "A .py, .yaml or .json file; without it the defaults.", flag_values=FLAGS)
flags.DEFINE_string("hyper_parameters_json", "", "Keys as JSON, as the original system takes them.", flag_values=FLAGS)
define_host_flags(FLAGS)
flags.DEFINE_bool("force", False, "Resume although configuration or data have changed.", flag_values=FLAGS)
flags.DEFINE_bool("check_fit", True, "Refuse weights that exceed the memory of this machine.", flag_values=FLAGS)
flags.DEFINE_bool("preview", False, "Show what training would see, and end.", flag_values=FLAGS)


def command(argv: Sequence[str]) -> int:
    """Runs the command line `argv` and returns the exit status."""
    overrides: list[str] = []

    def main(flag_values: flags.FlagValues) -> None:
        if not (flag_values.config or overrides or flag_values.hyper_parameters_json):
            raise UserError("name a config with --config=FILE, for example configs/quickstart.py (difflm recipes list)")
        config = load_config(flag_values.config, overrides, flag_values.hyper_parameters_json)
        connect_from_flags(flag_values)
        report = config.report
        naming = parse_naming(config.data.columns, config.data.roles)
        # bad rows must fail at the start
        questions = read_questions(report.data, report.rows, naming=naming) if report.data else []
        if flag_values.preview:
            preview(config)
            suggest_next(shlex.join(["difflm", "train", *(item for item in argv[1:] if "preview" not in item)]))
            return
        lm = train(config, flag_values.force, flag_values.check_fit)
        if questions:
            if lm is None:  # the run had already finished
                lm = load_model(spec_of_names(model=config.model, run=config.output_dir), with_base=True)
            elif config.trained == "all":
                lm = with_origin(lm, ModelSpec(config.model, revision=config.revision or None))
            if lm.diffusion.gated:
                print_texts(lm, [question.prompt for question in questions], report.max_new_tokens)
            else:
                print_report(lm, report.data, questions, Decodings(report.tokens_per_pass, report.max_new_tokens))
        if is_writer():
            run = f"--run={config.output_dir}"
            suggest_next(f'difflm generate {run} --prompt="..."; difflm export {run} --to=peft --out=DIR')

    def split_and_run() -> int:
        nonlocal overrides
        overrides, others = take_overrides(argv)
        return run_command(main, FLAGS, f"{__doc__}\nKeys of the config:\n\n{help_text()}", others, KEYS)

    return exit_with_errors(split_and_run)


if __name__ == "__main__":
    sys.exit(command(sys.argv))
