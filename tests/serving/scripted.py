"""An engine with scripted answers, to test the server alone."""

import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from difflm_jax.serving.engine import EngineOptions
from difflm_jax.serving.requests import Finished, Request, Ticket


class ScriptedEngine:
    """Runs `script(ticket)` in a thread for each request; `tickets` has all of them."""

    def __init__(
        self, models: Mapping[str, Any], script: Callable[[Ticket], None], options: EngineOptions | None = None
    ):
        self.models, self.options = dict(models), options or EngineOptions()
        self._script, self.tickets, self.is_alive = script, [], True

    def submit(self, request: Request) -> Ticket:
        ticket = Ticket(request)
        self.tickets.append(ticket)
        threading.Thread(target=self._script, args=(ticket,), daemon=True).start()
        return ticket

    def stats(self) -> dict[str, int]:
        return {"ready": True, "waiting": 0}

    def close(self) -> None:
        for ticket in self.tickets:
            ticket.cancel("closed")

    def __enter__(self) -> "ScriptedEngine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def finished(tokens: Any, reason: str = "length", **fields: Any) -> Finished:
    """The end of a request of one token of a prompt."""
    tokens = np.asarray(tokens, np.int32)
    end = Finished(tokens, reason, prompt_tokens=1, completion_tokens=len(tokens), passes=len(tokens))
    return dataclasses.replace(end, **fields)
