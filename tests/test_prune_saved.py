"""Pruned folders: they come back in the same bits, strop works on them, and what is damaged is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from quantizing import TOKENS, build, save
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import strop
import strop.prune
from strop.core.errors import StropError
from strop.core.narrow import KEY
from strop.engines import vllm_command
from strop.kv import KVarN
from strop.models.spiking_config import SpikingConfig
from strop.models.spiking_vit import SpikingTransformer
from strop.prune import Uniform, saved, trace
from strop.quantize import quantize, spelled
from strop.recipe import Recipe

WEIGHTS = "model.safetensors"


def vit() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(**shape, image_size=16, patch_size=8, num_channels=1, num_labels=5)
    return ViTForImageClassification(config).eval()


def spiking(pyramid: bool = False) -> nn.Module:
    torch.manual_seed(0)
    shape = {"classes": 5, "heads": 4, "steps": 2, "channels": 1}
    if pyramid:  # it has depthwise convolutions, whose groups are cut with them
        config = SpikingConfig.sdt_v2((8, 16, 16, 32), depths=(1, 1, 1, 1, 1), **shape)
    else:
        config = SpikingConfig.sdt(1, 16, pools="001", **shape)
    return SpikingTransformer(config).eval()


MODELS = {
    "llama": lambda: build("llama"),
    "qwen3": lambda: build("qwen3"),
    "gpt2": lambda: build("gpt2"),
    "vit": vit,
    "spiking": spiking,
    "pyramid": lambda: spiking(pyramid=True),
}


def pruned(model: nn.Module, folder: Path, rate: float = 0.4) -> nn.Module:
    """Prune a model into a new folder; returns it."""
    units = trace(model)
    plan = Uniform(rate=rate).plan_units(units, model)
    thin = plan.apply(model, units)
    folder.mkdir()
    saved.save(thin, model, plan, folder)
    return thin


def answers(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    inputs = {"input_ids": TOKENS} if hasattr(model, "generate") else None
    if inputs is None:
        channels = 1
        size = 32 if isinstance(model, SpikingTransformer) and model.config.pyramid else 16
        drawn = torch.randn(2, channels, size, size)
        inputs = {"images" if isinstance(model, SpikingTransformer) else "pixel_values": drawn}
    with torch.no_grad():
        given = model(**inputs)
    return getattr(given, "logits", given)


def numbers(model: nn.Module) -> list[tuple]:
    """The sizes that modules keep beside their tensors."""
    names = ["in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "nf"]
    return [tuple(getattr(module, name, None) for name in names) for module in model.modules()]


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_the_same_model_and_can_be_pruned_again(name, tmp_path):
    dense = MODELS[name]()
    thin = pruned(dense, tmp_path / "once")
    again = strop.prune.load(str(tmp_path / "once"))
    assert torch.equal(answers(again), answers(thin)) and numbers(again) == numbers(thin)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in dense.parameters())
    twice = pruned(again, tmp_path / "twice")
    assert torch.equal(answers(saved.load(tmp_path / "twice")), answers(twice))
    assert numbers(twice) != numbers(thin)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A pruned Llama with its tokenizer."""
    place = tmp_path_factory.mktemp("llama")
    dense = save(build("llama"), place / "dense")
    pruned(saved.load(dense), place / "pruned", 0.5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense / name, place / "pruned")
    return place / "pruned"


def test_a_pruned_language_model_generates_caches_and_is_quantized(folder, tmp_path):
    lm = strop.load(folder)
    plain = lm.generate(["abc"], max_new_tokens=8)
    assert lm.model.model.layers[0].mlp.up_proj.out_features == 48
    cached = lm.with_(kv=KVarN(bits_k=8, bits_v=8, sinks=4, tail=32, group=16))
    assert cached.generate(["abc"], max_new_tokens=8) == plain
    recipe = spelled(str(folder), "rtn", bits=8, group=16)
    assert quantize(recipe, tmp_path / "int8")["engines"] == ["strop"]
    stored, here = strop.load(tmp_path / "int8"), lm.with_(weights=recipe.weights)
    assert torch.equal(answers(stored.model), answers(here.model))
    assert not torch.equal(answers(here.model), answers(lm.model))
    with pytest.raises(StropError, match="prune the 16-bit checkpoint"):
        stored.with_(prune=Uniform())
    with pytest.raises(StropError, match="vLLM builds none like it"):
        vllm_command(Recipe(model=str(folder)))


def damaged(folder: Path, at: Path) -> Path:
    shutil.copytree(folder, at)
    return at


def told(folder: Path, change) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop(KEY), "in the file and .* by config.json: restore"),
        (lambda c: c[KEY]["shapes"].update({NAME: [47, 64]}), "in the file and .47, 64. by config.json"),
        (lambda c: c[KEY]["shapes"].update({NAME: [97, 64]}), "to which no LlamaForCausalLM"),
        (lambda c: c[KEY]["shapes"].update({NAME: [48]}), "to which no LlamaForCausalLM"),
        (lambda c: c[KEY]["shapes"].update({NAME: [-1, 64]}), "not what `strop prune` writes"),
        (lambda c: c[KEY]["shapes"].update({"model.nothing": [4]}), "to which no LlamaForCausalLM"),
        (lambda c: c[KEY].update(version=2), "update strop"),
        (lambda c: c[KEY].update(shapes=[1]), "not what `strop prune` writes"),
        (lambda c: c.update({KEY: "x"}), "not what `strop prune` writes"),
        (lambda c: c.pop("model_type"), "LlamaForCausalLM|model_type"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, tmp_path, change, words):
    place = told(damaged(folder, tmp_path / "it"), change)
    with pytest.raises(StropError, match=words) as first:
        saved.load(place)
    with pytest.raises(StropError, match=words) as second:
        strop.load(place)
    assert "\n" not in str(first.value) + str(second.value)


@pytest.mark.parametrize("name", ["llama", "spiking"])
def test_damaged_weights_are_refused(name, tmp_path):
    pruned(MODELS[name](), tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / WEIGHTS)
    first = next(n for n, t in tensors.items() if t.dim() > 1)

    def refused(words: str, held: dict | None = None, raw: bytes | None = None) -> None:
        place = damaged(tmp_path / "whole", tmp_path / "it")
        (place / WEIGHTS).unlink()
        if held is not None:
            save_file(held, place / WEIGHTS, metadata={"format": "pt"})
        if raw is not None:
            (place / WEIGHTS).write_bytes(raw)
        with pytest.raises(StropError, match=words):
            saved.load(place)
        shutil.rmtree(place)

    whole = (tmp_path / "whole" / WEIGHTS).read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        refused("restore the original", raw=whole[:length])
    refused("missing|cannot load")
    refused("lacks 1", {n: t for n, t in tensors.items() if n != first})
    refused("by (the )?config", tensors | {first: tensors[first][:-1].contiguous()})
    spoilt = tensors[first].clone()
    spoilt[0, 0] = torch.nan
    refused("NaN|no finite number", tensors | {first: spoilt})


def test_what_is_no_such_folder_is_told_in_a_sentence(tmp_path):
    with pytest.raises(StropError, match="no model folder"):
        saved.load(tmp_path / "nowhere")
    with pytest.raises(StropError, match=r"no readable config\.json"):
        saved.load(tmp_path)
    for text in ("", "{", "[]", '"x"', "[" * 100000, "{}", '{"model_type": "t5"}', '{"architecture": "x"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(StropError) as error:
            saved.load(tmp_path)
        assert "\n" not in str(error.value)
