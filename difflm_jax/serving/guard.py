"""Access control: the API key, the Host header, and the size and time limits of a body."""

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping

from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Receive, Scope, Send

from difflm_jax.serving.errors import RefusedError, error_response
from difflm_jax.serving.options import ServeOptions

# Routes that need no key: they only report whether the process is alive.
OPEN_ROUTES = ("/health",)


class Guard:
    """ASGI middleware for every route: a wrong Host is answered by 421, a missing or wrong key by 401.

    The Host is checked against DNS rebinding: a page of another site can point its own name to this machine. The key is
    sent as `Authorization: Bearer KEY`, or as the password of Basic authentication, which a browser prompts for.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions):
        self._app, self._hosts = app, options.hosts
        self._key = _digest(options.api_key.encode()) if options.api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rejects the request, or passes it on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        if "*" not in self._hosts and _host(headers.get(b"host", b"").decode("latin-1")) not in self._hosts:
            refusal = RefusedError(421, "this server does not answer to that Host", "invalid_host")
        elif self._key is not None and scope["path"] not in OPEN_ROUTES and not self._is_known(headers):
            refusal = RefusedError(401, "the API key is missing or wrong: Authorization: Bearer KEY", "invalid_api_key")
        else:
            return await self._app(scope, receive, send)
        await error_response(refusal)(scope, receive, send)

    def _is_known(self, headers: Mapping[bytes, bytes]) -> bool:
        scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
        given = credentials.strip()
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                given = b""
        elif scheme.lower() != b"bearer":
            given = b""
        return hmac.compare_digest(_digest(given), self._key)


def _digest(key: bytes) -> bytes:
    """Hashes a key, so that keys of any length compare in the same time."""
    return hashlib.sha256(key).digest()


def _host(header: str) -> str:
    """Returns the lowercase name in a Host header, without its port."""
    name, bracket, _ = header.partition("]")
    return (name + bracket if bracket else header.rpartition(":")[0] or header).lower()


async def read_body(request: HttpRequest, options: ServeOptions) -> bytes:
    """Returns the body of a JSON request. Raises `RefusedError` if it is of another type, too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # rejects forms, which a page of another site could send
        raise RefusedError(415, "the body must be JSON: Content-Type: application/json", "unsupported_media_type")
    body = bytearray()
    try:
        async with asyncio.timeout(options.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > options.max_body_bytes:
                    raise RefusedError(
                        413, f"the body is larger than {options.max_body_bytes} bytes", "request_too_large"
                    )
    except TimeoutError:
        raise RefusedError(408, f"the body took longer than {options.body_seconds:g} s", "timeout") from None
    return bytes(body)
