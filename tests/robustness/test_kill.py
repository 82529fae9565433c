"""kill -9 at any moment: nothing torn under its final name, and the run goes on to the same result."""

import time

import pytest
from counts import SEED, count, draws

from robustness.jobs import goes_on, require_done, require_whole

QUICK, LONG = ("rtn", "gptq", "alphaq"), ("tune", "train")
SURE = 0.9
"""The share of an undisturbed run's steps that every other one takes as well."""
every_job = pytest.mark.parametrize("name", QUICK + LONG)


@every_job
def test_a_run_killed_at_any_time_goes_on(warm, undisturbed, name, tmp_path):
    known, chance, kills = undisturbed(name), draws(f"time {name}"), count(1, 10)
    for index in range(kills):
        out = tmp_path / str(index) / "out"
        moments = [known.seconds * (index + chance.random()) / kills]
        moments += [known.seconds * chance.random()] * chance.randrange(2)
        for moment in moments:
            run = warm.start(*known.job.line(out, again=out.parent.exists()))
            time.sleep(moment)
            run.kill()
            assert run.wait().code in (-9, 0, 2), f"STROP_SEED={SEED}, kill {index}, {moment:.3f} s"
            require_whole(out.parent)
        if not known.job.is_done(out):
            goes_on(warm, known, out)


@every_job
def test_a_run_killed_at_a_step_on_files_goes_on(warm, undisturbed, name, tmp_path):
    known, chance = undisturbed(name), draws(f"step {name}")
    total = len(known.steps)
    for at in sorted(chance.sample(range(1, total + 1), min(count(2 if name in QUICK else 1, 25), total))):
        place = tmp_path / str(at)
        run = warm.run(*known.job.line(place / "out"), dies=(str(place), at))
        if run.code == 0 and at > SURE * total:
            require_done(known, place / "out")
            continue
        assert run.code == -9, f"step {at} of {total}, {known.steps[at - 1]}: {run.stderr}"
        require_whole(place)
        if known.job.is_done(place / "out"):
            continue
        try:
            goes_on(warm, known, place / "out")
        except AssertionError as error:
            raise AssertionError(f"killed before {known.steps[at - 1]} ({at} of {total}): {error}") from error
