"""Code shared by the commands: absl flags, help, one-line errors, and loading the model that flags name.

Modules that need jax are imported where they are used, so that `difflm --help` does not wait for it.
"""

import copy
import dataclasses
import importlib
import io
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from difflm_jax.errors import UserError, exit_with_errors, one_line
from difflm_jax.utils.files import expanded
from difflm_jax.utils.flag_help import help_text, nearest

if TYPE_CHECKING:
    from difflm_jax.lm import LanguageModel


def run_command(
    main: Callable[[flags.FlagValues], int | None],
    flag_values: flags.FlagValues,
    usage: str,
    argv: Sequence[str] | None = None,
    keys: Collection[str] = (),
) -> int:
    """Parses `argv` (the process's own by default) and runs `main(flag_values)`; returns the exit status.

    keys: the config keys, for commands that take `--config.KEY`. They are suggested for unknown flags. Bad flags and
    every `UserError` print one line that starts with `error:`; `--debug_traceback` also shows the traceback.
    """
    argv = list(sys.argv if argv is None else argv)
    flag_values = copy.deepcopy(flag_values)  # a second command in the same process starts from the defaults
    flags.DEFINE_bool("debug_traceback", False, "Show the traceback of an error.", flag_values=flag_values)
    if any(item in ("--help", "-h", "-help", "--helpfull", "--helpshort") for item in argv[1:]):
        print(help_text(usage, flag_values, _titles(flag_values)))
        return 0

    def command() -> int | None:
        try:
            rest = flag_values(argv)
        except flags.UnrecognizedFlagError as error:
            known = [*flag_values, *(f"config.{key}" for key in keys)]
            near = nearest(error.flagname, known)
            if error.flagname == "run" and "config" in flag_values:  # commands that take a config
                made = item.partition("=")[2] if (item := _item(argv, "run")) else ""
                near = f"config={Path(made or 'RUN') / 'config.json'}"
            raise UserError(f"--{error.flagname}: unknown flag (did you mean --{near}?)") from error
        except flags.Error as error:
            raise UserError(one_line(error)) from error
        if rest[1:]:
            raise UserError(f"unexpected argument {rest[1]!r} (flags are written --name=value)")
        from difflm_jax.utils.compilation import keep_compiled
        from difflm_jax.utils.progress import announce_compilation

        _expand_paths(flag_values)
        keep_compiled()
        announce_compilation()
        return main(flag_values)

    for stream in (sys.stdout, sys.stderr):  # characters that the terminal cannot encode must not end the work
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    asked = [item.partition("=")[2].lower() for item in argv if re.fullmatch("--debug_traceback(=.*)?", item)]
    return exit_with_errors(command, debug_traceback=bool(asked) and asked[-1] not in ("false", "f", "0", "no"))


# Flags that name files or directories. The shell does not expand the `~` of --name=~/path, so we do.
PATH_FLAGS = (
    *("model", "adapter", "run", "config", "data", "base", "text", "out", "file", "watch_html", "plot"),
    *("json_schema", "lark"),
)


def _item(argv: Sequence[str], name: str) -> str | None:
    return next((item for item in argv[1:] if re.fullmatch(f"--?{name}(=.*)?", item)), None)


def _expand_paths(flag_values: flags.FlagValues) -> None:
    for name in PATH_FLAGS:
        if name in flag_values and (value := flag_values[name].value):
            where = f"--{name}"
            expand = [expanded(path, where) for path in value] if isinstance(value, list) else expanded(value, where)
            flag_values[name].value = expand


_MODEL_FLAGS = ("model", "adapter", "run", "revision", "dtype", "quantization", "mask_token")


def _titles(flag_values: flags.FlagValues) -> dict[str, str]:
    """Returns the groups of `--help`, for flags that several commands share."""
    shared = dict.fromkeys((*_MODEL_FLAGS, "chat_template"), "Model")
    titles = shared if {"model", "adapter"} <= set(flag_values) else {}
    titles |= dict.fromkeys((*_HOST_FLAGS, *(["mesh"] if titles else [])), "Devices and processes")
    if "algorithm" in flag_values:
        from difflm_jax.sampling.options import Sampling

        titles |= {
            field.name: "Decoding (default: what the model was trained for)" for field in dataclasses.fields(Sampling)
        }
    return titles | {"debug_traceback": "Errors"}


_HOST_FLAGS = ("coordinator_address", "num_processes", "process_id")


def define_host_flags(flag_values: flags.FlagValues) -> None:
    """Defines the flags for runs with several processes. Defaults come from Cloud TPU, SLURM or Open MPI."""
    flags.DEFINE_string(
        "coordinator_address", "", "host:port of process 0, where there are several.", flag_values=flag_values
    )
    flags.DEFINE_integer("num_processes", None, "How many processes there are.", flag_values=flag_values)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", flag_values=flag_values)


def connect_from_flags(flag_values: flags.FlagValues) -> None:
    """Connects to the processes that the flags of `define_host_flags` name."""
    from difflm_jax.distributed.processes import connect

    connect(**{name: flag_values[name].value for name in _HOST_FLAGS})


def define_model_flags(flag_values: flags.FlagValues) -> None:
    """Defines the flags that name a model (a checkpoint with an adapter, or a run) and its devices."""
    define_host_flags(flag_values)
    flags.DEFINE_list(
        "mesh", [], "Devices along data, fsdp and tensor (-1: what is left), as 1,4,2; default: one device.",
        flag_values=flag_values,
    )  # fmt: skip
    flags.DEFINE_string("adapter", "", "PEFT adapter directory.", flag_values=flag_values)
    define_source_flags(flag_values)


def define_source_flags(flag_values: flags.FlagValues) -> None:
    """Defines the flags that name a checkpoint or a run, and the format of its weights in memory."""
    from difflm_jax.quant import FORMATS
    from difflm_jax.utils.dtypes import AUTO, DTYPES

    flags.DEFINE_string("model", "", "Hugging Face directory, hub id or .gguf file.", flag_values=flag_values)
    flags.DEFINE_string(
        "run", "", "Output directory of a training run: what it trained, on its model.", flag_values=flag_values
    )
    flags.DEFINE_string("revision", "", "Revision of a hub id.", flag_values=flag_values)
    flags.DEFINE_enum(
        "dtype",
        None,
        [*DTYPES, AUTO],
        "Default: the run's, else bfloat16; auto: what is fastest here.",
        flag_values=flag_values,
    )
    flags.DEFINE_enum(
        "quantization",
        None,
        ["none", *FORMATS],
        "How the projections are held; default: as in the run.",
        flag_values=flag_values,
    )
    flags.DEFINE_string(
        "mask_token", "", "The mask token, where the rule's choice is not wanted.", flag_values=flag_values
    )
    flags.DEFINE_string(
        "chat_template", "", "A Jinja file, or its text, in place of the tokenizer's chat template.",
        flag_values=flag_values,
    )  # fmt: skip


def define_sampling_flags(flag_values: flags.FlagValues) -> None:
    """Defines a flag for every decoding option."""
    from difflm_jax.sampling.options import Sampling

    define = {float: flags.DEFINE_float, int: flags.DEFINE_integer, str: flags.DEFINE_string, bool: flags.DEFINE_bool}
    for field in dataclasses.fields(Sampling):
        define[field.metadata["type"]](field.name, None, field.metadata["help"], flag_values=flag_values)


def sampling_flags(flag_values: flags.FlagValues) -> dict[str, Any]:
    """Returns the decoding options that the flags set."""
    from difflm_jax.sampling.options import Sampling

    options = {field.name: flag_values[field.name].value for field in dataclasses.fields(Sampling)}
    return {name: value for name, value in options.items() if value is not None}


def load_from_flags(
    flag_values: flags.FlagValues, with_base: bool = False, check: Callable[["LanguageModel"], None] | None = None
) -> "LanguageModel":
    """Loads the model that the flags of `define_model_flags` name; see `load_model` for `with_base` and `check`."""
    from difflm_jax.data.template_forms import read_template
    from difflm_jax.loading import load_model, spec_of_names

    check_names_a_model(flag_values)
    connect_from_flags(flag_values)
    spec = spec_of_names(**{name: flag_values[name].value for name in _MODEL_FLAGS})
    if flag_values.chat_template:
        read_template(flag_values.chat_template)  # raises before the weights are read
    return with_template(load_model(spec, flag_values.mesh, with_base, check), flag_values)


def with_template(lm: "LanguageModel", flag_values: flags.FlagValues) -> "LanguageModel":
    """Returns `lm` with the chat template of a flag, on its own and its origin's tokenizer. Raises `UserError`."""
    from difflm_jax.data.template_forms import read_template

    for each in (lm, lm.origin) if flag_values.chat_template else ():
        if each is not None:
            each.tokenizer.chat_template = read_template(flag_values.chat_template)
    return lm


def check_names_a_model(flag_values: flags.FlagValues) -> None:
    """Raises `UserError` if the flags of `define_source_flags` name no model, or give a run as `--model`."""
    if not flag_values.model and not flag_values.run:
        raise UserError("name a model with --model=... or a training run with --run=...")
    if flag_values.model and is_run(flag_values.model):
        raise UserError(f"--model={flag_values.model}: is a training run; write --run={flag_values.model}")


def is_run(directory: str) -> bool:
    """Whether a directory is the output directory of a training run."""
    path = Path(directory).expanduser()
    return (path / "config.json").is_file() and ((path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir())


def suggest_next(line: str) -> None:
    """Ends a command with the next one to try, on stderr."""
    print(f"next: {line}", file=sys.stderr)


# `difflm COMMAND` runs the module of that name.
COMMANDS = {
    "train": "train a masked-diffusion model out of a causal one",
    "generate": "answer prompts, fill masks, or chat",
    "serve": "answer clients of OpenAI's API, and a browser",
    "evaluate": "score a model next to its causal base",
    "export": "write a PEFT adapter or a merged checkpoint",
    "plan": "say whether a run will fit, and how long a step takes",
    "plot": "draw the metrics of runs",
    "doctor": "check this machine, and say how to mend what is wrong",
    "harness": "run lm-evaluation-harness on a model",
}


# Commands without their own module.
TOOLS = {
    "init": "write a config for your own data into a new directory, and preview it",
    "recipes": "list, show or copy the configs of the repository",
    "tune": "find the fastest decoding that is as good as the best, and keep it",
}


def difflm(argv: Sequence[str] | None = None) -> int:
    """The console script: `difflm COMMAND ...` is `python -m difflm_jax.COMMAND ...`."""
    argv = list(sys.argv if argv is None else argv)
    name = argv[1] if len(argv) > 1 else "--help"
    if name in ("--help", "-h", "-help", "help"):
        print("difflm COMMAND [--flags]     (difflm COMMAND --help lists the flags)\n")
        print("\n".join(f"  {name:<10}{text}" for name, text in {**COMMANDS, **TOOLS}.items()))
        return 0

    def command() -> int:
        if name in TOOLS:
            return _tool(name, [f"difflm {name}", *argv[2:]])
        if name not in COMMANDS:
            near = nearest(name, (*COMMANDS, *TOOLS))
            raise UserError(f"{name}: no such command (did you mean difflm {near}? difflm --help lists them)")
        return importlib.import_module(f"difflm_jax.{name}").command([f"difflm {name}", *argv[2:]])

    return exit_with_errors(command)


def tune_flags() -> flags.FlagValues:
    """Returns the flags of `difflm tune`."""
    from difflm_jax.evaluation import tune

    known = flags.FlagValues()
    define_model_flags(known)
    tune.define_flags(known)
    return known


def _tool(name: str, argv: Sequence[str]) -> int:
    if name == "tune":
        from difflm_jax.evaluation import tune

        known = tune_flags()
        return run_command(lambda given: tune.main(given, load_from_flags), known, tune.__doc__, argv)
    from difflm_jax.config import recipes

    if name == "recipes":
        return recipes.recipes(argv)
    path = recipes.init(argv)
    if path is None:
        return 0
    return importlib.import_module("difflm_jax.train").command(["difflm train", f"--config={path}", "--preview"])
