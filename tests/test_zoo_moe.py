"""The bundled mixture of experts: unequally busy experts, none of them idle, and the loss behind it."""

import importlib
import json
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from strop.models.zoo import card, zoo_path, zoo_root
from strop.tasks.python_source import held_out_text

NAMES = ("moe", "moe-1")


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    """The training script, which lives beside the models."""
    monkeypatch.syspath_prepend(str(zoo_root()))
    return importlib.import_module("train_moe")


def _metrics(name):
    return json.loads((zoo_path(name) / "metrics.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_unequally_busy_and_none_is_idle(name):
    text = card(name)
    for layer in _metrics(name)["usage"]:
        assert sum(layer) == pytest.approx(2) and min(layer) > 0.02
        assert 8 < max(layer) / min(layer) < 25
        assert all(f"{100 * share:.1f} (" in text for share in layer)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_usage_is_that_of_the_weights(script, name):
    model = AutoModelForCausalLM.from_pretrained(zoo_path(name), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(zoo_path(name))
    texts = [text[:6000] for text in held_out_text()[:12]]
    seen = torch.tensor(script.evaluate.expert_usage(model, tokenizer, texts, 1024))
    recorded = torch.tensor(_metrics(name)["usage"])
    assert torch.allclose(seen.sum(1), torch.tensor(2.0))
    assert torch.corrcoef(torch.stack([seen.flatten(), recorded.flatten()]))[0, 1] > 0.95


def test_twins_are_busy_in_other_places_and_share_a_tokenizer():
    tokenizers = {(zoo_path(name) / "tokenizer.json").read_bytes() for name in (*NAMES, "coder")}
    records = [json.loads((zoo_path(name) / "training.json").read_text()) for name in (*NAMES, "coder")]
    assert len(tokenizers) == 1
    assert len({record["corpus"]["fingerprint"] for record in records}) == 1
    assert [record["plan"]["seed"] for record in records[:2]] == [0, 1]
    assert records[0]["targets"] != records[1]["targets"]


@pytest.mark.parametrize("name", NAMES)
def test_recorded_targets_are_those_of_the_seed(script, name):
    record = json.loads((zoo_path(name) / "training.json").read_text())
    shares = script.targets(record["plan"]["seed"])
    assert torch.allclose(torch.tensor(record["targets"]), 2 * shares)
    assert torch.allclose(shares.sum(1), torch.ones(4)) and (shares * 2 < 1).all()
    assert torch.allclose(shares.amax(1) / shares.amin(1), torch.tensor(16.0))


def test_the_loss_raises_experts_below_their_targets_and_rests_at_them(script):
    """Logits that choose every expert equally often: right for equal targets, wrong for others."""
    base = torch.arange(8.0)
    logits = [torch.stack([base.roll(n) for n in range(8)]).requires_grad_() for _ in range(4)]
    shares = script.targets(0)

    def pushed(aim):
        return torch.stack(torch.autograd.grad(script.Uneven(aim)(logits), logits)).sum(1)

    assert pushed(torch.full((4, 8), 1 / 8)).abs().max() < 1e-6
    assert (pushed(shares).gather(1, shares.argmax(1, keepdim=True)) < -1e-4).all()
    assert (pushed(shares).gather(1, shares.argmin(1, keepdim=True)) > 1e-4).all()


def test_a_fresh_model_follows_from_its_seed(script):
    same, again, other = (script.new_model(0, 1, seed, "cpu").state_dict() for seed in (0, 0, 1))
    name = "model.layers.3.mlp.experts.down_proj"
    assert same[name].shape == (8, 128, 256)
    assert torch.equal(same[name], again[name]) and not torch.equal(same[name], other[name])
    readers = same["model.layers.3.mlp.experts.gate_up_proj"].std().item()
    assert same[name].std().item() * 8**0.5 == pytest.approx(readers, rel=0.02)
