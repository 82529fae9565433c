"""uvicorn's connections, made impatient, and its server, made to end with exit code 0."""

import contextlib
import math
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from strop.server.limits import Limits

SPARE = 64
"""Connections beyond the limit that are still told so; more are closed without a word."""


def impatient(limits: Limits) -> type[H11Protocol]:
    """Connections that are closed when no whole request head comes on them for a while."""

    class Impatient(H11Protocol):
        """Looks once in `idle_s` whether a request was answered, or came, since it last looked."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.answered: Any = None  # the last request that had its answer when it looked; self: none had
            self.look = self.loop.call_later(limits.idle_s, self._look)
            if len(self.connections) > limits.connections + SPARE:
                transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self.look.cancel()
            super().connection_lost(exc)

        def _look(self) -> None:
            cycle = self.cycle
            idle = cycle is None or cycle.response_complete
            if idle and cycle is self.answered:
                self.transport.abort()
                return
            self.answered = cycle if idle else self
            self.look = self.loop.call_later(limits.idle_s, self._look)

    return Impatient


class Server(uvicorn.Server):
    """A server for which a signal to stop is an ordinary end; a second one ends it at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM while it runs; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        taken = (signal.SIGINT, signal.SIGTERM)
        before = {sign: signal.signal(sign, self._end) for sign in taken}
        try:
            yield
        finally:
            for sign, handler in before.items():
                signal.signal(sign, handler)

    def end(self) -> None:
        """Stop soon; may be called in any thread."""
        self.should_exit = True

    def _end(self, *_: Any) -> None:
        self.force_exit = self.should_exit
        self.end()


def server(app: ASGIApp, limits: Limits, grace: int) -> Server:
    """A server for one socket; requests have `grace` seconds to end once it should stop."""
    config = uvicorn.Config(
        app,
        http=impatient(limits),
        ws="none",
        loop="asyncio",
        lifespan="off",
        limit_concurrency=limits.connections,
        timeout_keep_alive=math.ceil(limits.idle_s),
        timeout_graceful_shutdown=grace,
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    return Server(config)


def listen(address: tuple[Any, ...], limits: Limits) -> socket.socket:
    """A socket that listens on a numeric address; what its clients do not take is given up after a while."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    sock = socket.create_server(address, family=family, backlog=limits.connections)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(2000 * limits.send_s))
    return sock
