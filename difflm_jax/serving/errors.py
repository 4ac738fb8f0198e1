"""Errors in OpenAI's format: a status, and an object with message, type, param and code."""

import math
from typing import Any

from starlette.responses import JSONResponse

from difflm_jax.errors import UserError
from difflm_jax.serving.requests import Busy, Finished
from difflm_jax.serving.schemas import BadRequestError

_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
_FINAL = (408, 500, 504)  # OpenAI's clients would retry these statuses, at the same cost


class RefusedError(Exception):
    """Raised to answer a request with an error of status `status`."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def failure(finished: Finished) -> RefusedError | None:
    """Returns the error of a request that ended without an answer; None if it has one."""
    if finished.finish_reason == "cancelled":
        return RefusedError(504, finished.error or "the request was cancelled", "timeout")
    if finished.finish_reason == "failed":
        return RefusedError(500, "the request failed; the server's log says why", "internal_error")
    return None


def error_object(error: RefusedError) -> dict[str, Any]:
    """Returns the body of an error, which is also the data of the event that ends a stream."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: Exception) -> JSONResponse:
    """Returns the response to an exception of a handler."""
    headers: dict[str, str] = {}
    if isinstance(error, Busy):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        error = RefusedError(429, str(error), "queue_full")
    elif isinstance(error, BadRequestError):
        error = RefusedError(400, str(error), error.code, error.param)
    elif isinstance(error, UserError):
        error = RefusedError(400, str(error))
    elif not isinstance(error, RefusedError):
        error = RefusedError(500, "internal error; the server's log says why", "internal_error")
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="difflm", charset="UTF-8"'
    if error.status in _FINAL:
        headers["x-should-retry"] = "false"
    return JSONResponse(error_object(error), error.status, headers)
