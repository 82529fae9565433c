"""The routes, as a Starlette application over an engine."""

import asyncio
import time

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from strop.server.answer import Reply, problem
from strop.server.call import Call, Reader
from strop.server.engine import Engine
from strop.server.gate import Gate
from strop.server.limits import Limits
from strop.server.metrics import CONTENT_TYPE
from strop.server.openapi import describe
from strop.server.protocol import (
    ChatRequest,
    CompletionRequest,
    ModelCard,
    ModelList,
    Refused,
    Settings,
)

JSON = "application/json"


def create_app(engine: Engine, api_key: str | None = None) -> Starlette:
    """An application that serves a started engine; with a key, /v1/ asks for it."""
    handlers = _Handlers(engine)
    routes = [
        Route("/v1/completions", handlers.completions, methods=["POST"]),
        Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
        Route("/v1/models", handlers.models),
        Route("/health", handlers.health),
        Route("/metrics", handlers.metrics),
        Route("/openapi.json", handlers.schema),
    ]
    gate = Middleware(Gate, limits=engine.limits, metrics=engine.metrics, api_key=api_key)
    app = Starlette(
        routes=routes,
        middleware=[gate],
        exception_handlers={HTTPException: _not_routed, Refused: handlers.refused},
    )
    app.router.redirect_slashes = False
    return app


class _Handlers:
    """One method a route."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.reader = engine, Reader(engine)
        self.created = int(time.time())

    async def completions(self, request: Request) -> ASGIApp:
        return await self._answer(request, CompletionRequest)

    async def chat(self, request: Request) -> ASGIApp:
        return await self._answer(request, ChatRequest)

    async def _answer(self, request: Request, kind: type[Settings]) -> ASGIApp:
        asked = await self.reader.parse(kind, await read_body(request, self.engine.limits))
        return Reply(Call(self.reader, asked, await self.reader.read(asked)))

    async def models(self, request: Request) -> Response:
        card = ModelCard(
            id=self.engine.name, created=self.created, max_model_len=self.engine.lm.context_limit
        )
        return JSONResponse(ModelList(data=[card]).model_dump())

    async def health(self, request: Request) -> Response:
        if not self.engine.alive:
            raise Refused(503, "the server is closing", "closing")
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(self.engine.metrics.text(), media_type=CONTENT_TYPE)

    async def schema(self, request: Request) -> Response:
        return JSONResponse(describe())

    async def refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        self.engine.metrics.reject(error.code)
        return problem(error)


async def read_body(request: Request, limits: Limits) -> bytes:
    """The request's body, within the limits of size and time."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:
        raise Refused(415, f"send the body as {JSON}", "unsupported_media_type")
    large = Refused(413, f"the body exceeds {limits.body} bytes: send less", "too_large")
    told = request.headers.get("content-length", "")
    if told.isdecimal() and len(told) < 20 and int(told) > limits.body:
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.read_s):
            async for part in request.stream():
                body += part
                if len(body) > limits.body:
                    raise large
    except TimeoutError:
        raise Refused(408, f"the body did not come within {limits.read_s:g} s", "slow") from None
    except ClientDisconnect:
        raise Refused(400, "the client left before its request was whole", "left") from None
    return bytes(body)


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        message, code = f"{request.url.path} does not take {request.method}", "method_not_allowed"
    else:
        message, code = "nothing is here: see /openapi.json", "not_found"
    headers = dict(error.headers or {})
    return problem(Refused(error.status_code, message, code, headers=headers))
