"""Server options: limits, defaults and the API key. Requests cannot exceed the limits."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Limits and defaults of a server; see the flags of `difflm serve`."""

    api_key: str = ""  # "": no key is required
    hosts: tuple[str, ...] = ("*",)  # accepted values of the Host header
    max_new_tokens: int = 256  # default length of an answer
    max_length: int = 4096  # tokens of prompt and answer together
    max_answers: int = 16  # n times prompts of one request
    max_body_bytes: int = 2 << 20
    body_seconds: float = 30.0  # for the whole body to arrive
    template_seconds: float = 2.0  # for the chat template to run
    time_limit: float = 300.0  # seconds per request, including time in the queue
    drain_seconds: float = 30.0  # for running requests after SIGTERM
    steps: int | None = None  # default number of forward passes; None: one per token
    block_length: int | None = None
    sampling: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # default sampling options; requests may override them
