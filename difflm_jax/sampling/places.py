"""More rows than a batch has places: a row that is finished makes room for the next, between passes.

The loop is that of `caches.fill`, in three programs: `_begin` for the first rows, `_passes` until free places have
waited enough, and `_join`, which puts new rows into them. While the prompts of new rows are read, all places wait. So
rows join when free places have waited for about as long as joining takes: short answers are then decoded batch by
batch, and long ones that end early make room. Rows do not depend on each other: each gets its own answer.
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
    """(row, its tokens [L], its passes) of `count` rows, more than `places`, as they are finished.

    `canvas_of` gives the canvas of the rows of some numbers.
    """
    platform = jax.default_backend()
    begin, passes = compiled_on(platform, _begin), compiled_on(platform, _passes, donated="carry")
    join = compiled_on(platform, _join, donated="batch")
    row_at, following = np.arange(places), places
    half = max(1, places // 2)  # rows join in two sizes, so that two are compiled
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
            at = np.concatenate([at, np.full(filler, 2 * places)])  # no place: what is put there is dropped
            canvas, carry = join(decoder, plan, (canvas, carry), new, sampling, at)


def joining_cost(plan: Plan, sampling: Sampling, places: int) -> int:
    """Row-passes that take about as long as reading the columns of half of the places."""
    columns = plan.first_column + (plan.num_blocks * plan.block_length if sampling.cache == "dual" else 0)
    return places + places // 2 * columns // plan.block_length


def _begin(decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling) -> Carry:
    loop, first_cache = loop_over(decoder, plan, canvas, sampling)
    return loop.start(first_cache())


def _passes(
    decoder: Decoder, plan: Plan, canvas: Canvas, sampling: Sampling, carry: Carry, patience: int
) -> tuple[Carry, jax.Array]:
    """(carry, finished [B]) after passes until all rows are finished, or have waited `patience` row-passes."""
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
    """`batch` with the rows of canvas `new` at places `at_b`."""
    canvas, carry = batch
    places = len(canvas.tokens)
    begun = _begin(decoder, plan, new, sampling)

    def put(x_B: Any, new_b: Any) -> Any:
        return jax.tree.map(lambda x, new: x.at[at_b].set(new, mode="drop"), x_B, new_b)

    cache = carry.cache
    if cache is not None:  # columns have the layer first, and with guidance twins of all rows after the rows
        twins = [at_b + places] if sampling.cfg_scale is not None else []
        at = jnp.concatenate([at_b, *twins])
        columns = jax.tree.map(lambda x, new: x.at[:, at].set(new, mode="drop"), cache.columns, begun.cache.columns)
        cache = cache.replace(columns=columns, state=put(cache.state, begun.cache.state))
    joined = put(carry.replace(cache=None), begun.replace(cache=None))
    return put(canvas, new), joined.replace(cache=cache)
