"""What tests of faults share: the warm process, and small models to work on."""

import time
from pathlib import Path

import pytest
from counts import SEED, SOAK, count
from hypothesis import HealthCheck, settings
from quantizing import build, save
from test_cli import TEXT, save_tiny

from robustness.jobs import Known, jobs
from robustness.warm import Warm

settings.register_profile(
    "robustness",
    derandomize=not SOAK,
    max_examples=count(100, 10_000),
    deadline=None,
    print_blob=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def pytest_report_header() -> str:
    return f"robustness: {'at length' if SOAK else 'in brief'}, STROP_SEED={SEED}"


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    with Warm(tmp_path_factory.mktemp("warm")) as process:
        yield process


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A checkpoint with 640 tokens of context that reads bytes."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    return save_tiny(folder, hidden_size=64, head_dim=32, max_position_embeddings=640)


@pytest.fixture(scope="session")
def experts(tmp_path_factory) -> Path:
    """A mixture of experts in several shards."""
    import torch

    made = build("qwen2_moe", torch.bfloat16)
    return save(made, tmp_path_factory.mktemp("sound") / "experts", "200KB")


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def undisturbed(warm, model, experts, text, tmp_path_factory):
    """`undisturbed(name)`: a job with its result, how long it takes and what it does to files."""
    known: dict[str, Known] = {}

    def of(name: str) -> Known:
        if name not in known:
            job = jobs(model, experts, text)[name]
            place = tmp_path_factory.mktemp(name)
            told = warm.run(*job.line(place / "out"), dies=(str(place), 0))
            assert told.code == 0, told.stderr
            start = time.monotonic()
            assert warm.run(*job.line(place / "whole" / "out")).code == 0
            seconds = time.monotonic() - start
            steps = [line for line in told.stderr.splitlines() if line.startswith("step: ")]
            known[name] = Known(job, place / "whole" / "out", seconds, steps)
        return known[name]

    return of
