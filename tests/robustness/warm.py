"""A process that has imported everything, and forks a run of the command line when it is told to.

A run starts in milliseconds instead of seconds, so many can be killed, starved or fed with nonsense. Each is
a process of its own: a crash, a hang or too much memory is its end and no one else's.
"""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
LESS = {
    "strop.tune.workload": {"SCORED_TOKENS": 100, "CONTINUATION": 4, "KEYS_PER_DEPTH": 1},
    "strop.tune.measure": {"CONTINUATION": 4},
    "strop.audit.speed": {"LEAST_ROUNDS": 2, "SECONDS": 0.0},
}
"""Studies of seconds: what is tested is what they leave behind, not their numbers."""
MEMORY = 3 << 30
"""Bytes of address space that a run may take on top of what is imported."""
STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "sqlite3.connect"}
"""What Python tells of work on files, before it is done."""
SECONDS = 120
"""A run that takes longer is taken for hung."""


@dataclass
class Ended:
    """What came of a run; `code` is negative for the signal that ended it."""

    code: int
    stdout: str
    stderr: str

    def in_one_sentence(self) -> bool:
        """Whether it was refused as users are promised: the sentence comes last, after other news."""
        *told, last = self.stderr.splitlines() or [""]
        sound = "Traceback" not in self.stderr and not any(line.startswith("strop: ") for line in told)
        return self.code == 2 and last.startswith("strop: ") and sound


@dataclass
class Run:
    """A run that was started."""

    warm: "Warm"
    pid: int
    place: Path

    def kill(self) -> None:
        """As kill -9 does."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        """Its end, which comes within the limit of seconds."""
        status = self.warm.ask({"wait": self.pid})
        told = [(self.place / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        return Ended(os.waitstatus_to_exitcode(status), *told)


@dataclass
class Warm:
    """The process, and where its runs leave what they print."""

    home: Path
    server: Any = None
    count: int = field(default=0)

    def __enter__(self) -> "Warm":
        paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "80"}
        command = [sys.executable, "-m", "robustness.warm"]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.stdin.close()
        self.server.wait(10)

    def ask(self, request: dict[str, Any]) -> int:
        """Send a request, and return the number that answers it."""
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def start(self, *words: object, **how: Any) -> Run:
        """Begin a run of a command line. `how`: cwd, environ, seconds, memory, jumps, dies, call."""
        self.count += 1
        place = self.home / f"run-{self.count % 64}"
        place.mkdir(parents=True, exist_ok=True)
        for name in ("stdout", "stderr"):  # a run may be killed before it opens them
            (place / name).write_bytes(b"")
        request = {"words": [str(word) for word in words], "place": str(place)} | how
        return Run(self, self.ask(request), place)

    def run(self, *words: object, **how: Any) -> Ended:
        """A run from its beginning to its end."""
        return self.start(*words, **how).wait()


def serve() -> None:
    """Import, then fork a child for each request on stdin."""
    import strop.cli
    import strop.decode.fit
    import strop.model
    import strop.quantize
    import strop.tune.engine  # noqa: F401

    for module, values in LESS.items():
        for name, value in values.items():
            setattr(importlib.import_module(module), name, value)
    answers = os.fdopen(os.dup(1), "w")
    places: dict[int, Path] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitpid(request["wait"], 0)[1]
            _learn(places.pop(request["wait"]) / "modules")
        elif (answer := os.fork()) == 0:
            _child(request)
        else:
            places[answer] = Path(request["place"])
        print(answer, file=answers, flush=True)


def _learn(note: Path) -> None:
    """Import what a run had to import, so that the next one need not."""
    if note.exists():
        for name in json.loads(note.read_text()):
            with suppress(Exception):
                importlib.import_module(name)
        note.unlink()


def _child(request: dict[str, Any]) -> None:
    """Run a command line, or a call that prints, and end the process."""
    code, known = 70, set(sys.modules)
    try:
        _settle(request)
        if "call" in request:
            module, name = request["call"].split(":")
            getattr(importlib.import_module(module), name)(*request["words"])
        else:
            from strop.cli import app

            app(request["words"], prog_name="strop")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            new = [name for name in [*sys.modules] if name not in known]
            (Path(request["place"]) / "modules").write_text(json.dumps(new))
        finally:
            os._exit(code)


def _settle(request: dict[str, Any]) -> None:
    """Output, folder, environment, limits and clock of a child."""
    for number, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(Path(request["place"]) / name, flags, 0o644), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(request.get("cwd", request["place"]))
    os.environ.update(request.get("environ", {}))
    tempfile.tempdir = None
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + request.get("memory", MEMORY)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(request.get("seconds", SECONDS))
    if "jumps" in request:
        _jumping(request["jumps"])
    if "dies" in request:
        _mortal(*request["dies"])


def _jumping(seconds: float) -> None:
    """From here on each look at the wall clock finds it set back by `seconds` more."""
    now, looks = time.time, iter(range(1 << 62))
    time.time = lambda: now() - seconds * next(looks)
    time.time_ns = lambda: int(1e9 * time.time())


def _mortal(place: str, at: int) -> None:
    """Die before step `at` of what is done to files whose path begins with `place`; 0 lists the steps."""
    seen: list[str] = []

    def look(event: str, args: tuple[Any, ...]) -> None:
        if event not in STEPS or not any(str(arg).startswith(place) for arg in args if arg is not None):
            return
        seen.append(f"{event} {args[0]}")
        if at == 0:
            os.write(2, f"step: {seen[-1]}\n".encode())
        elif len(seen) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


if __name__ == "__main__":
    serve()
