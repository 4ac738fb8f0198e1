"""How a diffusion model attends and predicts: one record, stored as `diffusion_config.json`.

Loss, evaluation, likelihood, sampler, caches and export take the whole record. It builds the attention mask. It also
defines which hidden state predicts which token (the logit shift), the blocks, and which keys and values never change.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from difflm_jax.diffusion.segments import same_example
from difflm_jax.models.attention import View
from difflm_jax.utils.settings import NOT_NEGATIVE, setting

ATTENTION_RULES = ("full", "prefix", "block", "block_causal", "causal_context", "causal")
BLOCK_RULES = ("block", "block_causal", "causal_context")  # the rules that have a block length
PROMPT_RULES = ("prefix", "block", "causal_context")  # the rules that depend on where the prompt ends


@struct.dataclass
class Layout:
    """Positions of the tokens of a batch, as the attention rules need them."""

    positions: jax.Array  # [B, L] int32, counts real tokens from 0; in packed rows from the start of each example
    valid: jax.Array  # [B, L] bool, False at padding
    prompt_lengths: jax.Array  # [B], or [B, L] in packed rows: real tokens of the prompt
    segments: jax.Array | None = None  # [B, L] int32, number of the example; None: one example per row

    def part(self, start: jax.Array | int, length: int) -> "Layout":
        """Returns columns `start`, ..., `start + length - 1` of rows with one example each; `start` is [] or [B]."""
        positions, valid = (columns_from(x, start, length) for x in (self.positions, self.valid))
        return Layout(positions, valid, self.prompt_lengths)

    def twice(self) -> "Layout":
        """Returns [B, 2 L]: each row followed by a copy of itself. `prompt_lengths` must be [B, L]."""
        return jax.tree.map(lambda x_BL: jnp.concatenate([x_BL, x_BL], axis=1), self)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Attention rule, logit shift, mask token and preset of a model. Frozen and hashable, so static to `jax.jit`.

    attention: which tokens a token attends to ("sees").
      "full": every real token sees every real token.
      "causal": a token sees itself and the tokens before it.
      "prefix": the prompt is causal, and an answer token sees everything. Keys and values of a prompt do not depend on
        its answer.
      "block": an answer is cut into blocks of `block_length` from its start. A token sees its own block and all that
        precedes the block, so neither a prompt nor a finished block depends on what follows. The prompt is causal.
      "block_causal": the same, with blocks counted from the first token of the row (SDAR, arXiv:2510.06303).
      "causal_context": as "block", but the tokens of a finished block are causal, like the prompt
        (Nemotron-Labs-Diffusion). So everything before the block that a pass fills acts as its prompt.
    block_length: tokens per block under the block rules, else 0. (A traced scalar while blocks grow:
      `extras.annealing`.)
    logit_shift: the state of position i - 1 predicts token i, as in the causal base; if False, state i does.
    mask_token, mask_token_id: the token that marks hidden positions.
    algorithm: the sampler's preset.
    mask_is_trained: the embedding itself has a trained row for the mask token.
    gated: the adapter is on at noisy tokens only.
    noise: the token at hidden positions. "mask": the mask token; "uniform": any token.
    draft_length: tokens that a gated adapter drafts after the last one; else 0.
    preset: decoding options that `difflm tune` measured, with their figures, as JSON; "": none.
    """

    attention: str = setting(
        "full",
        "prefix: the prompt is causal, the answer sees everything; block: block diffusion.",
        choices=("full", "prefix", "block"),
    )
    block_length: int = setting(0, "Tokens per block of attention=block.", within=NOT_NEGATIVE)
    logit_shift: bool = setting(False, "The state of the token before a mask predicts it, as in the causal base.")
    mask_token_id: int | None = None
    mask_token: str | None = None
    algorithm: str = "confidence"
    mask_is_trained: bool = False
    gated: bool = False
    noise: str = "mask"
    draft_length: int = 0
    preset: str = ""

    def __post_init__(self):
        if self.attention not in ATTENTION_RULES:
            raise ValueError(f"attention rule {self.attention!r} is not one of {ATTENTION_RULES}")
        if self.has_blocks and isinstance(self.block_length, int) and self.block_length < 1:
            raise ValueError(f"attention rule {self.attention!r} needs a block length, not {self.block_length}")

    def to_json(self) -> dict[str, Any]:
        """Returns the contents of `diffusion_config.json`. Keys in `_WRITTEN_IF_NOT` are left out at their default."""
        values = {name: getattr(self, name) for name in _ALWAYS_WRITTEN}
        if self.has_blocks:
            values["block_length"] = self.block_length
        if self.preset:
            values["preset"] = json.loads(self.preset)
        return values | {
            name: getattr(self, name) for name, off in _WRITTEN_IF_NOT.items() if getattr(self, name) != off
        }

    def causal(self) -> "DiffusionConfig":
        """Returns the config of the causal base: next-token prediction, without gate, drafts or preset."""
        return dataclasses.replace(
            self,
            attention="causal",
            block_length=0,
            logit_shift=True,
            algorithm="confidence" if self.algorithm == "speculative" else self.algorithm,
            gated=False,
            noise="mask",
            draft_length=0,
            preset="",
        )

    @property
    def preset_options(self) -> dict[str, Any]:
        """The decoding options in `preset`; empty if there is none."""
        return json.loads(self.preset)["options"] if self.preset else {}

    # Blocks

    @property
    def has_blocks(self) -> bool:
        """Whether the attention rule has a block length."""
        return self.attention in BLOCK_RULES

    @property
    def decoding_block(self) -> int:
        """Tokens per block in generation: 1 for a causal model, 0 if the rule has no blocks."""
        return 1 if self.attention == "causal" else self.block_length

    @property
    def blocks_include_prompt(self) -> bool:
        """Whether blocks are counted from the first token of the row. If so, a prompt may end within a block."""
        return self.attention == "block_causal"

    @property
    def finished_is_prompt(self) -> bool:
        """Whether the tokens of a finished block attend like those of a prompt. If so, its keys change once."""
        return self.attention == "causal_context"

    @property
    def exact_cache(self) -> str:
        """Which keys and values never change: "prompt", "blocks" (the prompt and finished blocks), or "none"."""
        if self.decoding_block:
            return "blocks"
        return "prompt" if self.attention == "prefix" else "none"

    def fewest_passes(self, max_new_tokens: int, block_length: int | None = None) -> int:
        """Returns the least number of forward passes for an answer: one per block."""
        return -(-max_new_tokens // (self.decoding_block or block_length or max_new_tokens))

    def settled(self, given: int) -> int:
        """Returns how many of the first `given` tokens of a row precede the block with the first mask."""
        return given - given % self.block_length if self.blocks_include_prompt else given

    def block_starts(self, positions_BL: jax.Array, prompt_lengths: jax.Array) -> jax.Array:
        """Returns [B, L]: first position of each token's block. Under "block", each prompt token is its own block."""
        return self._own_block(positions_BL, _at_tokens(prompt_lengths))[0]

    # Which state predicts which token

    @property
    def shift(self) -> int:
        """1 with the logit shift, else 0: the state of column i - `shift` predicts the token of column i."""
        return int(self.logit_shift)

    def predictable(self, positions_BL: jax.Array) -> jax.Array:
        """Returns [B, L] bool: whether a state predicts the token; with the shift, none does for an example's first."""
        return positions_BL >= self.shift

    def predicting(self, hidden_BLD: jax.Array) -> jax.Array:
        """Returns the state [B, L, D] that predicts the token of each column, given the state of each column."""
        return jnp.roll(hidden_BLD, self.shift, axis=1) if self.shift else hidden_BLD

    # Who attends to whom

    def view(
        self,
        queries: Layout,
        keys: Layout | None = None,
        noisy_T: jax.Array | None = None,
        open_BTS: jax.Array | None = None,
        lengths_B: jax.Array | None = None,
    ) -> View:
        """Returns the attention mask of `queries` on `keys` (None: on themselves), in the form the transformer takes.

        queries.segments: a token sees its own example and the prefix that all examples of the row share.
        noisy_T: [T] bool, for training block diffusion on a noisy and a clean copy of each row in one row (BD3-LM,
          arXiv:2503.09573). A noisy token sees its own noisy block and the clean tokens before that block; a clean
          token sees clean tokens according to the rule.
        open_BTS: bool, for attention annealing. A later token that the rule allows is seen only where this is True.
        lengths_B: real tokens of each row, if rows have one example each and are padded on the right; else None.
        """
        keys = queries if keys is None else keys
        query_positions_BT, key_positions_BS = queries.positions, keys.positions
        mask_BTS = jnp.broadcast_to(keys.valid[:, None, :], (*query_positions_BT.shape, key_positions_BS.shape[1]))
        if queries.segments is not None:
            mask_BTS = mask_BTS & same_example(queries.segments)
        if open_BTS is not None:
            mask_BTS &= (key_positions_BS[:, None, :] <= query_positions_BT[:, :, None]) | open_BTS
        if self.attention != "full":
            mask_BTS = self._by_rule(mask_BTS, queries, key_positions_BS[:, None, :], noisy_T)
        whole_rows = self.attention == "full" and open_BTS is None  # then the lengths alone determine the mask
        return View(mask_BTS, query_positions_BT, key_positions_BS, lengths_B if whole_rows else None)

    def _by_rule(
        self, mask_BTS: jax.Array, queries: Layout, key_B1S: jax.Array, noisy_T: jax.Array | None
    ) -> jax.Array:
        first_BT, last_BT = self._own_block(queries.positions, _at_tokens(queries.prompt_lengths))
        not_after_BTS = key_B1S <= last_BT[:, :, None]
        if noisy_T is None:
            return mask_BTS & not_after_BTS
        before_BTS = key_B1S < first_BT[:, :, None]
        noisy_query, noisy_key = noisy_T[:, None], noisy_T[None, :]
        own_BTS, clean_BTS = noisy_query & not_after_BTS & ~before_BTS, not_after_BTS & (~noisy_query | before_BTS)
        if self.finished_is_prompt:  # a clean token is finished
            clean_BTS &= key_B1S <= queries.positions[:, :, None]
        return mask_BTS & jnp.where(noisy_key, own_BTS, clean_BTS)

    def _own_block(self, positions_BT: jax.Array, prompts_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the (first, last) position of a token's block: it sees the whole block and all that precedes it."""
        if self.attention == "causal":
            return positions_BT, positions_BT
        if self.attention == "block_causal":
            first_BT = positions_BT - positions_BT % self.block_length
            return first_BT, first_BT + self.block_length - 1
        in_prompt_BT = positions_BT < prompts_BT
        if self.attention == "prefix":
            first_BT, last = prompts_BT, jnp.iinfo(jnp.int32).max
        else:
            first_BT = positions_BT - (positions_BT - prompts_BT) % self.block_length
            last = first_BT + self.block_length - 1
        return jnp.where(in_prompt_BT, positions_BT, first_BT), jnp.where(in_prompt_BT, positions_BT, last)


def columns_from(x_BL: jax.Array, start: jax.Array | int, length: int) -> jax.Array:
    """[B, length] columns from `start` on, which is [], or [B] where each row has its own."""
    if jnp.ndim(start) == 0:
        return jax.lax.dynamic_slice_in_dim(x_BL, start, length, axis=1)
    return jax.vmap(lambda x_L, first: jax.lax.dynamic_slice_in_dim(x_L, first, length))(x_BL, start)


_ALWAYS_WRITTEN = ("mask_token", "mask_token_id", "attention", "logit_shift", "algorithm")
_WRITTEN_IF_NOT = {"mask_is_trained": False, "gated": False, "noise": "mask", "draft_length": 0}


def _at_tokens(prompt_lengths: jax.Array) -> jax.Array:
    """Returns prompt lengths per row [B] as [B, 1], and those per token [B, T] unchanged."""
    return prompt_lengths[:, None] if prompt_lengths.ndim == 1 else prompt_lengths
