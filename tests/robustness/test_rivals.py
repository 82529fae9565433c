"""Two runs on one folder at once: each ends well or is refused in one sentence; what they leave is whole."""

import time

import pytest
from counts import count, draws

from robustness.jobs import require_done


@pytest.mark.parametrize("name", ["rtn", "alphaq", "tune", "train"])
def test_two_runs_on_one_folder(warm, undisturbed, name, tmp_path):
    known, chance = undisturbed(name), draws(f"rivals {name}")
    for index in range(count(1, 12)):
        out = tmp_path / str(index) / "out"
        runs = [warm.start(*known.job.line(out))]
        time.sleep(known.seconds * chance.random() * 0.5)
        runs.append(warm.start(*known.job.line(out)))
        ended = [run.wait() for run in runs]
        assert all(run.code == 0 or run.in_one_sentence() for run in ended), ended
        assert any(run.code == 0 for run in ended), ended
        require_done(known, out)
