"""From messages and texts to tokens with an answer mask, using the tokenizer's own chat template.

`templates` finds where an answer begins and ends in the text. The prompt is tokenised on its own, as in generation, so
training sees exactly the same prompt tokens.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from difflm_jax.data.messages import Conversation, Message, check_unicode, parse_messages, parse_template_arguments
from difflm_jax.data.templates import ANSWERS, render_joined, render_prompt
from difflm_jax.errors import UserError

__all__ = ["ANSWERS", "OVERLONG", "Encoded", "cut", "encode_chat", "encode_prompt", "encode_rendered", "encode_texts"]

OVERLONG = ("cut", "drop")

# Characters before an answer that decide how its first token is cut; pre-tokenisers look no further back.
_CONTEXT_CHARS = 32


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A row: `tokens` [L] int32, and `answer_mask` [L] bool, true on the tokens of answers and their end tokens."""

    tokens: np.ndarray
    answer_mask: np.ndarray

    @property
    def prompt_length(self) -> int:
        """Index of the first answer token; the length of the row if it has no answer."""
        return int(self.answer_mask.argmax()) if self.answer_mask.any() else len(self.tokens)

    def __getitem__(self, part: slice) -> "Encoded":
        return Encoded(self.tokens[part], self.answer_mask[part])


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    answers: str = "last",
    tools: Any = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> Encoded:
    """Tokenises a conversation and marks its last answer, or every answer with `answers="all"`.

    What follows the last answer is left out. Raises `RowError` if an answer is missing or empty, or if the template
    refuses the conversation or shows only part of it. With "all", it also raises `RowError` if the template changes
    earlier turns. Raises `UserError` for a tokenizer without a chat template or EOS token.
    """
    conversation = _conversation(messages, tools, template_arguments)
    rendered = render_joined(tokenizer, conversation, answers)
    check_unicode("".join(rendered))
    return encode_rendered(tokenizer, [rendered])[0]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Any = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """Returns the prompt tokens [P] int32 of a conversation: those that `encode_chat` has before the last answer."""
    text = render_prompt(tokenizer, _conversation(messages, tools, template_arguments))
    check_unicode(text)
    return np.asarray(_tokenize(tokenizer, [text])[0], np.int32)


def _conversation(messages: Sequence[Message], tools: Any, arguments: Mapping[str, Any] | None) -> Conversation:
    conversation = parse_messages(messages, tools)
    return dataclasses.replace(conversation, template_arguments=parse_template_arguments(arguments or {}))


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], ends: Sequence[bool], begins: Sequence[bool]
) -> list[Encoded]:
    """Tokenises plain texts, with no token marked as answer.

    A BOS that the tokenizer adds is kept where `begins` is true; an EOS is appended where `ends` is true.
    """
    eos_id = tokenizer.eos_token_id
    encoded = []
    for ids, is_end, is_begin in zip(_tokenize(tokenizer, texts, add_special_tokens=True), ends, begins, strict=True):
        if ids and not is_begin and ids[0] == tokenizer.bos_token_id:
            ids = ids[1:]
        if ids and eos_id is not None:
            # Some tokenizers add EOS themselves. Keep exactly one if the text ends here, and none if it continues.
            ids = (ids[:-1] if ids[-1:] == [eos_id] else ids) + [eos_id] * is_end
        encoded.append(Encoded(np.asarray(ids, np.int32), np.zeros(len(ids), bool)))
    return encoded


def encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: Sequence[tuple[str, ...]]) -> list[Encoded]:
    """Tokenises many conversations that `templates` rendered. A row that ends in an answer ends in EOS.

    The templates of Qwen, SmolLM2, Llama 3 and Mistral end an answer with the tokenizer's EOS (`<|im_end|>`,
    `<|eot_id|>`, `</s>`). If a template does not (ChatML on a base model whose EOS is `<|endoftext|>`), EOS is added
    after the last answer, because generation stops at it.
    """
    texts: list[str] = []
    for pieces in rendered:
        texts.append(pieces[0])
        for before, piece in itertools.pairwise(pieces):
            texts += [before[-_CONTEXT_CHARS:], before[-_CONTEXT_CHARS:] + piece]
    ids = iter(_tokenize(tokenizer, texts))
    return [_assemble(tokenizer, pieces, ids) for pieces in rendered]


def _assemble(tokenizer: PreTrainedTokenizerBase, pieces: tuple[str, ...], ids: Iterator[list[int]]) -> Encoded:
    """Joins the token ids of `pieces` into one row.

    `ids` yields the ids of the first piece, then two lists per later piece: its context, and context plus piece. The
    context is needed because some tokenizers mark the beginning of a text. If a token would span the seam, the piece
    is tokenised alone.
    """
    parts = [next(ids)]
    for piece in pieces[1:]:
        context, together = next(ids), next(ids)
        seam = len(context)
        parts.append(together[seam:] if together[:seam] == context else _tokenize(tokenizer, [piece])[0])
    if len(parts) % 2 == 0 and parts[-1][-1:] != [_eos_id(tokenizer)]:
        parts[-1] = [*parts[-1], _eos_id(tokenizer)]
    is_answer = np.repeat(np.arange(len(parts)) % 2 == 1, [len(part) for part in parts])
    return Encoded(np.asarray([i for part in parts for i in part], np.int32), is_answer)


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so no answer could end; set eos_token in its config")
    return tokenizer.eos_token_id


def windows(encoded: Encoded, max_length: int) -> list[Encoded]:
    """Splits a long text into consecutive rows of at most `max_length` tokens."""
    return [encoded[start : start + max_length] for start in range(0, len(encoded.tokens), max_length)]


def cut(encoded: Encoded, max_length: int, overlong: str = "cut") -> Encoded | None:
    """Cuts `encoded` to `max_length` tokens and keeps part of an answer if it has any; None if it is dropped.

    If a whole prompt leaves half of `max_length` to the answer, only the tail is cut. Otherwise the prompt is cut from
    the left until the answer has that half, or all it needs. In a row with several answers, everything from the first
    one on is treated as one answer. `overlong="drop"` returns None for any row that is too long.
    """
    length = len(encoded.tokens)
    if length <= max_length:
        return encoded
    if overlong == "drop":
        return None
    if overlong != "cut":
        raise UserError(f"overlong={overlong!r}: must be one of {', '.join(OVERLONG)}")
    prompt = encoded.prompt_length
    if prompt == length:
        return encoded[:max_length]
    answer_kept = min(length - prompt, max(max_length - prompt, (max_length + 1) // 2))
    kept = encoded[prompt + answer_kept - max_length : prompt + answer_kept]
    return kept[: int(np.flatnonzero(kept.answer_mask)[-1]) + 1]  # a row must not end in half a question


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special_tokens: bool = False
) -> list[list[int]]:
    """Returns the token ids of each text. Templates spell out special tokens, so none is added by default."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
