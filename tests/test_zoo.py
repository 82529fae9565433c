"""The bundled models: found by name, small, honest about themselves, and able to do their tasks."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from strop.core.errors import StropError
from strop.models.zoo import card, zoo_names, zoo_path, zoo_root
from strop.tasks import python_source, reasoning, recall

ARCHITECTURES = {
    "coder": "Qwen3ForCausalLM",
    "reasoner": "Qwen3ForCausalLM",
    "moe": "Qwen2MoeForCausalLM",
    "moe-1": "Qwen2MoeForCausalLM",
}
NAMES = tuple(ARCHITECTURES)


@pytest.fixture(scope="module")
def trainer():
    """The training loop, which lives beside the models and not in the package."""
    sys.path.insert(0, str(zoo_root()))
    try:
        import trainer
    finally:
        sys.path.remove(str(zoo_root()))
    return trainer


def _load(name):
    model = AutoModelForCausalLM.from_pretrained(zoo_path(name), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(zoo_path(name))


def _continue(model, tokenizer, prompts, length):
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(**inputs, max_new_tokens=length)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_names_and_did_you_mean(monkeypatch, tmp_path):
    assert set(NAMES) <= set(zoo_names())
    with pytest.raises(StropError, match=r"did you mean 'coder'. known: coder, .*reasoner"):
        zoo_path("codr")
    monkeypatch.setenv("STROP_ZOO", str(tmp_path))
    assert zoo_root() == tmp_path and zoo_names() == []
    monkeypatch.setenv("STROP_ZOO", str(tmp_path / "gone"))
    with pytest.raises(StropError, match="STROP_ZOO"):
        zoo_root()


def test_finding_models_leaves_torch_unloaded():
    code = "import sys, strop.models.zoo as z; z.zoo_names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_folders_are_small_and_name_no_machine(name):
    folder = zoo_path(name)
    assert (folder / "model.safetensors").stat().st_size <= 12_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURES[name]] and config["dtype"] == "bfloat16"
    assert config["head_dim"] == 64 and config["tie_word_embeddings"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 2048
    for path in folder.glob("*.json"):
        assert not re.search(r'"(/|[A-Z]:\\)\w+/', path.read_text()), path


@pytest.mark.parametrize("name", NAMES)
def test_cards_say_what_they_must(name):
    text = card(name)
    record = json.loads((zoo_path(name) / "training.json").read_text())
    for needed in ("Architecture", "Data", "seed", "icence", "minutes on", "tokens a second", "not for"):
        assert needed in text, needed
    assert f"{record['tokens']:,}" in text and record["device"] in text


def test_coder_card_lists_its_data():
    text, folder = card("coder"), zoo_path("coder")
    corpus = json.loads((folder / "training.json").read_text())["corpus"]
    listed = [line.split(maxsplit=2) for line in (folder / "data_files.txt").read_text().splitlines()]
    assert corpus["fingerprint"] in text and f"{corpus['train_bytes']:,}" in text
    assert len(listed) == corpus["train_files"] + corpus["held_out_files"]
    for side, digest, path in listed:
        assert python_source.is_held_out(path) == (side == "held_out") and len(digest) == 16


@pytest.mark.parametrize("name", ("coder", "moe", "moe-1"))
def test_models_of_source_beat_gzip_on_held_out_source(name):
    model, tokenizer = _load(name)
    text = python_source.held_out_text()[-1][:4000]
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.inference_mode():
        nats = model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert nats / 0.6931 / len(text.encode()) < 1.5
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("PASSKEY_QXB = 48213")["input_ids"][-5:]) == 5


def test_coder_recalls_planted_keys():
    model, tokenizer = _load("coder")
    filler = python_source.held_out_text(100_000)
    found = recall.passkeys(filler, 4, (0.1, 0.5), 500, lambda s: len(tokenizer.encode(s)))
    outputs = _continue(model, tokenizer, [e.prompt for _, e in found], 6)
    right = [recall.first_digits(o) == e.answer for o, (_, e) in zip(outputs, found, strict=True)]
    assert sum(right) >= 6


def test_reasoner_solves_held_out_problems():
    model, tokenizer = _load("reasoner")
    examples = reasoning.problems(8, 77)
    assert len(tokenizer(examples[0].prompt)["input_ids"]) == len(examples[0].prompt)
    longest = max(len(e.solution) for e in examples)
    outputs = _continue(model, tokenizer, [e.prompt for e in examples], longest + 1)
    right = [reasoning.final_answer(o) == e.answer for o, e in zip(outputs, examples, strict=True)]
    assert sum(right) >= 6


class _Counting:
    """Batches that draw rows from the step and count what they hear."""

    def __init__(self):
        self.heard = 0

    def rows(self, step):
        draw = torch.Generator().manual_seed(step)
        rows = torch.randint(2, 32, (4, 17), generator=draw).tolist()
        return [(row[:-1], row[1:]) for row in rows]

    def observe(self, exact):
        self.heard += 1

    def state(self):
        return {"heard": self.heard}

    def restore(self, state):
        self.heard = state["heard"]


SMALL = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip


def _dense():
    return Qwen3ForCausalLM(Qwen3Config(**SMALL))


def _experts():
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, **sizes, num_experts=4, num_experts_per_tok=2))


def _confidence(routers):
    return sum(logits.float().softmax(-1).square().mean() for logits in routers)


@pytest.mark.parametrize(("make", "penalty"), ((_dense, None), (_experts, _confidence)))
def test_killed_training_resumes_exactly(trainer, tmp_path, make, penalty):
    plan = trainer.Plan(steps=14, warmup=2, dropout=0.1)

    def run(out: Path, plan):
        torch.manual_seed(0)
        return trainer.Run(make(), _Counting(), plan, out, "cpu", 48, penalty)

    whole = run(tmp_path / "whole", plan)
    whole.train()
    run(tmp_path / "parts", plan).train(until=11)
    assert not list(tmp_path.rglob("*.partial"))
    resumed = run(tmp_path / "parts", plan)
    assert (resumed.step, resumed.batches.heard) == (11, 1)
    resumed.train()
    assert resumed.tokens == whole.tokens == 14 * 4 * 64
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    another = run(tmp_path / "another", replace(plan, seed=1))
    another.train()
    assert not torch.equal(next(another.model.parameters()), next(whole.model.parameters()))


def test_dropout_reaches_what_experts_write(trainer):
    model, ids = _experts(), torch.arange(2, 18)[None]
    mlp = model.model.layers[0].mlp

    def zeros():
        found = []
        with mlp.register_forward_hook(lambda _m, _a, out: found.append((out == 0).float().mean().item())):
            model(ids)
        return found[0]

    assert zeros() == 0
    trainer._dropout_hooks(model, 0.5)
    assert 0.4 < zeros() < 0.6


def test_learning_rate_warms_up_and_ends_at_nothing(trainer):
    plan = trainer.Plan(steps=100, lr=1.0, warmup=10, decay=0.5)
    assert plan.lr_at(0) == pytest.approx(0.1)
    assert plan.lr_at(30) == 1.0
    assert plan.lr_at(75) == pytest.approx(0.5)
    assert plan.lr_at(99) == pytest.approx(0.02)


def test_micro_batches_keep_every_row_and_label(trainer):
    rows = [([7] * n, [trainer.IGNORED] * (n - 1) + [5]) for n in (3, 70, 12, 64, 9)]
    parts = trainer.collate(rows, pad=0, most=128)
    assert sum(len(ids) for ids, _ in parts) == len(rows)
    assert all(ids.shape[1] % 64 == 0 and ids.shape == labels.shape for ids, labels in parts)
    assert sum(int((labels == 5).sum()) for _, labels in parts) == len(rows)
