"""Continuous batching for more rows than a batch has places: between passes, new rows replace finished ones.

The loop is that of `caches.fill`, in three programs. `_begin` starts the first rows, `_passes` runs until free places
have waited enough, and `_join` writes new rows into them. All places wait while new prompts are read. So rows join once
free places have waited for about as long as joining takes. Short answers are then decoded batch by batch, and answers
that end early free their place. Rows do not depend on each other.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difflm_jax.sampling.caches import Decoder, compiled_on, loop_over
from difflm_jax.sampling.loop import Canvas, Carry, Plan
from difflm_jax.sampling.options import Sampling

FREE = -1
UNLIMITED = 1 << 30


def fill_in_turn(
    decoder: Decoder,
    plan: Plan,
    sampling: Sampling,
    canvas_of: Callable[[np.ndarray], Canvas],
    count: int,
    places: int,
) -> Iterator[tuple[int, np.ndarray, int]]:
    """Yields (row, its tokens [L], its passes) of each of `count` rows as it finishes. `count` exceeds `places`.

    `canvas_of` maps row indices to their canvas.
    """
    platform = jax.default_backend()
    begin, passes = compiled_on(platform, _begin), compiled_on(platform, _passes, donated="carry")
    join = compiled_on(platform, _join, donated="batch")
    row_at, following = np.arange(places), places
    half = max(1, places // 2)  # rows join in batches of two sizes, so only two are compiled
    canvas = jax.tree.map(jnp.asarray, canvas_of(row_at))
    carry = begin(decoder, plan, canvas, sampling)
    while (row_at != FREE).any():
        patience = joining_cost(plan, sampling, places) if following < count else UNLIMITED
        carry, is_finished = passes(decoder, plan, canvas, sampling, carry, patience)
        leaving = np.flatnonzero(np.asarray(is_finished) & (row_at != FREE))
        tokens, used = np.asarray(carry.tokens), np.asarray(carry.passes)
        for place in leaving:
            yield int(row_at[place]), tokens[place], int(used[place])
        row_at[leaving] = FREE
        at = np.flatnonzero(row_at == FREE)[: count - following]
        if len(at):
            rows = np.arange(following, following + len(at))
            following += len(at)
            row_at[at] = rows
            filler = (half if len(at) <= half else places) - len(at)
            new = jax.tree.map(jnp.asarray, canvas_of(np.concatenate([rows, np.repeat(rows[:1], filler)])))
            at = np.concatenate([at, np.full(filler, 2 * places)])  # out of range: writes there are dropped
            canvas, carry = join(decoder, plan, (canvas, carry), new, sampling, at)


def joining_cost(plan: Plan, sampling: Sampling, places: int) -> int:
    """Number of row-passes that take about as long as prefilling half of the places."""
    columns = plan.first_column + (plan.num_blocks * plan.block_length if sampling.cache == "dual" else 0)
    return places + places // 2 * columns // plan.block_length


def _begin(decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling) -> Carry:
    loop, first_cache = loop_over(decoder, plan, canvas, sampling)
    return loop.start(first_cache())


def _passes(
    decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling, carry: Carry, patience: int
) -> tuple[Carry, jax.Array]:
    """Runs passes until all rows are finished or free places have waited `patience` row-passes.

    Returns (carry, finished [B] bool).
    """
    loop, _ = loop_over(decoder, plan, canvas, sampling)

    def one(state: tuple[Carry, jax.Array]) -> tuple[Carry, jax.Array]:
        carry, waited = state
        carry = loop.step(carry)
        return carry, waited + loop.finished(carry).sum()

    def goes_on(state: tuple[Carry, jax.Array]) -> jax.Array:
        return loop.unfinished(state[0]) & (state[1] < patience)

    carry, _ = jax.lax.while_loop(goes_on, one, (carry, jnp.int32(0)))
    return carry, loop.finished(carry)


def _join(
    decoder: Decoder, plan: Plan, batch: tuple[Canvas, Carry], new: Canvas, sampling: Sampling, at_b: jax.Array
) -> tuple[Canvas, Carry]:
    """Writes the rows of canvas `new` to places `at_b` of `batch`."""
    canvas, carry = batch
    places = len(canvas.tokens)
    begun = _begin(decoder, plan, new, sampling)

    def put(x_B: Any, new_b: Any) -> Any:
        return jax.tree.map(lambda x, new: x.at[at_b].set(new, mode="drop"), x_B, new_b)

    cache = carry.cache
    if cache is not None:  # the first axis of columns is the layer; with guidance, twins follow all rows
        twins = [at_b + places] if sampling.cfg_scale is not None else []
        at = jnp.concatenate([at_b, *twins])
        columns = jax.tree.map(lambda x, new: x.at[:, at].set(new, mode="drop"), cache.columns, begun.cache.columns)
        cache = cache.replace(columns=columns, state=put(cache.state, begun.cache.state))
    joined = put(carry.replace(cache=None), begun.replace(cache=None))
    return put(canvas, new), joined.replace(cache=cache)
