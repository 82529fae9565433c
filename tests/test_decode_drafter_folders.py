"""Drafters in folders: the published form is read, what is written is read again, the rest is refused."""

import json
from copy import deepcopy

import pytest
import torch
from conftest import CONFIGS
from drafting import BLOCK, ROWS, approximator, drafter, net, target
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from strop.core.errors import StropError
from strop.decode import load_drafter
from strop.decode.checkpoint import fingerprint, new_config, read_drafter, save_drafter
from strop.decode.dflash import DFlashDrafter, DFlashNet, default_taps
from strop.decode.treeflash import TreeFlashDrafter

TAPS = {
    (36, 5): [1, 9, 17, 25, 33],
    (24, 5): [1, 6, 11, 16, 21],
    (28, 5): [1, 7, 13, 19, 25],
    (10, 5): [1, 2, 4, 6, 7],  # halves go to the even layer
    (48, 8): [1, 7, 14, 20, 26, 32, 39, 45],
    (6, 3): [1, 2, 3],
    (36, 1): [18],
}


@pytest.mark.parametrize(("layers", "taps"), TAPS.items(), ids=str)
def test_taps_by_default(layers, taps):
    assert default_taps(*layers) == taps


def published(model, **changes) -> dict:
    """A config as drafters are published with, for a tiny target."""
    of = model.config
    return {
        "architectures": ["DFlashDraftModel"],
        "attention_bias": False,
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": BLOCK,
        "dflash_config": {"mask_token_id": 60, "target_layer_ids": [0, 1]},
        "dtype": "bfloat16",
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": of.hidden_size,
        "intermediate_size": 48,
        "layer_types": ["full_attention"] * 2,
        "max_position_embeddings": of.max_position_embeddings,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_target_layers": of.num_hidden_layers,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": of.vocab_size,
        **changes,
    }


def folder_of(path, config: dict, trunk: DFlashNet):
    save_drafter(path, trunk)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_published_folders(tmp_path):
    model = target()
    trunk = net(model)
    own = {"mask_token_id": 60, "target_layer_ids": [0, 1]}
    inside = {"block_size": None, "dflash_config": {"block_size": BLOCK, **own}}
    for number, changes in enumerate(({}, inside)):
        draft = load_drafter(folder_of(tmp_path / str(number), published(model, **changes), trunk), model)
        assert isinstance(draft, DFlashDrafter) and not isinstance(draft, TreeFlashDrafter)
        assert draft.horizon == BLOCK - 1 and draft.tap_layers == (0, 1) and draft.masks == [60] * (BLOCK - 1)
        places = torch.arange(8) / 8
        assert torch.allclose(draft.net.rotary.inv_freq, 1e6**-places)
        assert draft.net.norm.weight.dtype == torch.float32
        assert draft.net.state_dict().keys() == trunk.state_dict().keys()


def test_taps_are_evenly_spread_where_a_config_names_none(tmp_path):
    config = CONFIGS["qwen3"]
    config.num_hidden_layers, config.layer_types = 10, ["full_attention"] * 10
    model = AutoModelForCausalLM.from_config(config).eval()
    trunk = DFlashNet(new_config(model, 5, 4, 0))
    assert trunk.config.dflash_config["target_layer_ids"] == [1, 2, 4, 6, 7]
    told = published(
        model, dflash_config={"mask_token_id": 3}, num_hidden_layers=5, layer_types=["full_attention"] * 5
    )
    draft = read_drafter(folder_of(tmp_path, told, trunk), model)
    assert draft.tap_layers == (1, 2, 4, 6, 7) and draft.net.fc.in_features == 5 * 32


@pytest.mark.parametrize("kind", ["dflash", "treeflash"])
@torch.no_grad()
def test_a_folder_holds_the_drafter_in_bfloat16(kind, tmp_path):
    model = target("llama")
    trunk = net(model)
    module = approximator(trunk) if kind == "treeflash" else None
    save_drafter(tmp_path, trunk, module, ROWS)
    draft = load_drafter(str(tmp_path), model)
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert isinstance(draft, TreeFlashDrafter) == (kind == "treeflash")
    for name, x in trunk.state_dict().items():
        assert torch.equal(draft.net.state_dict()[name], x.bfloat16().float())
    if module is not None:
        assert draft.rows == ROWS
        for name, x in module.state_dict().items():
            assert torch.equal(draft.approximator.state_dict()[name], x.bfloat16().float())
    same, features = drafter(kind, model), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for one in (draft, same):
        one.inject(features, 0)
    apart = draft.slots(3) - same.slots(3)
    assert 0 < apart.abs().max() < 0.1
    save_drafter(tmp_path / "again", draft.net, getattr(draft, "approximator", None), ROWS)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_frequencies_stay_exact_in_bfloat16(tmp_path):
    model = deepcopy(target()).bfloat16()
    save_drafter(tmp_path, net(model))
    draft = load_drafter(tmp_path, model)
    assert draft.net.norm.weight.dtype == torch.bfloat16 and draft.net.rotary.inv_freq.dtype == torch.float32
    assert torch.equal(draft.net.rotary.inv_freq, net(target()).rotary.inv_freq)


def test_another_target_is_refused(tmp_path):
    model, other = target("qwen3", 0), target("qwen3", 1)
    save_drafter(tmp_path, net(model))
    assert fingerprint(model) == fingerprint(deepcopy(model).bfloat16()) != fingerprint(other)
    with pytest.raises(StropError, match=r"trained for another model of this shape"):
        read_drafter(tmp_path, other)
    with pytest.raises(StropError, match=r"of vocabulary 61 and this one has 7"):
        read_drafter(tmp_path, target("qwen3", 0, 7))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_size": 1}, "blocks of 1, outside 2 to"),
        ({"dflash_config": {"mask_token_id": 61, "target_layer_ids": [0]}}, "mask token 61"),
        ({"dflash_config": {"mask_token_id": 1, "target_layer_ids": [0, 2]}}, r"layers \[0, 2\]"),
        ({"dflash_config": {}}, "not a DFlash drafter's.*mask_token_id"),
        ({"block_size": None}, "not a DFlash drafter's.*block_size"),
        ({"num_target_layers": 3}, "layers 3 and this one has 2"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"intermediate_size": 47}, "weights do not fit"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers of"),
        ({"intermediate_size": -1}, "describes no drafter"),
    ],
    ids=str,
)
def test_broken_configs_are_refused(changes, reason, tmp_path):
    model = target()
    folder = folder_of(tmp_path, published(model, **changes), net(model))
    with pytest.raises(StropError, match=reason):
        load_drafter(folder, model)


def test_rows_that_are_no_number_are_refused(tmp_path):
    model = target()
    save_drafter(tmp_path, net(model), approximator(net(model)), ROWS)
    config = json.loads((tmp_path / "config.json").read_text())
    for told in ({"rows": 0}, {"rows": "4"}, [4]):
        (tmp_path / "config.json").write_text(json.dumps(config | {"treeflash_config": told}))
        with pytest.raises(StropError, match="describes no drafter"):
            load_drafter(tmp_path, model)


def test_a_drafter_that_is_replaced_is_never_half_of_each(tmp_path, monkeypatch):
    """Killed between weights and config it is no drafter, instead of new weights under an old config."""
    model = target()
    save_drafter(tmp_path, net(model))

    def killed(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("strop.decode.checkpoint.json.dumps", killed)
    with pytest.raises(KeyboardInterrupt):
        save_drafter(tmp_path, net(model, 1))
    assert not (tmp_path / "config.json").exists()


def test_broken_weights_are_refused(tmp_path):
    model, file = target(), tmp_path / "model.safetensors"
    save_drafter(tmp_path, net(model))
    tensors = load_file(file)
    for broken, reason in (
        ({**tensors, "norm.weight": tensors["norm.weight"] * torch.nan}, "NaN"),
        ({name: x for name, x in tensors.items() if name != "fc.weight"}, "weights do not fit"),
    ):
        save_file(broken, file)
        with pytest.raises(StropError, match=reason):
            load_drafter(tmp_path, model)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(StropError, match="damaged"):
        load_drafter(tmp_path, model)
    file.unlink()
    with pytest.raises(StropError, match="complete"):
        load_drafter(tmp_path, model)
