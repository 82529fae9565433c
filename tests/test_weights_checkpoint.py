"""Quantized checkpoints: what they hold, and who reads them with the same logits."""

import json
from pathlib import Path

import pytest
import torch
from quantizing import CONFIGS, EXPERTS, build, logits, packed_layers, rows, save, store, tensors_of
from transformers import AutoConfig, AutoModelForCausalLM

import strop
from strop.core.checkpoint import inspect
from strop.core.errors import StropError
from strop.recipe import Recipe
from strop.weights import GPTQ, HQQ, PMQ, RTN, AlphaQ, WeightMethod, register
from strop.weights.grid import Grid
from strop.weights.packed import describe, grids_of
from strop.weights.plan import BitPlan
from strop.weights.readers import readers
from strop.weights.stream import Quantized, quantize_checkpoint

W4, W4Z = RTN(bits=4, group=32), RTN(bits=4, group=32, symmetric=False)
MIXED = AlphaQ(bits=2.5, quantizer=W4Z, gamma=10.0)
LAYERED = AlphaQ(bits=3, widths=(2, 4), quantizer=W4, granularity="layer", gamma=10.0)
OTHERS = {
    "int3-asymmetric": (RTN(bits=3, group=16, symmetric=False), ("qwen2_moe", "llama")),
    "int8": (RTN(), ("qwen3", "mixtral")),
    "mixed": (MIXED, ("qwen2_moe", "mixtral")),
    "layered": (LAYERED, ("mixtral", "olmoe")),
    "gptq": (GPTQ(group=32, samples=4, length=32), ("llama", "deepseek_v2")),
    "mixed-gptq": (AlphaQ(bits=2.5, quantizer=GPTQ(group=32, symmetric=False)), ("qwen3_moe",)),
    "hqq": (HQQ(group=32), ("mixtral",)),
    "pmq": (PMQ(bits=2.5, widths=(2, 3), quantizer=W4), ("qwen2_moe",)),
}
CASES = [
    pytest.param(method, name, id=f"{kind}-{name}")
    for kind, method in (("compressed", W4), ("own", RTN(bits=1, group=32)))
    for name in CONFIGS
] + [
    pytest.param(method, name, id=f"{kind}-{name}")
    for kind, (method, names) in OTHERS.items()
    for name in names
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """`source(name)`: a saved checkpoint in bfloat16 that tests must leave as it is."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save(build(name, torch.bfloat16), tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return get


def quantize(folder: Path, method: WeightMethod, out: Path) -> Quantized:
    if isinstance(method, HQQ):
        pytest.importorskip("hqq")
    recipe = Recipe(model=str(folder), weights=method).to_yaml()
    return quantize_checkpoint(inspect(folder), method, out, recipe, text=rows)


def expected(folder: Path, method: WeightMethod) -> torch.nn.Module:
    """The same, in memory."""
    return method.apply(strop.load(folder).plain, rows)


def told(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("method", "name"), CASES)
def test_a_folder_is_the_model_quantized_in_memory(method, name, source, tmp_path):
    folder, out = source(name), tmp_path / "new" / "out"
    done = quantize(folder, method, out)
    in_memory = expected(folder, method)
    loaded = strop.load(out)
    assert torch.equal(logits(loaded.model), logits(in_memory))
    layers = packed_layers(loaded.model)
    grids = {name: layer.grid for name, layer in layers.items()}
    assert grids == {row.name: row.grid for row in done.plan.rows}
    assert grids == {name: layer.grid for name, layer in packed_layers(in_memory).items()}
    assert all(row.measured is not None for row in done.plan.rows)

    own = told(out)["quant_method"] == "strop"
    assert own == (not done.readers.compressed)
    assert sum(tensor.nbytes for tensor in tensors_of(out).values()) == done.bytes
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert BitPlan.load(out / "plan.yaml") == done.plan
    assert Recipe.load(out / "strop.yaml").weights == method
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    with pytest.raises(StropError, match="already quantized"):
        quantize(out, RTN(), tmp_path / "twice")

    if own:
        register()
        assert type(AutoConfig.from_pretrained(out).quantization_config) is dict
        plain, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(logits(plain), logits(in_memory))
    elif "transformers" in done.readers.engines:
        plain, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        torch.testing.assert_close(logits(plain), logits(in_memory), rtol=0.02, atol=0.02)


def test_transformers_is_not_named_where_it_reads_wrongly(source, tmp_path):
    """The limits that `readers` knows are real: this fails once transformers reads such folders."""
    for name, method in {"zeros": W4Z, "layered": LAYERED}.items():
        done = quantize(source("mixtral"), method, tmp_path / name)
        assert "transformers" not in done.readers.engines
        assert any("transformers" in sentence for sentence in done.readers.said)
        try:
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            wrong = not torch.allclose(
                logits(plain), logits(strop.load(tmp_path / name).model), rtol=0.02, atol=0.02
            )
        except Exception:
            wrong = True
        assert wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("method", [W4Z, MIXED], ids=["compressed", "own"])
def test_other_dtypes(dtype, method, tmp_path):
    folder = save(build("qwen2_moe", dtype), tmp_path / "model")
    quantize(folder, method, tmp_path / "out")
    loaded = strop.load(tmp_path / "out")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded.model), logits(expected(folder, method)))


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral"])
@pytest.mark.parametrize("method", [W4, MIXED], ids=["compressed", "own"])
def test_experts_that_are_fused_on_disk(name, method, source, tmp_path):
    folder = save(build(name, torch.bfloat16), tmp_path / "model")
    tensors = tensors_of(folder)
    fused = {key: tensor for key, tensor in tensors.items() if ".experts." not in key}
    for key, tensor in build(name, torch.bfloat16).state_dict().items():
        if ".experts." in key:
            assert tensor.ndim == 3
            fused[key] = tensor
    assert len(fused) < len(tensors)
    store(folder, fused)
    quantize(folder, method, tmp_path / "out")
    assert torch.equal(logits(strop.load(tmp_path / "out").model), logits(expected(source(name), method)))


def test_compressed_tensors_stores_the_checkpoints_own_names(source, tmp_path):
    done = quantize(source("mixtral"), LAYERED, tmp_path / "out")
    assert len({row.grid.bits for row in done.plan.experts}) == 2
    before, after = tensors_of(source("mixtral")), tensors_of(tmp_path / "out")
    expert = "model.layers.1.block_sparse_moe.experts.2.w2"
    assert f"{expert}.weight" in before
    bits = done.plan.bits["model.layers.1.mlp.experts.2.down_proj"]
    stored = {key.removeprefix(f"{expert}."): t for key, t in after.items() if key.startswith(f"{expert}.")}
    assert {key: (t.dtype, tuple(t.shape)) for key, t in stored.items()} == {
        "weight_packed": (torch.int32, (64, 96 * bits // 32)),
        "weight_scale": (torch.bfloat16, (64, 3)),
        "weight_shape": (torch.int64, (2,)),
    }
    routers = [key for key in before if key.endswith(".gate.weight")]
    for key in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", *routers):
        assert torch.equal(before[key], after[key])


def test_the_config_is_that_of_pack_quantized(source, tmp_path):
    quantize(source("llama"), W4, tmp_path / "out")
    config = told(tmp_path / "out")
    (group,) = config["config_groups"].values()
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert config["ignore"] == ["lm_head"] and len(group["targets"]) == 2 * 7
    assert group["targets"][0] == "model.layers.0.self_attn.q_proj"
    weights = group["weights"]
    assert [weights[key] for key in ("num_bits", "strategy", "group_size", "symmetric")] == [
        4, "group", 32, True,
    ]  # fmt: skip
    stored = tensors_of(tmp_path / "out")
    assert stored["model.layers.0.mlp.down_proj.bias"].shape == (64,)


def test_every_reader_has_a_reason(source, tmp_path):
    def found(name: str, method: WeightMethod) -> tuple:
        model = build(name)
        plan = method.plan(walk := method.walk(model, rows))
        return readers(plan, method.whole_zeros, walk.targets)

    assert found("llama", W4).engines == ("strop", "transformers", "vLLM")
    assert found("llama", W4Z).engines == ("strop", "vLLM")
    assert found("mixtral", W4Z).engines == ("strop",)
    assert found("llama", RTN(bits=3, group=32)).engines == ("strop", "transformers")
    for name, method, why in (
        ("llama", RTN(bits=1), "no 1-bit"),
        ("llama", HQQ(group=32), "no zeros between"),
        ("gpt2", W4, "is a Conv1D"),
        ("mixtral", MIXED, "differ in width"),
    ):
        if isinstance(method, HQQ):
            pytest.importorskip("hqq")
        own = found(name, method)
        assert (own.compressed, own.engines) == (False, ("strop",)) and why in own.said[0]


EXPERT = "model.layers.0.mlp.experts.*"


def broken(config: dict) -> dict[str, object]:
    matrices = config["matrices"]
    grid, name = config["grids"][0], next(iter(matrices))
    return {
        "other version": config | {"version": 2},
        "no version": {key: value for key, value in config.items() if key != "version"},
        "width out of range": config | {"grids": [grid | {"bits": 9}]},
        "width is text": config | {"grids": [grid | {"bits": "4"}]},
        "group is zero": config | {"grids": [grid | {"group": 0}]},
        "group does not divide": config | {"grids": [grid | {"group": 48}]},
        "group of another size": config | {"grids": [grid | {"group": 16}]},
        "unknown field": config | {"grids": [grid | {"more": 1}]},
        "no such grid": config | {"matrices": matrices | {name: 7}},
        "negative grid": config | {"matrices": matrices | {name: -1}},
        "unknown matrix": config | {"matrices": matrices | {"model.layers.9.mlp.up_proj": 0}},
        "no linear layer": config | {"matrices": matrices | {"model.norm": 0}},
        "expert that is not there": config | {"matrices": matrices | {f"{EXPERT}.up_proj": [0] * 9}},
        "a matrix less": config | {"matrices": {key: matrices[key] for key in [*matrices][1:]}},
        "matrices are a list": config | {"matrices": [name]},
        "not a mapping": ["strop"],
        "text": "strop",
        "method unknown": config | {"quant_method": "other"},
    }  # fmt: skip


KINDS = [*broken({"matrices": {"m": 0}, "grids": [{}]})]


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    quantize(source("qwen2_moe"), RTN(bits=1, group=32), out)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_config_ends_in_one_sentence(kind, packed, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in packed.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = broken(config["quantization_config"])[kind]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StropError) as caught:
        strop.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_bits": 40}, "broken"),
        ({"num_bits": 0}, "broken"),
        ({"num_bits": "four"}, "broken"),
        ({"group_size": 48}, "restore"),
        ({"group_size": -7}, "broken"),
        ({"symmetric": False}, "restore|lacks"),
        ({"num_bits": 8}, "restore"),
    ],
    ids=str,
)
def test_a_broken_compressed_config_ends_in_one_sentence(change, why, source, tmp_path):
    quantize(source("llama"), W4, out := tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(StropError, match=why) as caught:
        strop.load(out)
    assert "\n" not in str(caught.value)


def test_grids_survive_the_config():
    grids = {
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj": Grid(1 + (layer + expert) % 3, 32)
        for layer in range(2)
        for expert in range(12)
    } | {"model.layers.0.self_attn.q_proj": Grid(8, None, False)}
    config = json.loads(json.dumps(describe(grids)))
    assert grids_of(config) == grids
    assert len(config["matrices"]) == 3


def test_mixtures_are_all_covered():
    assert {name for name in CONFIGS if hasattr(build(name).config, "num_experts_per_tok")} == {*EXPERTS}
