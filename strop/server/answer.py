"""How pieces become an answer: one JSON body, or events as they come. A client that leaves ends the work."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from strop.server.call import Call
from strop.server.protocol import (
    Chat,
    ChatChoice,
    ChatText,
    Completion,
    CompletionChoice,
    Refused,
    Usage,
)
from strop.server.row import Piece

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


def problem(refused: Refused) -> Response:
    """The answer to a request that is refused."""
    return JSONResponse(refused.body.model_dump(), refused.status, headers=refused.headers)


class Reply:
    """An ASGI answer that writes what a call brings, and cancels it when the client leaves."""

    def __init__(self, call: Call) -> None:
        self.call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        write = self._stream if self.call.asked.stream else self._whole
        work = asyncio.ensure_future(write(scope, receive, send))
        gone = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self.call.cancel()
            gone.cancel()
            work.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self.call
        texts: list[list[str]] = [[] for _ in call.rows]
        ends: dict[int, Any] = {}
        try:
            async for index, piece in call:
                texts[index].append(piece.text)
                if piece.finish is not None:
                    ends[index] = piece.finish
        except Refused as refused:
            await problem(refused)(scope, receive, send)
            return
        head: dict[str, Any] = {"id": call.id, "created": call.created, "model": call.asked.model}
        head["usage"] = Usage.of(call.read, sum(row.tokens for row in call.rows))
        said = ["".join(parts) for parts in texts]
        body: Chat | Completion
        if call.chat:
            chats = [
                ChatChoice(index=i, message=ChatText(content=text), finish_reason=ends[i])
                for i, text in enumerate(said)
            ]
            body = Chat(**head, choices=chats)
        else:
            choices = [
                CompletionChoice(index=i, text=text, finish_reason=ends[i]) for i, text in enumerate(said)
            ]
            body = Completion(**head, choices=choices)
        await JSONResponse(body.model_dump())(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Server-sent events. The status waits for the first piece, so that a failure has its own."""
        started = False
        try:
            async for event in self._events():
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
                await send(_chunk(event))
        except Refused as refused:
            if not started:
                await problem(refused)(scope, receive, send)
                return
            await send(_chunk(refused.body.model_dump()))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        call, options = self.call, self.call.asked.stream_options
        counts = options is not None and options.include_usage
        always = counts and options is not None and options.continuous_usage_stats
        kind = "chat.completion.chunk" if call.chat else "text_completion"
        head = {"id": call.id, "object": kind, "created": call.created, "model": call.asked.model}
        blank: dict[str, Any] = {"usage": None} if counts else {}
        written: dict[int, int] = {}
        async for index, piece in call:
            first = index not in written
            written[index] = piece.tokens
            if always:
                blank["usage"] = Usage.of(call.read, sum(written.values())).model_dump()
            for choice in self._choices(index, piece, first):
                yield head | {"choices": [choice]} | blank
        if counts:
            usage = Usage.of(call.read, sum(row.tokens for row in call.rows)).model_dump()
            yield head | {"choices": [], "usage": usage}

    def _choices(self, index: int, piece: Piece, first: bool) -> Iterator[dict[str, Any]]:
        if not self.call.chat:
            yield CompletionChoice(index=index, text=piece.text, finish_reason=piece.finish).model_dump()
            return
        if first:
            yield _delta(index, {"role": "assistant", "content": ""})
        if piece.text:
            yield _delta(index, {"content": piece.text})
        if piece.finish is not None:
            yield _delta(index, {}, piece.finish)


def _delta(index: int, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _chunk(event: dict[str, Any]) -> dict[str, Any]:
    data = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
    return {"type": "http.response.body", "body": data, "more_body": True}


async def _left(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
