"""Two runs that quantize into one folder: what the first one finished is not written over, or beside."""

import pytest
import torch
from quantizing import build, save

from strop.core.errors import StropError
from strop.quantize import quantize
from strop.recipe import Recipe
from strop.weights import RTN, stream


def test_a_rival_that_finishes_first_is_left_alone(tmp_path, monkeypatch):
    source = save(build("qwen3", torch.bfloat16), tmp_path / "model")
    recipe, out = Recipe(model=str(source), weights=RTN(bits=4, group=32)), tmp_path / "out" / "made"
    real, opened = stream.open_checkpoint, []

    def late(*told):
        """Opens the checkpoint once a rival is done, which has begun after the place was looked at."""
        opened.append(real(*told))
        if len(opened) == 1:
            quantize(recipe, out)
        return opened[0]

    monkeypatch.setattr(stream, "open_checkpoint", late)
    with pytest.raises(StropError, match="exists already"):
        quantize(recipe, out)
    assert [path.name for path in out.parent.iterdir()] == ["made"]
    assert {path.name: path.stat().st_size for path in out.iterdir()}["plan.yaml"]
