"""How a diffusion model sees and predicts: one record, which is `diffusion_config.json`.

Loss, evaluation, likelihood, sampler, caches and export take the whole of it. It makes the attention mask, it says
which hidden state predicts which token (the logit shift), what a block is, and which keys and values never change.
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
    """Where the tokens of a batch stand, for the attention rules."""

    positions: jax.Array  # [B, L] int32, counts real tokens from 0; in packed rows from the start of each example
    valid: jax.Array  # [B, L] bool, False at padding
    prompt_lengths: jax.Array  # [B], or [B, L] in packed rows: real tokens of the prompt
    segments: jax.Array | None = None  # [B, L] int32, number of the example; None: one example per row

    def part(self, start: jax.Array | int, length: int) -> "Layout":
        """Columns `start`, ..., `start + length - 1` of rows that hold one example each."""
        positions, valid = (
            jax.lax.dynamic_slice_in_dim(x, start, length, axis=1) for x in (self.positions, self.valid)
        )
        return Layout(positions, valid, self.prompt_lengths)

    def twice(self) -> "Layout":
        """Each row followed by a copy of itself, in one row (`prompt_lengths` are [B, L])."""
        return jax.tree.map(lambda x_BL: jnp.concatenate([x_BL, x_BL], axis=1), self)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Attention rule, logit shift, mask token and preset of a model. Frozen and hashable: static to `jax.jit`.

    attention: who sees whom.
      "full": every real token sees every real token.
      "causal": a token sees itself and what precedes it.
      "prefix": a prompt token sees what "causal" shows it, an answer token sees everything. Keys and values of a prompt
        do not depend on its answer.
      "block": an answer is cut into blocks of `block_length` from its start. A token sees its own block and what
        precedes the block, so neither a prompt nor a finished block depends on what follows.
      "block_causal": the same, with blocks counted from the first token of the row (SDAR, arXiv:2510.06303).
      "causal_context": as "block", but once a block is finished its tokens see what "causal" shows them, as those of
        the prompt do (Nemotron-Labs-Diffusion). So the prompt of a pass is all that precedes the block it fills.
    block_length: of the rules in blocks; else 0. (A traced scalar while blocks grow, `extras.annealing`.)
    logit_shift: the state of position i - 1 predicts token i, as in the causal base; else state i does.
    mask_token, mask_token_id: the token that stands for "hidden".
    algorithm: the sampler's preset.
    mask_is_trained: the embedding itself has a trained row for the mask token.
    gated, noise: the adapter is on at noisy tokens only; what stands at hidden positions ("mask": the mask token;
      "uniform": any token).
    draft_length: tokens that a gated adapter drafts after the last one; else 0.
    preset: options of decoding that were measured (`difflm tune`), with their figures, as JSON; "": none.
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
        """The contents of `diffusion_config.json`; keys that say nothing beyond their default are left out."""
        values = {name: getattr(self, name) for name in _ALWAYS_WRITTEN}
        if self.has_blocks:
            values["block_length"] = self.block_length
        if self.preset:
            values["preset"] = json.loads(self.preset)
        return values | {
            name: getattr(self, name) for name, off in _WRITTEN_IF_NOT.items() if getattr(self, name) != off
        }

    def causal(self) -> "DiffusionConfig":
        """The rule of the causal base: next-token prediction."""
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
        """The options of `preset`."""
        return json.loads(self.preset)["options"] if self.preset else {}

    # Blocks

    @property
    def has_blocks(self) -> bool:
        """The attention rule has a block length."""
        return self.attention in BLOCK_RULES

    @property
    def decoding_block(self) -> int:
        """Tokens per block when text is generated: 1 for a causal model, 0 where the rule names no blocks."""
        return 1 if self.attention == "causal" else self.block_length

    @property
    def blocks_include_prompt(self) -> bool:
        """Blocks are counted from the first token of the row, so a prompt may end within one."""
        return self.attention == "block_causal"

    @property
    def finished_is_prompt(self) -> bool:
        """The tokens of a finished block see what those of a prompt do, so that its keys change once."""
        return self.attention == "causal_context"

    @property
    def exact_cache(self) -> str:
        """Whose keys and values never change: those of the "prompt", of finished "blocks" too, or of "none"."""
        if self.decoding_block:
            return "blocks"
        return "prompt" if self.attention == "prefix" else "none"

    def fewest_passes(self, max_new_tokens: int, block_length: int | None = None) -> int:
        """Forward passes that an answer takes at least: one per block."""
        return -(-max_new_tokens // (self.decoding_block or block_length or max_new_tokens))

    def settled(self, given: int) -> int:
        """How many of the `given` first tokens of a row lie before the block that holds the first mask."""
        return given - given % self.block_length if self.blocks_include_prompt else given

    def block_starts(self, positions_BL: jax.Array, prompt_lengths: jax.Array) -> jax.Array:
        """[B, L] first position of the block of each token; under "block" a prompt token is a block of its own."""
        return self._own_block(positions_BL, _at_tokens(prompt_lengths))[0]

    # Which state predicts which token

    @property
    def shift(self) -> int:
        """The state of column i - `shift` predicts the token of column i."""
        return int(self.logit_shift)

    def predictable(self, positions_BL: jax.Array) -> jax.Array:
        """[B, L] bool: whether a state predicts the token. With the shift none predicts the first of an example."""
        return positions_BL >= self.shift

    def predicting(self, hidden_BLD: jax.Array) -> jax.Array:
        """The states that predict the token of each column, from the states of the columns."""
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
        """The attention mask of `queries` on `keys` (None: on themselves), as the transformer takes it.

        `queries.segments`: a token sees its own example and what all examples of the row begin with.
        `noisy_T` [T] bool is for the training input of block diffusion, a noisy and a clean copy of each row in one
        (BD3-LM, arXiv:2503.09573): a noisy token sees its own noisy block and the clean tokens before that block; a
        clean token sees clean tokens by the rule.
        `open_BTS` bool is for attention annealing: a later token that the rule allows is seen only where it is True.
        `lengths_B`: real tokens of rows that hold one example each, padded on the right (None: of other rows).
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
        whole_rows = self.attention == "full" and open_BTS is None  # then the lengths say all that the mask does
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
        """(first, last) position of the span in which a token sees everything, besides all that precedes the span."""
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


_ALWAYS_WRITTEN = ("mask_token", "mask_token_id", "attention", "logit_shift", "algorithm")
_WRITTEN_IF_NOT = {"mask_is_trained": False, "gated": False, "noise": "mask", "draft_length": 0}


def _at_tokens(prompt_lengths: jax.Array) -> jax.Array:
    """Prompt lengths of rows [B] as [B, 1]; those of tokens [B, T] unchanged."""
    return prompt_lengths[:, None] if prompt_lengths.ndim == 1 else prompt_lengths
