"""A wall clock that is set back an hour at every look changes nothing."""

import pytest
from counts import SOAK

from robustness.jobs import require_done


@pytest.mark.parametrize("name", ["rtn", "tune"] if SOAK else ["rtn"])
def test_a_clock_that_runs_backwards_changes_nothing(warm, undisturbed, name, tmp_path):
    known = undisturbed(name)
    budget = ["--budget-minutes", 5] if name == "tune" else []
    run = warm.run(*known.job.line(tmp_path / "out"), *budget, jumps=3600)
    assert run.code == 0, run.stderr
    require_done(known, tmp_path / "out")


def test_what_was_measured_in_the_future_is_kept(warm, undisturbed, tmp_path):
    job = undisturbed("tune").job
    assert warm.run(*job.line(tmp_path / "out")).code == 0
    again = warm.run(*job.line(tmp_path / "out", again=True), "--json", jumps=3600)
    assert again.code == 0, again.stderr
    assert again.stdout.count('"reused": true') >= 3
