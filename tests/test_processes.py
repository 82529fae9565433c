"""Tasks side by side in processes: the results of one process, whole after deaths, and nothing left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from working import Squares

from strop.core.errors import StropError
from strop.core.executor import Local, Lost
from strop.core.processes import Processes

HERE = Path(__file__).parent


def quiet(*said):
    """What nobody hears."""


def squares(where, folder: Path, numbers) -> dict[int, dict]:
    with where.workers(Squares(folder)) as run:
        return dict(run(numbers, quiet))


def test_results_are_those_of_one_process_and_two_workers_give_them(tmp_path):
    numbers = [*range(6), 100, 100]
    alone, spread = squares(Local(), tmp_path, range(6)), squares(Processes(2), tmp_path, numbers)
    assert sorted(spread) == [*range(8)]
    assert all(spread[i]["square"] == row["square"] for i, row in alone.items())
    assert len({row["pid"] for row in spread.values()} - {os.getpid()}) == 2


def test_no_more_processes_than_tasks_are_started_and_all_are_gone(tmp_path):
    before = set(psutil.Process().children(recursive=True))
    with Processes(8).workers(Squares(tmp_path)) as run:
        pids = {row["pid"] for _, row in run([1, 2], quiet)}
        working = [one for one in psutil.Process().children(recursive=True) if one.pid in pids]
        started = set(psutil.Process().children(recursive=True)) - before
    assert len(working) == len(pids) <= 2 and len(started) <= 2 + 2, "a server and a tracker beside them"
    assert not any(one.is_running() for one in working)


def test_tasks_are_drawn_when_a_worker_is_free_and_none_are_no_work(tmp_path):
    drawn, heard = [], []

    def numbers():
        for number in range(7):
            drawn.append(number)
            yield number

    with Processes(2).workers(Squares(tmp_path)) as run:
        results = run(numbers(), lambda number, what, share: heard.append((number, share)))
        next(results)
        assert len(drawn) <= 3
        assert len(list(results)) == 6
        assert list(run([], quiet)) == []
    assert sorted(heard) == sorted((n, share) for n in range(7) for share in (0.0, 1.0))


def test_a_task_whose_process_dies_is_lost_and_the_others_are_done(tmp_path):
    found = squares(Processes(1), tmp_path, [3, -2, 4])
    assert isinstance(found[1], Lost) and "its process died" in found[1].reason
    assert [found[i]["square"] for i in (0, 2)] == [9, 16]


def test_what_a_worker_raises_is_raised_here(tmp_path):
    with pytest.raises(ZeroDivisionError, match="thirteen") as raised:
        squares(Processes(2), tmp_path, [1, 13])
    assert "in square" in raised.value.__notes__[0], "where it was raised there"
    with pytest.raises(StropError, match="there is no folder"):
        squares(Processes(2), tmp_path / "none", [1])


def test_an_interruption_ends_workers_and_they_say_nothing(tmp_path):
    code = (
        "import signal, sys; from pathlib import Path; from working import Squares; "
        "from strop.core.processes import Processes\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # shells ignore it in the background
        "with Processes(2).workers(Squares(Path(sys.argv[1]))) as run:\n"
        "    list(run([1, 100], lambda *said: None))"
    )
    paths = os.pathsep.join(map(str, (HERE, HERE.parent)))
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("pid-*")) and time.monotonic() < deadline:
        time.sleep(0.05)  # until the task that waits in vain is being done
    family = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, signal.SIGINT)
    told = driver.communicate(timeout=20)[1]
    assert told.count("Traceback") == 1 and told.rstrip().endswith("KeyboardInterrupt")
    _, alive = psutil.wait_procs(family, 10)
    assert len(family) >= 2 and not alive
