"""A cluster's file: what it says, and what is refused in it."""

import dataclasses
import math

import pytest

from strop.core.errors import StropError
from strop.serve.background import Constant
from strop.serve.cluster import Cluster, Group
from strop.serve.latency import Pipeline
from strop.serve.topology import FatTree


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
        ({"kv_bytes": 0}, "kv_bytes must be above 0"),
        ({"telemetry": math.nan}, "telemetry must be above 0"),
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
