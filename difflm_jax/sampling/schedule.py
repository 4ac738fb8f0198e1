"""Schedules: how many masks of a block are committed at each step, as functions (masks, steps) -> a quota per step.

They run on the host in float64, once for each number of masks and steps, and reach the sampler as data. Only `time_of`
runs in the sampler.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

START_OF_TIME = 1.0
END_OF_TIME = 1e-3  # Dream's eps; the last step goes to 0


def even(masks: int, steps: int) -> list[int]:
    """Splits `masks` evenly over `steps`; the first steps get the remainder.

    The rule of the original system and of LLaDA's `get_num_transfer_tokens` (arXiv:2502.09992).
    """
    return [masks // steps + (step < masks % steps) for step in range(steps)]


def dream(masks: int, steps: int) -> list[int]:
    """int(masks left * (1 - s / t)) from time t to s; the last step takes the rest (Dream, arXiv:2508.15487)."""
    rates, quotas = reveal_rates(steps), []
    for rate in rates:
        quotas.append(int(masks * rate))
        masks -= quotas[-1]
    return quotas


def dllm(masks: int, steps: int) -> list[int]:
    """round(masks left * (1 - (1 - a_s) / (1 - a_t))) with a = 1 - t on an even grid; zero quotas move to the end.

    The rule of the library dLLM (github.com/ZHZisZZ/dllm), linear schedule.
    """
    quotas = []
    for step in range(steps):
        alpha_t, alpha_s = 1 - (steps - step) / steps, 1 - (steps - step - 1) / steps
        quotas.append(min(masks, round(masks * (1 - (1 - alpha_s) / (1 - alpha_t)))))
        masks -= quotas[-1]
    quotas = [quota for quota in quotas if quota > 0]
    return quotas + [0] * (steps - len(quotas))


def deadline(_masks: int, steps: int) -> list[int]:
    """Returns zeros: `commit.deadline_quota` computes each quota during sampling, from the passes that are left."""
    return [0] * steps


DEADLINE = "deadline"
SCHEDULES: dict[str, Callable[[int, int], list[int]]] = {
    "even": even,
    "dream": dream,
    "dllm": dllm,
    DEADLINE: deadline,
}


def timesteps(steps: int) -> np.ndarray:
    """[steps + 1] float64 from 1 down to 0: evenly spaced to `END_OF_TIME`, whose entry is then set to 0."""
    times = np.linspace(START_OF_TIME, END_OF_TIME, steps + 1)
    times[-1] = 0.0
    return times


def time_of(step: jax.Array, steps: jax.Array | int) -> jax.Array:
    """float32 `timesteps(steps)[step]`, of the shape of `step`."""
    time = START_OF_TIME - (START_OF_TIME - END_OF_TIME) / steps * step
    return jnp.where(step == steps, 0.0, time).astype(jnp.float32)


def reveal_rates(steps: int) -> np.ndarray:
    """[steps] float64, 1 - s / t: the probability that a mask is revealed at each step; 1 at the last."""
    times = timesteps(steps)
    return 1 - times[1:] / times[:-1]


def shares(steps: int, masks_BJ: np.ndarray, capped: bool) -> np.ndarray:
    """[B, J] int32: divides each row's `steps` passes over its blocks with masks. `masks_BJ` counts the masks.

    The first blocks get the remainder. `capped`: a block gets at most one pass per mask, since further ones would have
    nothing to commit. If a row has more such blocks than `steps`, some get no pass.
    """
    has_masks_BJ = masks_BJ > 0
    blocks_B1 = np.maximum(has_masks_BJ.sum(axis=1, keepdims=True), 1)
    number_BJ = np.cumsum(has_masks_BJ, axis=1) - 1
    shares_BJ = steps // blocks_B1 + (number_BJ < steps % blocks_B1)
    shares_BJ = np.where(has_masks_BJ, shares_BJ, 0)
    if not capped:
        return shares_BJ.astype(np.int32)
    shares_BJ = np.minimum(shares_BJ, masks_BJ)
    goal_B = np.minimum(masks_BJ.sum(axis=1), steps)
    while len(rows := np.flatnonzero(shares_BJ.sum(axis=1) < goal_B)):  # passes that small blocks leave go to others
        fewest = np.where(shares_BJ < masks_BJ, shares_BJ, steps + 1).argmin(axis=1)
        shares_BJ[rows, fewest[rows]] += 1
    return shares_BJ.astype(np.int32)


def quotas(schedule: str, masks_BJ: np.ndarray, steps_BJ: np.ndarray, most: int) -> np.ndarray:
    """[B, J, P] int32 quotas of every row and block, from their masks and passes; P is `most`."""
    found_BJP = np.zeros((*masks_BJ.shape, most), np.int32)
    known: dict[tuple[int, int], list[int]] = {}
    for place in np.ndindex(masks_BJ.shape):
        case = int(masks_BJ[place]), int(steps_BJ[place])
        if case not in known:
            known[case] = SCHEDULES[schedule](*case)
        found_BJP[place][: case[1]] = known[case]
    return found_BJP
