"""Tasks side by side on a local Ray cluster: the same results as here, whole after deaths, and gone."""

import dataclasses
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock, call

import psutil
import pytest
from routing import identical
from test_cli import ROOT, TEXT, strop_
from test_tune import model, rows_of  # noqa: F401
from working import Squares

import strop.claims
from strop.audit import speed
from strop.claims.base import Claim, Paper, part
from strop.claims.base import Row as ClaimRow
from strop.core import executor
from strop.core.errors import StropError
from strop.core.executor import Local, Lost, Ray, cluster
from strop.kv import SnapKV
from strop.serve.cluster import Cluster
from strop.serve.experiment import Settings as FleetSettings
from strop.serve.experiment import experiment
from strop.serve.traces import made
from strop.tune import measure, study, workload
from strop.tune.engine import Settings, tune
from strop.tune.report import scope

HERE = Path(__file__).parent
ASKED = {"methods": ("snapkv", "prompt_lookup"), "context": 560, "max_drop": 0.9}
"""A study without kernels, whose compiling would take most of the time."""


@pytest.fixture(scope="module", autouse=True)
def two_workers():
    """One cluster for all tests, whose workers find this file and this package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (HERE, HERE.parent))))
        with cluster(workers=2) as ray:
            yield ray


def shrink() -> None:
    """Less of everything, in whatever process."""
    measure.CONTINUATION = workload.CONTINUATION = 8
    workload.SCORED_TOKENS, workload.KEYS_PER_DEPTH = 600, 1
    speed.LEAST_ROUNDS, speed.SECONDS = 2, 0.0


@pytest.fixture
def small(monkeypatch):
    for place, names in {
        measure: ("CONTINUATION",),
        workload: ("CONTINUATION", "SCORED_TOKENS", "KEYS_PER_DEPTH"),
        speed: ("LEAST_ROUNDS", "SECONDS"),
    }.items():
        for name in names:
            monkeypatch.setattr(place, name, getattr(place, name))
    shrink()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(measure.Elsewhere):
    """A measurer of small studies, whose process dies once, in the middle of a recipe with a kv method."""

    marker: Path | None = None

    def __call__(self):
        shrink()
        measurer = super().__call__()

        def mortal(given, report):
            def hear(what, share):
                if what == "quality" and "kv" in given and self.marker and not self.marker.exists():
                    self.marker.write_text(given["model"])
                    os.kill(os.getpid(), signal.SIGKILL)

            return measurer(given, hear)

        return mortal


def quiet(*said):
    """What nobody hears."""


def squares(where, folder: Path, numbers) -> dict[int, dict]:
    with where.workers(Squares(folder)) as run:
        return dict(run(numbers, quiet))


def test_results_are_those_of_one_process_and_two_workers_give_them(tmp_path):
    numbers = [*range(6), 100, 100]
    alone = squares(Local(), tmp_path, range(6))
    spread = squares(Ray(), tmp_path, numbers)
    assert list(alone) == [*range(6)] and sorted(spread) == [*range(8)]
    assert all(spread[i]["square"] == number**2 for i, number in enumerate(numbers))
    assert all(alone[i] == {"square": i * i, "pid": os.getpid()} for i in range(6))
    found = {row["pid"] for row in spread.values()}
    assert len(found) == 2 and os.getpid() not in found


def test_tasks_are_drawn_when_a_worker_is_free(tmp_path):
    drawn, heard = [], []

    def numbers():
        for number in range(9):
            drawn.append(number)
            yield number

    with Ray().workers(Squares(tmp_path)) as run:
        results = run(numbers(), lambda number, what, share: heard.append((number, share)))
        next(results)
        assert len(drawn) <= 3
        rest = list(results)
    assert len(rest) == 8 and sorted(heard) == sorted((n, share) for n in range(9) for share in (0.0, 1.0))


def test_a_task_whose_worker_was_killed_is_done_again_and_given_up_in_the_end(tmp_path, capfd):
    found = squares(Ray(), tmp_path, [3, -1, -2, 4, 5])
    assert isinstance(found[2], Lost) and "died 3 times" in found[2].reason
    assert [found[i]["square"] for i in (0, 1, 3, 4)] == [9, 1, 16, 25]
    assert capfd.readouterr() == ("", ""), "Ray's own words would spoil --json and the bar"


def test_what_a_worker_raises_is_raised_here_and_a_worker_that_cannot_be_made_names_the_node(tmp_path):
    with pytest.raises(ZeroDivisionError, match=r"^thirteen$"):
        squares(Ray(), tmp_path, [1, 13])
    with pytest.raises(StropError, match=f"^on the node {socket.gethostname()}: there is no folder .*none$"):
        squares(Ray(), tmp_path / "none", [1])


def test_more_than_any_node_has_is_refused(tmp_path):
    with (
        pytest.raises(StropError, match="no node of the Ray cluster has the 64 CPU"),
        Ray().workers(Squares(tmp_path), cpus=64),
    ):
        pass


def test_a_cluster_that_is_late_is_started_once_more():
    late, asked = RuntimeError("The current node timed out during startup."), {"num_cpus": 2}
    ray = Mock(**{"init.side_effect": (late, None)})
    executor._started(ray, asked)
    assert ray.mock_calls == [call.init(**asked), call.shutdown(), call.init(**asked)]
    for fails, tries in (((late, late), 2), ((ConnectionError("no such place"),), 1)):
        ray = Mock(**{"init.side_effect": fails})
        with pytest.raises(type(fails[-1])):
            executor._started(ray, asked)
        assert ray.init.call_count == tries


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StropError, match=r"pip install 'strop\[ray\]'"), cluster():
        pass


def test_an_address_where_nothing_answers_is_told_at_once(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    told = strop_("claims", "--executor", "ray", "--address", address, code=2).stderr
    assert told.startswith(f"strop: nothing answers at {address}") and len(told.splitlines()) == 1
    assert "HOST:PORT" in strop_("claims", "--executor", "ray", "--address", "here", code=2).stderr


@pytest.mark.parametrize("words", [("--workers", 2), ("--address", "auto")])
@pytest.mark.parametrize("verb", [("tune", "zoo:coder"), ("claims",)])
def test_words_for_a_cluster_want_one(verb, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "add --executor ray" in strop_(*verb, *words, code=2).stderr
    assert not list(tmp_path.iterdir())


def test_a_study_is_the_same_side_by_side_though_a_worker_was_killed(
    model,  # noqa: F811
    small,
    tmp_path,
    monkeypatch,
):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    monkeypatch.setattr(study, "Elsewhere", partial(Small, marker=tmp_path / "killed"))
    monkeypatch.setattr(study, "named", lambda *asked: [SnapKV(budget=128, buffer=32)])
    heard: list[float] = []
    ways = {name: Settings(**ASKED, executor=name) for name in ("local", "ray")}
    alone = tune(str(model), text, tmp_path / "local", ways["local"])
    spread = tune(
        str(model), text, tmp_path / "ray", ways["ray"], report=lambda what, done: heard.append(done)
    )
    assert (tmp_path / "killed").exists()
    assert [row["label"] for row in spread["rows"]] == [row["label"] for row in alone["rows"]]
    assert [row["status"] for row in spread["rows"]] == ["measured"] * 3 + ["refused"]
    for row, one in zip(spread["rows"], alone["rows"], strict=True):
        assert (row["status"], row["reason"], row["quality"]) == (
            one["status"],
            one["reason"],
            one["quality"],
        )
        assert without_peak(row) == without_peak(one)
        assert socket.gethostname() in row["node"] and "node" not in one
    assert [row["quality"]["kl"] > 0 for row in spread["rows"][:3]] == [False, True, False], "evicting harms"
    assert heard == sorted(heard) and heard[-1] == 1
    assert "--executor ray" in spread["settings"]["command"]
    assert "not comparable" in scope(spread) and "not comparable" not in scope(alone)
    again = tune(str(model), text, tmp_path / "ray", ways["local"], resume=True)
    assert [row.get("reused") for row in again["rows"]] == [True] * 3 + [None]


def without_peak(row: dict) -> dict:
    return {name: value for name, value in (row["memory"] or {}).items() if name != "peak_rss_bytes"}


def study_apart(source: str, text: str, out: str) -> None:
    """A study of a process of its own, on a cluster of its own."""
    shrink()
    study.Elsewhere = Small
    tune(source, Path(text), Path(out), Settings(**ASKED, executor="ray", workers=1))


def kept(out: Path) -> dict[str, float]:
    """The recipes that are measured so far, and when."""
    try:
        return dict(sqlite3.connect(out / "results.sqlite").execute("SELECT label, created FROM results"))
    except sqlite3.OperationalError:
        return {}


def test_a_killed_driver_takes_its_cluster_along_and_the_study_goes_on(
    model,  # noqa: F811
    small,
    tmp_path,
    monkeypatch,
):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT * 4)
    code = f"import test_executor as t; t.study_apart({str(model)!r}, {str(text)!r}, {str(out)!r})"
    paths = os.pathsep.join(map(str, (HERE, HERE.parent)))
    driver = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths})
    while len(kept(out)) < 2:
        with pytest.raises(subprocess.TimeoutExpired):
            driver.wait(0.05)
    family = psutil.Process(driver.pid).children(recursive=True)
    listening = {
        connection.laddr.ip
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    agents = [process for process in family if process.name().endswith("Agent")]
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs([process for process in family if process not in agents], 20)
    assert not alive, "agents look for their parent from time to time only"
    assert listening and all(ip.endswith("127.0.0.1") or ip == "::1" for ip in listening)
    before = kept(out)
    rows = tune(str(model), text, out, Settings(**ASKED, executor="ray"), resume=True)["rows"]
    assert {row["label"] for row in rows if row.get("reused")} == set(before)
    after = kept(out)
    assert len(after) > len(before) and all(after[label] == when for label, when in before.items())


def numbers(number: int, bed: int, progress) -> list[ClaimRow]:
    progress("counting")
    return [{"number": number * bed, "pid": os.getpid()}]


def parts(size: int):
    return [
        part("sums", "one", 1, partial(numbers, 1)),
        part("times", "", 1, partial(numbers, 5), timed=True),
        part("sums", "two", 1, partial(numbers, 2)),
        part("sums", "three", 1, partial(numbers, 3)),
    ]


def lay(size: int, progress) -> int:
    progress("laying")
    return size


def verdicts(tables, size: int) -> list[Claim]:
    empty = {"claim": "c", "paper_value": "", "measured": "", "interval": None, "seeds": 5, "varied": "draws"}
    said = {"verdict": "partly", "reason": "r", "scale": "cpu"}
    return [table.claim(table.rows, paper=name, **empty, **said) for name, table in tables.items()]


def fake() -> Paper:
    return Paper(scales={"cpu": 7}, lay=lay, laying=1, parts=parts, verdicts=verdicts)


def test_claims_are_the_same_side_by_side_and_what_is_timed_runs_here_behind_the_rest(monkeypatch):
    monkeypatch.setattr(strop.claims, "PAPERS", {"fake": fake})
    told, heard = {}, {}
    for name in ("local", "ray"):
        shares = heard[name] = []
        where = executor.executor(name)
        found = strop.claims.run_claims(
            [], "cpu", lambda what, share, to=shares: to.append((what, share)), where
        )
        told[name] = {claim.paper: claim.details for claim in found}
        assert [share for _, share in shares] == sorted(share for _, share in shares)
        assert shares[-1] == ("done", 1.0)
    for table, rows in told["local"].items():
        assert [row["number"] for row in rows] == [row["number"] for row in told["ray"][table]]
    assert [row["number"] for row in told["ray"]["sums"]] == [7, 14, 21]
    assert {row["pid"] for row in told["ray"]["times"]} == {os.getpid()}
    assert os.getpid() not in {row["pid"] for row in told["ray"]["sums"]}


def test_a_simulation_on_ray_is_that_of_one_process_bit_for_bit():
    fleet = Cluster.load(ROOT / "examples" / "fat-tree-64.yaml")
    asked = FleetSettings(policies=("round-robin", "netkv"), seeds=2)
    draw = partial(made, "conversation", 40)
    here, there = (experiment(fleet, draw, asked, where).runs for where in (Local(), Ray()))
    for name, runs in here.items():
        assert all(identical(*pair) for pair in zip(runs, there[name], strict=True))
