"""Denoising as one self-contained HTML file: scrub through the passes, hover for alternatives."""

import importlib.resources
import json
from pathlib import Path
from typing import Any

import numpy as np

from difflm_jax.sampling.watch import Pass
from difflm_jax.utils.files import write_whole
from difflm_jax.view.pieces import Pieces

_DATA_PLACE = "/*DATA*/"


class PageRecorder:
    """A watcher (`on_pass=`) that records every pass; `write` writes the page.

    It records changes: what each pass wrote or remasked, and the most likely tokens where a mask was open or written.
    """

    def __init__(self, tokenizer: Any, mask_token_id: int, title: str, options: dict[str, Any]):
        self._tokenizer, self._mask = tokenizer, mask_token_id
        self._piece_of, self._pieces, self._index = Pieces(tokenizer, mask_token_id), [], {}
        self._head = {"title": title, "options": {name: str(value) for name, value in options.items()}}
        self._runs: list[dict[str, Any]] = []
        self._open: list[dict[str, Any]] = []  # the runs of the current batch
        self._before = np.zeros((0, 0), np.int32)

    def __call__(self, seen: Pass) -> None:
        """Records the pass `seen` for every row."""
        if seen.number == 1:
            self._open = [self._begin(seen, at) for at in range(len(seen.rows))]
            self._runs += self._open
            self._before = np.where(seen.written, self._mask, seen.tokens)
        for at, run in enumerate(self._open):
            changed = seen.real[at] & ((seen.tokens[at] != self._before[at]) | seen.written[at])
            was_open = seen.real[at] & (self._before[at] == self._mask)
            write, mask = [], []
            for i in np.flatnonzero(changed).tolist():
                if seen.tokens[at, i] == self._mask:
                    mask.append(i)
                else:
                    write.append([i, self._piece(seen.tokens[at, i]), _rounded(seen.confidence[at, i])])
            shown = (was_open | changed)[seen.block]
            alternatives = [
                [seen.block.start + j, [self._piece(t) for t in seen.candidates[at, j]],
                 [_rounded(p) for p in seen.probabilities[at, j]]]
                for j in np.flatnonzero(shown).tolist()
            ]  # fmt: skip
            if write or mask or alternatives:
                run["passes"].append({"write": write, "mask": mask, "alternatives": alternatives})
            run["text"] = self._text(seen, at)
        self._before = seen.tokens

    def write(self, path: str | Path) -> None:
        """Writes the page atomically. Raises `UserError` if it cannot be written."""
        data = {**self._head, "pieces": self._pieces, "runs": self._runs}
        # Escape these characters, so no text can end the script element or begin a comment.
        encoded = json.dumps(data, separators=(",", ":"))
        for character in "<>&":
            encoded = encoded.replace(character, f"\\u{ord(character):04x}")
        template = (importlib.resources.files("difflm_jax.view") / "page.html").read_text(encoding="utf-8")
        write_whole(path, template.replace(_DATA_PLACE, encoded))

    def _begin(self, seen: Pass, at: int) -> dict[str, Any]:
        start = np.where(seen.written[at], self._mask, seen.tokens[at])[seen.real[at]]
        return {
            "prompt": self._tokenizer.decode(seen.prompts[at].tolist()),
            "start": [-1 if token == self._mask else self._piece(token) for token in start],
            "passes": [],
            "text": "",
        }

    def _text(self, seen: Pass, at: int) -> str:
        tokens = seen.tokens[at][seen.real[at] & (seen.tokens[at] != self._mask)]
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

    def _piece(self, token: Any) -> int:
        """Returns the index of a token's text among the pieces of the page; adds it if it is new."""
        token = int(token)
        if token not in self._index:
            self._index[token] = len(self._pieces)
            self._pieces.append(self._piece_of(token))
        return self._index[token]


def _rounded(value: Any) -> float:
    return round(float(value), 4)
