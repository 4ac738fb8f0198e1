"""The tokens of a model as bytes, for any fast tokenizer: byte-level BPE, SentencePiece with byte fallback, bytes."""

import dataclasses
import functools
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from difflm_jax.errors import UserError
from difflm_jax.sampling.grammar.bits import words_of


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """`size` tokens, of which a grammar sees the bytes; special ones have none, but for the ends of a sequence."""

    parser_tokens: Any  # llguidance's view of the tokenizer, at least `size` tokens
    size: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, size: int, eos_token_ids: tuple[int, ...]) -> "Vocabulary":
        """The first `size` tokens of a Hugging Face tokenizer; the last vocabularies are kept. Raises `UserError`."""
        return _vocabulary(tokenizer, size, tuple(eos_token_ids))

    @functools.cached_property
    def texts(self) -> list[bytes]:
        """The bytes of each token; b"" for special tokens."""
        tokens, known = self.parser_tokens, self.parser_tokens.vocab_size
        return [
            b"" if token >= known or tokens.is_special_token(token) else tokens.decode_bytes([token])
            for token in range(self.size)
        ]

    @functools.cached_property
    def own_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        """(bytes, their tokens): those that are a token of their own."""
        tokens = {text[0]: token for token, text in reversed(list(enumerate(self.texts))) if len(text) == 1}
        return np.array([*tokens], np.int64), np.array([*tokens.values()], np.int64)

    @property
    def words(self) -> int:
        """uint32 words of a mask."""
        return words_of(self.size)


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any, size: int, eos_token_ids: tuple[int, ...]) -> Vocabulary:
    try:
        import llguidance
    except ImportError as error:
        raise UserError("grammar: needs llguidance: pip install 'difflm_jax[serve]'") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"grammar: needs a tokenizer with a tokenizer.json, not {type(tokenizer).__name__}")
    if not eos_token_ids:
        raise UserError("grammar: the tokenizer has no end-of-sequence token, so no answer can end")
    backend = tokenizer.backend_tokenizer
    text = type(backend).from_str(backend.to_str())  # a copy: padding belongs to the user
    text.no_padding()
    text.no_truncation()
    known = max(size, len(tokenizer))  # a table may be longer than the tokenizer, or shorter by unused added tokens
    tokens = llguidance.LLTokenizer(text.to_str(), n_vocab=known, eos_token=list(eos_token_ids))
    return Vocabulary(tokens, size, eos_token_ids)
