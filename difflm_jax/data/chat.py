"""From messages and texts to tokens, with the answers marked, by the tokenizer's own chat template.

Where an answer begins is read off the template itself: the conversation before it, rendered with the generation
prompt, must be the beginning of the conversation with it. What follows is the answer, up to and including its
end-of-turn token. The prompt is tokenised alone, as generation does it, so training sees exactly its tokens.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from difflm_jax.data.formats import Conversation, Message, parse_messages
from difflm_jax.data.sources import RowError
from difflm_jax.errors import UserError, one_line

ANSWERS = ("last", "all")
OVERLONG = ("cut", "drop")

# Characters before an answer that decide how its first token is cut; pre-tokenisers look no further back.
_CONTEXT_CHARS = 32


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One row: `tokens` [L] int32, and `answer_mask` [L] bool, true on the tokens of answers and their ends."""

    tokens: np.ndarray
    answer_mask: np.ndarray

    @property
    def prompt_length(self) -> int:
        """Index of the first token of an answer; the length where there is no answer."""
        return int(self.answer_mask.argmax()) if self.answer_mask.any() else len(self.tokens)

    def __getitem__(self, part: slice) -> "Encoded":
        return Encoded(self.tokens[part], self.answer_mask[part])


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answers: str = "last", tools: Any = None
) -> Encoded:
    """Tokens of a conversation with its last answer marked, or with `answers="all"` every one.

    What follows the last answer is left out. Raises `RowError` for a conversation without an answer, with an empty
    one, or which the template refuses, shows only in part, or changes as it goes on; `UserError` for a tokenizer
    without a chat template or EOS token.
    """
    return encode_rendered(tokenizer, [render_answers(tokenizer, parse_messages(messages, tools), answers)])[0]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Any = None) -> np.ndarray:
    """[P] int32 tokens of a conversation that waits for an answer: what `encode_chat` has before the last answer."""
    conversation = parse_messages(messages, tools)
    text = _render(tokenizer, conversation, len(conversation.messages), add_generation_prompt=True)
    _check_complete(conversation, len(conversation.messages), text)
    return np.asarray(_tokenize(tokenizer, [text])[0], np.int32)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, ends: bool = True) -> Encoded:
    """Tokens of a plain text as the tokenizer makes them, with its BOS if it adds one; EOS follows if the text `ends`.

    Nothing of it is an answer.
    """
    return encode_texts(tokenizer, [text], [ends])[0]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], ends: Sequence[bool]) -> list[Encoded]:
    """`encode_text` of many texts at once."""
    eos_id = tokenizer.eos_token_id
    encoded = []
    for ids, is_end in zip(_tokenize(tokenizer, texts, add_special_tokens=True), ends, strict=True):
        if ids and eos_id is not None:
            # A tokenizer may add EOS of its own accord; a text that goes on has none, one that ends has one.
            ids = (ids[:-1] if ids[-1:] == [eos_id] else ids) + [eos_id] * is_end
        encoded.append(Encoded(np.asarray(ids, np.int32), np.zeros(len(ids), bool)))
    return encoded


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as text, in pieces: a prompt, an answer, what lies between, an answer and so on."""

    pieces: tuple[str, ...]


def render_answers(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, answers: str) -> Rendered:
    """The text of `conversation` up to its last answer, cut at its last answer or at all of them; see `encode_chat`.

    An assistant turn that nothing precedes answers nothing and is context.
    """
    if answers not in ANSWERS:
        raise UserError(f"answers={answers!r}: must be one of {', '.join(ANSWERS)}")
    turns = [i for i, message in enumerate(conversation.messages) if i and message["role"] == "assistant"]
    if not turns:
        raise RowError("no assistant turn answers anything")
    text = _render(tokenizer, conversation, turns[-1] + 1, add_generation_prompt=False)
    _check_complete(conversation, turns[-1] + 1, text)
    pieces, position = [], 0
    for i in turns[-1:] if answers == "last" else turns:
        prompt = _render(tokenizer, conversation, i, add_generation_prompt=True)
        upto = text if i == turns[-1] else _render(tokenizer, conversation, i + 1, add_generation_prompt=False)
        upto = upto.rstrip()
        if not (upto.startswith(prompt) and text.startswith(upto)):
            raise RowError(
                "the chat template changes earlier turns, or the prompt, once there is an answer"
                + ("; answers='last' may do" if answers == "all" and len(turns) > 1 else "")
            )
        _check_answer(conversation.messages[i], i, upto[len(prompt) :], tokenizer.eos_token)
        pieces += [text[position : len(prompt)], upto[len(prompt) :]]
        position = len(upto)
    return Rendered(tuple(pieces))


def render_whole(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Rendered:
    """The text of all of `conversation`, nothing of it an answer."""
    text = _render(tokenizer, conversation, len(conversation.messages), add_generation_prompt=False)
    _check_complete(conversation, len(conversation.messages), text)
    return Rendered((text.rstrip(),))


def encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered]) -> list[Encoded]:
    """Tokens of many conversations at once. A row that ends in an answer ends in EOS.

    Templates of Qwen, SmolLM2, Llama 3 and Mistral end an answer with the tokenizer's EOS (`<|im_end|>`,
    `<|eot_id|>`, `</s>`). Where one does not (ChatML on a base model whose EOS is `<|endoftext|>`), EOS is put behind
    the last answer, since it is where generation stops.
    """
    texts: list[str] = []
    for row in rendered:
        texts.append(row.pieces[0])
        for before, piece in zip(row.pieces, row.pieces[1:], strict=False):
            texts += [before[-_CONTEXT_CHARS:], before[-_CONTEXT_CHARS:] + piece]
    ids = iter(_tokenize(tokenizer, texts))
    return [_assemble(tokenizer, row, ids) for row in rendered]


def _assemble(tokenizer: PreTrainedTokenizerBase, row: Rendered, ids: Iterator[list[int]]) -> Encoded:
    """One row from the ids of its first piece and, for each later one, of its context without and with it.

    The tokens of a piece are those it has behind its context (a tokenizer that marks the beginning of a text would
    mark a piece that stands alone); where a token would span the seam, it is tokenised alone.
    """
    parts = [next(ids)]
    for piece in row.pieces[1:]:
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
    """A long text as consecutive rows of at most `max_length` tokens."""
    return [encoded[start : start + max_length] for start in range(0, len(encoded.tokens), max_length)]


def cut(encoded: Encoded, max_length: int, overlong: str = "cut") -> Encoded | None:
    """`encoded` within `max_length` tokens, always with some of an answer if it has any; None if it is dropped.

    The prompt is kept whole and the tail cut if that leaves the answer half of `max_length`; otherwise the prompt is
    cut from the left until the answer has that half, or all it needs. A row with several answers is treated as if
    all from the first on were one. `overlong="drop"` gives None for whatever is too long.
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
    return kept[: int(np.flatnonzero(kept.answer_mask)[-1]) + 1]  # no row ends in half a question


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special_tokens: bool = False
) -> list[list[int]]:
    """Token ids of each text. Templates write special tokens out, so by default none is added."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]


def _render(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, count: int, add_generation_prompt: bool
) -> str:
    """The text of the first `count` messages."""
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, which conversations need; use a chat model, or rows of plain text"
        )
    try:
        return tokenizer.apply_chat_template(
            conversation.messages[:count],
            tools=conversation.tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RowError(f"the chat template refuses it ({one_line(error)})") from error


def _check_answer(message: Message, i: int, answer: str, eos_token: str | None) -> None:
    if not message["content"].strip() and not message.get("tool_calls"):
        raise RowError(f"the answer (message {i}) is empty")
    if not answer.removesuffix(eos_token or "").strip():
        raise RowError(f"the chat template shows nothing of the answer (message {i})")


def _check_complete(conversation: Conversation, count: int, text: str) -> None:
    """Raises `RowError` if the template has silently left out a message, a tool call or a tool."""
    for i, message in enumerate(conversation.messages[:count]):
        content = message["content"].strip()
        if message["role"] not in ("user", "assistant") and not _shows(text, content):
            raise RowError(f"the chat template leaves out message {i} of role {message['role']!r}")
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                raise RowError(f"the chat template leaves out the tool call of message {i}")
    for tool in conversation.tools or ():
        name = tool["function"].get("name") if isinstance(tool["function"], dict) else None
        if isinstance(name, str) and name not in text:
            raise RowError("the chat template leaves out the tools")


def _shows(text: str, content: str) -> bool:
    """Templates write a content as it is, or as JSON."""
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text or json.dumps(content)[1:-1] in text
