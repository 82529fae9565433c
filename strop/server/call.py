"""A request on its way through the engine: its rows, and the pieces that come back for them."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar
from uuid import uuid4

from jinja2 import TemplateError

from strop.core.errors import StropError
from strop.server.draw import Draw
from strop.server.engine import Busy, Closed, Engine
from strop.server.protocol import ChatRequest, CompletionRequest, Refused, Settings, parse
from strop.server.row import Piece, Row
from strop.server.text import TextStream

SHORT = 16
"""Tokens that a completion writes where the request does not say, as with OpenAI."""
RETRY_S = 1
GREEDY = 1e-5
"""A temperature below this takes the likeliest token: scores divided by less leave float32."""
Asked = CompletionRequest | ChatRequest
Done = TypeVar("Done")


class Reader:
    """Turns requests into token ids and rows, within the engine's limits."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.lm, self.limits = engine, engine.lm, engine.limits
        self.longest = min(self.limits.prompt, self.lm.context_limit - 1)
        ends = self.lm.model.generation_config.eos_token_id
        ends = self.lm.tokenizer.eos_token_id if ends is None else ends
        listed = ends if isinstance(ends, list) else [ends]
        self.ends = frozenset(token for token in listed if token is not None)
        self.worker = ThreadPoolExecutor(1, "strop-reader")

    async def parse(self, kind: type[Settings], data: bytes) -> Asked:
        """The request that a body holds. Raises Refused."""
        return await self._apart(partial(parse, kind, data))

    async def read(self, asked: Asked) -> list[list[int]]:
        """The token ids of each prompt. Raises Refused for what cannot be served."""
        count = (asked.n or 1) * (len(asked.prompts) if isinstance(asked, CompletionRequest) else 1)
        if asked.model != self.engine.name:
            raise Refused(
                404,
                f"this server has the model {self.engine.name!r} and no other",
                "model_not_found",
                "model",
            )
        if count > self.limits.batch:
            raise Refused(
                400, f"{count} texts at once exceed the {self.limits.batch} of this server: ask for fewer"
            )
        if asked.stream_options is not None and not asked.stream:
            raise Refused(400, "stream_options needs stream: leave it out", param="stream_options")
        prompts = await self._apart(partial(self._encode, asked))
        for ids in prompts:
            self._require_fits(ids, asked)
        return prompts

    def rows(self, asked: Asked, prompts: list[list[int]], call: "Call") -> list[Row]:
        """What the engine is to write: the samples of a prompt side by side."""
        temperature = 1.0 if asked.temperature is None else asked.temperature
        top_p = 1.0 if asked.top_p is None else asked.top_p
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        samples, rows = asked.n or 1, []
        for index in range(len(prompts) * samples):
            ids, sample = prompts[index // samples], index % samples
            draw = Draw(seed, sample, temperature, top_p) if temperature >= GREEDY else None
            text = TextStream(self.lm.tokenizer, asked.stops)
            ends = frozenset() if asked.ignore_eos else self.ends
            rows.append(Row(ids, self._most(ids, asked), draw, text, ends, partial(call.put, index)))
        return rows

    async def _apart(self, work: Callable[[], Done]) -> Done:
        """What work returns, done in a thread, one request after the other: a long body takes a while."""
        return await asyncio.get_running_loop().run_in_executor(self.worker, work)

    def _encode(self, asked: Asked) -> list[list[int]]:
        name = "messages" if isinstance(asked, ChatRequest) else "prompt"
        if isinstance(asked, ChatRequest):
            if not self.lm.tokenizer.chat_template:
                raise Refused(
                    400,
                    "the model has no chat template, so it reads no messages: use /v1/completions, or add "
                    "chat_template to its tokenizer_config.json",
                    param=name,
                )
            prompts: list = [[message.to_dict() for message in asked.messages]]
        else:
            prompts = asked.prompts
        try:
            return [self._ids(prompt) for prompt in prompts]
        except StropError as error:
            raise Refused(400, str(error), param=name) from error
        except (TemplateError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise Refused(400, f"the model's tokenizer does not take this: {said}", param=name) from error

    def _ids(self, prompt: str | list) -> list[int]:
        if not isinstance(prompt, str) and isinstance(prompt[0], int):
            if (token := max(prompt)) >= self.lm.vocabulary:
                named = f"token {token}" if token < 1 << 63 else "a token of 19 digits or more"
                raise StropError(f"{named} is beyond the model's {self.lm.vocabulary}")
            return prompt
        return self.lm.encode(prompt)

    def _require_fits(self, ids: list[int], asked: Asked) -> None:
        if not ids:
            raise Refused(400, "the prompt is empty: give at least one token to continue", param="prompt")
        if len(ids) > self.longest:
            raise Refused(
                400,
                f"the prompt has {len(ids)} tokens and this server takes {self.longest}: shorten it",
                "context_length_exceeded",
            )
        room = self.lm.context_limit - len(ids)
        if asked.asked is not None and asked.asked > min(room, self.limits.output):
            why = (
                f"the {room} that the model's context leaves behind this prompt"
                if room < self.limits.output
                else f"the {self.limits.output} that this server writes a text"
            )
            raise Refused(
                400,
                f"{asked.asked} tokens exceed {why}: ask for fewer",
                "context_length_exceeded",
                "max_tokens",
            )

    def _most(self, ids: list[int], asked: Asked) -> int:
        room = min(self.lm.context_limit - len(ids), self.limits.output)
        wish = SHORT if isinstance(asked, CompletionRequest) else room
        return min(room, wish) if asked.asked is None else asked.asked


class Call:
    """Rows in the engine and a queue that their pieces come through; used in one event loop."""

    def __init__(self, reader: Reader, asked: Asked, prompts: list[list[int]]) -> None:
        """Raises Refused when there is no place in the queue."""
        self.engine, self.asked = reader.engine, asked
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.rows = reader.rows(asked, prompts, self)
        self.read = sum(len(ids) for ids in prompts)
        self.chat = isinstance(asked, ChatRequest)
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid4().hex
        self.created = int(time.time())
        try:
            self.engine.submit(self.rows)
        except Busy:
            raise Refused(
                429,
                "the queue is full: try again in a moment",
                "queue_full",
                headers={"retry-after": str(RETRY_S)},
            ) from None
        except Closed:
            raise Refused(503, "the server is closing", "closing") from None

    def put(self, index: int, piece: Piece) -> None:
        """Hand over a piece of a row; called in the engine's thread."""
        self.loop.call_soon_threadsafe(self.pieces.put_nowait, (index, piece))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces as they come, to the end of every row. Raises Refused where the model fails."""
        left = len(self.rows)
        while left:
            index, piece = await self.pieces.get()
            if piece.finish == "error":
                raise Refused(500, piece.text, "model_failed")
            left -= piece.finish is not None
            yield index, piece

    def cancel(self) -> None:
        """Give up what is not written yet."""
        self.engine.cancel(self.rows)
