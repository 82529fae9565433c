"""`strop simulate`: what it writes, prints, exits with and refuses."""

import json
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from browser import chromium, complaints, requests, show
from routing import identical
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from test_cli import ROOT, strop_

from strop.core.executor import Local
from strop.core.files import alone
from strop.core.processes import Processes
from strop.serve import export
from strop.serve.cluster import Cluster
from strop.serve.experiment import Settings, alike, experiment
from strop.serve.fleet_report import write_report
from strop.serve.run import names, nearest, occupied, simulate
from strop.serve.traces import MADE, load, made

EXAMPLE = ROOT / "examples" / "fat-tree-64.yaml"
POLICIES = ("round-robin", "netkv", "netkv:gamma=0.5,hits=false")
FILES = ["report.html", "requests.parquet", "simulation.json", "trace.json"]
ROWS = 90
SHARED = "strop: 1\nnetwork: {flat: {hosts: 2}}\ninstances: [{role: both, hosts: [0, 1]}]\n"


def row(number: int, prompt: int, step: int = 3) -> str:
    """A line of Mooncake's form; `step` requests share a timestamp, and all the first block."""
    blocks = [0, *range(100 * number + 1, 100 * number + -(-prompt // 512))]
    told = {"timestamp": number // step * 1000, "input_length": prompt, "output_length": 5 + number % 90}
    return json.dumps(told | {"hash_ids": blocks})


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "made.jsonl"
    path.write_text("".join(row(i, 600 + 811 * i % 9000) + "\n" for i in range(ROWS)))
    return path


def run(*words: object, code: int = 0) -> Any:
    return strop_("simulate", *words, "--workers", 1, code=code)


def said(result: Any) -> str:
    """What a command said, on one line."""
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def done(trace, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("done") / "fleet"
    run(EXAMPLE, "--trace", trace, "--policy", ",".join(POLICIES), "--seeds", 2, "--out", out)
    return out


def test_the_four_files_agree(done):
    assert sorted(path.name for path in done.iterdir()) == FILES
    told = json.loads((done / "simulation.json").read_text())
    table = pyarrow.parquet.read_table(done / "requests.parquet")
    assert table.num_rows == len(POLICIES) * 2 * ROWS
    policy, seed, first, arrived = (table[name].to_numpy() for name in ("policy", "seed", "first", "arrived"))
    assert sorted(set(seed)) == [0, 1]
    for line in told["rows"]:
        own = policy == line["policy"]
        assert line["ttft_mean"][0] == pytest.approx((first - arrived)[own].mean())
        assert told["ttft"][line["policy"]][100] == pytest.approx(np.median((first - arrived)[own]))
    assert [line["policy"] for line in told["rows"]] == list(POLICIES)
    assert told["rows"][0]["ttft_change"] is None and len(told["rows"][1]["ttft_change"]) == 3
    assert json.loads(table.schema.metadata[b"strop"])["command"] == told["command"]
    assert told["speed"]["requests"] == table.num_rows
    page = (done / "report.html").read_text().partition("<main>")[2].partition("</main>")[0]
    assert "the first token" in page and told["cluster"]["nearest"] == "pod"
    assert all(name in page for name in (*POLICIES, "Load over time", "strop simulate"))


def test_slices_of_the_timeline_nest_and_each_instance_is_a_row(done, trace, tmp_path, monkeypatch):
    events = json.loads((done / "trace.json").read_text())["traceEvents"]
    processes = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert list(processes.values()) == [
        f"{name}: {role}" for name in POLICIES for role in ("prefill", "decode")
    ]
    stays = defaultdict(list)
    for event in events:
        if event["ph"] != "M":
            stays[event["pid"], event["id2"]["local"]].append(event)
    assert len(stays) == len(POLICIES) * 2 * ROWS
    for (process, _), stay in stays.items():
        role = processes[process].rpartition(" ")[2]
        inner = ["queue", "prefill"] if role == "prefill" else ["transfer", "decode"]
        expected = [f"{role} {stay[0]['tid']}", *[name for name in inner for _ in "be"]]
        assert [event["name"] for event in stay] == [*expected, expected[0]]
        assert [event["ph"] for event in stay] == ["b", "b", "e", "b", "e", "e"]
        times = [event["ts"] for event in stay]
        assert times == sorted(times) and times[2] == times[3]
    monkeypatch.setattr(export, "SHOWN", 7)
    run(EXAMPLE, "--trace", trace, "--policy", "jsq", "--seeds", 1, "--out", tmp_path)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len({event["id2"]["local"] for event in events if event["ph"] != "M"}) == 7


def test_it_says_first_whether_the_network_matters_and_json_is_one_value(trace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (EXAMPLE, "--trace", trace, "--policy", "round-robin,netkv", "--seeds", 2)
    printed = run(*words).stdout
    assert printed.startswith("Network-aware routing: ")
    assert max(map(len, printed.splitlines())) <= 80 and "round-robin  " in printed
    assert "requests were simulated in" in said(run(*words))
    result = run(*words, "--json")
    assert len(json.loads(result.stdout)["rows"]) == 2 and "Network-aware" in result.stderr
    assert not list(tmp_path.iterdir()), "nothing is written without --out"


def test_processes_give_what_one_process_gives_bit_for_bit(trace):
    asked = Settings(policies=("round-robin", "power-of-two", "netkv"), seeds=2)
    given = (Cluster.load(EXAMPLE), partial(alike, load(trace)), asked)
    alone_, spread = (experiment(*given, where) for where in (Local(), Processes(2)))
    assert list(alone_.runs) == list(spread.runs) == list(asked.policies)
    for name, runs in alone_.runs.items():
        for one, other in zip(runs, spread.runs[name], strict=True):
            assert identical(one, other)


@pytest.mark.parametrize("name", MADE)
def test_every_made_up_trace_has_a_name_and_differs_by_seed(name):
    one, again, other = (made(name, 100, seed) for seed in (0, 0, 1))
    assert len(one.all()) == 100 or name == "agents"
    assert one.jobs == again.jobs != other.jobs


def test_sessions_are_simulated_by_name():
    told = json.loads(run(EXAMPLE, "--trace", "agents", "--policy", "jsq", "--requests", 60, "--json").stdout)
    assert told["trace"]["name"] == "agents with tools" and told["trace"]["hashed"]


def test_tuned_weights_are_told(trace, tmp_path):
    printed = said(run(EXAMPLE, "--trace", trace, "--policy", "jsq,cache-load", "--seeds", 1))
    assert "The weights of cache-load, w_c" in printed and "the first 20% of the trace's time" in printed
    assert "One seed bounds nothing" in printed


def test_what_is_told_of_requests_is_told_of_those_that_are_measured(tmp_path):
    path = tmp_path / "grows.jsonl"
    path.write_text("".join(row(i, 1000 if i < 8 else 3000, step=1) + "\n" for i in range(41)))
    printed = said(run(EXAMPLE, "--trace", path, "--policy", "jsq,cache-load", "--seeds", 1))
    assert "Simulated: 33 requests of grows.jsonl, 1.03 a second, prompts of 3,000 tokens" in printed
    path.write_text(row(0, 1000) + "\n")
    alone = said(run(EXAMPLE, "--trace", path, "--policy", "jsq", "--seeds", 1))
    assert "Simulated: 1 request of grows.jsonl, prompts of 1,000 tokens" in alone
    assert "1 request was simulated" in alone


def test_what_seeds_do_not_vary_has_no_interval(tmp_path):
    path = tmp_path / "apart.jsonl"
    path.write_text("".join(row(i, 700 + 300 * i % 5000, step=1) + "\n" for i in range(40)))
    shared = tmp_path / "shared.yaml"
    shared.write_text(SHARED.replace("hosts: 2", "hosts: 4").replace("[0, 1]", "[0, 1, 2, 3]"))
    asked = Settings(policies=("round-robin", "least-loaded", "power-of-two"), seeds=3)
    told = simulate(shared, path, asked)
    fixed, least, drawn = told["rows"]
    assert fixed["ttft_mean"][1:] == least["ttft_mean"][1:] == least["ttft_change"][1:] == [None, None]
    assert drawn["ttft_mean"][1] <= drawn["ttft_mean"][0] <= drawn["ttft_mean"][2]
    assert None not in drawn["ttft_change"] and told["varied"]
    same = simulate(shared, path, Settings(policies=("round-robin",), seeds=2))
    assert not same["varied"]


def test_a_comma_ends_a_policy_unless_a_field_follows():
    assert names("netkv:gamma=0.5,hits=false,jsq") == ("netkv:gamma=0.5,hits=false", "jsq")
    assert names("jsq, cache-load:w_c=1,w_l=2,netkv:gamma=0") == (
        "jsq",
        "cache-load:w_c=1,w_l=2",
        "netkv:gamma=0",
    )


def test_load_over_time_is_the_mean_number_of_spans():
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 10, 50)
    end, edges = start + rng.uniform(0, 3, 50), np.linspace(1, 12, 8)
    ticks = np.linspace(1, 12, 70_001)[:-1] + 5.5 / 70_000
    counts = ((start[:, None] <= ticks) & (ticks < end[:, None])).sum(0)
    assert occupied(start, end, edges) == pytest.approx(counts.reshape(7, -1).mean(1), abs=1e-2)


def test_instances_that_do_both_have_no_transfers(trace, tmp_path):
    (tmp_path / "shared.yaml").write_text(SHARED)
    out = tmp_path / "out"
    run(
        tmp_path / "shared.yaml", "--trace", trace, "--policy", "jsq,least-loaded", "--seeds", 1, "--out", out
    )
    told = json.loads((out / "simulation.json").read_text())
    assert told["expected"] is None and told["cluster"]["nearest"] is None
    assert "How far the KV went" not in (out / "report.html").read_text()
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert {event["name"] for event in events} >= {"queue", "prefill", "decode", "both 0", "both 1"}
    assert "transfer" not in {event["name"] for event in events}


REFUSED = {
    "no rate": (["--rate", "0"], "is not a number above 0"),
    "a negative rate": (["--rate=-1"], "is not a number above 0"),
    "no number": (["--rate", "nan"], "is not a number above 0"),
    "no time": (["--slo", "0"], "is not a number above 0"),
    "an unknown policy": (["--policy", "jsq,netvk"], "did you mean 'netkv'?"),
    "a policy twice": (["--policy", "jsq,jsq"], "each once"),
    "a policy without a name": (["--policy", "gamma=2"], "unknown routing policy"),
    "no seed": (["--seeds", "0"], "--seeds"),
    "too many seeds": (["--seeds", "100000"], "are more than the 1,000"),
    "too many requests": (["--requests", "3000000"], "from 1 to 2000000"),
    "bad rows of no file": (["--skip-bad"], "add --trace FILE"),
    "too many requests in all": (
        ["--requests", "1000000", "--policy", "jsq", "--seeds", "21"],
        "in all runs are",
    ),
    "no such trace": (["--trace", "nowhere.jsonl"], "nowhere.jsonl"),
    "no trace of that name": (["--trace", "agent"], "did you mean 'agents'?"),
    "an address without a cluster": (["--address", "auto"], "add --executor ray"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_told_in_one_sentence(name, tmp_path):
    words, expected = REFUSED[name]
    result = run(EXAMPLE, *words, "--out", tmp_path / "out", code=2)
    assert expected in said(result) and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("strop: ") and not list(tmp_path.iterdir())


def test_a_cluster_that_makes_no_sense_is_refused(tmp_path):
    def refused(text: str) -> str:
        (tmp_path / "c.yaml").write_text(text)
        return said(run(tmp_path / "c.yaml", code=2))

    assert "cannot read cluster" in said(run(tmp_path / "none.yaml", code=2))
    assert "has no field 'raks'" in refused(EXAMPLE.read_text().replace("racks:", "raks:"))
    assert "800,000 instances are more than" in refused(
        EXAMPLE.read_text().replace("each: 2", "each: 100000")
    )
    assert "hosts are more than" in refused(EXAMPLE.read_text().replace("pods: 4", "pods: 4000000"))
    assert "is not YAML" in refused("strop: [1")


def test_a_trace_that_does_not_fit_is_refused_by_its_line(trace, tmp_path):
    bad, out = tmp_path / "bad.jsonl", tmp_path / "out"
    lines = trace.read_text().splitlines()
    lines[4] = lines[4].replace('"hash_ids": [0, ', '"hash_ids": [0, 7777, ')
    bad.write_text("\n".join(lines))
    assert "bad.jsonl, line 5: " in said(run(EXAMPLE, "--trace", bad, "--out", out, code=2))
    words = ("--policy", "jsq", "--seeds", 1, "--skip-bad")
    printed = said(run(EXAMPLE, "--trace", bad, *words))
    assert "1 bad row was skipped; the first: " in printed and "line 5" in printed
    (tmp_path / "empty.jsonl").write_text("")
    assert "is empty" in said(run(EXAMPLE, "--trace", tmp_path / "empty.jsonl", "--out", out, code=2))
    plain = tmp_path / "plain.csv"
    plain.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,400,10\n")
    told = said(run(EXAMPLE, "--trace", plain, "--policy", "jsq,cache-aware", "--out", out, code=2))
    assert "CacheAware needs to know which blocks requests share" in told
    assert "leave it out" in said(run(EXAMPLE, "--trace", trace, "--requests", 9, code=2))
    assert not out.exists()


def test_a_file_is_no_folder_and_two_runs_do_not_share_one(trace, tmp_path):
    (tmp_path / "file").write_text("")
    words = (EXAMPLE, "--trace", trace, "--policy", "jsq", "--seeds", 1)
    assert "it is a file" in said(run(*words, "--out", tmp_path / "file", code=2))
    with alone(tmp_path / "taken"):
        assert "another run is at work" in said(run(*words, "--out", tmp_path / "taken", code=2))
    assert not (tmp_path / "taken").exists(), "what was made and not used goes"
    for _ in range(2):
        run(*words, "--out", tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == FILES


def test_no_tensor_library_is_loaded(trace, tmp_path):
    code = (
        "import sys; from pathlib import Path; from strop.serve import run\n"
        "asked = run.Settings(policies=('jsq',), seeds=1)\n"
        "run.simulate(Path(sys.argv[1]), Path(sys.argv[2]), asked, out=Path(sys.argv[3]))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, EXAMPLE, trace, tmp_path], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_the_example_is_64_gpus_whose_nearest_decoder_is_in_the_pod():
    cluster = Cluster.load(EXAMPLE)
    assert [len(cluster.of(role)) for role in ("prefill", "decode")] == [8, 8]
    assert nearest(cluster) == "pod" and cluster.background.share == 0.2


def test_links_of_pairs_are_counted_among_the_facts(trace, tmp_path):
    for said, told in (("pairs: [[0, 1, 1e6, 0.001]]", "memory 1e+10, pairs 1 apart"), ("", "memory 1e+10")):
        path = tmp_path / "shared.yaml"
        path.write_text(SHARED.replace("hosts: 2", f"hosts: 2, {said}"))
        facts = simulate(path, trace, Settings(policies=("jsq",), seeds=1))["cluster"]
        assert facts["network"].endswith(told)


def test_help_has_an_example():
    told = strop_("simulate", "--help").stdout
    assert "Example: strop simulate" in told and "unless field=value" in " ".join(
        told.replace("│", " ").split()
    )


def test_hostile_names_and_missing_numbers_stay_in_their_place(done, tmp_path):
    told = json.loads((done / "simulation.json").read_text())
    told["trace"]["name"] = told["cluster"]["file"] = "</script><img src=x onerror=alert(1)>"
    told["rows"][1]["ttft_change"][1:] = [None, None]
    write_report(told, tmp_path / "report.html")
    body = (tmp_path / "report.html").read_text().partition("<main>")[2].partition("</main>")[0]
    assert "<img" not in body and "</script>" not in body and "None" not in body


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_draws_its_charts(done, width):
    with chromium() as driver:
        show(driver, done / "report.html", width, dark=width == 400)
        lines = "#load-decode .scatterlayer .trace"
        WebDriverWait(driver, 20).until(lambda d: len(d.find_elements(By.CSS_SELECTOR, lines)) == 3)
        count = {name: len(driver.find_elements(By.CSS_SELECTOR, f"#{name} .bars .point")) for name in
                 ("stages", "tiers")}  # fmt: skip
        assert count == {"stages": 4 * 3, "tiers": 4 * 3}
        told = [text.text for text in driver.find_elements(By.CSS_SELECTOR, "#stages .annotation-text")]
        assert [text.rpartition(":")[0] for text in told] == list(POLICIES)
        assert len(driver.find_elements(By.CSS_SELECTOR, "#ttft .scatterlayer .trace")) == 3
        assert driver.execute_script("return document.documentElement.scrollWidth") == width
        assert complaints(driver) == [] and requests(driver) == []
