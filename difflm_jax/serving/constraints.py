"""Converts `response_format`, `tool_choice`, `diffusion.regex` or `diffusion.choice` to the grammar of an answer."""

import json
from collections.abc import Sequence

from difflm_jax.errors import UserError
from difflm_jax.sampling.grammar.grammar import Grammar
from difflm_jax.serving.schemas import BadRequestError, ChatRequest, CompletionRequest, NamedTool, ResponseFormat, Tool


def grammar_of(body: ChatRequest | CompletionRequest) -> Grammar | None:
    """Returns the grammar of a body; None: any text. Raises `BadRequestError` for two grammars or an invalid one."""
    asked = {name: make for name, make in _asked(body).items() if make is not None}
    if len(asked) > 1:
        raise BadRequestError(f"{' and '.join(asked)} are two grammars for one answer: give one", next(iter(asked)))
    for name, make in asked.items():
        try:
            return make()
        except UserError as error:
            raise BadRequestError(f"{name}: {error}", name) from error
    return None


def _asked(body: ChatRequest | CompletionRequest) -> dict:
    """Maps each field to a function that builds its grammar; None if the field is not set."""
    regex, choice = body.diffusion.regex, body.diffusion.choice
    asked = {
        "diffusion.regex": None if regex is None else lambda: Grammar.regex(regex),
        "diffusion.choice": None if choice is None else lambda: Grammar.choice(choice),
    }
    if isinstance(body, ChatRequest):
        form = body.response_format
        asked["response_format"] = None if form is None or form.type == "text" else lambda: _of_format(form)
        asked["tool_choice"] = (lambda: _of_calls(body)) if _must_call(body) else None
        if any(tool.function.strict for tool in body.tools or ()) and not _must_call(body):
            raise BadRequestError("tools: strict is kept to where a call is required: tool_choice=required", "tools")
    return asked


def _must_call(body: ChatRequest) -> bool:
    return body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)


def _of_format(form: ResponseFormat) -> Grammar:
    if form.json_schema is None or form.json_schema.schema_ is None:
        return Grammar.json_object()
    return Grammar.json_schema(form.json_schema.schema_)


def _of_calls(body: ChatRequest) -> Grammar:
    """Returns the grammar of one or several tool calls, in the form that `tools.parse_calls` parses."""
    tools: Sequence[Tool] = body.tools or ()
    if isinstance(body.tool_choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == body.tool_choice.function.name]
    schemas = [_schema(tool) for tool in tools]
    call = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    single = isinstance(body.tool_choice, NamedTool) or body.parallel_tool_calls is False
    start = "call" if single else 'call ("\\n" call)*'
    return Grammar.lark(
        f'start: {start}\ncall: "<tool_call>\\n" body "\\n</tool_call>"\nbody: %json {json.dumps(call)}\n'
    )


def _schema(tool: Tool) -> dict:
    """Returns the JSON schema of a call."""
    function = tool.function
    return {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            "arguments": function.parameters or {"type": "object"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
