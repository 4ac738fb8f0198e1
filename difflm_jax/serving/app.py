"""The routes: OpenAI's API and the web page, over an engine.

A handler parses a body, submits requests and waits; everything else is in the other modules. Handlers run in one event
loop and never compute: templates and tokenizers run in threads, the model in the engine's thread.
"""

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import importlib.resources
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from difflm_jax.errors import UserError
from difflm_jax.lm import LanguageModel
from difflm_jax.serving.answers import Head, whole
from difflm_jax.serving.asking import Asked, ask_chat, ask_completion
from difflm_jax.serving.engine import Engine
from difflm_jax.serving.errors import RefusedError, error_object, error_response, failure
from difflm_jax.serving.guard import Guard, read_body
from difflm_jax.serving.metrics import CONTENT_TYPE, Metrics
from difflm_jax.serving.options import ServeOptions
from difflm_jax.serving.prompts import chat_text, chat_tokens
from difflm_jax.serving.requests import Busy, Event, Finished, Ticket
from difflm_jax.serving.schemas import ChatRequest, CompletionRequest, TokenizeRequest, parse
from difflm_jax.serving.stream import events

log = logging.getLogger("difflm.serve")

_SEND_SECONDS = 60.0  # time limit for a client to receive one part of a stream


class Server:
    """An HTTP server over an engine. Requests that name no model use the engine's first one."""

    def __init__(self, engine: Engine, options: ServeOptions):
        self.engine, self.options = engine, options
        self.metrics = Metrics(engine.stats)
        self.created = int(time.time())
        self.fingerprint = f"difflm-{importlib.metadata.version('difflm_jax')}"

    def app(self) -> Starlette:
        """Returns the ASGI application. Its shutdown closes the engine."""
        routes = [
            Route("/", self._page, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/ready", self._ready, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/tokenize", self._tokenize, methods=["POST"]),
            Route("/load_model", self._load_model, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {HTTPException: _http_error, Exception: _error}
        handlers |= dict.fromkeys((RefusedError, Busy, UserError), _error)
        middleware = [Middleware(_Counted, metrics=self.metrics), Middleware(Guard, options=self.options)]
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(self.engine.close)

    def model(self, name: str | None) -> tuple[str, LanguageModel]:
        """Returns (name, model) for the name in a request. Raises `RefusedError`."""
        models: Mapping[str, LanguageModel] = self.engine.models
        name = next(iter(models)) if name is None else name
        if name not in models:
            known = ", ".join(models)
            raise RefusedError(404, f"model: there is no {name!r} here; there are {known}", "model_not_found", "model")
        return name, models[name]

    async def _page(self, _: HttpRequest) -> Response:
        page = importlib.resources.files("difflm_jax.serving.web").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(page, headers={"X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"})

    async def _health(self, _: HttpRequest) -> Response:
        alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)

    async def _ready(self, _: HttpRequest) -> Response:
        ready = self.engine.is_alive and self.engine.stats()["ready"]
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def _metrics(self, _: HttpRequest) -> Response:
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self.engine.models]})

    async def _model(self, request: HttpRequest) -> Response:
        return JSONResponse(self._described(self.model(request.path_params["name"])[0]))

    def _described(self, name: str) -> dict[str, Any]:
        lm = self.engine.models[name]
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "difflm",
            "max_model_len": min(self.options.max_length, lm.config.max_position_embeddings),
            "diffusion": {
                "attention": lm.attention,
                "block_length": lm.block_length,
                "algorithm": lm.algorithm,
                "fills_gaps": not lm.diffusion.gated and lm.attention != "causal",
                "is_chat": lm.tokenizer.chat_template is not None,
            },
        }

    async def _chat(self, request: HttpRequest) -> Response:
        body = parse(ChatRequest, await read_body(request, self.options))
        name, lm = self.model(body.model)
        asked = await run_in_threadpool(ask_chat, body, name, lm, self.options)
        return await self._answer(request, asked, body.user or body.safety_identifier)

    async def _completions(self, request: HttpRequest) -> Response:
        body = parse(CompletionRequest, await read_body(request, self.options))
        name, lm = self.model(body.model)
        asked = await run_in_threadpool(ask_completion, body, name, lm, self.options)
        return await self._answer(request, asked, body.user)

    async def _answer(self, request: HttpRequest, asked: Asked, user: str | None) -> Response:
        tickets = await run_in_threadpool(self._submit, asked)
        head, seen = Head.of(asked, self.fingerprint), self.metrics.watcher()
        log.info("%s model=%s choices=%d user=%s", head.id, head.model, len(tickets), json.dumps(user))
        if asked.body.stream:

            def ended(finished: Finished) -> dict[str, Any] | None:
                error = failure(finished)
                return None if error is None else error_object(error)

            return _event_stream(events(asked, head, tickets, ended, seen), self.options, tickets)
        finished = await _results(request, tickets, seen)
        for one in finished:
            if (error := failure(one)) is not None:
                raise error
        return JSONResponse(whole(asked, head, finished))

    def _submit(self, asked: Asked) -> list[Ticket]:
        """Submits all choices and returns their tickets; cancels all of them if one is refused. Raises `Busy`."""
        tickets: list[Ticket] = []
        try:
            for request in asked.requests:
                tickets.append(self.engine.submit(request))
        except BaseException:
            for ticket in tickets:
                ticket.cancel("the queue is full")
            raise
        return tickets

    async def _tokenize(self, request: HttpRequest) -> Response:
        body = parse(TokenizeRequest, await read_body(request, self.options))
        name, lm = self.model(body.model)
        tokens = await run_in_threadpool(self._tokens, body, lm)
        strings = lm.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
        length = self._described(name)["max_model_len"]
        return JSONResponse({"count": len(tokens), "max_model_len": length, "tokens": tokens, "token_strs": strings})

    def _tokens(self, body: TokenizeRequest, lm: LanguageModel) -> list[int]:
        if body.messages is None and not body.add_special_tokens:
            return lm.tokenizer(body.prompt, add_special_tokens=False, verbose=False)["input_ids"]
        if body.messages is None:
            return lm.prompts.canvas(body.prompt).tolist()
        seconds = self.options.template_seconds
        return chat_tokens(lm, chat_text(lm, body.messages, body.tools, body.chat_template_kwargs, seconds)).tolist()

    async def _load_model(self, request: HttpRequest) -> Response:
        """Answers `transformers chat`, which loads a model before it chats: this server's models are loaded."""
        try:
            asked = json.loads(await read_body(request, self.options))
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, "the body is not JSON") from error
        name = asked.get("model") if isinstance(asked, dict) else None
        try:
            said = {"status": "ready", "cached": True, "model": self.model(str(name).partition("@")[0])[0]}
        except RefusedError as error:
            said = {"status": "error", "message": str(error)}

        async def one() -> AsyncIterator[str]:
            yield json.dumps(said)

        return _event_stream(one(), self.options)


def _event_stream(
    data: AsyncIterator[str], options: ServeOptions, tickets: Sequence[Ticket] = ()
) -> EventSourceResponse:
    async def gone(_: Message) -> None:  # may be called before the stream begins
        for ticket in tickets:
            ticket.cancel("the client has gone")

    async def sent() -> AsyncIterator[ServerSentEvent]:
        async with contextlib.aclosing(data):
            async for text in data:
                yield ServerSentEvent(text, sep="\n")

    # On shutdown, streams get the same grace period as other requests; the library would cut them at once.
    return EventSourceResponse(
        sent(),
        send_timeout=_SEND_SECONDS,
        client_close_handler_callable=gone,
        shutdown_event=anyio.Event(),
        shutdown_grace_period=options.drain_seconds,
    )


async def _results(request: HttpRequest, tickets: Sequence[Ticket], seen: Callable[[Event], None]) -> list[Finished]:
    """Waits for all requests and returns their ends. Cancels them if the client disconnects."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        for ticket in tickets:
            ticket.cancel("the client has gone")

    async def last(ticket: Ticket) -> Finished:
        async for event in ticket:
            seen(event)
        return event

    watching = asyncio.create_task(watch())
    try:
        return await asyncio.gather(*map(last, tickets))
    finally:
        watching.cancel()
        for ticket in tickets:
            ticket.cancel("the client has gone")


async def _error(_: HttpRequest, error: Exception) -> Response:
    return error_response(error)


async def _http_error(request: HttpRequest, error: HTTPException) -> Response:
    path = request.url.path
    message = f"{request.method} {path}: {'no such route' if error.status_code == 404 else error.detail}"
    return error_response(RefusedError(error.status_code, message))


@dataclasses.dataclass
class _Counted:
    """ASGI middleware that counts requests. Unknown paths count as one route."""

    app: ASGIApp
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.monotonic(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.request(route, status, time.monotonic() - start)
