"""Messages -> tokens and answer mask, from what the tokenizer's own chat template renders.

A template says by its structure where an answer begins and ends: the conversation before it, rendered with the
generation prompt, is a prefix of the conversation with it; the rest is the answer, with the token that ends it.
Prompt and answer are tokenised apart at that boundary, so that training sees the very prompt tokens that generation
will. In a row of several answers the history behind the first is tokenised piece by piece likewise.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from difflm_jax.data.rows import Conversation, clean_messages
from difflm_jax.data.sources import RowError
from difflm_jax.errors import UserError, one_line

ANSWERS = ("last", "all")
_TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """`tokens` int32 [L] and `answer_mask` bool [L], True on the tokens of answers, the token that ends one included."""

    tokens: np.ndarray
    answer_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rendered:
    """Texts to be tokenised apart, each with whether it is an answer, and remarks on what the template did."""

    segments: tuple[tuple[str, bool], ...]
    special_tokens: bool = False  # whether the tokenizer adds its own (a template writes them itself)
    notes: tuple[str, ...] = ()


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], answers: str = "last", tools: list[Any] | None = None
) -> Encoded:
    """Renders and tokenises a conversation; the row ends with the end-of-sequence token of its last answer.

    `answers`: `last` trains the last assistant turn, `all` every one that answers something; what follows the last
    answer is cut off. Raises `RowError` for a conversation that has no answer or that the template cannot render
    faithfully, `UserError` for a tokenizer without a chat template.
    """
    conversation = Conversation(clean_messages(messages), tools)
    return encode(tokenizer, [render_chat(tokenizer, conversation, answers)])[0]


def encode_prompt(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> np.ndarray:
    """The tokens int32 [P] that generation answers: the conversation with the template's generation prompt."""
    prompt = _render(tokenizer, Conversation(clean_messages(messages), tools), None, generation_prompt=True)
    return encode(tokenizer, [Rendered(((prompt, False),))])[0].tokens


def encode_text(tokenizer: Any, text: str) -> Encoded:
    """A plain text as the tokenizer itself would encode it (with BOS where it adds one), without answers."""
    return encode(tokenizer, [render_text(text)])[0]


def render_text(text: str) -> Rendered:
    """A plain text; raises `RowError` for an empty one."""
    if not text.strip():
        raise RowError("the text is empty")
    return Rendered(((_unicode(text), False),), special_tokens=True)


def render_chat(tokenizer: Any, conversation: Conversation, answers: str = "last", required: bool = True) -> Rendered:
    """The pieces of a conversation, prompts and answers in turn; see `encode_chat`.

    Without `required` a conversation that has no answer is rendered whole.
    """
    messages = conversation.messages
    answered = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    if not answered and required:
        raise RowError(f"no assistant turn {'answers something' if messages[0]['role'] == 'assistant' else ''}".rstrip())
    if not answered:
        return Rendered(((_render(tokenizer, conversation, None), False),))
    if answers == "last":
        answered = answered[-1:]
    segments, done, notes = [], "", []
    for index in answered:
        prompt, answer, remarks = _answer(tokenizer, conversation, index)
        if not prompt.startswith(done):
            raise RowError("the chat template changes earlier answers as a conversation goes on; use answers='last'")
        segments += [(prompt[len(done) :], False), (answer, True)]
        done = prompt + answer
        notes += remarks
    _refuse_what_is_left_out(tokenizer, conversation, answered[-1] + 1, done)
    if not done.endswith(tokenizer.eos_token):
        segments.append((tokenizer.eos_token, True))
        notes.append(f"the end-of-sequence token {tokenizer.eos_token} is added: the chat template has another, or none")
    return Rendered(tuple(segments), notes=tuple(sorted(set(notes))))


def encode(tokenizer: Any, rows: Sequence[Rendered]) -> list[Encoded]:
    """Tokenises all pieces of `rows` at once. Raises nothing of its own: an empty row has no tokens."""
    ids: dict[bool, list[list[int]]] = {}
    for special in {row.special_tokens for row in rows}:
        texts = [text for row in rows if row.special_tokens == special for text, _ in row.segments]
        encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        ids[special] = iter(encoded["input_ids"])
    return [_join([(next(ids[row.special_tokens]), answer) for _, answer in row.segments]) for row in rows]


def cut(encoded: Encoded, max_length: int, overlong: str = "cut") -> Encoded | None:
    """The row with at most `max_length` tokens, of which some are an answer if any was; None to drop it.

    With P tokens before the first answer and A from there on: the prompt stays whole if half of `max_length`, or all
    A, are left behind it, and the tail is cut; otherwise the prompt loses its beginning until that much is left.
    Tokens behind the last answer that is left are cut as well.
    """
    length = len(encoded.tokens)
    if length <= max_length:
        return encoded
    if overlong == "drop":
        return None
    if not encoded.answer_mask.any():
        return Encoded(encoded.tokens[:max_length], encoded.answer_mask[:max_length])
    prompt = int(np.argmax(encoded.answer_mask))
    wanted = min(length - prompt, -(-max_length // 2))
    start = prompt - min(prompt, max_length - wanted)
    end = start + 1 + int(np.flatnonzero(encoded.answer_mask[start : start + max_length])[-1])
    return Encoded(encoded.tokens[start:end], encoded.answer_mask[start:end])


def windows(encoded: Encoded, max_length: int) -> list[Encoded]:
    """A row without answers, in consecutive windows of `max_length` tokens (the last may be shorter)."""
    starts = range(0, len(encoded.tokens), max_length)
    return [Encoded(encoded.tokens[i : i + max_length], encoded.answer_mask[i : i + max_length]) for i in starts]


def _answer(tokenizer: Any, conversation: Conversation, index: int) -> tuple[str, str, list[str]]:
    """The text before the answer at `index`, the answer with the token that ends it, and remarks."""
    message = conversation.messages[index]
    if not message["content"].strip() and not message.get("tool_calls"):
        raise RowError(f"message {index}: the answer is empty")
    prompt = _render(tokenizer, conversation, index, generation_prompt=True)
    whole = _render(tokenizer, conversation, index + 1)
    if not whole.startswith(prompt):
        raise RowError(
            f"message {index}: the chat template does not continue its own prompt with the answer (it changes earlier "
            "turns, or its generation prompt begins an answer differently)"
        )
    answer = whole[len(prompt) :].rstrip()
    body = answer.removesuffix(tokenizer.eos_token)
    if not body.strip():
        raise RowError(f"message {index}: the chat template renders nothing of the answer")
    if tokenizer.eos_token in body:
        raise RowError(f"message {index}: the answer holds the end-of-sequence token {tokenizer.eos_token}")
    dropped = message.get("reasoning_content", "").strip() not in answer
    return prompt, answer, ["the chat template leaves out reasoning"] if dropped else []


def _refuse_what_is_left_out(tokenizer: Any, conversation: Conversation, stop: int, rendered: str) -> None:
    """Raises `RowError` where the template silently skips a tool call, or turns of a role that it does not know."""
    messages = conversation.messages[:stop]
    for index, message in enumerate(messages):
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in rendered:
                raise RowError(f"message {index}: the chat template leaves out tool calls")
    roles = {message["role"]: index for index, message in enumerate(messages) if message["content"]}
    whole = _render(tokenizer, conversation, stop) if roles.keys() & {"tool", "developer", "function"} else ""
    for role in sorted(roles.keys() & {"tool", "developer", "function"}):
        changed = list(messages)
        changed[roles[role]] = {**messages[roles[role]], "content": "?"}
        if _render(tokenizer, Conversation(changed, conversation.tools), None) == whole:
            raise RowError(f"message {roles[role]}: the chat template leaves out the role {role}")


def _render(tokenizer: Any, conversation: Conversation, stop: int | None, generation_prompt: bool = False) -> str:
    """The first `stop` messages as text, by the sandboxed template."""
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, so that conversations cannot be rendered; use rows of plain `text`, "
            "or a tokenizer with a chat_template"
        )
    try:
        text = tokenizer.apply_chat_template(
            conversation.messages[:stop],
            tools=conversation.tools,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except _TEMPLATE_ERRORS as error:
        raise RowError(f"the chat template fails ({one_line(error)})") from error
    return _unicode(text)


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("invalid Unicode (a lone surrogate, as in \"\\ud800\")") from error
    return text


def _join(pieces: list[tuple[list[int], bool]]) -> Encoded:
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids, _ in pieces])
    return Encoded(tokens, np.repeat([answer for _, answer in pieces], [len(ids) for ids, _ in pieces]))
