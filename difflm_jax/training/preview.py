"""Previews training without training: the rows of the first step of each phase, with exactly the masks it draws."""

import os
import sys
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from difflm_jax.config.files import notes
from difflm_jax.data.batches import describe
from difflm_jax.data.fields import SHARED_SEGMENT
from difflm_jax.diffusion.corruption import CleanBatch, NoisyBatch, corrupt
from difflm_jax.lm import LanguageModel
from difflm_jax.training.loop import phase_key, step_options
from difflm_jax.training.phase import PhaseData
from difflm_jax.training.run import open_configured, phase_data, read_rows
from difflm_jax.view.pieces import Pieces, ansi, printable

SHOWN_ROWS = 6
_COUNTED_STEPS = 20
_PROMPT, _ANSWER, _MASKED = ("2",), (), ("30", "43")  # dim, plain, black on yellow


def preview(config: ConfigDict) -> None:
    """Prints rows and figures of every phase of `config`. Reads the data and the tokenizer, but no weights."""
    for note in notes(config):
        print(note)
    lm = open_configured(config)
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    rows = {name: read_rows(config, name, lm) for name in config.phases}  # report bad rows of all phases first
    for name, (train_rows, test_rows) in rows.items():
        data = phase_data(config, name, lm, train_rows, test_rows)
        print(f"\n{name}: {describe(train_rows)}\n  held out: {describe(test_rows)}")
        batches = data.train_batches()
        first, noisy = _first_step(lm, data, batches[0])
        _print_rows(lm, train_rows, first, noisy, colours)
        _print_figures(data, batches, noisy)


def _first_step(lm: LanguageModel, data: PhaseData, batch: dict[str, np.ndarray]) -> tuple[CleanBatch, NoisyBatch]:
    """Returns the rows of the first step, of all micro-batches, and their corruption."""
    rows = CleanBatch(**{name: field.reshape(-1, *field.shape[2:]) for name, field in batch.items()})
    key = jax.random.fold_in(phase_key(data.name, data.config.seed), 0)
    corruption = step_options(data.name, data.config, lm.model, lm.diffusion, data.eos_id, data.steps).corruption
    return rows, corrupt(key, rows, corruption)


def _print_rows(lm: LanguageModel, rows: Any, batch: CleanBatch, noisy: NoisyBatch, colours: bool) -> None:
    pieces = Pieces(lm.tokenizer, lm.mask_token_id)
    how = "on yellow" if colours else "in ⟦⟧"
    print(f"  masked tokens stand {how}, prompts {'dim' if colours else 'before ▸'}")
    masked, prompts, segments = (np.asarray(x) for x in (noisy.masked, noisy.prompt_lengths, batch.segments))
    examples = [(row, number) for row in range(len(segments)) for number in range(1, segments[row].max() + 1)]
    for row, number in examples[:SHOWN_ROWS]:
        at = np.flatnonzero((segments[row] == SHARED_SEGMENT) | (segments[row] == number))
        length, prompt = len(at), int(min(prompts[row, at[-1]], len(at)))
        hidden = int(masked[row, at].sum())
        origin = printable(rows[int(batch.example_ids[row, at[-1]])]["origin"])
        share = f" ({hidden / (length - prompt):.0%})" if length > prompt else ""
        print(f"\n  {origin}: {length} tokens, prompt {prompt}, {hidden} of {length - prompt} masked{share}")
        shown = [printable(pieces(int(token))) for token in batch.tokens[row, at]]
        print("  " + _coloured(shown, masked[row, at], prompt, colours))


def _coloured(shown: list[str], masked: np.ndarray, prompt: int, colours: bool) -> str:
    """Returns the row as text, with adjacent tokens of the same kind grouped."""
    text, start = "", 0
    kinds = [_MASKED if masked[i] else _PROMPT if i < prompt else _ANSWER for i in range(len(shown))]
    for i in range(1, len(shown) + 1):
        if i < len(shown) and kinds[i] == kinds[start] and i != prompt:
            continue
        part = "".join(shown[start:i])
        if colours:
            part = ansi(part, *kinds[start])
        elif kinds[start] == _MASKED:
            part = f"⟦{part}⟧"
        text += part + ("▸" if i == prompt and not colours else "")
        start = i
    return text


def _print_figures(data: PhaseData, batches: Any, noisy: NoisyBatch) -> None:
    """Prints the same figures as training: steps, with `max_steps`, and the share of real tokens of all rows."""
    micro, rows, width = max(batches[step]["tokens"].shape for step in range(min(data.steps, _COUNTED_STEPS)))
    masked, valid = np.asarray(noisy.masked), np.asarray(noisy.segments) != 0
    print(
        f"\n  a step: {micro} x {rows} rows of up to {width} columns; {data.steps:,} steps in all\n"
        f"  real tokens: {data.plan.real_share:.1%} of the columns; masked in the first step: "
        f"{masked.sum() / max(valid.sum(), 1):.1%} of its tokens"
    )
    for note in data.advice():
        print(f"  {note}")
