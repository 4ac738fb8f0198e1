"""Adapts messages to a chat template: the key of thoughts, and the form of tool-call arguments."""

import functools
import json
import re
from pathlib import Path

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase

from difflm_jax.data.messages import Message
from difflm_jax.errors import UserError, one_line

_PROBE_CALL = {"id": "call00001", "type": "function", "function": {"name": "probe_name", "arguments": {"key": "v"}}}
_GENERATION_MARK = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # a tag of transformers, not of Jinja
TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_TEXT_ARGUMENTS: dict[str, bool] = {}  # found so far, by template


def read_template(value: str) -> str:
    """Returns the chat template that the key `chat_template` gives, as Jinja text or as the name of a file.

    Raises `UserError` for a file that cannot be read, and for text that is not Jinja.
    """
    text = value
    if "{" not in value:
        try:
            text = Path(value).expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"chat_template={value}: cannot be read ({one_line(error)})") from error
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION_MARK.sub("", text))
    except jinja2.TemplateError as error:
        raise UserError(f"chat_template: is not a Jinja template ({one_line(error)})") from error
    return text


# Variables that transformers passes to a template; an argument of the same name would replace them.
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now")


@functools.lru_cache(maxsize=64)
def template_arguments(template: str) -> frozenset[str]:
    """Returns the variables of a chat template that only the caller can set, such as `enable_thinking`."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    read = jinja2.meta.find_undeclared_variables(environment.parse(_GENERATION_MARK.sub("", template)))
    return frozenset(name for name in read - {*environment.globals, *_GIVEN} if not name.endswith("_token"))


def adapted(tokenizer: PreTrainedTokenizerBase, template: str, message: Message) -> Message:
    """Returns `message` with its thought under the key that the template reads, and its calls in the form it takes."""
    if "reasoning_content" in message and (key := _thought_key(template)) != "reasoning_content":
        message = {key if name == "reasoning_content" else name: value for name, value in message.items()}
    if message.get("tool_calls") and _takes_text(tokenizer, template):
        message = _with_text(message)
    return message


@functools.lru_cache(maxsize=64)
def _thought_key(template: str) -> str:
    for key in ("reasoning_content", "reasoning", "thinking"):
        if re.search(rf"(?:\.|\[['\"]|['\"]){key}\b", template):
            return key
    return "reasoning_content"


def _with_text(message: Message) -> Message:
    """Returns `message` with the arguments of its tool calls as JSON text."""
    calls = (call["function"] for call in message["tool_calls"])
    texts = [function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)} for function in calls]
    pairs = zip(message["tool_calls"], texts, strict=True)
    return message | {"tool_calls": [call | {"function": function} for call, function in pairs]}


def _takes_text(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the template needs tool-call arguments as JSON text. Tried once per template on a small conversation.

    Templates that concatenate the arguments refuse an object; those that print it would show its Python repr.
    """
    if template not in _TEXT_ARGUMENTS:
        call = {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}
        shown = [_shows_call(tokenizer, template, form) for form in (call, _with_text(call))]
        _TEXT_ARGUMENTS[template] = shown == [False, True]
    return _TEXT_ARGUMENTS[template]


def _shows_call(tokenizer: PreTrainedTokenizerBase, template: str, call: Message) -> bool:
    messages = [{"role": "user", "content": "q"}, call]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except TEMPLATE_ERRORS:
        return False
    return _PROBE_CALL["function"]["name"] in text and "{'key'" not in text and '{\\"key' not in text
