"""Workers for tests of executors, in a file of their own so that a process that runs them starts fast."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop.core.errors import StropError

MEET_S = 60.0
"""Seconds for two workers to meet."""


@dataclass(frozen=True)
class Squares:
    """Makes a worker that squares whole numbers.

    Processes die on negative ones, the first time on -1 and always below; 13 fails; 100 waits for a second
    process that was given 100 as well.
    """

    folder: Path

    def __call__(self):
        if not self.folder.is_dir():
            raise StropError(f"there is no folder {self.folder}")
        return self.square

    def square(self, number: int, report: Any) -> dict[str, int]:
        """The square, and the process that found it."""
        met = self.folder / f"{number}"
        if number < -1 or (number == -1 and not met.exists()):
            met.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 13:
            raise ZeroDivisionError("thirteen")
        if number == 100:
            self.meet()
        return {"square": number * number, "pid": os.getpid()}

    def meet(self) -> None:
        """Wait for another process."""
        (self.folder / f"pid-{os.getpid()}").write_text("")
        deadline = time.monotonic() + MEET_S
        while len(list(self.folder.glob("pid-*"))) < 2:
            if time.monotonic() > deadline:
                raise TimeoutError("no second worker came")
            time.sleep(0.01)
