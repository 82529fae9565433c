"""Every example runs from any folder, as its docstring says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from counts import SOAK

SHOWN = {
    "draft_on_transformers": "the same text",
    "quantize_experts": "matrices by width",
    "reuse_documents": "0 of documents",
    "route_requests": "first token after",
}
"""What an example prints; the others name a method."""
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
LONG = ("tune_from_python",)
"""Examples that take most of a minute."""


@pytest.mark.soak
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example, tmp_path):
    if example.stem in LONG and not SOAK:
        pytest.skip("long: make soak")
    environment = os.environ | {"PYTHONPATH": str(example.parents[1])}
    run = subprocess.run(
        [sys.executable, str(example)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr
    assert SHOWN.get(example.stem, "kvarn") in run.stdout and "Traceback" not in run.stderr
