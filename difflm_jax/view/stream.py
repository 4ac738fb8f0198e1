"""An answer for a streamer of transformers: final tokens from the left, and drafts where the streamer takes them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from difflm_jax.sampling.watch import Pass


class StreamerFeed:
    """A watcher (`on_pass=`) of one prompt that feeds `streamer`; `finish` gives it what is left, and ends it.

    As in transformers, the first `put` is the prompt [1, L], and each further one is new tokens [n]. A token is put
    when it can no longer change. `put_draft`, where the streamer has it, gets the tokens [1, n] after those: committed
    ones, and the most likely token at each mask up to the end of the active block. Arrays are NumPy's int64.

    `revised`: committed tokens of the active block may still change. `cut`: tokens up to where the answer ends.
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
        """Puts what the pass made final, then the draft of the rest."""
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
        """Puts the rest of the whole answer `tokens`, and ends the streamer."""
        self._put(tokens)
        self._streamer.end()

    def _put(self, tokens: np.ndarray) -> None:
        """Puts those of the answer's first `tokens` that were not put before."""
        if not self._begun:
            self._streamer.put(self._prompt.astype(np.int64)[None])
            self._begun = True
        if len(tokens) > self._sent:
            self._streamer.put(np.asarray(tokens[self._sent :], np.int64))
            self._sent = len(tokens)
