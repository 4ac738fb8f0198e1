"""Live denoising in a terminal: the answer after every pass, with tokens coloured by their confidence."""

import os
import shutil
from typing import IO, Any

import numpy as np

from difflm_jax.sampling.watch import Pass
from difflm_jax.view.pieces import Pieces, ansi, confidence_code, printable, width


class TerminalView:
    """A watcher (`on_pass=`) that draws to `stream`: in place on a terminal, else one line per pass without colours.

    Tokens that the last pass committed are bold and underlined. A mask of the active block is shown as its most likely
    token, dimmed, unless that is an end of sequence. `NO_COLOR` turns colours and guesses off.
    """

    def __init__(self, tokenizer: Any, mask_token_id: int, eos_token_ids: tuple[int, ...], stream: IO[str]):
        self._pieces, self._mask, self._eos = Pieces(tokenizer, mask_token_id), mask_token_id, eos_token_ids
        self._stream, self._drawn = stream, 0
        self._live = stream.isatty()
        self._colours = self._live and not os.environ.get("NO_COLOR")

    def __call__(self, seen: Pass) -> None:
        """Draws every row of the batch."""
        columns, lines = _size(self._stream)
        drawn = []
        for at, row in enumerate(seen.rows):
            masks = int((seen.real[at] & (seen.tokens[at] == self._mask)).sum())
            name = f"row {row + 1}, " if len(seen.rows) > 1 else ""
            header = f"{name}pass {seen.number}: {int(seen.written[at].sum())} committed, {masks} masks left"
            drawn.append(header[:columns] if self._live else header)
            drawn += self._text(seen, at, columns) if self._live else ["".join(self._row(seen, at))]
        if seen.number == 1:
            self._drawn = 0
        if self._live:
            drawn = drawn[-max(lines - 1, 2) :]  # lines that have scrolled away cannot be redrawn
            up = f"\x1b[{self._drawn}F" if self._drawn else ""
            self._stream.write(up + "\x1b[J" + "\n".join(drawn) + "\n")
            self._drawn = len(drawn)
        else:
            self._stream.write("  ".join(drawn) + "\n")
        self._stream.flush()

    def _row(self, seen: Pass, at: int) -> list[str]:
        """Returns the printable piece of each token, or of the guess at a mask, up to the first end of sequence."""
        tokens = seen.tokens[at][seen.real[at]]
        ends = np.flatnonzero(np.isin(tokens, self._eos))
        end = ends[0] if len(ends) else len(tokens)
        if self._colours:  # without colours, a guess would look like a committed token
            guesses = seen.guess(self._mask)[at][seen.real[at]]
            tokens = np.where(np.isin(guesses, self._eos), tokens, guesses)
        return [printable(self._pieces(int(token))) for token in tokens[:end]]

    def _text(self, seen: Pass, at: int, columns: int) -> list[str]:
        """Returns the row, coloured, in lines of at most `columns` columns."""
        lines, line, used = [], "", 0
        for i, piece in enumerate(self._row(seen, at)):
            taken = width(piece)
            if used + taken > columns and used:
                lines, line, used = [*lines, line], "", 0
            line, used = line + self._coloured(seen, at, i, piece), used + taken
        return [*lines, line]

    def _coloured(self, seen: Pass, at: int, i: int, piece: str) -> str:
        if not self._colours:
            return piece
        if seen.tokens[at, i] == self._mask:
            return ansi(piece, "2")
        confidence = float(seen.confidence[at, i])
        codes = [confidence_code(confidence)] if confidence > 0 else []  # a given token has no confidence
        return ansi(piece, *codes, *(["1", "4"] if seen.written[at, i] else []))


def _size(stream: IO[str]) -> os.terminal_size:
    """Returns (columns, lines) of the terminal of `stream`, which may not be that of standard output."""
    try:
        size = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):  # not a terminal, or not even a file
        return shutil.get_terminal_size()
    return size if size.columns > 0 and size.lines > 0 else os.terminal_size((80, 24))  # a pty without a size
