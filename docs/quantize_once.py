"""Quantize one folder with strop and say how long its parts took; a worker of measure_quantize.py.

    python docs/quantize_once.py '{"folder": ..., "out": ..., "method": "rtn", "settings": {"bits": 4}, ...}'

The last line is JSON: `seconds` by part, without imports; a part's clock stands while one inside it runs.
Shards are mapped, so a page is read where it is first used, mostly under `quantize`. With `"spectra": false`
no spectrum is read but where the method asks for it.
"""

import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from strop.core.checkpoint import inspect
from strop.model import tokenizer_of
from strop.quantize import spelled
from strop.weights import alphaq, stream
from strop.weights.draft import Draft
from strop.weights.stored import Stored
from strop.weights.text import calibration_rows
from strop.weights.walk import Flow

PARTS: dict[str, list[tuple[Any, str]]] = {
    "load": [(stream, "open_checkpoint"), (Stored, "load"), (Stored, "matrix"), (Stored, "load_rest")],
    "calibrate": [(Flow, "__init__"), (Flow, "run")],
    "spectra": [(stream, "spectrum"), (alphaq, "spectrum")],
    "save": [(stream.Layout, "state"), (Draft, "add"), (Draft, "finish")],
}


class Clock:
    """Seconds by part; what belongs to none is quantizing."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.part, self.since = "quantize", time.perf_counter()

    def switch(self, part: str) -> None:
        """From now on time counts for `part`."""
        now = time.perf_counter()
        self.seconds[self.part] += now - self.since
        self.part, self.since = part, now

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Count what a function or method takes under `part`."""
        inner: Callable = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **named: Any) -> Any:
            before = self.part
            self.switch(part)
            try:
                return inner(*args, **named)
            finally:
                self.switch(before)

        setattr(owner, name, timed)


def main(told: str) -> None:
    """Quantize as the job says."""
    job = json.loads(told)
    checkpoint = inspect(Path(job["folder"]))
    recipe = spelled(job["folder"], job["method"], **job["settings"])
    assert recipe.weights is not None
    if not job["spectra"]:
        stream._tile = lambda shapes: None
    clock = Clock()
    for part, places in PARTS.items():
        for owner, name in places:
            clock.watch(owner, name, part)
    stream.quantize_checkpoint(
        checkpoint,
        recipe.weights,
        Path(job["out"]),
        recipe.to_yaml(),
        lambda asked: calibration_rows(tokenizer_of(checkpoint), job["folder"], asked),
    )
    clock.switch("end")
    print("\n" + json.dumps({"seconds": dict(clock.seconds)}))


if __name__ == "__main__":
    main(sys.argv[1])
