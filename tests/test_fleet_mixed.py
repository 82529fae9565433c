"""Instances that compute prompts and decode in the same iterations: chunks, and what a router sees."""

import numpy as np
import pytest
from fleets import POLICY, both, busy, run, trace

from strop.core.chunks import Fixed
from strop.serve.base import Job, Request, Trace
from strop.serve.cluster import Cluster, Group
from strop.serve.latency import Roofline
from strop.serve.simulate import Simulation
from strop.serve.topology import Flat


def test_a_prompt_in_chunks_takes_an_iteration_for_each():
    found = run(both(), trace([(0.0, 1000, 3)]))
    assert found.ttft()[0] == pytest.approx(1000 * 1e-4 + 2 * 0.01)
    assert found.columns["ended"][0] == pytest.approx(0.12 + 2 * 0.01)


def test_no_prompt_reuses_what_is_not_computed_yet():
    """The older program's turn would go first, but what it shares is still to be computed by the other."""
    common = tuple(range(100))
    turn = Job(Request(3, 1600, common), 1)
    old = Job(Request(0, 16, (900,)), 1, 0.0, next=turn, gap=0.3)
    long, other = Job(Request(1, 20_000), 1, 0.01), Job(Request(2, 1600, common), 1, 0.2)
    found = run(both(order="program"), Trace("made", [old, long, other], 16))
    done = dict(zip(found.columns["id"], found.columns["computed"], strict=True))
    reused = dict(zip(found.columns["id"], found.columns["reused"], strict=True))
    assert reused[3] == 1599 and done[3] >= done[2] > done[1]


def test_a_chunk_slows_the_iteration_of_those_that_decode():
    found = run(both(), trace([(0.0, 100, 200), (0.5, 500, 1)]))
    assert found.spans[:, 1].max() == pytest.approx(0.01 + 500 * 1e-4)
    tokens = sum(n * b for n, _, _, b in found.spans)
    assert (
        tokens == found.columns["output"].sum() - 2
    )  # the iteration that ends a prompt gives its first token


def test_a_backlog_of_prompts_costs_no_more_a_request_than_a_short_queue():
    """Times that are asked of the latency model, by requests that all come at once."""
    asked = [0]

    class Counting(Roofline):
        def prefill(self, runs):
            asked[0] += 1
            return super().prefill(runs)

    counts = []
    for requests in (50, 200):
        asked[0] = 0
        group = Group(role="both", hosts=(0,), latency=Counting(), chunk=Fixed(base=512))
        cluster = Cluster(network=Flat(hosts=1), instances=(group,))
        run(cluster, trace([(0.0, 1000, 3)] * requests))
        counts.append(asked[0] / requests)
    assert counts[1] <= 1.1 * counts[0]


def test_seconds_of_work_ahead_are_those_of_the_prompts_that_are_there():
    simulation = Simulation(both(kv_tokens=20_000, batch=4), busy(60), POLICY)
    (instance,), seen = simulation.decodes, []

    def look() -> None:
        whole = [instance.latency.prefill([(flight.job.request.prompt, 0)]) for flight in instance.waiting]
        left = [instance.latency.prefill(flight.runs) for flight in instance.prompts]
        seen.append((instance.pool.ahead[0], sum(whole) + sum(left)))

    for time in np.linspace(0, 45, 200):
        simulation.clock.at(float(time), look)
    simulation.run()
    told, expected = np.array(seen).T
    assert (
        told == pytest.approx(expected, abs=1e-9)
        and told.max() > 1
        and simulation.decoding.pool.ahead[0] == 0
    )


def test_answers_of_one_token_have_no_time_between_tokens():
    found = run(both(), trace([(0.0, 100, 1)] * 3))
    assert len(found.spans) == 0 and found.summary(1.0)["tbt_mean"] == 0 == found.summary(1.0)["tbt_p99"]
