"""Renders conversations with the tokenizer's chat template and cuts the text where answers begin and end.

An answer is what the template writes after the prompt that generation starts from. Usually the rendering with the
answer begins with that prompt, and is cut there. Some templates render the prompt differently once there is an answer.
Mistral's move the system text to the last user turn. Those of R1 distillations open a thought in the generation prompt
and remove thoughts from answers. In these cases the prompt is still the generation prompt, and the answer is what the
template writes for it.
"""

import itertools
import json
import re

from transformers import PreTrainedTokenizerBase

from difflm_jax.data.keys import Notes, note
from difflm_jax.data.messages import Conversation, Message
from difflm_jax.data.rows import RowError
from difflm_jax.data.template_forms import TEMPLATE_ERRORS, adapted
from difflm_jax.errors import UserError, one_line

ANSWERS = ("last", "all")

_OPEN_THOUGHT = re.compile(r"<think>\s*$")
_NO_THOUGHT = re.compile(r"<think>\s*</think>\s*$")
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_THOUGHT_END = "</think>"
_SHARED_END = 8  # characters that a prompt and the text before its answer must share
_CHANGED = "the chat template changes earlier turns, or the prompt, once there is an answer"


class PromptChangedError(RowError):
    """The template renders the prompt differently once there is an answer."""


def render_answers(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, answers: str, notes: Notes | None = None
) -> list[tuple[str, ...]]:
    """Renders `conversation` up to its last trained answer in pieces: prompt, answer, text up to the next, ...

    With `answers="last"` only the last trained answer is a piece of its own, with "all" every one is. The result is
    one tuple of pieces. With "all" it is one per answer if the template changes earlier turns as the conversation
    grows. An assistant turn at the very beginning is not an answer, and one in `conversation.untrained` is context.
    `notes` counts what the template does not show. Raises `RowError`.
    """
    turns = _trained_turns(conversation, answers)
    try:
        texts = [_pieces(tokenizer, conversation, turns)]
    except PromptChangedError:
        if len(turns) == 1:
            raise
        texts = [_pieces(tokenizer, conversation, [i]) for i in turns]
        note(notes, "the chat template changes earlier turns: one example per answer")
    if notes is not None:
        _note_hidden(conversation, turns, texts, notes)
    return texts


def render_joined(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, answers: str) -> tuple[str, ...]:
    """`render_answers` as one tuple of pieces. Raises `RowError` if there would be several."""
    try:
        return _pieces(tokenizer, conversation, _trained_turns(conversation, answers))
    except PromptChangedError as error:
        if answers == "last":
            raise
        raise RowError(f"{error}; answers='last' may do") from error


def render_whole(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> tuple[str]:
    """Renders all of `conversation` as one piece that holds no answer."""
    text = render(tokenizer, conversation, len(conversation.messages), add_generation_prompt=False)
    _check_complete(conversation, len(conversation.messages), text)
    return (text.rstrip(),)


def render_prompt(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """Renders a conversation with the generation prompt at its end."""
    text = render(tokenizer, conversation, len(conversation.messages), add_generation_prompt=True)
    _check_complete(conversation, len(conversation.messages), text)
    return text


def render(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, count: int, add_generation_prompt: bool
) -> str:
    """Renders the first `count` messages, in the forms that the template takes. Raises `RowError`."""
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, which conversations need; name one with chat_template, use a chat "
            "model, or rows of plain text"
        )
    template = tokenizer.get_chat_template(tools=conversation.tools)
    messages = [adapted(tokenizer, template, message) for message in conversation.messages[:count]]
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=conversation.tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **conversation.template_arguments,
        )
    except TEMPLATE_ERRORS as error:
        raise RowError(f"the chat template refuses it ({one_line(error)})") from error


def _trained_turns(conversation: Conversation, answers: str) -> list[int]:
    if answers not in ANSWERS:
        raise UserError(f"answers={answers!r}: must be one of {', '.join(ANSWERS)}")
    turns = [i for i, message in enumerate(conversation.messages) if i and message["role"] == "assistant"]
    if not turns:
        raise RowError("no assistant turn answers anything")
    trained = [i for i in turns if i not in conversation.untrained]
    if not trained:
        raise RowError("no answer is to be trained: each has weight 0")
    return trained[-1:] if answers == "last" else trained


def _pieces(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, turns: list[int]) -> tuple[str, ...]:
    """Renders the text up to the last of `turns`, cut before and after each of them."""
    last = turns[-1]
    text = render(tokenizer, conversation, last + 1, add_generation_prompt=False)
    pieces: list[str] = []
    position = 0
    for i in turns:
        prompt = render(tokenizer, conversation, i, add_generation_prompt=True)
        upto = text if i == last else render(tokenizer, conversation, i + 1, add_generation_prompt=False)
        upto = upto.rstrip()
        if upto.startswith(prompt) and text.startswith(upto):
            answer = upto[len(prompt) :]
            pieces += [text[position : len(prompt)], answer]
            position = len(upto)
        elif len(turns) > 1:
            raise PromptChangedError(_CHANGED)
        else:
            answer = _moved_answer(tokenizer, conversation, i, prompt, upto)
            pieces = [prompt, answer]
        _check_answer(conversation.messages[i], i, answer, tokenizer.eos_token)
    _check_complete(conversation, last + 1, "".join(pieces))
    return tuple(pieces)


def _moved_answer(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, i: int, prompt: str, text: str
) -> str:
    """Finds answer `i` in a `text` that does not begin with `prompt`."""
    thought = _OPEN_THOUGHT.search(prompt) or _NO_THOUGHT.search(prompt)
    bare_prompt = prompt[: thought.start()] if thought else prompt
    before = render(tokenizer, conversation, i, add_generation_prompt=False)
    header = bare_prompt[len(_shared_start(bare_prompt, before)) :]
    start = _answer_start(_head(tokenizer, conversation, i, text), header, bare_prompt)
    if start is None:
        raise PromptChangedError(f"{_CHANGED}, and the answer is not found in it")
    answer = text[start:]
    if not thought:
        return answer
    if _THOUGHT_END in thought[0]:
        return _THOUGHT.sub("", answer, count=1) if _THOUGHT.match(answer) else answer
    if answer.lstrip().startswith("<think>"):
        return answer.lstrip().removeprefix("<think>").lstrip()
    return _thought_of(conversation.messages[i]) + answer


def _head(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, i: int, text: str) -> str:
    """Returns the part of `text` before the content of message `i`: what stays the same if that content changes."""
    other = "Y" if conversation.messages[i]["content"].lstrip().startswith("Z") else "Z"
    messages = [*conversation.messages[:i], {"role": "assistant", "content": other}]
    changed = Conversation(messages, conversation.tools, template_arguments=conversation.template_arguments)
    return _shared_start(text, render(tokenizer, changed, i + 1, add_generation_prompt=False))


def _answer_start(head: str, header: str, prompt: str) -> int | None:
    """Where the answer begins: after the last assistant header, else at the end of `head` if `prompt` ends like it."""
    if header.strip() and (found := head.rfind(header)) >= 0:
        return found + len(header)
    bare, bare_prompt = head.rstrip(), prompt.rstrip()
    if not bare or not bare_prompt.endswith(bare[-_SHARED_END:]):
        return None
    space = _shared_start(head[len(bare) :], prompt[len(bare_prompt) :])
    return len(bare) + len(space)


def _shared_start(a: str, b: str) -> str:
    """The longest common prefix."""
    end = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:end]


def _thought_of(message: Message) -> str:
    """The thought of an answer, with its end tag, for a prompt that has already opened it; may be empty."""
    thought, end, _ = message["content"].rpartition(_THOUGHT_END)
    if end:
        return thought.lstrip().removeprefix("<think>").lstrip() + end
    thought = message.get("reasoning_content", "").strip("\n")
    return f"{thought}\n{_THOUGHT_END}\n\n"


def _check_answer(message: Message, i: int, answer: str, eos_token: str | None) -> None:
    if not message["content"].strip() and not message.get("tool_calls"):
        raise RowError(f"the answer (message {i}) is empty")
    said = message["content"].rpartition(_THOUGHT_END)[2].strip()
    if not answer.removesuffix(eos_token or "").strip() or not _shows(answer, said):
        raise RowError(f"the chat template shows nothing of the answer (message {i})")


def _check_complete(conversation: Conversation, count: int, text: str) -> None:
    """Raises `RowError` if the template has silently left out a message, a tool call or a tool."""
    for i, message in enumerate(conversation.messages[:count]):
        content = message["content"].strip()
        if message["role"] != "assistant" and not _shows(text, content):
            raise RowError(f"the chat template leaves out message {i} of role {message['role']!r}")
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                raise RowError(f"the chat template leaves out the tool call of message {i}")
    for tool in conversation.tools or ():
        name = tool["function"].get("name") if isinstance(tool["function"], dict) else None
        if isinstance(name, str) and name not in text:
            raise RowError("the chat template leaves out the tools")


def _shows(text: str, content: str) -> bool:
    """Whether `text` contains `content`, verbatim or as JSON, the two forms in which templates write it."""
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text or json.dumps(content)[1:-1] in text


def _note_hidden(conversation: Conversation, turns: list[int], texts: list[tuple[str, ...]], notes: Notes) -> None:
    """Notes names and thoughts of trained answers that the template does not show, and thoughts that it adds."""
    text = "".join(itertools.chain(*texts))
    answers = [conversation.messages[i] for i in turns]
    thoughts = [_own_thought(answer) for answer in answers]
    if any(thought and not _shows(text, thought) for thought in thoughts):
        note(notes, "reasoning_content is not shown by the chat template")
    if _OPEN_THOUGHT.search(texts[-1][-2]) and not thoughts[-1]:
        note(notes, "an answer without a thought gets an empty one, which the chat template opens")
    names = (message.get("name") for message in conversation.messages[: turns[-1] + 1])
    if any(isinstance(name, str) and name not in text for name in names):
        note(notes, "name of messages is not shown by the chat template")


def _own_thought(message: Message) -> str:
    """The stripped thought of a message, from its field or its content."""
    inline = message["content"].rpartition(_THOUGHT_END)[0].strip().removeprefix("<think>")
    return message.get("reasoning_content", "").strip() or inline.strip()
