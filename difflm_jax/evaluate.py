"""Scores a converted model on rows with known answers, beside its own causal base.

    python -m difflm_jax.evaluate --model=SOURCE [--adapter=DIR | --run=DIR] --data=FILE

Prints masked NLL, accuracy and perplexity of the answers by mask rate, then exact matches of generated answers at
several numbers of tokens a forward pass. `--out=FILE` keeps every question and answer as JSON.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from difflm_jax.cli import define_model_flags, load_from_flags, run_command
from difflm_jax.data.pipeline import batches, tokenize
from difflm_jax.diffusion.corruption import Corruption
from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.mesh import is_writer, make_mesh, place, row_shards, rows_of_process
from difflm_jax.report import print_report, read_questions
from difflm_jax.training.evaluation import Evaluator, by_rate, summarise
from difflm_jax.training.step import StepOptions

FLAGS = flags.FlagValues()
define_model_flags(FLAGS)
flags.DEFINE_string("data", "", "Rows with answers: a file, a directory, builtin:NAME or a hub id.", flag_values=FLAGS)
flags.DEFINE_integer("rows", 0, "Only the first rows (0: all).", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("max_new_tokens", 32, "Length of the answer's canvas.", flag_values=FLAGS)
flags.DEFINE_list("tokens_per_pass", ["1", "2", "4"], "Tokens committed in a forward pass.", flag_values=FLAGS)
flags.DEFINE_integer("max_length", 768, "Longest row that is scored, in tokens.", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 8, "Rows scored together.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Seed of the masks.", flag_values=FLAGS)
flags.DEFINE_string("out", "", "A JSON file for the figures and every answer.", flag_values=FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Prints both tables, and writes `--out` if it is given."""
    if not flag_values.data:
        raise UserError("name the rows to score with --data")
    try:
        tokens_per_pass = [int(item) for item in flag_values.tokens_per_pass]
    except ValueError as error:
        raise UserError(f"--tokens_per_pass={','.join(flag_values.tokens_per_pass)}: must be integers") from error
    if min(tokens_per_pass, default=0) < 1:
        raise UserError("--tokens_per_pass: must be integers greater than 0")
    questions = read_questions(flag_values.data, flag_values.rows)  # before the model: bad rows cost no load
    lm = load_from_flags(flag_values)
    scores = masked_scores(lm, flag_values)
    print(f"\nMasked answers ({flag_values.data}), attention {lm.attention}, shift {lm.logit_shift}")
    print(f"  {'mask rate':<12}{'nll':>10}{'accuracy':>12}{'perplexity':>14}")
    for rate, values in {**scores["by_mask_rate"], "all": scores}.items():
        print(
            f"  {rate:<12}{values['masked_nll']:>10.4f}{values['masked_accuracy']:>12.4f}{values['perplexity']:>14.2f}"
        )
    columns = print_report(lm, flag_values.data, questions, tokens_per_pass, flag_values.max_new_tokens)
    if flag_values.out and is_writer():
        record = {
            "command": sys.argv,
            "model": lm.source.name,
            "diffusion_config": lm.diffusion_config(),
            "masked": scores,
            "questions": [dataclasses.asdict(question) for question in questions],
            "generated": [dataclasses.asdict(column) for column in columns],
        }
        Path(flag_values.out).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def masked_scores(lm: LanguageModel, flag_values: flags.FlagValues) -> dict[str, Any]:
    """NLL, accuracy and perplexity of hidden answer tokens, at rates stratified over (0, 1]."""
    rows = tokenize(
        flag_values.data,
        lm.tokenizer,
        phase="sft",
        max_length=flag_values.max_length,
        mask_token_id=lm.mask_token_id,
    )
    if flag_values.rows:
        rows = rows.select(range(min(flag_values.rows, len(rows))))
    mesh = lm.mesh or make_mesh(1)
    batch_size = min(flag_values.batch_size, len(rows))
    batch_size += -batch_size % row_shards(mesh)
    corruption = Corruption(
        scope="answer",
        mask_rate="row",
        min_rate=1e-3,
        max_rate=1.0,
        loss_tokens="masked",
        attention=lm.attention,
        logit_shift=lm.logit_shift,
        block_length=lm.model.block_length,
    )
    data = batches(
        rows,
        batch_size=batch_size,
        local_rows=rows_of_process(mesh, batch_size),
        shuffle=False,
        pad_id=lm.pad_token_id,
        max_length=flag_values.max_length,
        answer_padding=lm.model.block_length,
        eos_id=lm.tokenizer.eos_token_id,
    )
    evaluate = Evaluator(
        StepOptions(lm.model, corruption, 256),
        mesh,
        (data[i] for i in range(len(data))),
        len(rows),
        jax.random.key(flag_values.seed),
    )
    sums = evaluate(place(lm.params, mesh), place(lm.lora or {}, mesh))
    return {**summarise(sums), "by_mask_rate": by_rate(sums)}


if __name__ == "__main__":
    sys.exit(run_command(main, FLAGS, __doc__))
