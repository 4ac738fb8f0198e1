"""The bytes of a model's tokens, for any fast tokenizer: byte-level BPE, SentencePiece with byte fallback, bytes."""

import dataclasses
import functools
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from difflm_jax.errors import UserError
from difflm_jax.sampling.grammar.bits import words_of


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """The bytes of `size` tokens, as grammars see them. Special tokens have none; EOS tokens end a sequence."""

    parser_tokens: Any  # llguidance's view of the tokenizer, at least `size` tokens
    size: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, size: int, eos_token_ids: tuple[int, ...]) -> "Vocabulary":
        """Returns the first `size` tokens of a Hugging Face tokenizer, from a small cache. Raises `UserError`."""
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
        """Returns (bytes, tokens), int64: the bytes that have a token of their own, and these tokens."""
        tokens = {text[0]: token for token, text in reversed(list(enumerate(self.texts))) if len(text) == 1}
        return np.array([*tokens], np.int64), np.array([*tokens.values()], np.int64)

    @property
    def words(self) -> int:
        """Number of uint32 words in a mask."""
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
    known = max(size, len(tokenizer))  # an embedding may have more rows than the tokenizer, or lack unused added tokens
    tokens = llguidance.LLTokenizer(text.to_str(), n_vocab=known, eos_token=list(eos_token_ids))
    return Vocabulary(tokens, size, eos_token_ids)
