"""Settings of the objectives without a shown gain. All are off by default."""

import dataclasses

from difflm_jax.utils.settings import NOT_NEGATIVE, POSITIVE, SHARE, setting


@dataclasses.dataclass(frozen=True)
class Extras:
    """Settings of the modules next to this one.

    complementary: each row is used twice, with its mask and with the complement (`complementary`).
    on_policy: share of examples trained on states of the model's own decoding; on_policy_passes, on_policy_tokens: how
      these are reached (`on_policy`).
    distillation: weight of the divergence from the causal base (`distillation`).
    anneal_steps, anneal_power, block_growth_steps: a gentle start, off at 0 steps (`annealing`).
    """

    complementary: bool = setting(
        False, "Each row is used twice, with its mask and with the complement.", key="complementary_masks"
    )
    on_policy: float = setting(0.0, "Share of rows in states of the model's own decoding.", within=SHARE)
    on_policy_passes: int = setting(1, "Forward passes of that decoding.", within=POSITIVE)
    on_policy_tokens: str = setting(
        "reference", "own: the model's own tokens there, which only a teacher judges.", choices=("reference", "own")
    )
    distillation: float = setting(
        0.0,
        "Weight of the KL divergence from the causal base; one more forward pass.",
        within=NOT_NEGATIVE,
        key="distillation_weight",
    )
    anneal_steps: int = setting(
        0, "Steps in which edges to later tokens open at random; 0: open from the start.", within=NOT_NEGATIVE
    )
    anneal_power: float = setting(1.0, "Above 1: edges open slowly at first.", within=POSITIVE)
    block_growth_steps: int = setting(
        0, "Steps in which blocks grow from 1 to block_length; 0: no growth.", within=NOT_NEGATIVE
    )
