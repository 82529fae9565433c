"""Sparse autoencoders: each form against its formula, SAELens folders, what is wrong with a folder."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file

from strop.audit.sae import CONFIG, NORMS, SAE, WEIGHTS
from strop.audit.sae_training import CHUNK, Settings, Trainer, chunk_of, judged
from strop.audit.states import read, replaced
from strop.core.errors import StropError
from strop.kernels import moments, moments_numba, topk, topk_numba

D, M = 6, 20


def made(**changes: Any) -> SAE:
    draw = torch.Generator().manual_seed(1)
    sizes = {"w_enc": (D, M), "b_enc": (M,), "w_dec": (M, D), "b_dec": (D,)}
    tensors = {name: torch.randn(size, generator=draw) for name, size in sizes.items()}
    return SAE(**tensors | {"layer": 2} | changes)


def states() -> torch.Tensor:
    return torch.randn(3, 5, D, generator=torch.Generator().manual_seed(2)) * 3 + 1


def normalised(x: np.ndarray, sae: SAE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States as the encoder reads them, and what undoes it: times, plus."""
    if sae.norm == "layer_norm":
        mean, spread = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True) + 1e-5
        return (x - mean) / spread, spread, mean
    if sae.norm == "constant_norm_rescale":
        size = np.sqrt((x**2).sum(-1, keepdims=True) / x.shape[-1])
        return x / size, size, np.zeros(1)
    return x * sae.factor, np.full(1, 1 / sae.factor), np.zeros(1)


FORMS = {
    "relu": {},
    "jumprelu": {"form": "jumprelu", "threshold": torch.linspace(0.1, 2, M)},
    "topk": {"form": "topk", "k": 4},
    "topk by norm": {"form": "topk", "k": 4, "by_norm": True},
    "embeddings": {"layer": -1},
}


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", FORMS)
def test_features_and_what_they_write_follow_the_formulas(form, norm, centred):
    factor = 0.7 if norm == "expected_average_only_in" else 1.0
    sae, given = made(**FORMS[form], norm=norm, factor=factor, centred=centred), states()
    w_enc, b_enc, w_dec, b_dec = (
        getattr(sae, name).double().numpy() for name in ("w_enc", "b_enc", "w_dec", "b_dec")
    )
    x, times, plus = normalised(given.double().numpy(), sae)
    pre = (x - b_dec if centred else x) @ w_enc + b_enc
    lengths = np.linalg.norm(w_dec, axis=1) if sae.by_norm else np.ones(M)
    pre = pre * lengths
    wanted = np.maximum(pre, 0)
    if sae.form == "jumprelu":
        wanted = np.where(pre > sae.threshold.double().numpy(), wanted, 0)
    if sae.form == "topk":
        least = np.sort(pre, -1)[..., -sae.k, None]
        wanted = np.where(pre >= least, wanted, 0)
    features = sae.encode(given)
    assert np.allclose(features, wanted, atol=1e-4)
    written = (wanted / lengths @ w_dec + b_dec) * times + plus
    assert np.allclose(sae.decode(features, given), written, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_gives_back_what_was_saved(form, tmp_path):
    sae = made(**FORMS[form], centred=True, norm="expected_average_only_in", factor=0.5)
    sae.save(tmp_path)
    again = SAE.load(tmp_path)
    assert torch.equal(again.encode(states()), sae.encode(states()))
    for name in ("layer", "form", "k", "centred", "norm", "factor", "by_norm"):
        assert getattr(again, name) == getattr(sae, name), name


def test_a_direction_of_no_length_writes_nothing():
    sae = made(form="topk", k=4, by_norm=True)
    sae.w_dec[3] = 0
    features = sae.encode(states())
    assert not features[..., 3].any()
    features[..., 3] = 1.0
    silent = features.clone()
    silent[..., 3] = 0
    assert torch.equal(sae.decode(features, states()), sae.decode(silent, states()))


def spoil_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def spoil_tensor(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = change(tensors[name])
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / WEIGHTS)


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[7] = torch.nan
    return tensor


BAD = {
    "no config": (lambda at: (at / CONFIG).unlink(), "no readable cfg.json"),
    "a list": (lambda at: (at / CONFIG).write_text("[]"), "is not a mapping"),
    "gated": (lambda at: spoil_config(at, architecture="gated"), "architecture 'gated' is not read"),
    "k": (lambda at: spoil_config(at, k=21), "keeps 1 to 20 features, got k = 21"),
    "heads": (lambda at: spoil_config(at, hook_name="blocks.1.attn.hook_z"), "no residual stream"),
    "tuned": (lambda at: spoil_config(at, finetuning_scaling_factor=True), "finetuning_scaling_factor"),
    "activation": (
        lambda at: spoil_config(at, architecture="standard", activation_fn="tanh-relu"),
        "architecture 'tanh-relu' is not read",
    ),
    "zero": (
        lambda at: spoil_config(
            at, normalize_activations="expected_average_only_in", norm_scaling_factor=0.0
        ),
        "norm_scaling_factor above 0",
    ),
    "factor": (
        lambda at: spoil_config(at, normalize_activations="expected_average_only_in"),
        "without a norm_scaling_factor",
    ),
    "threshold": (lambda at: spoil_config(at, architecture="jumprelu"), "needs the tensor `threshold`"),
    "cut": (lambda at: (at / WEIGHTS).write_bytes((at / WEIGHTS).read_bytes()[:200]), "restore the file"),
    "missing": (lambda at: spoil_tensor(at, "W_dec", lambda t: None), "has no tensor W_dec"),
    "shape": (lambda at: spoil_tensor(at, "b_enc", lambda t: t[:-1].clone()), r"b_enc is \[19\]"),
    "nan": (lambda at: spoil_tensor(at, "W_dec", with_nan), r"W_dec holds numbers.*\(feature 7\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_told_in_one_sentence(case, tmp_path):
    made(form="topk", k=4).save(tmp_path)
    spoil, sentence = BAD[case]
    spoil(tmp_path)
    with pytest.raises(StropError, match=sentence):
        SAE.load(tmp_path)


@pytest.mark.parametrize(
    ("without", "changes", "found"),
    [
        ("apply_b_dec_to_input", {}, {"centred": True}),
        ("normalize_activations", {"normalize_activations": None}, {"norm": "none"}),
        ("metadata", {"hook_point": "blocks.2.hook_resid_post"}, {"layer": 2}),
        (
            "architecture",
            {"activation_fn": "topk", "activation_fn_kwargs": {"k": 3}},
            {"form": "topk", "k": 3},
        ),
        ("architecture", {"activation_fn_str": "relu", "activation_fn_kwargs": "none"}, {"form": "relu"}),
    ],
)
def test_older_configs_mean_what_saelens_takes_them_for(without, changes, found, tmp_path):
    made().save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config.pop(without)
    (tmp_path / CONFIG).write_text(json.dumps(config | changes))
    sae = SAE.load(tmp_path)
    assert {name: getattr(sae, name) for name in found} == found


def test_what_enters_the_first_layer_has_positions_added():
    model = tiny_model("gpt2")
    lm = SimpleNamespace(model=model, device=torch.device("cpu"))
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    states, losses = read(lm, ids, -1)
    body = model.transformer
    assert torch.allclose(states, body.wte(ids) + body.wpe(torch.arange(9)), atol=1e-6)
    with replaced(model, -1, [states]):
        assert torch.equal(read(lm, ids, 0)[1], losses)
    with replaced(model, -1, [torch.zeros_like(states)]):
        assert not torch.allclose(read(lm, ids, 0)[1], losses)


@pytest.mark.parametrize(("m", "k"), [(4096, 32), (61, 5), (7, 7), (300, 40), (3, 1)])
@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_the_largest_are_kept_as_torch_keeps_them(m, k, shift):
    draw = torch.Generator().manual_seed(m)
    values = (torch.randn(50, m, generator=draw) * 4).round() / 4 + shift  # with many equals
    values[0] = -1.0
    wanted, found = (module.keep_largest(values.clone(), k) for module in (topk, topk_numba))
    assert torch.equal(found.sort(1).values, wanted.sort(1).values)
    assert ((found == 0) | (found == values)).all()


def test_sums_are_those_of_the_twin():
    draw = torch.Generator().manual_seed(3)
    x, y = (torch.randn(40, 33, generator=draw).relu() for _ in range(2))
    folds, results = torch.arange(40) % 3, []
    for module in (moments, moments_numba):
        held = torch.zeros(3, 8, 33, dtype=torch.float64), torch.zeros(3, 2, 33), torch.full((3, 2, 33), -1)
        module.accumulate(x, y, folds, 100, *held)
        results.append(held)
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("length", [16, 300, 2500])
def test_judging_and_training_read_as_many_tokens_at_a_time_whatever_the_length(length, tmp_path):
    model = tiny_model("qwen3")
    lm = SimpleNamespace(model=model, device=torch.device("cpu"))
    rows = torch.randint(3, 60, (6000 // length + 1, length), generator=torch.Generator().manual_seed(0))
    settings = Settings(layer=0, m=M, k=4, tokens=2048)
    asked, read = [], lambda _module, given: asked.append(given[0].shape[:2])
    handle = model.get_decoder().layers[0].register_forward_pre_hook(read)
    try:
        sae = Trainer(lm, rows, settings, tmp_path / "run.safetensors").folded()
        judged(lm, sae, rows[:3])
    finally:
        handle.remove()
    assert all(size[0] * size[1] <= 4096 for size in asked)
    assert max(size[0] * size[1] for size in asked) > 2048
    assert chunk_of(torch.zeros(5000, length), settings, 0)[0] * length <= CHUNK


def test_another_device_is_asked_for_every_tensor():
    sae = made(form="jumprelu", threshold=torch.ones(M))
    assert {t.device.type for t in vars(sae.to("meta")).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert replace(sae).about == {}
