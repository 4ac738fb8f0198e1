"""What an operator decides: limits, defaults and the key. Requests cannot widen any of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Limits and defaults of a server; see the flags of `difflm serve`."""

    api_key: str = ""  # "": none is asked for
    hosts: tuple[str, ...] = ("*",)  # values of the Host header that are answered
    max_new_tokens: int = 256  # of a request that names no length
    max_length: int = 4096  # tokens of prompt and answer together
    max_answers: int = 16  # n times prompts of one request
    max_body_bytes: int = 2 << 20
    body_seconds: float = 30.0  # for the whole body to arrive
    template_seconds: float = 2.0  # for the chat template to run
    time_limit: float = 300.0  # seconds of a request, waiting included
    drain_seconds: float = 30.0  # for running requests after SIGTERM
    steps: int | None = None  # forward passes of a request that names none; None: one for each place
    block_length: int | None = None
    sampling: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # options of decoding that requests may replace
