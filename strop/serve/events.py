"""The clock of a simulation: calls in order of time, and of being asked for where times are equal."""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Clock:
    """A heap of calls to come. The same calls give the same order, whatever the machine."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._asked = 0

    @property
    def events(self) -> int:
        """Calls made so far."""
        return self._asked - len(self._heap)

    def at(self, time: float, call: Callable[..., None], *args: Any) -> None:
        """Call at a time, which must not be past."""
        if time < self.now:
            raise ValueError(f"asked at {self.now} for a call at {time}")
        self._asked = number = self._asked + 1
        heappush(self._heap, (time, number, call, args))

    def run(self, until: float = float("inf")) -> None:
        """Make calls until none is left, or the next one is later than `until`."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, call, args = heappop(heap)
            call(*args)
