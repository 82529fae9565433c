"""Tasks side by side in processes of this machine, without a cluster: fast to start, for tasks of seconds."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from strop.core.executor import STARVED, Hear, Lost, Run, Worker


@dataclass(frozen=True)
class Processes:
    """Workers in processes of this machine."""

    count: int | None = None
    """Workers, of which none is started that has no task; None: one a core."""

    @contextmanager
    def workers(
        self, make: Callable[[], Worker], here: Worker | None = None, cpus: int = 1, gpus: int = 0
    ) -> Iterator[Run]:
        """Builds a worker once a process. Behind the block all are gone, whatever they were doing."""
        crew: dict[Connection, BaseProcess] = {}
        try:
            most = self.count or max((os.cpu_count() or 1) // cpus, 1)
            yield partial(_by_pipe, crew, most, make)
        finally:
            for pipe, process in crew.items():
                process.kill()
                process.join()
                pipe.close()


def _by_pipe(
    crew: dict[Connection, BaseProcess],
    most: int,
    make: Callable[[], Worker],
    tasks: Iterable[Any],
    hear: Hear,
) -> Iterator[tuple[int, Any]]:
    """A task whose process dies is lost, and another process takes the next one."""
    waiting, doing = enumerate(tasks), {}

    def begin(pipe: Connection | None) -> None:
        index, task = next(waiting, (-1, None))
        if index >= 0:
            pipe = pipe or _hired(crew, make)
            pipe.send(task)
            doing[pipe] = index
            hear(index, "begun", 0.0)

    for _ in range(most):
        begin(None)
    while doing:
        pipe: Any = wait(list(doing))[0]
        index = doing.pop(pipe)
        try:
            result, error = pipe.recv()
        except (EOFError, OSError):
            result, error, pipe = Lost(f"its process died, {STARVED}"), None, None
        if error is not None:
            raise error
        begin(pipe)
        hear(index, "done", 1.0)
        yield index, result


def _hired(crew: dict[Connection, BaseProcess], make: Callable[[], Worker]) -> Connection:
    """A pipe to a new process, which dies with this one."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()
    crew[here] = process
    here.send(make)
    return here


def _serve(pipe: Connection) -> None:
    """Do tasks until there is nobody to do them for. An interruption is the business of who asks for them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker: Worker | None = None
    with suppress(EOFError, OSError):
        make = pipe.recv()
        while True:
            task = pipe.recv()
            answer: tuple[Any, Exception | None]
            try:
                worker = worker or make()
                answer = worker(task, lambda what, share: None), None
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = None, error
            pipe.send(answer)
