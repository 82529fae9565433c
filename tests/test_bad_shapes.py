"""Weights of another shape than config.json says, in folders of every form: named in one sentence."""

import shutil

import pytest
import torch
from quantizing import build, save, tensors_of
from safetensors.torch import save_file
from torch import nn

from strop.core.checkpoint import INDEX
from strop.core.errors import StropError
from strop.model import load
from strop.quantize import quantize
from strop.recipe import Recipe
from strop.weights import RTN
from strop.weights.packed import StropConfig, StropQuantizer, describe

FORMS = {"dense": None, "packed": RTN(bits=1, group=32), "compressed": RTN(bits=4, group=32)}
"""1 bit is strop's own form."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    place = tmp_path_factory.mktemp("sound")
    save(build("qwen3", torch.bfloat16), place / "dense")
    for name, method in FORMS.items():
        if method is not None:
            quantize(Recipe(model=str(place / "dense"), weights=method), place / name)
    return place


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", ["embed_tokens", "norm", "layers.0.input_layernorm"])
def test_a_weight_of_another_shape_is_refused(sound, tmp_path, form, weight):
    folder = shutil.copytree(sound / form, tmp_path / "model")
    tensors, name = tensors_of(folder), f"model.{weight}.weight"
    tensors[name] = torch.cat([tensors[name]] * 2, -1)
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StropError, match=f"{name} .*restore the original files"):
        load(folder)


@pytest.mark.parametrize("shape", [(2,), (64, 1), ()])
def test_a_shape_that_transformers_lets_pass_is_refused(shape):
    """transformers 5.17 compares no shapes where a model is quantized."""
    model, quantizer = build("qwen3"), StropQuantizer(StropConfig(**describe({})))
    quantizer._process_model_before_weight_loading(model)
    quantizer._process_model_after_weight_loading(model)
    model.model.norm.weight = nn.Parameter(torch.ones(shape))
    with pytest.raises(StropError, match=r"model\.norm\.weight as .* by config.json"):
        quantizer._process_model_after_weight_loading(model)
