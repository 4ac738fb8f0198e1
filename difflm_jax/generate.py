"""Answers prompts with a converted model.

    python -m difflm_jax.generate (--model=SOURCE [--adapter=DIR] | --run=DIR) --prompt="..." [--max_new_tokens=64 ...]

Without --prompt or --file it reads lines from a pipe (one prompt per line, one answer each), or chats on a terminal.
`--watch` shows on stderr how masks turn into an answer; `--watch_html=FILE` writes a page to scrub through the passes.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from difflm_jax.checkpoint.memory import check_weights
from difflm_jax.cli import (
    define_model_flags,
    define_sampling_flags,
    load_from_flags,
    run_command,
    sampling_flags,
    suggest_next,
)
from difflm_jax.errors import UserError
from difflm_jax.lm import Generation, LanguageModel
from difflm_jax.sampling.grammar.grammar import Grammar
from difflm_jax.sampling.options import sampling_options
from difflm_jax.sampling.watch import Watcher
from difflm_jax.utils.files import check_writable
from difflm_jax.view.page import PageRecorder
from difflm_jax.view.terminal import TerminalView

FLAGS = flags.FlagValues()
define_model_flags(FLAGS)
flags.DEFINE_string("prompt", None, "The prompt (with --infill: text that holds the mask token).", flag_values=FLAGS)
flags.DEFINE_string(
    "file", None, "A file with one prompt per line; a blank line is answered by a blank line.", flag_values=FLAGS
)
flags.DEFINE_bool("infill", False, "Fill the mask tokens of the text instead of answering it.", flag_values=FLAGS)
flags.DEFINE_bool("causal", False, "Decode with the causal base, token by token.", flag_values=FLAGS)
flags.DEFINE_integer("max_new_tokens", 128, "Length of the answer's canvas.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "steps", None, "Forward passes at most, all blocks together; default: --max_new_tokens.", lower_bound=1,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer(
    "block_length", 0, "Fill the answer in blocks of this length (0: one block).", lower_bound=0, flag_values=FLAGS
)
flags.DEFINE_string("stop", "", "Texts that end an answer, separated by commas (\\n: a newline).", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Seed of the draws.", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 16, "Prompts decoded together.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool("stats", False, "Print tokens, passes and tokens per pass to stderr.", flag_values=FLAGS)
flags.DEFINE_bool("watch", False, "Show the answer after every pass, on stderr; prompts in turn.", flag_values=FLAGS)
flags.DEFINE_string("watch_html", "", "A page of every pass, to scrub through; prompts in turn.", flag_values=FLAGS)
flags.DEFINE_string("json_schema", None, "A file: answers are JSON that its schema allows.", flag_values=FLAGS)
flags.DEFINE_bool("json_object", False, "Answers are JSON objects.", flag_values=FLAGS)
flags.DEFINE_string("regex", None, "Answers are what this expression matches, whole.", flag_values=FLAGS)
flags.DEFINE_multi_string("choice", [], "Answers are one of these; once for each text.", flag_values=FLAGS)
flags.DEFINE_string("lark", None, "A file: answers are texts of its Lark grammar.", flag_values=FLAGS)
flags.DEFINE_bool("check_fit", True, "Refuse weights that exceed the memory of this machine.", flag_values=FLAGS)
define_sampling_flags(FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Prints one answer per prompt. With several prompts, newlines within an answer are escaped."""
    if flag_values.prompt is not None and flag_values.file is not None:
        raise UserError("give --prompt or --file, not both")
    if flag_values.watch_html:
        check_writable(flag_values.watch_html)
    lines = _lines(flag_values)  # before the model, so that a missing file fails early
    _grammar(flag_values)
    if flag_values.infill and lines is None and flag_values.prompt is None:
        raise UserError("--infill fills texts, and does not chat: give --prompt, --file or a pipe")
    prompts = [flag_values.prompt] if flag_values.prompt is not None else [line for line in lines or () if line.strip()]
    check = functools.partial(_check, flag_values=flag_values, prompts=prompts)
    lm = load_from_flags(flag_values, with_base=flag_values.causal, check=check)
    if flag_values.causal:
        lm = lm.base()
    for note in _notes(lm, flag_values):
        print(f"note: {note}", file=sys.stderr)
    options = _options(flag_values)
    page = _page(lm, flag_values, options) if flag_values.watch_html else None
    answers = functools.partial(_answers, lm, flag_values, options, page)
    if flag_values.prompt is not None:
        print(answers([flag_values.prompt])[0])
    elif lines is not None:
        found = iter(answers([line for line in lines if line.strip()]))
        for line in lines:  # a blank line has a blank answer: line n of the output belongs to line n of the input
            answer = next(found) if line.strip() else ""
            print(answer.replace("\\", "\\\\").replace("\n", "\\n"))
    else:
        _chat(lm, answers)
    if flag_values.watch_html:
        suggest_next(f"open {flag_values.watch_html} in a browser")
    elif flag_values.run and sys.stderr.isatty():
        suggest_next(f"difflm evaluate --run={flag_values.run} --data=FILE, or the same command with --watch")


def _check(lm: LanguageModel, flag_values: flags.FlagValues, prompts: list[str]) -> None:
    """Raises `UserError` for prompts and options that the model does not support, before its weights are read."""
    if not flag_values.causal:
        try:
            sampling_options(lm.attention, lm.algorithm, sampling_flags(flag_values))
        except UserError as error:
            name = str(error).split()[0].partition("=")[0].rstrip(":")
            raise UserError(f"--{error}" if name in flag_values else str(error)) from error
    if flag_values.infill and (flag_values.stop or flag_values.block_length):
        raise UserError("--stop and --block_length belong to answers, not to --infill")
    for prompt in prompts if flag_values.infill else ():
        if lm.mask_token_id not in lm.prompts.canvas(prompt):
            raise UserError(f"--infill: {prompt[:60]!r} does not hold the mask token {lm.tokenizer.mask_token!r}")
    limit, answer = lm.config.max_position_embeddings, flag_values.max_new_tokens
    if not flag_values.infill and answer > limit:
        raise UserError(f"--max_new_tokens={answer}: is more than the model's max_position_embeddings={limit}")
    if flag_values.check_fit:
        note = check_weights(lm, "--quantization", "--nocheck_fit", is_divided=bool(flag_values.mesh))
        if note:
            print(f"note: {note}", file=sys.stderr)


def _notes(lm: LanguageModel, flag_values: flags.FlagValues) -> list[str]:
    """Returns notes for the user on why answers may be poor."""
    notes = []
    if not (flag_values.causal or lm.lora or lm.mask_is_trained):
        notes.append(
            f"{lm.source.name} was never trained to fill masks: its answers will be empty or noise; "
            "--causal decodes it token by token, --adapter or --run names what was trained on it"
        )
    if lm.tokenizer.chat_template is None and not flag_values.infill:
        notes.append(f"{lm.source.name} has no chat template: prompts are continued as plain text")
    return notes


def _lines(flag_values: flags.FlagValues) -> list[str] | None:
    """Reads the prompts of a file or a pipe; None if there is one prompt, or a terminal for a chat."""
    if flag_values.prompt is not None:
        return None
    if flag_values.file is not None:
        path = Path(flag_values.file)
        if not path.is_file():
            raise UserError(f"--file={path}: no such file")
        name, content = f"--file={path}", path.read_bytes()
    elif not sys.stdin.isatty():
        name, content = "standard input", sys.stdin.buffer.read()
    else:
        return None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text ({error})") from error
    # Not `splitlines`, which would also split a prompt at a form feed or a U+2028.
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if not any(map(str.strip, lines)):
        raise UserError("there is no prompt to answer")
    return lines


def _options(flag_values: flags.FlagValues) -> dict[str, Any]:
    """Returns the arguments of `generate` and `infill` from the flags."""
    one_by_one = flag_values.watch or flag_values.watch_html
    return sampling_flags(flag_values) | {
        "seed": flag_values.seed,
        "batch_size": 1 if one_by_one else flag_values.batch_size,
    }


def _grammar(flag_values: flags.FlagValues) -> Grammar | None:
    """Returns the grammar that a flag sets for answers, or None."""
    given = [name for name in ("json_schema", "json_object", "regex", "choice", "lark") if flag_values[name].value]
    if not given:
        return None
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]}: an answer keeps to one of them: leave one out")
    if flag_values.infill:
        raise UserError(f"--{given[0]} belongs to answers, not to --infill")
    name, value = given[0], flag_values[given[0]].value
    if name == "json_object":
        return Grammar.json_object()
    if name in ("json_schema", "lark"):
        path = Path(value)
        if not path.is_file():
            raise UserError(f"--{name}={path}: no such file")
        value = path.read_text(encoding="utf-8")
    return getattr(Grammar, name)(value)


def _page(lm: LanguageModel, flag_values: flags.FlagValues, options: dict[str, Any]) -> PageRecorder:
    shown = {"attention": lm.attention, "logit_shift": lm.logit_shift, "steps": _steps(lm, flag_values)}
    shown |= {name: value for name, value in options.items() if name != "batch_size"}
    return PageRecorder(lm.tokenizer, lm.mask_token_id, f"Denoising by {lm.source.name}", shown)


def _watcher(lm: LanguageModel, flag_values: flags.FlagValues, page: PageRecorder | None) -> Watcher | None:
    """Returns the observer of every pass, or None."""
    watchers: list[Watcher] = [page] if page is not None else []
    if flag_values.watch:
        watchers.append(TerminalView(lm.tokenizer, lm.mask_token_id, lm.eos_token_ids, sys.stderr))
    return (lambda seen: [watcher(seen) for watcher in watchers]) if watchers else None


def _answers(
    lm: LanguageModel,
    flag_values: flags.FlagValues,
    options: dict[str, Any],
    page: PageRecorder | None,
    prompts: list,
) -> list[str]:
    options = {**options, "on_pass": _watcher(lm, flag_values, page)}
    start = time.perf_counter()
    if flag_values.infill:
        out = lm.infill(prompts, steps=_steps(lm, flag_values), **options)
    else:
        block_length = flag_values.block_length or None
        stops = [text.replace("\\n", "\n") for text in flag_values.stop.split(",")] if flag_values.stop else []
        out = lm.generate(
            prompts,
            flag_values.max_new_tokens,
            _steps(lm, flag_values),
            block_length,
            stop=stops,
            grammar=_grammar(flag_values),
            **options,
        )
        if out.complete is not None and not out.complete.all():
            short = int((~out.complete).sum())
            print(f"note: {short} of {len(prompts)} answers did not come to an end of the grammar", file=sys.stderr)
    if page is not None:
        page.write(flag_values.watch_html)
    if flag_values.stats:
        print(_stats(out, flag_values.infill, time.perf_counter() - start), file=sys.stderr)
    return out.texts


def _stats(out: Generation, infill: bool, seconds: float) -> str:
    """Returns a line of statistics. It counts the tokens of answers, without padding after an end of sequence."""
    tokens, passes = int(out.committed.sum()) if infill else sum(map(len, out.tokens)), int(out.steps.sum())
    rate = f"{tokens / max(passes, 1):.2f} per pass"
    return f"{tokens} tokens in {passes} passes ({rate}), {seconds:.1f} s with compilation"


def _steps(lm: LanguageModel, flag_values: flags.FlagValues) -> int | None:
    """Returns the budget of forward passes.

    It is --steps if given, None with a preset of `difflm tune`, else one pass per token of the canvas (--infill: 128).
    """
    steps = flag_values.steps
    if flag_values.infill:
        return 128 if steps is None else steps
    if steps is None and "tokens_per_pass" in lm.diffusion.preset_options and not flag_values.causal:
        return None
    block = flag_values.block_length or lm.diffusion.decoding_block or 1
    canvas = -(-flag_values.max_new_tokens // block) * block
    return max(steps or 0, canvas) if flag_values.causal or steps is None else steps


CHAT_HELP = "/reset starts the conversation anew, /exit or Ctrl-D ends it, /help shows this"


def _chat(lm: LanguageModel, answers: Callable[[list], list[str]]) -> None:
    """Runs a chat with memory of earlier turns, until /exit or the end of input."""
    if lm.tokenizer.chat_template is None:
        raise UserError("this tokenizer has no chat template: give --prompt, --file or a pipe")
    print(f"{lm.source.name}: {CHAT_HELP}", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            messages = []
        elif line.startswith("/"):
            print(CHAT_HELP if line == "/help" else f"{line}: no such command; {CHAT_HELP}", file=sys.stderr)
        elif line:
            messages = _turn(messages, line, answers)


def _turn(messages: list[dict[str, str]], line: str, answers: Callable[[list], list[str]]) -> list[dict[str, str]]:
    """Prints the answer to one line; returns the conversation after it."""
    asked = [*messages, {"role": "user", "content": line}]
    try:
        answer = answers([asked])[0]
    except UserError as error:  # too long, or it contains a mask: the conversation stays unchanged
        print(f"error: {error}", file=sys.stderr)
        return messages
    print(answer)
    return [*asked, {"role": "assistant", "content": answer}]


def command(argv: Sequence[str]) -> int:
    """Runs the command line `argv` and returns the exit status."""
    return run_command(main, FLAGS, __doc__, argv)


if __name__ == "__main__":
    sys.exit(command(sys.argv))
