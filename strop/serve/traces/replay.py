"""A trace at another rate, without the steps of its clock, or in two parts."""

import numpy as np

from strop.core.errors import StropError
from strop.serve.base import Job, Trace
from strop.serve.traces.base import positive, stream


def replay(trace: Trace, rate: float = 1.0, spread: bool = True, seed: int = 0) -> Trace:
    """The trace with `rate` times as many arrivals a second; gaps between turns of a session stay.

    With `spread`, requests of the same timestamp are spread uniformly up to the next timestamp, in the order
    that they have, but over no more than the smallest distance of two timestamps: the step of the clock that
    wrote them. Mooncake's conversation trace has steps of 3 s; replayed raw they are bursts.
    """
    positive("rate", rate)
    times = np.array([job.arrival for job in trace.jobs])
    if spread:
        times = _spread(times, seed)
    return _at(trace, trace.jobs, times / rate)


def split(trace: Trace, share: float) -> tuple[Trace, Trace]:
    """The first `share` of a trace's time, to tune on, and the rest, which starts at 0 again."""
    if not 0 < share < 1:
        raise StropError(f"the share of a trace must be above 0 and below 1, not {share}")
    times = np.array([job.arrival for job in trace.jobs])
    cut = times[0] + share * (times[-1] - times[0]) if len(times) else 0.0
    first = int(np.searchsorted(times, cut))
    if not 0 < first < len(times):
        raise StropError(
            f"no request is on one side of {share} of the time of {trace.name}: choose another share"
        )
    return (
        _at(trace, trace.jobs[:first], times[:first]),
        _at(trace, trace.jobs[first:], times[first:] - cut),
    )


def _spread(times: np.ndarray, seed: int) -> np.ndarray:
    """Arrivals `[N]` in order, those that are equal spread over the step of the clock."""
    distinct, bucket, count = np.unique(times, return_inverse=True, return_counts=True)
    if len(distinct) < 2:
        return times
    width = np.where(count > 1, np.diff(distinct).min(), 0.0)[bucket]
    return np.sort(times + width * stream(seed, "spread").random(len(times)))


def _at(trace: Trace, jobs: list[Job], times: np.ndarray) -> Trace:
    moved = [
        Job(job.request, job.output, time, job.next, job.gap)
        for job, time in zip(jobs, times.tolist(), strict=True)
    ]
    return Trace(trace.name, moved, trace.block)
