"""A cluster's file: what it says, and what is refused in it."""

import dataclasses
import math
import os

import pytest

from strop.core.chunks import Shrinking
from strop.core.errors import StropError
from strop.core.nodes import MOST_BYTES
from strop.serve.background import Constant
from strop.serve.cluster import Cluster, Group
from strop.serve.latency import Pipeline
from strop.serve.topology import FatTree, Flat


def group(role: str = "both", **fields) -> dict:
    return {"instances": [{"role": role, "hosts": [0], **fields}]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"instance": []}, "cluster has no field 'instance'.*did you mean 'instances'"),
        ({"instances": []}, "a cluster lists its `instances`, at least one group"),
        ({"instances": [{"role": "prefil", "hosts": [0]}]}, "role must be one of prefill, decode, both"),
        ({"instances": [{"role": "both", "hosts": [9]}]}, "host 9 is not in a network of 8"),
        ({"instances": [{"role": "decode", "hosts": [0]}]}, "some prefill and the others decode"),
        ({"instances": [{"role": "both", "hosts": [0], "evict": "lri"}]}, "unknown evictor 'lri'"),
        ({"network": {"fat_tre": {}}}, "unknown cluster.network 'fat_tre'; did you mean 'fat_tree'"),
        ({"network": {"flat": {"hosts": 8, "bandwidth": -1}}}, "bandwidth must be a finite number above 0"),
        ({"network": {"flat": {"hosts": 8, "bandwidth": 0}}}, "bandwidth must be a finite number above 0"),
        ({"network": {"flat": {"hosts": "8"}}}, "cluster.network.flat.hosts must be int, got '8'"),
        ({"network": {"flat": {"hosts": 8, "pairs": [[0, 8, 1, 0]]}}}, "each of pairs is two of the 8 hosts"),
        ({"network": {"flat": {"hosts": 8, "pairs": [0, 1]}}}, "each of pairs is two of the 8 hosts"),
        ({"kv_bytes": 0}, "kv_bytes must be a finite number above 0"),
        ({"telemetry": math.nan}, "telemetry must be a finite number above 0"),
        ({"telemetry": 1e-4}, "telemetry must be at least 0.001 seconds"),
        ({"reports": 1e-6}, "reports must be at least 0.001 seconds"),
        ({"kv_bytes": 1e300}, "kv_bytes must be"),
        (group(kv_tokens=10**30), r"kv_tokens must be at least 1 and at most 1e\+12"),
        (group(batch=0), "batch must be at least 1"),
        (group(latency={"roofline": {"iteration": 1e308}}), "iteration must be seconds from 0 to 1e"),
        (
            group(latency={"roofline": {"iteration": 0.0, "decode_request": 1e-300}}),
            "an iteration takes time",
        ),
        (
            group(latency={"pipeline": {"prefill_token": 1e-3, "decode_stage": [1e-300]}}),
            "decode_stage must be",
        ),
        (
            group(latency={"pipeline": {"prefill_token": 1e-3, "decode_stage": []}}),
            "for at least one request",
        ),
        (group("decode", holes=True), "holes are for instances that compute prompts"),
        (
            group("decode", chunk={"fixed": {"base": 9}}),
            "pin, tune, order and chunk are for instances of both",
        ),
        (group("prefill", chunk="shrinking"), "pin, tune, order and chunk are for instances of both"),
        ({"strop": 2}, "starts with `strop: 1`"),
    ],
)
def test_a_wrong_cluster_is_refused_in_one_sentence(change, said):
    data = {"strop": 1, "instances": [{"role": "both", "hosts": [0]}]}
    with pytest.raises(StropError, match=said):
        Cluster.from_dict(data | change)


def test_a_cluster_file_says_what_its_objects_say(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "strop: 1\nnetwork: {fat_tree: {pods: 2}}\nbackground: {constant: {share: 0.1}}\n"
        "instances:\n- {role: prefill, hosts: [0, 2]}\n- role: decode\n  hosts: [1, 3]\n  each: 2\n"
        "  latency: {pipeline: {stages: 2, prefill_token: 0.001, decode_stage: [0.1]}}\n"
    )
    found = Cluster.load(tmp_path / "c.yaml")
    pipeline = Pipeline(stages=2, prefill_token=0.001, decode_stage=(0.1,))
    groups = (
        Group(role="prefill", hosts=(0, 2)),
        Group(role="decode", hosts=(1, 3), each=2, latency=pipeline),
    )
    assert found == Cluster(network=FatTree(pods=2), background=Constant(0.1), instances=groups)
    assert dataclasses.is_dataclass(found) and len(found.of("decode")) == 4


def test_a_file_may_name_links_of_pairs():
    data = {"network": {"flat": {"hosts": 2, "pairs": [[0, 1, 1e6, 0.001]]}}}
    found = Cluster.from_dict({"strop": 1, **data, **group()})
    assert found.network == Flat(hosts=2, pairs=((0, 1, 1e6, 0.001),))


def test_a_file_may_name_the_chunks_of_instances_that_do_both():
    for said, chunk in (("shrinking", Shrinking()), ({"shrinking": {"floor": 64}}, Shrinking(floor=64))):
        assert Cluster.from_dict({"strop": 1, **group(chunk=said)}).instances[0].chunk == chunk


def test_what_is_no_regular_file_or_too_large_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    for name, said in (
        ("pipe.yaml", "cannot read cluster .*pipe.yaml: it is a folder or a device"),
        ("large.yaml", "has 16 MiB, over the limit of 16"),
    ):
        with pytest.raises(StropError, match=said):
            Cluster.load(tmp_path / name)
