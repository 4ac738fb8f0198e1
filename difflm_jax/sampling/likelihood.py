"""Log-likelihood of an answer: exact for a causal model, LLaDA's Monte-Carlo bound for a diffusion model.

For an answer of L tokens (arXiv:2502.09992, equation 6)

    log p(answer | prompt)  >=  E_l E_S [ L / l * sum over i in S of log p(token i | prompt, tokens outside S) ]

with l uniform in 1..L and S uniform among the sets of l of its tokens. Masking exactly l tokens has less variance than
a mask rate. Under attention in blocks, each block is bounded given the clean blocks before it, and the bounds add up.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difflm_jax.diffusion.corruption import NoisyBatch
from difflm_jax.diffusion.objective import predicting_states
from difflm_jax.distributed.mesh import row_shards
from difflm_jax.distributed.sharding import over_rows, to_host
from difflm_jax.errors import UserError
from difflm_jax.models.attention import positions_of
from difflm_jax.models.transformer import head_weight
from difflm_jax.ops.cross_entropy import Outputs, scored_cross_entropy
from difflm_jax.sampling.batching import check_positive, check_seed, width_bucket
from difflm_jax.sampling.caches import Decoder
from difflm_jax.utils.progress import Progress

CHUNK = 256  # positions whose logits are in memory at once

# (tokens [B, L], masked [B, L], real [B, L], prompt lengths [B]) -> [B, L] nats of the masked tokens, 0 elsewhere
TokenNll = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
    """For each row: log-probability in nats, its standard error, and the number of answer tokens.

    For a diffusion model the value estimates a lower bound. The standard error is that of the Monte-Carlo estimate: 0
    if the value is exact, NaN if one sample was drawn.
    """

    values: np.ndarray
    standard_errors: np.ndarray
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Sample:
    """A row with part of its answer masked, one of its `copies`. `weights` [A] are L / l where masked, 0 elsewhere."""

    row: int
    copies: int
    tokens: np.ndarray
    prompt_length: int
    weights: np.ndarray


def log_likelihoods(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    samples: int = 128,
    seed: int = 0,
    batch_size: int = 16,
) -> LogLikelihood:
    """Computes log p(answer | prompt) of each row of tokens.

    `samples` is the number of masked copies per row; an answer of a single token has only one. The copies depend only
    on `seed` and the row. With causal attention the result is exact and takes one pass per row. Raises `UserError` for
    an empty answer and, with the logit shift, for an empty prompt.
    """
    check_positive("samples", samples)
    check_positive("batch_size", batch_size)
    check_seed(seed)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if not len(answer):
            raise UserError(f"log_likelihood: answer {row} holds no token")
        if decoder.diffusion.shift and not len(prompt):
            raise UserError(
                f"log_likelihood: prompt {row} is empty, and with the logit shift nothing predicts its answer"
            )
    if decoder.mesh is not None:
        batch_size += -batch_size % row_shards(decoder.mesh)
    if decoder.diffusion.attention == "causal":
        return _exact(decoder, prompts, answers, batch_size)
    score = functools.partial(_score, decoder)
    blocks = decoder.diffusion.block_length, decoder.diffusion.blocks_include_prompt
    return bound(score, prompts, answers, samples, seed, batch_size, *blocks)


def bound(
    score: TokenNll,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    samples: int,
    seed: int,
    batch_size: int,
    block_length: int = 0,
    counts_prompt: bool = False,
) -> LogLikelihood:
    """Computes the Monte-Carlo bound with any `score` of tokens.

    `block_length` cuts answers into blocks (0: one block). Blocks are counted from the start of the answer, or with
    `counts_prompt` from the start of the prompt. Masked copies are drawn while scoring, so memory has at most one batch
    of each width, however many rows there are.
    """
    blocks = [
        _blocks(len(prompt) if counts_prompt else 0, len(answer), block_length)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]

    def drawn() -> Iterator[_Sample]:
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            yield from _samples_of(row, prompt, answer, blocks[row], samples, seed)

    values, errors = np.zeros(len(answers)), np.zeros(len(answers))
    with Progress("scoring", "answers", len(answers)) as progress:
        for row, (nll_SA, weights_SA) in _by_row(_weighted_nll(score, drawn(), batch_size)):
            for block in blocks[row]:
                nll_S = nll_SA[:, block].sum(axis=1)
                values[row] -= nll_S.mean()
                if weights_SA[:, block].shape[1] > 1:  # a single token can be masked in only one way
                    errors[row] += _variance_of_mean(nll_S, weights_SA[:, block].max(axis=1))
            progress.advance()
    return LogLikelihood(values, np.sqrt(errors), np.array([len(answer) for answer in answers]))


def _samples_of(row: int, prompt, answer, blocks: Sequence[slice], samples: int, seed: int) -> Iterator[_Sample]:
    """Yields the masked copies of a row; only one if every block of the answer has a single token."""
    rng = np.random.default_rng([seed, *prompt.tolist(), *answer.tolist()])
    tokens = np.concatenate([prompt, answer])
    weights = [_block_weights(rng, len(answer[block]), samples) for block in blocks]
    count = 1 if all(len(block) == 1 for block in weights) else samples
    whole = np.concatenate([np.broadcast_to(block, (count, block.shape[1])) for block in weights], axis=1)
    for weights_A in whole:
        yield _Sample(row, count, tokens, len(prompt), weights_A)


def _by_row(scored: Iterable[tuple[_Sample, np.ndarray]]) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """Yields (row, (nats [S, A], weights [S, A])) as soon as all copies of the row are scored."""
    found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for sample, nll_A in scored:
        of_row = found.setdefault(sample.row, [])
        of_row.append((nll_A, sample.weights))
        if len(of_row) == sample.copies:
            nll_SA, weights_SA = (np.stack(each) for each in zip(*found.pop(sample.row), strict=True))
            yield sample.row, (nll_SA, weights_SA)


def _blocks(given: int, length: int, block_length: int) -> list[slice]:
    """Cuts an answer of `length` tokens into blocks. The first completes a block that has `given` tokens already."""
    if not block_length:
        return [slice(0, length)]
    starts = [0, *range(block_length - given % block_length, length, block_length)]
    return [slice(*ends) for ends in zip(starts, [*starts[1:], length], strict=True)]


def mask_counts(rng: np.random.Generator, length: int, samples: int) -> np.ndarray:
    """[samples] int, each uniform in 1..`length`, evenly spread: LLaDA's stratified draw.

    Halves are rounded up. LLaDA's code rounds them to even, which draws even counts more often.
    """
    first = int(rng.integers(length))
    return (first + (2 * np.arange(samples) * length + samples) // (2 * samples)) % length + 1


def _block_weights(rng: np.random.Generator, length: int, samples: int) -> np.ndarray:
    """[samples, length] weights: length / l at l masked tokens, 0 elsewhere. One sample if `length` is 1."""
    if length == 1:
        return np.ones((1, 1))
    counts = rng.permutation(mask_counts(rng, length, samples))  # makes the counts of different blocks independent
    ranks = rng.permuted(np.tile(np.arange(length), (samples, 1)), axis=1)
    return np.where(ranks < counts[:, None], length / counts[:, None], 0.0)


def _variance_of_mean(nll_S: np.ndarray, weights_S: np.ndarray) -> float:
    """Variance of the mean of a systematic sample over mask counts; NaN for a single sample.

    `weights_S` order the samples: a larger weight is a lower count. Differences of neighbours in this order remove the
    variance that the counts explain (Wolter, Introduction to Variance Estimation, 2007, section 8.2, v2).
    """
    n = len(nll_S)
    if n == 1:
        return float("nan")
    steps = np.diff(nll_S[np.argsort(weights_S, kind="stable")])
    return float((steps**2).sum() / (2 * n * (n - 1)))


def _weighted_nll(score: TokenNll, samples: Iterable[_Sample], batch_size: int) -> Iterator[tuple[_Sample, np.ndarray]]:
    """Yields (sample, its weighted nats [A]), scored in batches of a few widths, each as soon as it is full."""
    waiting: dict[int, list[_Sample]] = {}
    for sample in samples:
        width = width_bucket(len(sample.tokens))
        waiting.setdefault(width, []).append(sample)
        if len(waiting[width]) == batch_size:
            yield from _scored(score, waiting.pop(width), width, batch_size)
    for width in sorted(waiting):
        yield from _scored(score, waiting[width], width, batch_size)


def _scored(
    score: TokenNll, samples: Sequence[_Sample], width: int, batch_size: int
) -> Iterator[tuple[_Sample, np.ndarray]]:
    rows = [*samples, *[samples[0]] * (batch_size - len(samples))]
    tokens, masked, real = (np.zeros((batch_size, width), kind) for kind in (np.int32, bool, bool))
    for at, sample in enumerate(rows):
        tokens[at, : len(sample.tokens)], real[at, : len(sample.tokens)] = sample.tokens, True
        masked[at, sample.prompt_length : len(sample.tokens)] = sample.weights > 0
    lengths = np.array([sample.prompt_length for sample in rows], np.int32)
    nll = np.asarray(score(tokens, masked, real, lengths), np.float64)
    for at, sample in enumerate(samples):
        yield sample, nll[at, sample.prompt_length : len(sample.tokens)] * sample.weights


def _exact(decoder: Decoder, prompts, answers, batch_size: int) -> LogLikelihood:
    if not decoder.diffusion.logit_shift:
        raise UserError("log_likelihood: a causal model predicts the next token: it needs the logit shift")
    score = functools.partial(_score, decoder)
    rows = [
        _Sample(row, 1, np.concatenate([prompt, answer]), len(prompt), np.ones(len(answer)))
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    values = np.zeros(len(rows))
    for sample, nll in _weighted_nll(score, rows, batch_size):
        values[sample.row] = -nll.sum()
    return LogLikelihood(values, np.zeros(len(rows)), np.array([len(answer) for answer in answers]))


def _score(decoder: Decoder, tokens_BL, masked_BL, real_BL, prompt_lengths_B) -> np.ndarray:
    return to_host(_token_nll(decoder, tokens_BL, masked_BL, real_BL, prompt_lengths_B))


@jax.jit
def _token_nll(decoder: Decoder, *rows: Any) -> jax.Array:
    """[B, L] float32 nats of the masked tokens. A causal model sees only earlier tokens, so it needs no masks."""

    model, diffusion = decoder.model, decoder.diffusion

    def nll(variables: Any, tokens_BL, masked_BL, real_BL, prompt_lengths_B) -> jax.Array:
        hidden_BL = masked_BL & (diffusion.attention != "causal")
        zeros_BL = jnp.zeros(tokens_BL.shape)
        noisy = NoisyBatch(
            tokens=jnp.where(hidden_BL, diffusion.mask_token_id, tokens_BL),
            clean=tokens_BL,
            segments=real_BL.astype(jnp.int32),
            positions=positions_of(real_BL),
            prompt_lengths=jnp.broadcast_to(prompt_lengths_B[:, None], tokens_BL.shape),
            candidates=masked_BL,
            masked=masked_BL,
            rates=zeros_BL,
            weights=masked_BL.astype(jnp.float32),
            teacher_weights=zeros_BL,
            counts=zeros_BL,
        )
        states_BLD = predicting_states(model, diffusion, variables, noisy)
        _, scores = scored_cross_entropy(
            states_BLD.reshape(-1, states_BLD.shape[-1]),
            head_weight(model.config, variables["params"]),
            tokens_BL.reshape(-1),
            noisy.weights.reshape(-1),
            Outputs(diffusion.mask_token_id, model.config.vocab_size, model.config.logit_softcap),
            CHUNK,
        )
        return scores.nll.reshape(tokens_BL.shape)

    return over_rows(nll, decoder.mesh, decoder.variables, *rows)
