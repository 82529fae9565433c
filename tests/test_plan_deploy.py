"""A deployment plan simulated: it follows the law of the slowest stage, and is stable where it says so."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from planning import LINKS, OSS

from strop.claims.e2llm_bed import waiting
from strop.core.errors import StropError
from strop.serve import run
from strop.serve.base import Job, Request, Trace
from strop.serve.cluster import Cluster, Group
from strop.serve.experiment import expect
from strop.serve.latency import Pipeline
from strop.serve.plan import DeploymentPlan, Device, Exhaustive, Link, Links, Timing, Workload, planner
from strop.serve.plan.deploy import fleet, pipeline, places
from strop.serve.plan.plan import PREFILL
from strop.serve.plan.roles import Mixed
from strop.serve.routing import policy
from strop.serve.routing.jsq import JSQ
from strop.serve.simulate import Simulation
from strop.serve.topology import Flat

SIZE = Workload(600, 400, 2.0)
SPEEDS = (1.0, 1.3, 1.7, 2.4, 3.0)


def devices() -> list[Device]:
    """Five of different speeds, of which the slowest three must share a model."""
    found = []
    for k, slow in enumerate(SPEEDS):
        steps = tuple(1.2e-3 * slow * (1 + 0.4 * b) for b in range(16))
        block = Timing(6e-5 * slow, steps, prefill_base=1e-3)
        head = tuple(3e-3 * slow * (1 + 0.05 * b) for b in range(16))
        found.append(Device(f"d{k}", 20e9 if k < 2 else 8e9, block, head))
    return found


def plan(**fields) -> DeploymentPlan:
    made = Exhaustive(min_tps=5.0, **fields).plan(devices(), LINKS, OSS, SIZE)
    return replace(made, links=Links(Link(1e12, 0.0)))  # what moving KV adds is not part of the prediction


@pytest.fixture(scope="module")
def apart() -> DeploymentPlan:
    return plan()


@pytest.fixture(scope="module")
def mixed() -> DeploymentPlan:
    return plan(objective=Mixed())


def every(period: float, count: int, prompt: int = 600, output: int = 400) -> Trace:
    jobs = [Job(Request(number, prompt), output, number * period) for number in range(count)]
    return Trace("alike", jobs, 1)


def simulated(cluster: Cluster, trace: Trace):
    simulation = Simulation(cluster, trace, JSQ())
    results = simulation.run()
    simulation.check()
    return results


def slope(made: DeploymentPlan, period: float, count: int = 500) -> float:
    """Seconds that a request waits longer than the one before it, after the first 150."""
    wait = waiting(simulated(fleet(made), every(period, count)))
    return float(np.polyfit(np.arange(150, count), wait[150:], 1)[0])


def test_what_plan_writes_is_a_cluster_to_simulate(apart, mixed, tmp_path):
    for made in (apart, mixed):
        path = tmp_path / "plan.yaml"
        made.save(path)
        cluster = Cluster.load(path)
        assert cluster == fleet(made) and cluster.kv_bytes == made.kv_bytes
        assert cluster.shared == (made is mixed) and run.usual(path) == "jsq"
        assert cluster.network == Flat(hosts=len(SPEEDS), bandwidth=1e12, rtt=0.0)
        numbers = dict(enumerate([*made.devices, *made.idle]))
        for group, replica in zip(cluster.instances, made.replicas, strict=True):
            (master,) = (stage.device for stage in replica.stages if stage.master)
            assert [numbers[host] for host in group.hosts] == [master]
            assert group.kv_tokens == replica.kv_tokens
            assert group.batch == replica.concurrency or replica.role == PREFILL


def test_a_lent_replica_decodes_as_many_as_keep_the_least_speed(apart):
    for replica in (one for one in apart.replicas if one.role == PREFILL):
        stages = len(replica.stages)
        for requests in (1, 4, 9, 16):
            least = 0.999 / replica.step_seconds(requests)
            assert places(replica, least) == min(-(-requests // stages) * stages, 16)
        assert places(replica, 1e9) == 1


def test_a_cluster_that_is_no_plan_has_other_policies(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("strop: 1\ninstances: [{role: both, hosts: [0]}]\n")
    assert run.usual(path) == "round-robin,cache-load,netkv"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("replicas", 0, "kv_tokens"), 0, "kv_tokens must be at least 1"),
        (("replicas", 0, "stages", 0, "prefill_base"), 1e12, "prefill_base must be seconds"),
        (("links", "bandwidth"), 1e-300, "bandwidth must be above 0"),
        (("replicas", 1, "role"), "mixed", "both roles, or some prefill"),
        (("strop_plan",), 2, "starts with `strop_plan: 1`"),
    ],
)
def test_a_plan_that_cannot_be_simulated_is_refused(apart, tmp_path, path, value, said):
    data = yaml.safe_load(apart.to_yaml())
    *way, last = path
    node = data
    for key in way:
        node = node[key]
    node[last] = value
    file = Path(tmp_path / "plan.yaml")
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(StropError, match=said):
        Cluster.load(file)


def test_a_prefill_pipeline_takes_a_prompt_every_slowest_stage_and_all_stages_for_each():
    (replica,) = planner("single", 3).plan(devices()[2:], LINKS, OSS, SIZE).replicas
    latency = pipeline(replace(replica, role=PREFILL), SIZE)
    groups = tuple(
        Group(role=role, hosts=(host,), latency=latency) for host, role in enumerate(("prefill", "decode"))
    )
    cluster = Cluster(network=Flat(hosts=2), instances=groups)
    columns = simulated(cluster, every(0.0, 6, output=1)).columns
    slowest = max(stage.prefill(600) for stage in replica.stages)
    assert len(replica.stages) == 3
    assert np.diff(columns["begun"]) == pytest.approx([slowest] * 5)
    assert columns["computed"] - columns["begun"] == pytest.approx([3 * slowest] * 6)


def test_full_replicas_decode_at_the_speed_that_was_planned(apart):
    for replica in apart.replicas:
        if replica.role != PREFILL:
            two = tuple(one for one in apart.replicas if one.role == PREFILL)[:1]
            cluster = fleet(replace(apart, replicas=(*two, replica)))
            spans = simulated(cluster, every(0.01, 6 * replica.concurrency)).spans
            full = spans[spans[:, 3] == replica.concurrency]
            tokens, seconds = (full[:, 0] * full[:, 3]).sum(), (full[:, 0] * full[:, 1:3].mean(1)).sum()
            assert tokens > 3 * 400 * replica.concurrency
            assert tokens / seconds == pytest.approx(replica.speed, rel=0.01)


@pytest.mark.parametrize("which", ["apart", "mixed"])
def test_waiting_grows_where_the_phase_is_above_the_period_and_nowhere_else(which, request):
    made = request.getfixturevalue(which)
    for share in (0.5, 0.8, 0.95):
        period = share * made.phase
        assert slope(made, period) == pytest.approx(made.phase - period, rel=0.1)
    assert abs(slope(made, 1.05 * made.phase)) < 0.002 * made.phase


def test_kv_takes_the_link_that_two_devices_have_of_their_own(tmp_path):
    slow = frozenset(("d0", "d1"))
    links = Links(Link(1e9, 0.0), {slow: Link(1e7, 2.0)})
    made = Exhaustive(min_tps=5.0).plan(devices()[:3], links, OSS, SIZE)
    path = tmp_path / "plan.yaml"
    made.save(path)
    cluster = Cluster.load(path)
    names = [*made.devices, *made.idle]
    masters = [names[group.hosts[0]] for group in cluster.instances]
    sources, targets = (
        [name for name, group in zip(masters, cluster.instances, strict=True) if group.role == role]
        for role in ("prefill", "decode")
    )
    columns = simulated(cluster, every(5.0, 30)).columns
    ends = [{sources[p], targets[d]} for p, d in zip(columns["prefill"], columns["decode"], strict=True)]
    nbytes = 600 * made.kv_bytes
    expected = [nbytes / 1e7 + 1 if pair == slow else nbytes / 1e9 for pair in ends]
    assert slow in ends and columns["moved"] - columns["room"] == pytest.approx(expected)


def test_a_router_that_knows_links_goes_where_the_link_of_a_pair_is_fast():
    latency = Pipeline(prefill_token=1e-5, decode_stage=(0.01,) * 16)
    groups = (
        Group(role="prefill", hosts=(0,), latency=latency),
        *(Group(role="decode", hosts=(host,), latency=latency) for host in (1, 2)),
    )
    network = Flat(hosts=3, bandwidth=1e8, rtt=0.0, pairs=((0, 2, 1e9, 0.0),))
    cluster = Cluster(network=network, instances=groups, kv_bytes=1e5)
    trace = every(10.0, 20)
    told = expect(cluster, trace)
    assert told.ratio == pytest.approx(10) and told.blind == pytest.approx((0.6 + 0.06) / 2)
    simulation = Simulation(cluster, trace, policy("netkv"))
    columns = simulation.run().columns
    simulation.check()
    assert set(columns["decode"]) == {1} and columns["moved"] - columns["room"] == pytest.approx(0.06)


def test_a_place_is_kept_while_kv_moves_to_it():
    latency = Pipeline(prefill_token=1e-5, decode_stage=(0.01,) * 16)
    groups = (
        Group(role="prefill", hosts=(0,), latency=latency),
        Group(role="decode", hosts=(1,), latency=latency, batch=1),
    )
    network = Flat(hosts=2, bandwidth=1e8, rtt=0.0)
    cluster = Cluster(network=network, instances=groups, kv_bytes=1e5)
    wait = waiting(simulated(cluster, every(2.0, 20)))
    phase = 400 * 0.01 + 600 * 1e5 / 1e8
    assert np.diff(wait) == pytest.approx(phase - 2.0, rel=0.01)


def test_a_request_goes_where_a_place_is_free_though_fewer_are_served_at_the_full_one():
    latency = Pipeline(prefill_token=1e-5, decode_stage=(0.01,) * 16)
    groups = (
        Group(role="prefill", hosts=(0,), latency=latency),
        Group(role="decode", hosts=(1,), latency=latency, batch=1),
        Group(role="decode", hosts=(2,), latency=latency, batch=9),
    )
    cluster = Cluster(network=Flat(hosts=3, bandwidth=1e12, rtt=0.0), instances=groups, kv_bytes=1.0)
    columns = simulated(cluster, every(0.1, 10)).columns
    assert sorted(columns["decode"]) == [0] + [1] * 9
    assert columns["room"] == pytest.approx(columns["computed"])


def test_queues_of_full_endpoints_take_equally_long_though_one_has_little_memory():
    latency = Pipeline(prefill_token=1e-6, decode_stage=(0.01,) * 16)
    groups = (
        Group(role="prefill", hosts=(0,), latency=latency),
        Group(role="decode", hosts=(1,), latency=latency, batch=8, kv_tokens=8_100),
        Group(role="decode", hosts=(2,), latency=latency, batch=2, kv_tokens=400_000),
    )
    cluster = Cluster(network=Flat(hosts=3, bandwidth=1e12, rtt=0.0), instances=groups, kv_bytes=1.0)
    columns = simulated(cluster, every(0.1, 200)).columns
    ended = [columns["ended"][columns["decode"] == number].max() for number in (0, 1)]
    assert ended[0] == pytest.approx(ended[1], rel=0.1)
    assert (columns["decode"] == 0).mean() == pytest.approx(0.8, abs=0.03)
