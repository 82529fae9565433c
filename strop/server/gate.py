"""What every request passes first: its id, the key, clients that do not read, and failures nobody foresaw."""

import asyncio
import logging
import secrets
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from strop.server.answer import problem
from strop.server.limits import Limits
from strop.server.metrics import Metrics
from strop.server.protocol import Refused

log = logging.getLogger("strop.server")


class Stalled(Exception):
    """The client does not take its answer."""


class Gate:
    """An ASGI middleware around all routes."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, api_key: str | None) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self.key = None if api_key is None else api_key.strip().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started = uuid4().hex.encode(), False

        async def send_in_time(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            try:
                async with asyncio.timeout(self.limits.send_s):
                    await send(message)
            except TimeoutError:
                raise Stalled from None

        try:
            if scope["path"].startswith("/v1/") and not self._admits(scope):
                raise Refused(
                    401,
                    "the API key is missing or wrong: send `Authorization: Bearer KEY`",
                    "invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
            await self.app(scope, receive, send_in_time)
        except Refused as refused:
            self.metrics.reject(refused.code)
            await problem(refused)(scope, receive, send_in_time)
        except Stalled:
            self.metrics.reject("stalled")
            raise
        except Exception as error:
            log.error("request %s failed", request_id.decode(), exc_info=error)
            if started:
                raise
            sorry = Refused(500, "the server failed: its log says how", "failed")
            await problem(sorry)(scope, receive, send_in_time)

    def _admits(self, scope: Scope) -> bool:
        if self.key is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(key.strip(), self.key)
