"""What a checkpoint stores against what its config says: dtypes, lost and broken weights, true sizes."""

import json

import pytest
import torch
from quantizing import build, logits, packed_layers, rows, save, store, tensors_of

import strop
from strop.core.checkpoint import inspect
from strop.core.errors import StropError
from strop.recipe import Recipe
from strop.weights import GPTQ, RTN
from strop.weights.grid import Grid, restored, round_to_nearest
from strop.weights.stream import quantize_checkpoint

CALIBRATED = GPTQ(bits=4, group=32, samples=4, length=32)


def quantize(folder, method, out):
    recipe = Recipe(model=str(folder), weights=method).to_yaml()
    return quantize_checkpoint(inspect(folder), method, out, recipe, text=rows)


def say(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def in_memory(folder, method):
    return logits(method.apply(strop.load(folder).plain, rows))


@pytest.mark.parametrize("method", [RTN(bits=4, group=32), CALIBRATED], ids=["rtn", "gptq"])
@pytest.mark.parametrize("lies", ["norms", "all", "unsaid"])
def test_weights_are_read_in_the_dtype_of_the_config(lies, method, tmp_path):
    folder = save(build("qwen3", torch.bfloat16), tmp_path / "model")
    tensors = tensors_of(folder)
    wide = {name: t.float() for name, t in tensors.items() if lies == "all" or "norm" in name}
    store(folder, tensors | ({} if lies == "unsaid" else wide))
    if lies == "unsaid":
        say(folder, dtype=None)
    quantize(folder, method, tmp_path / "out")
    assert torch.equal(logits(strop.load(tmp_path / "out").model), in_memory(folder, method))
    if lies == "norms":
        assert tensors_of(tmp_path / "out")["model.layers.0.input_layernorm.weight"].dtype == torch.float32


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_effective_bits_are_those_on_disk(bits, symmetric, dtype, tmp_path):
    folder = save(build("llama", dtype), tmp_path / "model")
    plan = quantize(folder, RTN(bits=bits, group=32, symmetric=symmetric), tmp_path / "out").plan
    stored = tensors_of(tmp_path / "out")
    for row in plan.rows:
        own = {key: t for key, t in stored.items() if key.startswith(f"{row.name}.")}
        held = sum(t.nbytes for key, t in own.items() if not key.endswith(("bias", "weight_shape")))
        assert row.effective_bits == pytest.approx(8 * held / row.weights)
    if bits == 4 and dtype == torch.bfloat16:
        assert plan.effective_bits == pytest.approx(4.5 if symmetric else 4.625, abs=0.05)


def test_starved_experts_are_told(tmp_path):
    folder = save(
        build("qwen2_moe", torch.bfloat16, num_experts=8, num_experts_per_tok=1), tmp_path / "model"
    )
    one = torch.full((1, 2), 5)

    recipe = Recipe(model=str(folder), weights=CALIBRATED).to_yaml()
    plan = quantize_checkpoint(
        inspect(folder), CALIBRATED, tmp_path / "out", recipe, text=lambda asked: one
    ).plan
    starved = [row for row in plan.rows if row.tokens == 0]
    assert 3 <= len(starved) < len(plan.rows) and all(row.expert for row in starved)
    assert f"{len(starved)} matrices saw no calibration text" in plan.said
    assert {row.tokens for row in plan.rows if "q_proj" in row.name} == {2}


@pytest.mark.parametrize("lost", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_outside_the_layers_must_be_there(lost, tmp_path):
    folder = save(build("llama", torch.bfloat16), tmp_path / "model")
    store(folder, {name: t for name, t in tensors_of(folder).items() if name != lost})
    with pytest.raises(StropError, match=f"stores no weight {lost}"):
        quantize(folder, RTN(bits=4, group=32), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_weights_of_eight_bits_are_refused(dtype, tmp_path):
    folder = save(build("llama", torch.bfloat16), tmp_path / "model")
    tensors = tensors_of(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    store(folder, tensors | {name: tensors[name].to(dtype)})
    with pytest.raises(StropError, match=f"weight {name} is stored as .*8"):
        quantize(folder, RTN(bits=4, group=32), tmp_path / "out")


@pytest.mark.parametrize("changes", [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"text_config": 5}])
def test_a_config_that_cannot_be_ends_in_one_sentence(changes, tmp_path):
    folder = save(build("llama", torch.bfloat16), tmp_path / "model")
    say(folder, **changes)
    with pytest.raises(StropError):
        quantize(folder, RTN(bits=4, group=32), tmp_path / "out")


@pytest.mark.parametrize("bits", [1, 4])  # in strop's form, and in that of compressed-tensors
def test_a_scale_that_is_no_number_is_refused(bits, tmp_path):
    folder = save(build("llama", torch.bfloat16), tmp_path / "model")
    quantize(folder, RTN(bits=bits, group=32), tmp_path / "out")
    shard = tmp_path / "out" / "model-00001.safetensors"
    tensors = tensors_of(tmp_path / "out")
    name = next(name for name in tensors if name.endswith("scale") and "layers.0" in name)
    tensors[name][0, 0] = torch.nan
    for other in (tmp_path / "out").glob("*.safetensors"):
        other.unlink()
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    store(tmp_path / "out", tensors)
    assert not shard.exists()
    with pytest.raises(StropError, match=r"scale holds NaN"):
        strop.load(tmp_path / "out")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_half_precision_holds_small_weights(bits):
    weight = 1e-5 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    grid, exact = Grid(bits, 32), weight.half().float()
    error = (restored(round_to_nearest(weight.half(), grid), grid).float() - exact).square().mean()
    ideal = (restored(round_to_nearest(exact, grid), grid) - exact).square().mean()
    assert error <= 1.3 * ideal + (0.5 * 2.0**-24) ** 2


def test_half_precision_that_overflows_is_refused():
    model = build("llama", torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(60_000)
        model.model.layers[1].mlp.up_proj.weight[0, 0] = -60_000
    with pytest.raises(StropError, match=r"layers\.1\.mlp\.up_proj\.weight is too large for float16"):
        RTN(bits=2, group=None).apply(model)
    assert len(packed_layers(model)) < 14
