"""Answers prompts with a converted model.

    python -m difflm_jax.generate --model=SOURCE [--adapter=DIR | --run=DIR] --prompt="..." [--max_new_tokens=64 ...]

Without --prompt or --file it reads lines from a pipe (one prompt a line, one answer each), or chats on a terminal.
"""

import sys
from pathlib import Path

from absl import flags

from difflm_jax.cli import define_model_flags, load_from_flags, run_command
from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel

FLAGS = flags.FlagValues()
define_model_flags(FLAGS)
flags.DEFINE_string("prompt", None, "The prompt (with --infill: text that holds the mask token).", flag_values=FLAGS)
flags.DEFINE_string("file", None, "A file with one prompt a line.", flag_values=FLAGS)
flags.DEFINE_bool("infill", False, "Fill the mask tokens of the text instead of answering it.", flag_values=FLAGS)
flags.DEFINE_bool("causal", False, "Decode with the causal base, token by token.", flag_values=FLAGS)
flags.DEFINE_integer("max_new_tokens", 128, "Length of the answer's canvas.", flag_values=FLAGS)
flags.DEFINE_integer("steps", 128, "Forward passes, all blocks together.", flag_values=FLAGS)
flags.DEFINE_integer("block_length", 0, "Fill the answer in blocks of this length (0: one block).", flag_values=FLAGS)
flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", flag_values=FLAGS)
flags.DEFINE_string("algorithm", None, "confidence or probability; default: the adapter's.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Seed of the draws at temperature > 0.", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 16, "Prompts decoded together.", flag_values=FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Prints one answer a prompt; newlines within an answer are escaped when there are several prompts."""
    if flag_values.prompt is not None and flag_values.file is not None:
        raise UserError("give --prompt or --file, not both")
    lines = _lines(flag_values)  # before the model: a missing file should not cost a load
    lm = load_from_flags(flag_values)
    if flag_values.causal:
        lm = lm.base()
    if flag_values.prompt is not None:
        print(_answers(lm, flag_values, [flag_values.prompt])[0])
    elif lines is not None:
        for answer in _answers(lm, flag_values, lines):
            print(answer.replace("\\", "\\\\").replace("\n", "\\n"))
    else:
        _chat(lm, flag_values)


def _lines(flag_values: flags.FlagValues) -> list[str] | None:
    """The prompts of a file or a pipe; None where there is one prompt, or a terminal to chat on."""
    if flag_values.prompt is not None:
        return None
    if flag_values.file is not None:
        path = Path(flag_values.file)
        if not path.is_file():
            raise UserError(f"--file={path}: no such file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--file={path}: not UTF-8 text ({error})") from error
    elif not sys.stdin.isatty():
        text = sys.stdin.read()
    else:
        return None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError("there is no prompt to answer")
    return lines


def _answers(lm: LanguageModel, flag_values: flags.FlagValues, prompts: list) -> list[str]:
    options = {name: flag_values[name].value for name in ("temperature", "algorithm", "seed", "batch_size")}
    if flag_values.infill:
        return lm.infill(prompts, steps=flag_values.steps, **options).texts
    steps = max(flag_values.steps, flag_values.max_new_tokens) if flag_values.causal else flag_values.steps
    block_length = flag_values.block_length or None
    return lm.generate(prompts, flag_values.max_new_tokens, steps, block_length, **options).texts


def _chat(lm: LanguageModel, flag_values: flags.FlagValues) -> None:
    """A conversation that remembers its turns, until an empty line or the end of input."""
    if lm.tokenizer.chat_template is None:
        raise UserError("this tokenizer has no chat template: give --prompt, --file or a pipe")
    print(f"{lm.source.name}: an empty line ends the conversation, /reset starts it anew", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        if line == "/reset":
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        answer = _answers(lm, flag_values, [messages])[0]
        messages.append({"role": "assistant", "content": answer})
        print(answer)


if __name__ == "__main__":
    sys.exit(run_command(main, FLAGS, __doc__))
