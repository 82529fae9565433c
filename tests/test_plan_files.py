"""Files of the planner: devices, models, workloads, plans; and the commands around them."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from strop import cli_plan, console, profiling
from strop.core.errors import StropError
from strop.models.zoo import zoo_path
from strop.serve.base import Job, Request, Trace
from strop.serve.plan import DeploymentPlan, Workload, planner, read_devices, read_model
from strop.serve.plan.devices import parse_device
from strop.serve.plan.model import ModelShape, from_config
from strop.serve.plan.picture import picture

EDGE = Path(__file__).parents[1] / "examples" / "edge-7.yaml"
OSS = "name=oss,blocks=24,hidden=2880,kv_heads=8,head_dim=64,block=476MB,ffn=423MB,head=2.3GB"
TYPED = {"blocks": 4, "hidden": 64, "kv_heads": 2, "head_dim": 16, "block": "1MB", "head": "1MB"}


def small(**changes: Any) -> dict[str, Any]:
    """Three devices, the third too small for anything."""
    device = {"memory": "1 GB", "block": {"prefill_token": "10 us", "decode": [0.001, 0.002]}, "head": "1 ms"}
    devices = {"a": device, "b": dict(device), "c": device | {"memory": 1000}}
    return {"strop_devices": 1, "links": {"bandwidth": "1 Gb/s", "rtt": "1 ms"}, "devices": devices} | changes


def written(folder: Path, data: Any) -> Path:
    path = folder / "devices.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(data))))  # without aliases
    return path


def run(*words: object, code: int = 0) -> str:
    app = typer.Typer(cls=console.Strop, pretty_exceptions_enable=False)
    app.command()(cli_plan.plan)
    app.command()(cli_plan.profile)
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output
    return result.output


def test_quantities_have_units(tmp_path):
    devices, links = read_devices(written(tmp_path, small()))
    assert [device.name for device in devices] == ["a", "b", "c"]
    assert devices[0].memory == 1e9 and devices[0].block.prefill_token == pytest.approx(1e-5)
    assert devices[0].head == (1e-3,) * 16 and devices[0].batch == 2
    assert links.default.bandwidth == 125e6 and links.between("a", "b").seconds(125e6) == pytest.approx(
        1.0005
    )


def test_pairs_have_links_of_their_own(tmp_path):
    pair = {"between": ["b", "a"], "bandwidth": "1 MB/s"}
    _, links = read_devices(written(tmp_path, small(links={"bandwidth": "1 GB/s", "pairs": [pair]})))
    assert links.between("a", "b").bandwidth == 1e6 and links.between("a", "c").bandwidth == 1e9


def change(path: str, value: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(small()))
    *way, last = path.split(".")
    node = data
    for key in way:
        node = node[key]
    node[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("device", {}, "no field 'device'; did you mean 'devices'"),
        ("devices.a.memroy", 1, "device a has no field 'memroy'; did you mean 'memory'"),
        ("devices.a.block.decod", [1], "no field 'decod'; did you mean 'decode'"),
        ("devices.a.block", {"decode": [1]}, "device a: block lacks 'prefill_token'"),
        ("devices.a.block.decode", [], "decode has 1 to 16 finite times"),
        ("devices.a.block.decode", [0.1, -1], "decode has 1 to 16 finite times"),
        ("devices.a.block.decode", [0.1, 0], "decode must be above 0"),
        ("devices.a.block.decode", ["1 parsec"], "seconds, or one with a unit out of s, ms, us"),
        ("devices.a.memory", float("nan"), "device a: memory is a number of bytes"),
        ("devices.a.memory", 0, "memory must be above 0"),
        ("devices.a.offload", {"prefill_token": 1e-9, "decode": [0.1]}, "is not faster than without"),
        ("links.bandwidth", 0, "bandwidth must be above 0"),
        ("links.bandwidth", "-5 Mb/s", "bandwidth must be above 0"),
        ("links.bandwidth", float("inf"), "links.bandwidth is a number of bytes a second"),
        ("links.bandwidth", 1e300, "links.bandwidth is a number of bytes a second"),
        ("links.bandwidth", 1e-300, "bandwidth must be above 0, 1e-09 at least"),
        ("devices.a.block.prefill_token", 1e-300, "prefill_token must be above 0"),
        ("devices.a.block.decode", [1e-300], "decode must be above 0"),
        ("devices.a.block.decode", [1e300], "is a number of seconds"),
        ("links.pairs", [{"between": ["a", "d"], "bandwidth": 1}], "no device 'd'; known: a, b, c"),
        ("links.pairs", [{"between": ["a"], "bandwidth": 1}], "between names two devices"),
        ("devices", {}, "names 1 to 64 devices"),
        ("strop_devices", 2, "starts with `strop_devices: 1`"),
    ],
)
def test_bad_devices_are_refused_by_name(tmp_path, path, value, said):
    with pytest.raises(StropError, match=said):
        read_devices(written(tmp_path, change(path, value)))


def test_a_plan_comes_back_from_its_file(tmp_path):
    devices, links = read_devices(EDGE)
    for kind in ("exhaustive", "mixed"):
        found = planner(kind, 4, 15.0).plan(devices[:4], links, read_model(OSS), Workload(576, 588, 2.0))
        path = tmp_path / f"{kind}.yaml"
        found.save(path)
        assert DeploymentPlan.from_yaml(path) == found
        assert [path.name for path in tmp_path.glob(f"{kind}*")] == [path.name]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("replicas.0.stages.0.first", 1, "every block once"),
        ("replicas.0.stages.0.master", False, "one master"),
        ("replicas.0.role", "both", "is prefill, decode, mixed"),
        ("replicas.0.speed", float("nan"), "finite numbers"),
        ("replicas.0.sped", 1, "did you mean 'speed'"),
        ("replicas.0.stages.0.device", "a", "gives a device two stages"),
        ("replicas", [], "has no replica"),
        ("replicas.0.stages.0.decode", [], "has a stage without seconds of decode"),
        ("replicas.0.stages.0.receive_base", 1e308, "receive_base holds finite numbers from 0 to 1e"),
        ("replicas.0.kv_tokens", 10**30, "kv_tokens holds finite numbers from 0 to 1e"),
        ("idle", ["a"], "has an idle device that serves"),
        ("idle", ["c", "c"], "has an idle device that serves, or twice"),
        ("blocks", "6", "blocks must be int"),
    ],
)
def test_bad_plans_are_refused_by_name(tmp_path, path, value, said):
    devices, links = read_devices(written(tmp_path, small()))
    data = planner("auto", 3).plan(devices, links, _typed(), Workload(10, 10)).to_dict()
    *way, last = path.split(".")
    node: Any = data
    for key in way:
        node = node[int(key) if key.isdecimal() else key]
    node[last] = value
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(StropError, match=said):
        DeploymentPlan.from_yaml(file)


def _typed() -> ModelShape:
    return read_model(",".join(f"{key}={value}" for key, value in TYPED.items()))


def test_a_folder_says_exactly_what_its_blocks_weigh(tmp_path):
    path = zoo_path("coder")
    exact = read_model(str(path))
    counted = read_model(str(path / "config.json"))
    stored = sum(shard.stat().st_size for shard in path.glob("*.safetensors"))
    assert exact.weight_bytes == pytest.approx(stored, rel=0.01)
    assert exact.ffn_bytes == counted.ffn_bytes == 3 * 256 * 768 * 2
    assert counted.block_bytes == pytest.approx(exact.block_bytes, rel=0.01)
    assert exact.head_bytes == pytest.approx(4096 * 256 * 2, rel=0.01)
    assert exact.kv_block_bytes == 2 * 2 * 64 * 2 and exact.activation_bytes == 512


def test_a_config_of_something_else_is_refused(tmp_path):
    file = tmp_path / "config.json"
    for config, said in (
        ({"num_hidden_layers": 161}, "160 are the most"),
        ({"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": "two"}, "num_attention_heads"),
        (
            {
                "num_hidden_layers": 2,
                "hidden_size": 8,
                "num_attention_heads": 2,
                "vocab_size": 9,
                "head_dim": [4],
            },
            "no config",
        ),
        ([], "no config of a model"),
    ):
        file.write_text(json.dumps(config))
        with pytest.raises(StropError, match=said):
            read_model(str(file))


def test_times_of_a_layer_type_that_the_model_lacks_are_refused(tmp_path):
    data = small()
    data["devices"]["a"] = data["devices"]["a"] | {"types": {"full_atention": data["devices"]["a"]["block"]}}
    devices, links = read_devices(written(tmp_path, data))
    with pytest.raises(StropError, match=r"full_atention.*did you mean 'full_attention'"):
        planner("auto", 3).plan(devices, links, _typed(), Workload(10, 10))


def test_a_config_of_experts_with_windows_is_understood():
    config = {
        "model_type": "gpt_oss", "num_hidden_layers": 24, "hidden_size": 2880, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 32,
        "vocab_size": 201088, "sliding_window": 128, "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    shape = from_config(config, "oss")
    assert shape.weight_bytes == pytest.approx(13.8e9, rel=0.02)  # what the published checkpoint weighs
    assert shape.kept(1000)[:2] == [128 * 2048, 1000 * 2048]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("blocks=4,hiden=5", "did you mean 'hidden'"),
        ("blocks=4,hidden=5", "lacks 'kv_heads'"),
        ("blocks=0,hidden=5,kv_heads=1,head_dim=1,block=1,head=1", "blocks is a whole number"),
        ("blocks=1,hidden=5,kv_heads=1,head_dim=1,block=1 TB,head=1", "number of bytes"),
        ("blocks=1,hidden=5,kv_heads=1,head_dim=1,block=1,ffn=2,head=1", "ffn lies within a block"),
        (
            "blocks=161,hidden=5,kv_heads=1,head_dim=1,block=1,head=1",
            "blocks is a whole number from 1 to 160",
        ),
        ("nowhere/config.json", "cannot read nowhere/config.json"),
    ],
)
def test_bad_models_are_refused_by_name(source, said):
    with pytest.raises(StropError, match=said):
        read_model(source)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("in=576", "lacks 'out'"),
        ("in=576,out=x", "out is a number"),
        ("in=nan,out=5", "in of a workload"),
        ("in=5,out=0", "out of a workload"),
        ("in=5,out=5,period=0", "period of a workload"),
        ("in=5,out=5,perod=1", "did you mean 'period'"),
    ],
)
def test_bad_workloads_are_refused_by_name(text, said):
    with pytest.raises(StropError, match=said):
        Workload.parse(text)


def test_a_trace_is_its_means():
    jobs = [Job(Request(k, 100 * (k + 1)), 10, arrival=2.0 * k) for k in range(3)]
    assert Workload.of(Trace("t", jobs)) == Workload(200, 10, 2.0)


def test_the_edge_example_gives_the_published_plan():
    devices, links = read_devices(EDGE)
    found = planner("auto", 7, 15.0).plan(devices, links, read_model(OSS), Workload(576, 588, 2.0))
    told = sorted((r.role, r.concurrency, sorted(s.device for s in r.stages)) for r in found.replicas)
    assert told == [
        ("decode", 2, ["m1-a", "m1-b"]),
        ("decode", 5, ["m2-max-a"]),
        ("decode", 5, ["m2-max-b"]),
        ("decode", 10, ["rtx-3060m", "rtx-5070"]),
        ("prefill", 0, ["agx-orin"]),
    ]
    assert sum(r.speed for r in found.replicas if r.role == "decode") == pytest.approx(372, rel=0.01)
    assert found.stable and not found.idle
    assert all(len(line) <= 80 for line in picture(found))


def test_plan_prints_replicas_and_rivals_at_80_columns_and_writes(tmp_path):
    file, out = written(tmp_path, small()), tmp_path / "plan.yaml"
    model = ",".join(f"{key}={value}" for key, value in TYPED.items())
    words = ("plan", file, "--model", model, "--workload", "in=10,out=10,period=0.01")
    text, _, told = run(*words, "--out", out).rpartition("Plan: ")
    assert told.strip() == str(out)
    assert "idle        c: a defect" in text and "unstable" in text and "Splitwise, adapted" in text
    assert "one, by memory" in text and max(map(len, text.splitlines())) <= 80
    assert DeploymentPlan.from_yaml(out).idle == ("c",)
    told = json.loads(run(*words, "--json"))
    assert told["stable"] is False and told["phases"]["auto"] == told["phase"]


def test_a_rival_that_cannot_serve_is_told_and_the_plan_stands(tmp_path):
    file = written(tmp_path, small())
    model = ",".join(f"{key}={value}" for key, value in TYPED.items())
    text = run("plan", file, "--model", model, "--workload", "in=10,out=10")
    assert "does not serve: some device has too little" in " ".join(text.split())
    assert "period=SECONDS" in text


def test_what_cannot_be_planned_ends_in_one_sentence(tmp_path):
    file = written(tmp_path, small(devices={"a": small()["devices"]["a"]}))
    model = ",".join(f"{key}={value}" for key, value in TYPED.items())
    words = ("plan", file, "--model", model, "--workload", "in=10,out=10")
    assert "need 2 devices at least and there is 1" in run(*words, code=2)
    assert "one, by memory" in run(*words, "--planner", "single")


def test_a_profile_is_an_entry_that_the_planner_reads(tmp_path, monkeypatch):
    for name, value in (("LENGTHS", (8, 32)), ("CONTEXT", 8), ("ROUNDS", 2), ("LARGEST_BATCH", 2)):
        monkeypatch.setattr(profiling, name, value)
    out = tmp_path / "device.yaml"
    text = run("profile", "zoo:coder", "--name", "here", "--out", out)
    assert "A step of 2" in text
    device = parse_device("here", yaml.safe_load(out.read_text())["here"])
    assert device.memory > 1e8 and len(device.block.decode) == len(device.head) == 2
    assert 0 < device.block.decode[0] < 10 and device.head[0] > 0
