"""Scores a converted model, and its causal base, on rows with known answers.

    python -m difflm_jax.evaluate (--model=SOURCE [--adapter=DIR] | --run=DIR) --data=FILE [--task=gsm8k ...]

Prints masked NLL, accuracy and perplexity of the answers by mask rate, then the share of right answers at several
numbers of tokens per forward pass, with 95 % bootstrap intervals. `--likelihood=128` adds the likelihood of the
answers, and `--text=FILE` that of plain text in bits per byte. Both are exact for the base and a Monte-Carlo bound for
the diffusion model. `--out=FILE` saves the command, versions, seed, all results and all answers as JSON.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from difflm_jax.cli import (
    define_model_flags,
    define_sampling_flags,
    load_from_flags,
    run_command,
    sampling_flags,
    suggest_next,
)
from difflm_jax.config.files import phase_config
from difflm_jax.data.batches import batches, plan_batches
from difflm_jax.data.columns import parse_naming
from difflm_jax.data.examples import Options
from difflm_jax.data.packing import BatchOptions
from difflm_jax.data.tokenised import tokenize
from difflm_jax.diffusion.corruption import Corruption
from difflm_jax.diffusion.weights import LossRule
from difflm_jax.distributed.mesh import make_mesh, row_shards
from difflm_jax.distributed.processes import is_writer
from difflm_jax.distributed.sharding import place, rows_of_process
from difflm_jax.errors import UserError
from difflm_jax.evaluation.fluency import print_fluency
from difflm_jax.evaluation.lossless import print_lossless
from difflm_jax.evaluation.masked import Evaluator, by_rate, summarise
from difflm_jax.evaluation.report import Decodings, print_report
from difflm_jax.evaluation.results import write_results
from difflm_jax.evaluation.scores import print_scores, read_windows, score_answers, score_text
from difflm_jax.evaluation.tasks import TASKS, Question, read_questions
from difflm_jax.lm import LanguageModel
from difflm_jax.loading import ModelSpec, read_run_config, with_origin
from difflm_jax.sampling.batching import answer_plan
from difflm_jax.sampling.options import sampling_options
from difflm_jax.training.run import read_rows
from difflm_jax.training.step import StepOptions
from difflm_jax.utils.files import check_writable
from difflm_jax.view.tables import print_table

FLAGS = flags.FlagValues()
define_model_flags(FLAGS)
flags.DEFINE_string("data", "", "Rows with answers: a file, a directory, builtin:NAME or a hub id.", flag_values=FLAGS)
flags.DEFINE_string(
    "base", "", "The causal model to compare with, where --model is not it with an adapter.", flag_values=FLAGS
)
flags.DEFINE_bool(
    "held_out", False, "With --run: score the rows of its own data that it did not train on.", flag_values=FLAGS
)
flags.DEFINE_string("columns", "", "Own names of columns: prompt=frage, response=antwort.", flag_values=FLAGS)
flags.DEFINE_string("roles", "", "Own names of speakers: user=Kunde, assistant=Agent.", flag_values=FLAGS)
flags.DEFINE_enum("task", "exact", list(TASKS), "What the rows are, and what counts as right.", flag_values=FLAGS)
flags.DEFINE_integer("rows", 0, "Only the first rows (0: all).", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("max_new_tokens", 128, "Length of the answer's canvas.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "block_length", 0, "Fill answers in blocks of this length (0: one block).", lower_bound=0, flag_values=FLAGS
)
flags.DEFINE_list("tokens_per_pass", ["1", "2", "4"], "Tokens committed in a forward pass.", flag_values=FLAGS)
flags.DEFINE_integer("max_length", 768, "Longest row that is scored, in tokens.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 8, "Rows scored together.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("decode_batch_size", 64, "Questions answered together.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "likelihood", 0, "Masked copies of an answer by which its likelihood is bounded (0: not; LLaDA takes 128).",
    lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "text", "", "Plain text whose bits a byte are bounded (--rows counts its windows of --max_length).",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_bool(
    "fluency", False, "Add length, ends, repetition and NLL under the causal base of the answers.", flag_values=FLAGS
)
flags.DEFINE_bool(
    "lossless", False, "Tokens per pass of every strategy of a drafting adapter, and whether its text is the base's.",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_bool(
    "causally", True, "Add a line for the same weights decoded as a causal model, left to right.", flag_values=FLAGS
)
flags.DEFINE_integer("show", 12, "About how many questions and answers are printed.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Seed of the masks and draws.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_string("out", "", "A JSON file for the figures and every answer.", flag_values=FLAGS)

define_sampling_flags(FLAGS)

TEXT_SAMPLES = 32  # masked copies of a window of text, if --likelihood is not given


def main(flag_values: flags.FlagValues) -> None:
    """Prints the tables that the flags select, and writes `--out` if given."""
    if flag_values.run:
        _take_settings_of_run(flag_values, read_run_config(Path(flag_values.run)))
    elif flag_values.held_out:
        raise UserError("--held_out: name the run that held rows out with --run")
    if not flag_values.data and not flag_values.text:
        own = ", --held_out for those that the run held out" if flag_values.run else ""
        raise UserError(f"name the rows to score with --data{own}, or plain text with --text")
    tokens_per_pass = _tokens_per_pass(flag_values.tokens_per_pass)
    if flag_values.likelihood and flag_values.data and not TASKS[flag_values.task].has_answers:
        raise UserError(f"--likelihood: rows of the task {flag_values.task} hold no answer to score")
    if flag_values.out:
        check_writable(flag_values.out)
    questions = []  # read before the model, so that bad rows fail early
    if flag_values.data:
        naming = parse_naming(flag_values.columns, flag_values.roles)
        count = 0 if flag_values.held_out else flag_values.rows
        questions = read_questions(flag_values.data, count, flag_values.task, naming)
        if not questions:
            raise UserError(f"--data={flag_values.data}: holds no rows")
    lm = _with_its_base(load_from_flags(flag_values, with_base=True), flag_values.base)
    origins = None
    if flag_values.held_out:
        origins = _held_out(lm, flag_values.run)
        questions = [question for question in questions if question.origin in origins][: flag_values.rows or None]
        print(f"{len(questions)} rows of {flag_values.data} that {flag_values.run} did not train on")
    if flag_values.lossless:
        _lossless(lm, flag_values, questions)
        return
    decoding = sampling_flags(flag_values)
    _check_decoding(lm, flag_values, tokens_per_pass, decoding)  # before anything is scored
    decoding["seed"] = flag_values.seed
    if flag_values.block_length:
        decoding["block_length"] = flag_values.block_length
    record = {
        "model": lm.source.name,
        "run": flag_values.run or None,
        "adapter": flag_values.adapter or None,
        "decoding": decoding,
        "diffusion_config": lm.diffusion_config(),
        "seed": flag_values.seed,
    }
    if flag_values.text:
        record["text"] = _text_scores(lm, flag_values)
    if questions:
        record |= _answer_scores(lm, flag_values, questions, tokens_per_pass, decoding, origins)
    if flag_values.out and is_writer():
        write_results(flag_values.out, record)
    if is_writer() and not flag_values.out:
        suggest_next("the same command with --out=FILE.json keeps every answer")


def _take_settings_of_run(flag_values: flags.FlagValues, config: ConfigDict) -> None:
    """Takes the names of columns and roles from the run unless flags set them; `--held_out` also takes its data.

    Prints a notice about rows that the run was trained on.
    """
    for name, value in (("columns", config.data.columns), ("roles", config.data.roles)):
        flag_values[name].value = flag_values[name].value or value
    settings = phase_config(config, config.phases[-1])
    if flag_values.held_out:
        if flag_values.data:
            raise UserError("--held_out scores rows of the run's own data: leave out --data")
        if not settings.test_size:
            raise UserError(f"--held_out: {flag_values.run} held no rows out (test_size=0): name others with --data")
        flag_values["data"].value = settings.dataset
    elif flag_values.data and _same_data(flag_values.data, settings.dataset):
        held = "it held no rows out" if not settings.test_size else "--held_out scores those that it held out"
        print(f"note: the run was trained on rows of --data={flag_values.data}: {held}", file=sys.stderr)


def _same_data(one: str, other: str) -> bool:
    paths = [Path(each).expanduser() for each in (one, other)]
    return one == other or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))


def _held_out(lm: LanguageModel, run: str) -> frozenset[str]:
    """Returns the origins (file and line) of the rows of the run's test split."""
    config = read_run_config(Path(run))
    _, test_rows = read_rows(config, config.phases[-1], lm)
    return frozenset(test_rows["origin"])


def _lossless(lm: LanguageModel, flag_values: flags.FlagValues, questions: list[Question]) -> None:
    """Prints the report on a drafting adapter and writes it to `--out`."""
    if not questions:
        raise UserError("--lossless: name the prompts with --data")
    prompts = [question.prompt for question in questions]
    found = print_lossless(lm, prompts, flag_values.max_new_tokens, flag_values.batch_size)
    if flag_values.out and is_writer():
        write_results(flag_values.out, {"model": lm.source.name, "data": flag_values.data, "lossless": found})


def _with_its_base(lm: LanguageModel, base: str) -> LanguageModel:
    """Returns `lm` with the causal model `base` as its origin. Without a name, returns it unchanged.

    Prints a notice if its own weights, used as the base, are not a causal model.
    """
    if base:
        return with_origin(lm, ModelSpec(base))
    if lm.mask_is_trained and lm.origin is None:
        print(
            f"note: {lm.source.name} was itself trained as a diffusion model: 'causal base' is here these weights read "
            "from left to right, and no measure of the model that they were made of; name that one with --base"
        )
    return lm


def _tokens_per_pass(items: list[str]) -> list[int]:
    try:
        numbers = [int(item) for item in items]
    except ValueError as error:
        raise UserError(f"--tokens_per_pass={','.join(items)}: must be integers") from error
    if min(numbers, default=0) < 1:
        raise UserError("--tokens_per_pass: must be integers greater than 0")
    return numbers


def _check_decoding(
    lm: LanguageModel, flag_values: flags.FlagValues, tokens_per_pass: list[int], decoding: dict[str, Any]
) -> None:
    """Raises `UserError` for decoding options that the model does not support."""
    sampling = sampling_options(lm.attention, lm.algorithm, decoding)
    length = flag_values.max_new_tokens
    for tokens in tokens_per_pass if flag_values.data else []:
        fewest = lm.diffusion.fewest_passes(length, flag_values.block_length or None)
        if -(-length // tokens) < fewest:
            raise UserError(
                f"--tokens_per_pass={tokens}: an answer of --max_new_tokens={length} is filled in {fewest} blocks, and "
                "each takes at least one pass: lower it, or give longer blocks with --block_length"
            )
        answer_plan(lm.diffusion, length, -(-length // tokens), flag_values.block_length or None, sampling)


def _answer_scores(
    lm: LanguageModel,
    flag_values: flags.FlagValues,
    questions: list[Question],
    tokens_per_pass: list[int],
    decoding: dict[str, Any],
    origins: frozenset[str] | None,
) -> dict[str, Any]:
    """Scores the reference answers (masked and likelihood), then generates and scores answers."""
    record: dict[str, Any] = {"task": flag_values.task, "data": flag_values.data}
    if TASKS[flag_values.task].has_answers:
        record["masked"] = scores = masked_scores(
            lm,
            flag_values.data,
            flag_values.rows,
            flag_values.max_length,
            flag_values.batch_size,
            flag_values.seed,
            Options("sft", flag_values.max_length, columns=flag_values.columns, roles=flag_values.roles),
            origins,
        )
        print(f"\nMasked answers ({flag_values.data}), attention {lm.attention}, shift {lm.logit_shift}")
        rows = [
            [rate, f"{found['masked_nll']:.4f}", f"{found['masked_accuracy']:.4f}", f"{found['perplexity']:.2f}"]
            for rate, found in {**scores["by_mask_rate"], "all": scores}.items()
        ]
        print_table(["mask rate", "nll", "accuracy", "perplexity"], rows)
    if samples := flag_values.likelihood:
        scored = score_answers(lm, questions, samples, flag_values.seed, flag_values.batch_size)
        title = f"Likelihood of the answers ({len(questions)}, {flag_values.data}), {samples} samples a row"
        record["likelihood"] = {"samples": samples, **print_scores(title, scored)}
    decodings = Decodings(
        tokens_per_pass,
        flag_values.max_new_tokens,
        flag_values.task,
        flag_values.decode_batch_size,
        decoding,
        flag_values.causally,
    )
    columns = print_report(lm, flag_values.data, questions, decodings, flag_values.show)
    if flag_values.fluency:
        record["fluency"] = print_fluency(lm, questions, columns, flag_values.batch_size)
    record["questions"] = [dataclasses.asdict(question) for question in questions]
    record["generated"] = [column.record(columns[0]) for column in columns]
    return record


def _text_scores(lm: LanguageModel, flag_values: flags.FlagValues) -> dict[str, Any]:
    """Scores both models on plain text."""
    samples = flag_values.likelihood or TEXT_SAMPLES
    windows = read_windows(flag_values.text, lm.tokenizer, flag_values.max_length, flag_values.rows)
    scored = score_text(lm, windows, samples, flag_values.seed, flag_values.batch_size)
    title = f"Likelihood of text ({len(windows)} windows of {flag_values.text}), {samples} samples a window"
    return {"data": flag_values.text, "samples": samples, **print_scores(title, scored)}


def masked_scores(
    lm: LanguageModel,
    dataset: str,
    rows: int = 0,
    max_length: int = 768,
    batch_size: int = 8,
    seed: int = 0,
    reading: Options | None = None,
    origins: frozenset[str] | None = None,
) -> dict[str, Any]:
    """Returns NLL, accuracy and perplexity of masked answer tokens, at rates stratified over (0, 1].

    Scores the first `rows` (0: all) of `dataset`; rows above `max_length` tokens are cut. `reading` has the other
    options of reading rows, and `origins` the rows to score (None: all).
    """
    reading = dataclasses.replace(reading or Options("sft", max_length), mask_token_id=lm.mask_token_id)
    examples = tokenize(dataset, lm.tokenizer, reading)
    if origins is not None:
        examples = examples.select([i for i, origin in enumerate(examples["origin"]) if origin in origins])
    if rows:
        examples = examples.select(range(min(rows, len(examples))))
    mesh = lm.mesh or make_mesh(1)
    batch_size = min(batch_size, len(examples))
    batch_size += -batch_size % row_shards(mesh)
    corruption = Corruption(
        diffusion=lm.diffusion,
        scope="answer",
        mask_rate="row",
        min_rate=1e-3,
        max_rate=1.0,
        loss=LossRule("masked"),
    )
    options = BatchOptions(
        batch_size=batch_size,
        max_length=max_length,
        answer_padding=lm.block_length,
        pad_id=lm.pad_token_id,
        eos_id=lm.tokenizer.eos_token_id,
        shuffle=False,
    )
    plan = plan_batches(examples, options)
    data = batches(examples, plan, strata="rows", local_rows=rows_of_process(mesh, batch_size))
    evaluate = Evaluator(
        StepOptions(lm.model, corruption, 256),
        mesh,
        (data[i] for i in range(len(data))),
        jax.random.key(seed),
    )
    sums = evaluate(place(lm.variables, mesh))
    return {**summarise(sums), "by_mask_rate": by_rate(sums)}


def command(argv: Sequence[str]) -> int:
    """Runs the command line `argv` and returns the exit status."""
    return run_command(main, FLAGS, __doc__, argv)


if __name__ == "__main__":
    sys.exit(command(sys.argv))
