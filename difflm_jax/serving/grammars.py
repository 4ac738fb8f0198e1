"""Left-to-right rows under a grammar: allowed tokens mask the logits, and appended tokens advance a matcher.

The logits after the last token and after every proposed one are masked. So accepted tokens are the base's choices among
those that the grammar allows.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.sampling.grammar.matcher import Matcher
from difflm_jax.sampling.grammar.vocabulary import Vocabulary
from difflm_jax.sampling.speculative import Carry
from difflm_jax.serving.requests import Request


def matcher_of(lm: LanguageModel, request: Request) -> Matcher | None:
    """Returns a matcher at the start of the answer; None without a grammar. Raises `UserError`."""
    if request.grammar is None:
        return None
    if request.sampling.eos_penalty is not None or not request.sampling.stop_at_eos:
        raise UserError("grammar: it says where an answer ends: leave eos_penalty and stop_at_eos out")
    vocabulary = Vocabulary.of(lm.tokenizer, lm.config.vocab_size, lm.eos_token_ids)
    return request.grammar.matcher(vocabulary)


def allowed(matcher: Matcher, left: int, nodes: tuple[np.ndarray, ...], vocabulary: int, ends: tuple[int, ...]) -> Any:
    """[1 + Q, V] bool: tokens that may follow the last one, and each of Q proposed `nodes` (tokens, parents, valid).

    `left`: tokens left in the row's budget. Nodes that cannot be accepted get a full mask, which is unused.
    """
    places: list[tuple[Matcher, int] | None] = [(matcher, left)]
    masks = [_unpacked(matcher.allowed(left), vocabulary)]
    for token, parent, valid in zip(*(x.tolist() for x in nodes), strict=True):
        before, place = places[parent], None
        if valid and before is not None and before[1] > 1 and token not in ends and before[0].accepts([token]) == 1:
            place = before[0].copy(), before[1] - 1
            place[0].advance([token])
        places.append(place)
        masks.append(np.ones(vocabulary, bool) if place is None else _unpacked(place[0].allowed(place[1]), vocabulary))
    return np.stack(masks)


def kept(
    carry: Carry, before_B: np.ndarray, rows: Mapping[int, tuple[Matcher, int]], ends: tuple[int, ...]
) -> tuple[Carry, dict[int, str]]:
    """Advances the matchers of `rows` {row: (matcher, limit)} over the tokens that a pass appended.

    Returns (the carry with the tokens that the matchers keep, {row: error} of failures). A failed row's tokens are
    unchanged.
    """
    tokens, lengths, done = (np.array(x) for x in (carry.tokens, carry.lengths, carry.done))
    failed: dict[int, str] = {}
    for row, (matcher, limit) in rows.items():
        start = int(before_B[row])
        new = tokens[row, start : lengths[row]].tolist()
        if not new:
            continue
        try:
            taken = matcher.take(new, limit - start)
        except (UserError, ValueError) as error:
            failed[row] = str(error)
            continue
        lengths[row] = start + len(taken)
        tokens[row, start : lengths[row]] = taken
        done[row] = taken[-1] in ends or lengths[row] >= limit
    return carry.replace(tokens=tokens, lengths=lengths, done=done), failed


@jax.jit
def within(logits: jax.Array, allowed_BNV: jax.Array) -> jax.Array:
    """Sets the first N places of logits [B, M, V] to -inf where a token is not allowed."""
    count = allowed_BNV.shape[1]
    return jnp.concatenate([jnp.where(allowed_BNV, logits[:, :count], -jnp.inf), logits[:, count:]], axis=1)


def _unpacked(bits: np.ndarray, size: int) -> np.ndarray:
    words = np.ascontiguousarray(bits, "<u4")
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:size].astype(bool)
