"""Reports the speed of a drafting adapter: tokens per pass of every strategy, and the time of real loops.

A table has the drafts after every position of the base's own answers. Since drafts do not change the text, the table
gives the passes of any strategy exactly (for one draw of the noise), without running its loop.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difflm_jax.diffusion.corruption import CleanBatch
from difflm_jax.diffusion.lossless import Draft, NoiseRows, draft_logits
from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.sampling.batching import width_bucket
from difflm_jax.sampling.causal import LOOKED_UP
from difflm_jax.sampling.drafts import Drafting, most_probable
from difflm_jax.sampling.lookup import CONFIDENCE, SUFFIXES, WITHOUT_DRAFTS
from difflm_jax.view.pieces import printable

ANCHORS = 16  # positions whose drafts are computed together
_NOTHING = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class Row:
    """One answer and its drafts. Index p - start has the drafts after position p of the whole text."""

    text: np.ndarray  # prompt and answer
    start: int  # the last position of the prompt
    drafts: np.ndarray  # [positions, m, C] int32, by descending probability
    log_p: np.ndarray  # [positions, m, C] float32

    def after(self, position: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (drafts of the tokens from `position` + 2 on, their confidence)."""
        index = position - self.start
        return self.drafts[index, :length, 0], np.exp(self.log_p[index, :length, 0])

    def accepted(self, position: int, proposal: np.ndarray) -> int:
        """Counts the leading tokens of `proposal` that agree with the base's choice after `position`."""
        own = self.text[position + 1 :][: len(proposal)]
        wrong = np.flatnonzero(own != proposal[: len(own)])
        return int(wrong[0]) if len(wrong) else len(own)


def draft_table(lm: LanguageModel, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], length: int):
    """Returns a `Row` per answer, with `length` drafts after every position from the end of the prompt on."""
    rows = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = np.concatenate([prompt, answer]).astype(np.int32)
        batch = _one_row(text, len(prompt), number, lm.pad_token_id)
        parts = []
        for first in range(len(prompt) - 1, len(text), ANCHORS):
            parts.append(_drafts(lm.model, lm.diffusion, length, lm.variables, batch, np.int32(first)))
        drafts, log_p = (np.concatenate([np.asarray(x) for x in side]) for side in zip(*parts, strict=True))
        rows.append(Row(text, len(prompt) - 1, drafts, log_p))
    return rows


def passes(row: Row, drafting: Drafting) -> int:
    """Counts the forward passes that a strategy needs for the answer of `row`."""
    position, end, count, ready = row.start, len(row.text) - 1, 0, (_NOTHING, _NOTHING)
    suffixes = WITHOUT_DRAFTS if drafting.beside or drafting.strategy == "lookup" else SUFFIXES

    def found_at(position: int) -> np.ndarray | None:
        size = drafting.beside or drafting.num_nodes
        return _looked_up(row.text[: position + 1], size, suffixes) if drafting.lookup else None

    while position < end:
        found = found_at(position)
        if drafting.drafts_first and found is None:
            count += 1
            ready = row.after(position, drafting.length)
            position += 1
            if position == end:
                break
            found = found_at(position)
        count += 1
        chains = [ready]
        if found is not None:
            looked = (found, np.full(len(found), CONFIDENCE))
            chains = [ready, looked] if drafting.beside else [looked]
        if drafting.strategy == "tree" and found is None:
            best, right = 0, _walked(row, position, drafting)
        else:
            rights = [row.accepted(position, tokens) for tokens, _ in chains]
            best = int(np.argmax(rights))
            right = rights[best]
        ready = (_NOTHING, _NOTHING)
        if drafting.num_anchors and (best, right) in _anchors([each for _, each in chains], drafting):
            ready = row.after(position + right, drafting.length)
        position += right + 1
    return count


def strategies(length: int) -> dict[str, Drafting]:
    """Returns the strategies of the report, by name."""
    shorter = max(length // 2, 1)
    named = {"prompt lookup": Drafting("lookup", LOOKED_UP)}
    for strategy in ("two_pass", "one_pass", "likeliest", "tree"):
        for m in dict.fromkeys((shorter, length)):
            for lookup in (False, True):
                beside = LOOKED_UP if lookup and strategy in ("one_pass", "likeliest") else 0
                name = f"{strategy} m={m}{' + lookup' if lookup else ''}"
                named[name] = Drafting(strategy, m, lookup, beside=beside)
    return named


def print_lossless(lm: LanguageModel, prompts: Sequence[Any], max_new_tokens: int, batch_size: int) -> dict[str, Any]:
    """Prints and returns tokens per pass of every strategy, the time of real loops, and the rows that differ."""
    if not lm.diffusion.gated:
        raise UserError("--lossless: this model has no adapter that drafts (train one with objective=draft)")
    rows = lm.prompts.all(prompts)
    arguments = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    base, base_seconds = _timed(lm.base().generate, rows, arguments)
    drafted, seconds = _timed(lm.generate, rows, arguments)
    table = draft_table(lm, rows, base.tokens, lm.diffusion.draft_length)
    tokens = sum(map(len, base.tokens))
    found = {
        name: tokens / sum(passes(row, drafting) for row in table)
        for name, drafting in strategies(lm.diffusion.draft_length).items()
    }
    differences = [i for i, pair in enumerate(zip(base.tokens, drafted.tokens, strict=True)) if not _equal(*pair)]
    print(f"\nLossless decoding ({len(rows)} prompts, {tokens:,} tokens of the base), tokens per pass")
    for name, value in found.items():
        print(f"  {name:<28}{value:>8.2f}")
    print(f"  accepted by depth: {', '.join(f'{share:.2f}' for share in drafted.accepted_by_depth)}")
    for name, taken in (("base", base_seconds), ("drafts", seconds)):
        print(f"  {name:<28}{tokens / taken:>8.1f} tokens/s in {lm.model.dtype.__name__}")
    print(f"  rows that differ from the base: {len(differences)} of {len(rows)}")
    return {
        "tokens": tokens,
        "tokens_per_pass": {"base": 1.0, **found},
        "decoded_tokens_per_pass": float(tokens / drafted.steps.sum()),
        "accepted_by_depth": drafted.accepted_by_depth.tolist(),
        "seconds": {"base": base_seconds, "drafts": seconds},
        "different_rows": differences,
    }


def print_texts(lm: LanguageModel, prompts: Sequence[Any], max_new_tokens: int) -> list[bool]:
    """Prints the base's answers, whether drafts change them, and the forward passes with and without drafts.

    Returns whether the tokens are equal, for each prompt.
    """
    rows = lm.prompts.all(prompts)
    base, drafted = (x.generate(rows, max_new_tokens, batch_size=1) for x in (lm.base(), lm))
    equal = [_equal(*pair) for pair in zip(base.tokens, drafted.tokens, strict=True)]
    print(f"\nThe base's text and the text with drafts ({len(rows)} prompts, at most {max_new_tokens} tokens)")
    for i, prompt in enumerate(prompts):
        print(f"\n  Q: {_line(prompt[-1]['content'] if not isinstance(prompt, str) else prompt)}")
        print(f"     base    {base.steps[i]:>4} passes  {_line(base.texts[i])}")
        text = "the same text" if equal[i] else _line(drafted.texts[i])
        print(f"   {'=' if equal[i] else ' '} drafts  {drafted.steps[i]:>4} passes  {text}")
    if not all(equal):
        print(f"  a bfloat16 or rounding tie: see docs/lossless.md (dtype {lm.model.dtype.__name__})")
    return equal


def _line(text: str) -> str:
    return printable(" ".join(text.split()))


def _timed(generate: Callable[..., Any], rows: list[np.ndarray], arguments: dict[str, Any]) -> tuple[Any, float]:
    """Returns (the result of `generate`, seconds). Runs twice and times the second run, which compiles nothing."""
    generate(rows, **arguments)
    began = time.perf_counter()
    return generate(rows, **arguments), time.perf_counter() - began


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tolist() == b.tolist()


def _one_row(text: np.ndarray, prompt: int, number: int, pad: int) -> CleanBatch:
    """Returns a batch of one example, padded to one of a few widths to limit compilation."""
    width = width_bucket(len(text))
    padded = np.pad(text, (0, width - len(text)), constant_values=pad)
    place = np.arange(width)
    return CleanBatch.of_rows(
        tokens=jnp.asarray(padded[None]),
        lengths=jnp.array([len(text)], jnp.int32),
        answer_mask=jnp.asarray((place >= prompt) & (place < len(text)))[None],
        prompt_lengths=jnp.array([prompt], jnp.int32),
        example_ids=jnp.array([number], jnp.int32),
        strata=jnp.zeros(1),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _drafts(model, diffusion, length: int, variables, batch: CleanBatch, first: jax.Array):
    """Drafts after `ANCHORS` positions from `first` on: (tokens, log-probabilities), both [ANCHORS, length, C]."""
    number = jnp.arange(ANCHORS * length, dtype=jnp.int32)
    anchors, depths = number // length, number % length + 1
    rows = NoiseRows(first + anchors[None], anchors, depths, jnp.ones((1, len(number)), bool))
    draft = Draft(rows=length, noise=diffusion.noise)
    logits = draft_logits(model, diffusion, variables, batch, rows, draft, jax.random.key(0))
    tokens, log_p = most_probable(logits[0], Drafting().branches)
    return tuple(x.reshape(ANCHORS, length, -1) for x in (tokens, log_p))


def _looked_up(text: np.ndarray, count: int, suffixes: tuple[int, ...]) -> np.ndarray | None:
    """Does the work of `lookup.looked_up` for one row, on the host."""
    last = len(text) - 1
    for size in sorted(suffixes, reverse=True):
        if len(text) <= size:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
        places = np.flatnonzero((windows == text[-size:]).all(axis=1))
        if len(places):
            end = int(places[-1]) + size - 1
            return text[end + 1 + np.arange(count) % (last - end)]
    return None


def _anchors(chains: list[np.ndarray], drafting: Drafting) -> set[tuple[int, int]]:
    """Does the work of `drafts.anchors` for one row, on the host.

    Returns pairs (chain, number of its accepted tokens); (0, 0) if no token is accepted.
    """
    if drafting.num_anchors == drafting.num_nodes + 1:
        return {(chain, right) for chain in range(2) for right in range(drafting.num_nodes + 1)}
    sizes = [drafting.length, drafting.beside] if drafting.beside else [drafting.num_nodes]
    padded = [np.zeros(size) for size in sizes]
    for own, confidence in zip(padded, chains, strict=False):
        own[: len(confidence)] = confidence
    ends, places = [1 - max(own[0] for own in padded)], [(0, 0)]
    for chain, own in enumerate(padded):
        ends += (np.cumprod(own) * (1 - np.append(own[1:], 0))).tolist()
        places += [(chain, right) for right in range(1, len(own) + 1)]
    return {places[i] for i in np.argsort(-np.array(ends), kind="stable")[: drafting.num_anchors]}


def _walked(row: Row, position: int, drafting: Drafting) -> int:
    """Returns how many of the base's next tokens are a path in the tree drafted one position earlier."""
    index = position - 1 - row.start
    tokens, log_p = row.drafts[index, : drafting.length], row.log_p[index, : drafting.length]
    paths = [(0.0, ())]
    for depth in range(drafting.length):
        parents = [path for path in paths if len(path[1]) == depth]
        paths += [(score + log_p[depth, k], (*path, int(tokens[depth, k]))) for score, path in parents
                  for k in range(tokens.shape[1])]  # fmt: skip
    best = sorted(paths[1:], key=lambda path: (-path[0], len(path[1])))[: drafting.num_nodes]
    own = tuple(row.text[position + 1 : position + 1 + drafting.length].tolist())
    return max((len(path) for _, path in best if own[: len(path)] == path), default=0)
