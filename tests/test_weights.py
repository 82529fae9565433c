"""The weights family: one table over methods and architectures, then export and refusals."""

import copy
import errno
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from strop.core.errors import StropError
from strop.weights import RTN
from strop.weights.export import export
from strop.weights.linear import PackedLinear

METHODS = {
    "int8": RTN(bits=8),
    "int4": RTN(bits=4),
    "int4-group": RTN(bits=4, group=32),
}
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
ARCHITECTURES = {
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64),
}
EXPORTABLE = ["qwen3", "llama"]
DTYPES = [torch.float32, torch.bfloat16]
TOKENS = torch.arange(34).reshape(2, 17) % 29

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def build(name: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[name], dtype=dtype).eval()


def memory(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "to": 1, "be": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@every_method
@every_dtype
class TestEveryMember:
    def test_logits_are_those_of_the_dequantized_matrices(self, method, architecture, dtype):
        model = build(architecture, dtype)
        packed = method.apply(copy.deepcopy(model))
        for name, layer in method.targets(model):
            dense = packed.get_submodule(name).weight
            assert dense.dtype == dtype
            layer.weight.data = dense.T if architecture == "gpt2" else dense
        assert not torch.equal(logits(build(architecture, dtype)), logits(packed))
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        exact = architecture != "gpt2"  # a Conv1D multiplies by addmm and not by F.linear
        torch.testing.assert_close(logits(packed), logits(model), rtol=0, atol=0 if exact else tolerance)

    def test_memory_is_codes_and_scales(self, method, architecture, dtype):
        model = build(architecture, dtype)
        saved = 0
        for _, layer in method.targets(model):
            inputs, outputs = layer.weight.shape
            if architecture != "gpt2":
                inputs, outputs = outputs, inputs
            groups = inputs // method.group if method.group else 1
            codes = outputs * inputs * method.bits // 8
            saved += layer.weight.nbytes - codes - outputs * groups * dtype.itemsize
        assert memory(method.apply(copy.deepcopy(model))) == memory(model) - saved

    def test_copies_are_independent(self, method, architecture, dtype):
        model = build(architecture, dtype)
        before = logits(model)
        packed = method.apply(copy.deepcopy(model))
        assert not any(isinstance(module, PackedLinear) for module in model.modules())
        assert torch.equal(logits(model), before)

        after = logits(packed)
        twin = copy.deepcopy(packed)
        for module in twin.modules():
            if isinstance(module, PackedLinear):
                module.scale.zero_()
        assert torch.equal(logits(packed), after)


@pytest.mark.parametrize("bits", [2, 4, 8])
@every_dtype
def test_packed_linear_round_trip(bits, dtype):
    torch.manual_seed(0)
    codes = torch.randint(0, 2**bits, (6, 32), dtype=torch.uint8)
    scale = torch.rand(6, 4, dtype=dtype)
    bias = nn.Parameter(torch.randn(6, dtype=dtype))
    layer = PackedLinear(codes.clone(), scale, bits, bias)
    integers = codes.int() - 2 ** (bits - 1)
    dense = integers.to(dtype) * scale.repeat_interleave(8, dim=1)
    x = torch.randn(3, 5, 32, dtype=dtype)

    assert layer.packed.nbytes == 6 * 32 * bits // 8
    assert torch.equal(layer.integers.int(), integers)
    assert torch.equal(layer.weight, dense)
    assert torch.equal(layer(x), F.linear(x, dense, bias))


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (4, 4)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_rtn_rounds_to_the_nearest_code(bits, group, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(12, 16) * 0.02).to(dtype)
    weight[0] = 0
    weight[1] = weight[1].abs()  # the largest magnitude is positive, where the grid is shorter
    codes, scale = RTN(bits=bits, group=group).quantize(weight)
    width, half = group or 16, 2 ** (bits - 1)
    assert (codes.dtype, scale.dtype) == (torch.uint8, dtype)
    for row in range(12):
        for column in range(16):
            start = column // width * width
            largest = max(abs(w) for w in weight[row, start : start + width].tolist())
            w, s = weight[row, column].item(), scale[row, column // width].item()
            error = abs(w - (codes[row, column].item() - half) * s)
            nearest = min(abs(w - code * s) for code in range(-half, half))
            assert error <= s / 2 * (1 + 1e-4)
            assert math.isclose(error, nearest, rel_tol=1e-4, abs_tol=1e-9)
            assert row == 0 or 1 - 1e-6 <= s / (largest / (half - 0.5)) <= 1.01


def test_targets_leave_head_embeddings_and_routers_alone():
    model = build("llama")
    model.model.layers[0].mlp.gate = nn.Linear(64, 4)
    names = [name for name, _ in RTN().targets(model)]
    assert len(names) == 2 * 7
    assert all(name.endswith("_proj") for name in names)


@pytest.mark.parametrize("architecture", EXPORTABLE)
@every_method
@every_dtype
def test_export_reloads_in_plain_transformers(method, architecture, dtype, tokenizer, tmp_path):
    packed = method.apply(build(architecture, dtype))
    expected = logits(packed)
    folder = export(packed, tokenizer, tmp_path / "new" / "model")

    reloaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert reloaded.dtype == dtype
    assert torch.equal(logits(reloaded.eval()), expected)
    assert torch.equal(logits(packed), expected)
    assert AutoTokenizer.from_pretrained(folder)("to be").input_ids == [1, 2]
    assert (folder / "generation_config.json").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_export_follows_the_pack_quantized_format(tmp_path):
    (tmp_path / "model").mkdir()  # an empty folder is taken
    folder = export(RTN(bits=4, group=32).apply(build("llama")), None, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    layer = "model.layers.0.mlp.down_proj."
    stored = {key.removeprefix(layer): t for key, t in tensors.items() if key.startswith(layer)}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
        "bias": (torch.float32, (64,)),
        "weight_packed": (torch.int32, (64, 160 * 4 // 32)),
        "weight_scale": (torch.float32, (64, 160 // 32)),
        "weight_shape": (torch.int64, (2,)),
    }
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (4, "group", 32)
    assert weights["symmetric"] is True


def test_failed_save_leaves_nothing(monkeypatch, tmp_path):
    def full_disk(tensors, filename, metadata=None):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export(RTN().apply(build("llama")), None, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_export_refuses_an_existing_folder(tmp_path):
    (tmp_path / "kept").write_text("precious")
    packed = RTN().apply(build("llama"))
    for taken in (tmp_path, tmp_path / "kept"):
        with pytest.raises(StropError, match="exists already"):
            export(packed, None, taken)
    assert (tmp_path / "kept").read_text() == "precious"


def test_export_refuses_what_the_format_cannot_say(tmp_path):
    with pytest.raises(StropError, match="no packed layer"):
        export(build("llama"), None, tmp_path / "model")
    with pytest.raises(StropError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        export(RTN().apply(build("gpt2")), None, tmp_path / "model")
    mixed = RTN().apply(build("llama"))
    narrow = RTN(bits=4).quantize(nn.Linear(64, 64).weight)
    mixed.model.layers[0].self_attn.q_proj = PackedLinear(*narrow, bits=4)
    with pytest.raises(StropError, match=r"one \(bits, group\)"):
        export(mixed, None, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_refuses_mixture_of_experts():
    config = MixtralConfig(**SHAPE, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(StropError, match="rtn covers dense models and MixtralForCausalLM"):
        RTN().apply(model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refuses_non_finite_weights_and_changes_nothing(value):
    model = build("qwen3")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(StropError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        RTN().apply(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_refuses_rows_that_do_not_divide():
    with pytest.raises(StropError, match=r"down_proj has 160 input channels.*group=64"):
        RTN(bits=4, group=64).apply(build("llama"))
    model = build("llama")
    model.model.layers[0].self_attn.q_proj = nn.Linear(63, 64)
    with pytest.raises(StropError, match=r"q_proj has 63 input channels.*whole bytes"):
        RTN(bits=4).apply(model)


def test_refuses_models_without_dense_linear_layers(tmp_path):
    packed = RTN().apply(build("llama"))
    with pytest.raises(StropError, match=r"no nn\.Linear"):
        RTN().apply(packed)
    reloaded = AutoModelForCausalLM.from_pretrained(export(packed, None, tmp_path / "model"))
    with pytest.raises(StropError, match="already quantized"):
        RTN().apply(reloaded)


@pytest.mark.parametrize("fields", [{"bits": 3}, {"bits": 16}, {"group": 0}, {"group": -1}])
def test_rtn_checks_its_fields(fields):
    with pytest.raises(ValueError, match="must be"):
        RTN(**fields)
