"""Tasks over workers: one after another here, or side by side on the machines of a Ray cluster.

A worker is what is expensive to build and then does many tasks, such as a loaded model. `make` builds one,
wherever it is going to work. Tasks and results are plain data; results come back in order of completion.
"""

import io
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from strop.core.errors import StropError

Report = Callable[[str, float], None]
"""Called with what is going on and the share of one task that is done, 0 to 1."""
Hear = Callable[[int, str, float], None]
"""The same behind the task's number; of work elsewhere it hears the beginning and the end."""
Worker = Callable[[Any, Report], Any]
"""Does one task. What it raises ends the run."""
Run = Callable[[Iterable[Any], Hear], Iterator[tuple[int, Any]]]
"""Does tasks, which are drawn when a worker is free; gives the number and the result of each, or a `Lost`."""

ATTEMPTS = 3
"""Times that a task is begun whose worker dies on it."""
STARVED = "as one does that runs out of memory: use fewer --workers"
PATIENCE = 5.0
"""Seconds for a cluster's address to answer."""
STORE_BYTES = 128 << 20
"""What a local cluster keeps of tasks and results in memory; more goes to disk."""
LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}
"""Has a local cluster listen on loopback alone, as Ray does by itself on macOS, report to nobody, and get the
processor as others do."""


@dataclass(frozen=True)
class Lost:
    """In place of a result: every attempt at the task ended with its worker's death."""

    reason: str


class Executor(Protocol):
    """Where tasks are done."""

    def workers(
        self, make: Callable[[], Worker], here: Worker | None = None, cpus: int = 1, gpus: int = 0
    ) -> AbstractContextManager[Run]:
        """Workers, which are gone behind the block, each with so many cores and devices.

        `here` is a worker that this process has already. A StropError of `make` ends the run.
        """


@dataclass(frozen=True)
class Local:
    """One worker in this process, and tasks in order."""

    @contextmanager
    def workers(
        self, make: Callable[[], Worker], here: Worker | None = None, cpus: int = 1, gpus: int = 0
    ) -> Iterator[Run]:
        """Builds nothing when a worker is here."""
        yield partial(_in_order, here or make())


def _in_order(worker: Worker, tasks: Iterable[Any], hear: Hear) -> Iterator[tuple[int, Any]]:
    for index, task in enumerate(tasks):
        yield index, worker(task, partial(hear, index))


@dataclass(frozen=True)
class Ray:
    """Workers on a Ray cluster: the one that this process is in, else an address's, else one for the run."""

    address: str | None = None
    count: int | None = None
    """Workers; None: as many as the cluster has room for."""

    @contextmanager
    def workers(
        self, make: Callable[[], Worker], here: Worker | None = None, cpus: int = 1, gpus: int = 0
    ) -> Iterator[Run]:
        """Ray speaks on stdout of workers that die, so nothing reaches stdout inside the block."""
        with redirect_stdout(io.StringIO()), cluster(self.address, self.count, cpus) as ray:
            wanted = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
            room = sum(_room(node["Resources"], wanted) for node in ray.nodes() if node["Alive"])
            if not room:
                needs = " and ".join(f"{many} {name}" for name, many in wanted.items())
                raise StropError(f"no node of the Ray cluster has the {needs} that a worker needs: add one")
            kind = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=ATTEMPTS - 1)(
                _Actor
            )
            sent = ray.put(make)
            crew = [kind.remote() for _ in range(min(self.count or room, room))]
            try:
                yield partial(_side_by_side, ray, crew, sent)
            finally:
                for actor in crew:
                    ray.kill(actor)


def _room(has: Mapping[str, float], wanted: Mapping[str, int]) -> int:
    return min(int(has.get(name, 0) // many) for name, many in wanted.items())


@contextmanager
def cluster(address: str | None = None, workers: int | None = None, cpus: int = 1) -> Iterator[Any]:
    """The `ray` module, connected. A cluster that is started here listens on loopback, and is gone behind it.

    It dies with this process as well, however that ends.
    """
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    with tempfile.TemporaryDirectory(prefix="strop-ray-", ignore_cleanup_errors=True) as folder:
        if address is None:
            count = workers or max((os.cpu_count() or 1) // cpus, 1)
            settings |= {"address": "local", "num_cpus": count * cpus, "include_dashboard": False}
            settings |= {"object_store_memory": STORE_BYTES, "_temp_dir": folder}
        else:
            _require_answer(address)
            settings["address"] = address
        with _environment(LOCAL if address is None else {}):
            ray = _imported()
            if ray.is_initialized():
                yield ray
                return
            try:
                _started(ray, settings)
            except (Exception, SystemExit) as error:  # Ray exits where an address is no cluster's
                where = f"at {address}" if address else "on this machine"
                raise StropError(f"no Ray cluster {where}: {' '.join(str(error).split())[:200]}") from error
        try:
            yield ray
        finally:
            ray.shutdown()


def _started(ray: Any, settings: Mapping[str, Any]) -> None:
    """Ray gives its node 30 s, which a busy machine may not keep: a second try finds its files in memory."""
    try:
        ray.init(**settings)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        ray.shutdown()
        ray.init(**settings)


def _imported() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise StropError(
            "Ray is not installed, and --executor ray needs it: pip install 'strop[ray]'"
        ) from error
    return ray


def _require_answer(address: str) -> None:
    """Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal():
        raise StropError(f"--address is auto, HOST:PORT or ray://HOST:PORT, not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise StropError(
            f"nothing answers at {address} ({error}): start a cluster with `ray start --head`, or leave "
            "--address out for one on this machine"
        ) from error


@contextmanager
def _environment(names: Mapping[str, str]) -> Iterator[None]:
    """The environment with some variables more, which processes that are started meanwhile inherit."""
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Actor:
    """A worker's process. When it dies, Ray starts another, and the worker is built there again."""

    def __init__(self) -> None:
        self.worker: Worker | None = None

    def ready(self, make: Callable[[], Worker]) -> Worker:
        """Build the worker."""
        if self.worker is None:
            try:
                self.worker = make()
            except StropError as error:
                raise StropError(f"on the node {socket.gethostname()}: {error}") from error
        return self.worker

    def begin(self, make: Callable[[], Worker]) -> None:
        """The same, of which nothing is sent back."""
        self.ready(make)

    def work(self, make: Callable[[], Worker], task: Any) -> Any:
        """Do one task."""
        return self.ready(make)(task, lambda what, share: None)


def _side_by_side(
    ray: Any, crew: list[Any], make: Any, tasks: Iterable[Any], hear: Hear
) -> Iterator[tuple[int, Any]]:
    """Workers that a busy cluster has no room for yet are never waited for."""
    waiting, exhausted = enumerate(tasks), False
    doing = {actor.begin.remote(make): (actor, -1) for actor in crew}
    while not exhausted or any(index >= 0 for _, index in doing.values()):
        (done,), _ = ray.wait(list(doing), num_returns=1)
        actor, index = doing.pop(done)
        result = _result(ray, done)
        if index < 0 and isinstance(result, Lost):
            raise StropError(f"no worker could be made ready: {result.reason}")
        following = None if exhausted else next(waiting, None)
        exhausted = following is None
        if following is not None:
            doing[actor.work.remote(make, following[1])] = (actor, following[0])
            hear(following[0], "begun", 0.0)
        if index >= 0:
            hear(index, "done", 1.0)
            yield index, result


def _result(ray: Any, done: Any) -> Any:
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
        return Lost(f"its worker died {ATTEMPTS} times, {STARVED}")
    except ray.exceptions.RayError as error:
        return Lost(f"the cluster lost it ({type(error).__name__}): look at its nodes, then use --resume")


def executor(name: str, address: str | None = None, workers: int | None = None) -> Executor:
    """What `--executor`, `--address` and `--workers` ask for. Raises StropError where they contradict."""
    if name == "ray":
        return Ray(address, workers)
    if name != "local":
        raise StropError(f"unknown executor {name!r}: local or ray")
    if address is not None or workers is not None:
        raise StropError(
            "--address and --workers are for a Ray cluster: add --executor ray, or leave them out"
        )
    return Local()
