"""Who runs the model: one thread that takes waiting rows in groups and writes a token a group in turn.

Rows of similar length are read together, so that little of a batch is padding. Groups take turns, so a new
request gets its first token while long ones are still being written. Where rows wait for places, places are
handed out a few at a time, lest every group be a single row.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from transformers import Cache

from strop.core.cache import tensor_bytes
from strop.core.errors import StropError
from strop.model import Model
from strop.server.alone import needs_generate, write_alone
from strop.server.group import Group, divisible
from strop.server.limits import Limits
from strop.server.metrics import Metrics
from strop.server.row import Row

READ_AT_ONCE = 4096
"""Most tokens, padding included, that one group reads in its first step; a longer prompt is read alone."""
SHORTEST = 0.75
"""A group's shortest prompt over its longest, at least."""
SHORT = 32
"""Tokens by which prompts of a group may always differ."""
SHARE = 4
"""Where rows wait and others run, new ones start when one place in so many is free."""
COUNT_S = 1.0
"""Seconds between counts of what the caches hold."""

log = logging.getLogger("strop.server")


class Busy(Exception):
    """The queue is full."""


class Closed(Exception):
    """The engine takes nothing more."""


class Engine:
    """A model that writes many rows at once, within limits."""

    def __init__(self, lm: Model, name: str, limits: Limits | None = None) -> None:
        """`name` is what clients call the model."""
        self.lm, self.name, self.limits = lm, name, limits or Limits()
        self.alone = needs_generate(lm)
        self.together = divisible(lm.new_cache())
        self.metrics = Metrics(name, drafts="custom_generate" in lm.decoding)
        self.changed = threading.Condition()
        self.waiting: deque[Row] = deque()
        self.groups: list[Group] = []
        self.started: list[Row] = []
        """Rows that have a place and no group."""
        self.cache: Cache | None = None
        """The cache of a row that is written alone."""
        self.closing = self.stopped = False
        self.failure: Exception | None = None
        """What ended the thread, where it was not asked to end."""
        self.ended: Callable[[], None] = lambda: None
        self.cache_bytes, self.counted = 0, 0.0
        self.thread = threading.Thread(target=self._run, name="strop-engine", daemon=True)
        watched = self.metrics.watch
        watched("vllm:num_requests_running", "Sequences being written.", lambda: self.running)
        watched("vllm:num_requests_waiting", "Sequences that wait.", lambda: len(self.waiting))
        watched("strop:kv_cache_bytes", "Bytes of all caches.", lambda: self.cache_bytes)

    def start(self, ended: Callable[[], None] = lambda: None) -> None:
        """Start the thread, which calls `ended` when it ends."""
        self.ended = ended
        self.thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are being served."""
        return self.thread.is_alive() and not self.closing

    @property
    def running(self) -> int:
        """Rows that have a place."""
        return sum(len(group.rows) for group in list(self.groups)) + len(self.started)

    def submit(self, rows: Sequence[Row]) -> None:
        """Let rows wait for their turn, all or none. Raises Busy or Closed."""
        with self.changed:
            if self.closing:
                raise Closed
            if len(self.waiting) + len(rows) > self.limits.queue:
                raise Busy
            for row in rows:
                row.note, row.ended = self._note, self.metrics.end
            self.waiting.extend(rows)
            self.changed.notify_all()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Give up rows: those that wait leave at once, those that run before their next token."""
        with self.changed:
            for row in rows:
                row.cancel()
            self.waiting = deque(row for row in self.waiting if not row.over)
            self.changed.notify_all()

    def wait_idle(self, seconds: float) -> bool:
        """Wait until nothing runs or waits; whether that came."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.waiting and not self.running, seconds)

    def close(self, grace: float = 0.0) -> None:
        """Take nothing more, let what runs end within `grace` seconds, then stop the thread."""
        with self.changed:
            self.closing = True
        self.wait_idle(grace)
        with self.changed:
            self._end_all("abort")
            self.stopped = True
            self.changed.notify_all()
        if self.thread.is_alive():
            self.thread.join()

    def _end_all(self, reason: Literal["error", "abort"]) -> None:
        """Tell every row that is not over that the server stopped."""
        for row in [*self.waiting, *self.started, *(row for group in self.groups for row in group.rows)]:
            row.fail("the server stopped", reason)
        self.waiting.clear()

    # In the engine's thread.

    @torch.no_grad()
    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            log.error("the engine failed", exc_info=error)
            self.failure = error
        with self.changed:
            self.closing = True
            self._end_all("error")
            self.started, self.groups = [], []
            self.changed.notify_all()
        self.ended()

    def _serve(self) -> None:
        while self._wait():
            fresh = self._admit()
            self.metrics.prompt_tokens.inc(sum(len(row.prompt) for row in fresh))
            if self.alone:
                for row in fresh:
                    self._guard([row], partial(self._write, row))
            elif fresh:
                self._guard(fresh, partial(self._open, fresh))
            self.started = []
            for group in list(self.groups):
                self._step(group)
            self._count()

    def _wait(self) -> bool:
        """Wait for something to do; whether there is."""
        with self.changed:
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.waiting or self.groups or self.closing)
            return not self.stopped and bool(self.waiting or self.groups)

    def _admit(self) -> list[Row]:
        """The rows that start now: the one that waited longest, and others of similar length."""
        with self.changed:
            waiting, free = len(self.waiting), self.limits.batch - self.running
            if not waiting or free < min(waiting, max(self.limits.batch // SHARE, 1) if self.groups else 1):
                return []
            most = free if self.together and not self.alone else 1
            chosen = _alike(self.waiting, most)
            self.waiting = deque(row for row in self.waiting if row not in chosen)
            self.started = chosen
            return chosen

    def _open(self, rows: list[Row]) -> None:
        group = Group(self.lm, rows)
        with self.changed:
            self.groups.append(group)
            self.started = []

    def _step(self, group: Group) -> None:
        """One token for every row of a group."""
        if not self._guard(group.rows, group.step):
            group.rows = []
        if not group.rows:
            with self.changed:
                self.groups.remove(group)

    def _write(self, row: Row) -> None:
        """A whole row that cannot share a step."""
        self.cache, self.counted = self.lm.new_cache(), 0.0
        try:
            stats = write_alone(self.lm, row, self.cache)
        finally:
            self.cache = None
        if stats is not None:
            self.metrics.drafted(stats)
        if not row.over:
            raise StropError(
                "the text was cut off: the model's generation config ends texts early, by max_time say; take "
                "that out of generation_config.json"
            )

    def _guard(self, rows: Sequence[Row], work: Callable[[], None]) -> bool:
        """Work for some rows; a failure ends these and no others. Whether it went well."""
        try:
            work()
        except Exception as error:
            sentence = _sentence(error)
            for row in rows:
                row.fail(sentence)
            return False
        return True

    def _note(self, row: Row, count: int) -> None:
        """Measure the new tokens of a row's step; latencies are of steps, as vLLM's are of its outputs."""
        now, metrics = time.perf_counter(), self.metrics
        metrics.generation_tokens.inc(count)
        if row.latest:
            metrics.between_tokens.observe(now - row.latest)
        else:
            metrics.first_token.observe(now - row.arrived)
        row.latest = now
        if row.finish in ("stop", "length"):
            metrics.whole.observe(now - row.arrived)
        if self.alone:
            self._count()

    def _count(self) -> None:
        """Count what the caches hold, now and then."""
        now, idle = time.perf_counter(), not self.groups and self.cache is None
        if idle or now - self.counted > COUNT_S:
            alone = 0 if self.cache is None else tensor_bytes(self.cache.layers)
            self.cache_bytes, self.counted = alone + sum(group.bytes() for group in self.groups), now


def _alike(waiting: deque[Row], most: int) -> list[Row]:
    """The oldest row, and up to `most` in all that can be read with it."""
    first, *others = waiting
    size = len(first.prompt)
    chosen, shortest, longest = [first], size, size
    for row in sorted(others, key=lambda row: abs(len(row.prompt) - size)):
        low, high = min(shortest, len(row.prompt)), max(longest, len(row.prompt))
        if len(chosen) == most or high * (len(chosen) + 1) > READ_AT_ONCE:
            break
        if low >= SHORTEST * high or high - low <= SHORT:
            chosen.append(row)
            shortest, longest = low, high
    return chosen


def _sentence(error: Exception) -> str:
    """Why rows end, for their clients; the log keeps the traceback of what is not the request's fault."""
    if isinstance(error, StropError):
        return str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate mem" in str(error):
        return "the server ran out of memory: ask for less, or start it with a smaller --batch"
    log.error("a step of the model failed", exc_info=error)
    return "the model failed: the server's log says how"
