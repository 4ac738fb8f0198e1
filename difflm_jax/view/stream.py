"""Feeds an answer to a transformers streamer: final tokens from the left, and drafts if the streamer accepts them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from difflm_jax.sampling.watch import Pass


class StreamerFeed:
    """A watcher (`on_pass=`) of one prompt that feeds `streamer`. `finish` feeds the rest and ends the streamer.

    As in transformers, the first `put` is the prompt [1, L], and each further one is new tokens [n]. A token is put
    when it can no longer change. If the streamer has `put_draft`, it gets the tokens [1, n] after those: committed
    tokens, and the most likely token at each mask up to the end of the active block. Arrays are NumPy int64.

    revised: whether committed tokens of the active block may still change. cut: returns the tokens up to the end of the
    answer.
    """

    def __init__(
        self,
        streamer: Any,
        prompt_L: np.ndarray,
        max_new_tokens: int,
        mask_token_id: int,
        revised: bool,
        cut: Callable[[np.ndarray], np.ndarray],
    ):
        self._streamer, self._prompt, self._most = streamer, prompt_L, max_new_tokens
        self._mask, self._revised, self._cut = mask_token_id, revised, cut
        self._begun, self._sent = False, 0

    def __call__(self, seen: Pass) -> None:
        """Puts the tokens that this pass made final, then the draft of the rest."""
        start = len(self._prompt) - len(seen.prompts[0])  # a prompt may end within the first block
        answer = slice(start, start + self._most)
        tokens_T, guess_T = seen.tokens[0][answer], seen.guess(self._mask)[0][answer]
        open_T = tokens_T == self._mask
        final = int(open_T.argmax()) if open_T.any() else len(tokens_T)
        if self._revised:
            final = min(final, max(seen.block.start - start, 0))
        self._put(self._cut(tokens_T[:final]))
        draft = self._cut(guess_T[: max(seen.block.stop - start, 0)])[self._sent :]
        if len(draft) and hasattr(self._streamer, "put_draft"):
            self._streamer.put_draft(draft.astype(np.int64)[None])

    def finish(self, tokens: np.ndarray) -> None:
        """Puts the part of the whole answer `tokens` that was not put yet, and ends the streamer."""
        self._put(tokens)
        self._streamer.end()

    def _put(self, tokens: np.ndarray) -> None:
        """Puts the tokens that were not put yet. `tokens` are those of the answer from its beginning."""
        if not self._begun:
            self._streamer.put(self._prompt.astype(np.int64)[None])
            self._begun = True
        if len(tokens) > self._sent:
            self._streamer.put(np.asarray(tokens[self._sent :], np.int64))
            self._sent = len(tokens)
