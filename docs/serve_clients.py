"""Clients for `measure_serve.py`: ones that ask in a closed loop, and ones that misbehave beside them."""

import asyncio
import contextlib
import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psutil

from strop.tasks.python_source import held_out_text

NEW = 64
LENGTHS = (40, 90, 160, 300, 420, 700, 1000, 1600)
"""Characters of the fixed prompts, each asked greedily and drawn."""
SEED, TEMPERATURE = 7, 0.8
PAUSE_S = 0.5
"""Of a client that misbehaves, between two times."""
SAMPLE_S = 2.0
LEAVING = 8
"""Clients that leave; each waits for its turn first."""


@dataclass
class Tally:
    """What clients saw."""

    texts: int = 0
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    other: dict[tuple[int, bool], str] = field(default_factory=dict)
    """One text for each prompt that differed from what it is alone."""
    others: int = 0
    disturbed: Counter[str] = field(default_factory=Counter)


def prompts() -> list[str]:
    """Beginnings of held-out files, of fixed lengths."""
    files = [text for text in held_out_text() if len(text) > 2 * max(LENGTHS)]
    return [files[i][:length] for i, length in enumerate(LENGTHS)]


def head(length: int) -> bytes:
    return (
        "POST /v1/completions HTTP/1.1\r\nhost: strop\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\nconnection: close\r\n\r\n"
    ).encode()


def body(prompt: str, drawn: bool, new: int = NEW) -> bytes:
    chance = {"seed": SEED, "temperature": TEMPERATURE} if drawn else {"temperature": 0}
    asked = {"model": "recipe.yaml", "prompt": prompt, "max_tokens": new, "stream": True, "ignore_eos": True}
    return json.dumps(asked | chance).encode()


class Load:
    """Clients of one server until a time is over."""

    def __init__(self, port: int, asked: list[str], expected: dict[tuple[int, bool], str]) -> None:
        self.port, self.asked, self.expected = port, asked, expected
        self.tally = Tally()
        self.end = 0.0

    async def run(self, streams: int, seconds: float, process: psutil.Process) -> list[tuple[float, float]]:
        """Let all clients run; the server's memory as (seconds, MiB)."""
        start, memory = time.perf_counter(), []
        self.end = start + seconds
        bad = (self._hang, self._lie, self._garbage, *[self._leave] * LEAVING)
        tasks = [asyncio.create_task(self._ask(number)) for number in range(streams)]
        tasks += [asyncio.create_task(self._disturb(one)) for one in bad]
        while (now := time.perf_counter()) < self.end:
            memory.append((now - start, process.memory_info().rss / 2**20))
            await asyncio.sleep(SAMPLE_S)
        for task in tasks:  # what is under way is not counted
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return memory

    async def _ask(self, number: int) -> None:
        """A client that behaves: it reads each answer to its end, then asks again."""
        while time.perf_counter() < self.end:
            which, drawn = number % len(self.asked), bool(number // len(self.asked) % 2)
            number += 1
            try:
                await self._read(which, drawn)
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                self.tally.errors[type(error).__name__] += 1

    async def _read(self, which: int, drawn: bool) -> None:
        start, first, parts = time.perf_counter(), 0.0, []
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = body(self.asked[which], drawn)
        writer.write(head(len(data)) + data)
        status = await reader.readline()
        async for line in reader:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - start
                parts.append(json.loads(line[6:])["choices"][0]["text"])
        writer.close()
        if b" 200 " not in status:
            self.tally.errors[status.decode().strip()] += 1
            return
        tally, text = self.tally, "".join(parts)
        tally.texts += 1
        tally.first_s.append(first)
        tally.whole_s.append(time.perf_counter() - start)
        if text != self.expected[which, drawn]:
            tally.others += 1
            tally.other[which, drawn] = text

    async def _disturb(self, client: Any) -> None:
        while time.perf_counter() < self.end:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            with contextlib.suppress(OSError):  # the server closes first, as it should
                await client(reader, writer)
            writer.close()
            self.tally.disturbed[client.__name__.strip("_")] += 1
            await asyncio.sleep(PAUSE_S)

    async def _hang(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Sends half a head, and waits until it is turned out or the time is over."""
        writer.write(head(100)[:50])
        left = self.end - time.perf_counter()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(), max(left, 0.1))

    async def _lie(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Promises more than it sends, and leaves a little later."""
        writer.write(head(100_000) + body(self.asked[0], False))
        await asyncio.sleep(2 * PAUSE_S)

    async def _garbage(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(os.urandom(300) + b"\r\n\r\n")
        await reader.read()

    async def _leave(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Takes the beginning of a long answer and leaves."""
        data = body(self.asked[3], True, 1000)
        writer.write(head(len(data)) + data)
        await reader.readline()
