"""Pydantic models of request bodies. Every field of OpenAI's API is supported, or refused by name.

No field is ignored. A field that a diffusion model cannot support is refused unless its value has no effect
(`REFUSED`). The error for an unknown key suggests the nearest name.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from difflm_jax.errors import UserError
from difflm_jax.sampling.options import Sampling
from difflm_jax.utils.flag_help import nearest

# Fields of OpenAI's API that are refused, with the values that are accepted all the same and the reason.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "frequency_penalty": ((None, 0), "not supported; diffusion.repetition_penalty is"),
    "presence_penalty": ((None, 0), "not supported; diffusion.repetition_penalty is"),
    "functions": ((None, []), "the older form of tools: use tools"),
    "function_call": ((None, "none", "auto"), "the older form of tool_choice: use tool_choice"),
    "audio": ((None,), "the model writes text only"),
    "modalities": ((None, ["text"]), "the model writes text only"),
    "prediction": ((None,), "not supported; complete with prompt and suffix instead"),
    "moderation": ((None,), "not supported"),
    "web_search_options": ((None,), "the model has no tools of its own"),
    "reasoning_effort": ((None,), "use chat_template_kwargs, if the chat template has such an argument"),
    "verbosity": ((None,), "not supported"),
    "store": ((None, False), "nothing is stored"),
    "service_tier": ((None, "auto", "default"), "there is one tier"),
    "prompt_cache_key": ((None,), "shared beginnings are found without it"),
    "prompt_cache_options": ((None,), "shared beginnings are found without it"),
    "prompt_cache_retention": ((None, "in_memory"), "shared beginnings are kept in memory only"),
    "chat_template": ((None,), "templates of requests are not run; the model has its own"),
}
_FORM = re.compile(r"str|int|float|bool|(list|dict|constrained|literal|function)\W.*|[A-Z]\w*")  # a member of a union
# Keys of a generation configuration of transformers that do not affect decoding.
_STAMPS = ("transformers_version", "_from_model_config")

Name = Annotated[str, Field(min_length=1, max_length=256)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Scalar = bool | Annotated[int, Field(ge=-(10**6), le=10**6)] | Annotated[str, Field(max_length=64)]


class _Strict(BaseModel):
    """A frozen model with strict JSON types. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class FunctionCall(_Strict):
    name: Name
    arguments: str


class ToolCall(_Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Strict):
    """A turn of a conversation. `developer` is the newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Name | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None


class Function(_Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(_Strict):
    name: Name


class NamedTool(_Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Strict):
    name: Name
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, which needs it")
        return self


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Diffusion(_Strict):
    """The options specific to diffusion models; `Diffusion` adds every field of `Sampling`."""

    steps: Annotated[int, Field(ge=1, le=10**6)] | None = None
    block_length: Annotated[int, Field(ge=1, le=10**6)] | None = None
    regex: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    choice: Annotated[list[Name], Field(min_length=1, max_length=256)] | None = None
    drafts: bool = False

    def sampling(self) -> dict[str, Any]:
        """Returns the fields of `Sampling` that are set. `sampling_options` checks their values."""
        own = _Diffusion.model_fields
        return {name: value for name, value in self if name not in own and value is not None}


Diffusion = create_model(
    "Diffusion",
    __base__=_Diffusion,
    **{field.name: (field.metadata["type"] | None, None) for field in dataclasses.fields(Sampling)},
)


class _Generation(_Strict):
    """The fields that chats and completions share."""

    model: Name | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Name | Annotated[list[Name], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = None
    user: Name | None = None  # goes to the log
    diffusion: Diffusion = Diffusion()
    generation_config: str | None = None  # of `transformers chat`

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        """Removes fields that have no effect from `given`. Raises `ValueError` for unsupported ones."""
        if not isinstance(given, dict):
            return given
        for name in given.keys() & REFUSED.keys():
            values, reason = REFUSED[name]
            if not any(given[name] == value and type(given[name]) in (type(value), float) for value in values):
                raise ValueError(f"{name}: {reason}")
        kept = {name: value for name, value in given.items() if name not in REFUSED}
        if isinstance(config := kept.get("generation_config"), str):
            kept = {**_of_transformers(config), **kept}
        if kept.get("diffusion", ...) is None:
            del kept["diffusion"]
        return kept

    @model_validator(mode="after")
    def _belongs_together(self) -> "_Generation":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: belongs to stream=true")
        if self.diffusion.drafts and not self.stream:
            raise ValueError("diffusion.drafts: belongs to stream=true")
        for name in ("temperature", "top_p"):
            inner = getattr(self.diffusion, name)
            if inner is not None and getattr(self, name) not in (None, inner):
                raise ValueError(f"{name} and diffusion.{name} differ: give one")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self) -> dict[str, Any]:
        """Returns the sampling options that are set."""
        own = {"temperature": self.temperature, "top_p": self.top_p}
        return {**self.diffusion.sampling(), **{name: value for name, value in own.items() if value is not None}}


class ChatRequest(_Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Annotated[dict[Name, Scalar], Field(max_length=16)] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    safety_identifier: Name | None = None  # goes to the log

    @model_validator(mode="after")
    def _of_a_chat(self) -> "ChatRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs=true")
        names = {tool.function.name for tool in self.tools or ()}
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: {self.tool_choice.function.name!r} is not one of the tools")
        if self.tool_choice not in (None, "none") and not names:
            raise ValueError("tool_choice: there are no tools")
        if self.parallel_tool_calls is not None and not names:
            raise ValueError("parallel_tool_calls: there are no tools")
        return self

    @property
    def length(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Generation):
    """`POST /v1/completions`. With a `suffix` it is an infilling: prompt, masks, suffix."""

    prompt: str | list[int] | list[str] | list[list[int]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _of_a_completion(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of: not supported beyond n; ask for n answers and choose")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: logprobs of a prompt are not defined for a diffusion model; leave one of them out")
        return self

    @property
    def length(self) -> int | None:
        return self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or tokens."""
        first = self.prompt[0] if self.prompt and not isinstance(self.prompt, str) else None
        return [self.prompt] if isinstance(self.prompt, str) or isinstance(first, int) else list(self.prompt)


class TokenizeRequest(_Strict):
    """`POST /v1/tokenize`: a text, or a conversation rendered by the chat template up to the next answer."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    chat_template_kwargs: Annotated[dict[Name, Scalar], Field(max_length=16)] | None = None
    add_special_tokens: bool = True  # to a prompt; a chat template writes its own
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _has_one_text(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, and not both")
        return self


def _of_transformers(text: str) -> dict[str, Any]:
    """Converts a generation configuration of transformers (JSON, as sent by `transformers chat`) to our fields."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ValueError("generation_config: is not the JSON of an object")
    config = {name: value for name, value in config.items() if value is not None and name not in _STAMPS}
    sampled = config.pop("do_sample", False)
    fields: dict[str, Any] = {"temperature": config.pop("temperature", 1.0) if sampled else 0.0}
    config.pop("temperature", None)
    if "max_new_tokens" in config:
        fields["max_tokens"] = config.pop("max_new_tokens")
    if "top_p" in config:
        fields["top_p"] = config.pop("top_p")
    inner = {name: config.pop(name) for name in ("top_k", "repetition_penalty") if name in config}
    if config:
        names = ", ".join(sorted(config)).encode("utf-8", "replace").decode()  # replaces halves of surrogate pairs
        raise ValueError(f"generation_config: {names} not supported")
    return fields | ({"diffusion": inner} if inner else {})


Body = TypeVar("Body", bound=BaseModel)


class BadRequestError(UserError):
    """An invalid request: a message of one line, and the name of the field."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code


def parse(kind: type[Body], body: bytes) -> Body:
    """Parses `body` as a request of `kind`. Raises `BadRequestError` that names the field and suggests a known one."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise _explained(kind, max(errors, key=lambda one: len(one["loc"]))) from error  # the closest union member


def _explained(kind: type[BaseModel], error: Mapping[str, Any]) -> BadRequestError:
    path = [str(part) for part in error["loc"] if not _FORM.fullmatch(str(part))]
    where = ".".join(path)
    if error["type"] == "extra_forbidden":
        return BadRequestError(f"{where}: unknown field (did you mean {_meant(kind, path)}?)", where)
    if error["type"] == "json_invalid":
        return BadRequestError(f"the body is not JSON ({error['ctx']['error']})")
    if error["type"] == "value_error":  # ours, which names the field
        said = str(error["ctx"]["error"])
        return BadRequestError(f"{where}: {said}" if where else said, where or said.partition(":")[0])
    return BadRequestError(f"{where or 'the body'}: {error['msg']}", where or None)


def _meant(kind: type[BaseModel], path: list[str]) -> str:
    """Returns the known field most similar to the last name of `path`."""
    if len(path) == 1:
        known = [*kind.model_fields]
        if "diffusion" in known:
            known += [f"diffusion.{name}" for name in Diffusion.model_fields]
        return nearest(path[0], known)
    here = kind
    for name in path[:-1]:
        inner = here.model_fields.get(name)
        models = _models(inner.annotation) if inner else []
        here = models[0] if models else here
    names = [field.alias or name for name, field in here.model_fields.items()]
    return ".".join([*path[:-1], nearest(path[-1], names)])


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Returns the pydantic models within a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models(inner)]
