"""A saved cache goes on exactly where it was, and nothing else is taken for one."""

import dataclasses

import pytest
import torch
from conftest import CONFIGS
from exact_codec import Exact
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from strop.core.cache import KVCache
from strop.core.errors import StropError
from strop.kv import KIVI, KVarN, load_cache, save_cache

METHOD = KVarN(bits=2, group=16, tail=16, sinks=4)


def read(model, method, lengths=(90,)) -> tuple[KVCache, torch.Tensor]:
    """A cache that has read a left-padded batch, and the batch's mask."""
    width = max(lengths)
    ids = torch.randint(2, 61, (len(lengths), width), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    cache = method.new_cache(model.config)
    model(ids * mask, attention_mask=mask, past_key_values=cache)
    return cache, mask


def go_on(model, cache, mask: torch.Tensor) -> torch.Tensor:
    """Logits of twenty more tokens."""
    logits = []
    for token in range(20):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        ids = torch.full((len(mask), 1), token + 2)
        logits.append(model(ids, attention_mask=mask, past_key_values=cache).logits)
    return torch.stack(logits)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "method", [METHOD, KIVI(group=16, tail=16, sinks=0, aux_dtype="fp8"), Exact(sinks=4)]
)
@pytest.mark.parametrize("lengths", [(90, 31, 2), (9,)])
@pytest.mark.parametrize("attention", ["strop", "eager"])
@torch.no_grad()
def test_goes_on_where_it_was(name, method, lengths, attention, tiny, tmp_path):
    model = tiny(name, attention)
    cache, mask = read(model, method, lengths)
    save_cache(cache, tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache", method, model.config)
    assert loaded.get_seq_length() == cache.get_seq_length()
    assert loaded.bytes() <= cache.bytes()
    assert torch.equal(go_on(model, loaded, mask), go_on(model, cache, mask))


@torch.no_grad()
def test_one_prompt_is_continued_many_times(tiny, tmp_path):
    model = tiny("qwen3")
    cache, _ = read(model, KVarN(), (700,))
    assert len(cache.attending[0].store.records) == 3
    save_cache(cache, tmp_path / "prompt")
    options = {"max_new_tokens": 20, "do_sample": False}
    texts = []
    for question in ([5, 6, 7], [8], [5, 6, 7]):
        ids = torch.cat([torch.zeros(1, 700, dtype=torch.long), torch.tensor([question])], 1)
        loaded = load_cache(tmp_path / "prompt", KVarN(), model.config)
        texts.append(model.generate(ids, past_key_values=loaded, **options)[0, 700:].tolist())
    assert texts[0] == texts[2] != texts[1]
    ids = torch.tensor([[0] * 700 + [5, 6, 7]])
    assert model.generate(ids, past_key_values=cache, **options)[0, 700:].tolist() == texts[0]


@torch.no_grad()
def test_keeps_what_may_be_taken_back(tiny, tmp_path):
    model = tiny("qwen3")
    cache, mask = read(model, METHOD)
    save_cache(cache, tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache", METHOD, model.config)
    for one in (cache, loaded):
        one.crop(-METHOD.max_rollback)
    mask = mask[:, : -METHOD.max_rollback]
    assert torch.equal(go_on(model, loaded, mask), go_on(model, cache, mask))


@torch.no_grad()
def test_a_window_that_was_recording_is_saved_as_a_window(tiny, tmp_path):
    model = tiny("gemma2")
    plain, mask = read(model, METHOD)
    recording = METHOD.new_cache(model.config)
    recording.activate_past_recording()
    ids = torch.randint(2, 61, (1, 90), generator=torch.Generator().manual_seed(4))
    model(ids, past_key_values=recording)
    save_cache(recording, tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache", METHOD, model.config)
    assert torch.equal(go_on(model, loaded, mask), go_on(model, plain, mask))


@pytest.fixture
def saved(tiny, tmp_path):
    model = tiny("qwen3")
    with torch.no_grad():
        save_cache(read(model, METHOD)[0], tmp_path / "cache")
    return tmp_path / "cache"


def refused(saved, match: str, method=METHOD, config=CONFIGS["qwen3"]) -> None:
    with pytest.raises(StropError, match=match) as caught:
        load_cache(saved, method, config)
    assert "\n" not in str(caught.value)


def test_loads_for_the_same_method_and_model_only(saved):
    for other in (KIVI(bits=2, group=16, tail=16, sinks=4), dataclasses.replace(METHOD, n_iter=4)):
        refused(saved, "method", method=other)
    for name in ("qwen2", "gpt2", "gemma2"):
        refused(saved, "model", config=CONFIGS[name])


def test_refuses_what_is_not_a_whole_cache(saved, tmp_path):
    content = saved.read_bytes()
    for size in (0, 7, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:size])
        refused(saved, "cannot read")
    saved.unlink()
    refused(saved, "cannot read")
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign")
    refused(tmp_path / "foreign", "is not a")


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop("0.first"),
        lambda t: t.update({"0.table": t["0.table"][:, :-1]}),
        lambda t: t.update({"0.keys": t["0.keys"][:, :, 1:]}),
        lambda t: t.update({"1.records": t["1.records"][..., 8:]}),
        lambda t: t.update({"1.records": t["1.records"].float()}),
        lambda t: t["0.table"].fill_(99),
        lambda t: t["0.table"].fill_(-7),
        lambda t: t.update({"0.table": t["0.table"].repeat(1, 2)}),
        lambda t: t["0.first"].add_(1000),
        lambda t: t["0.first"].sub_(3),
        lambda t: t["1.revocable"].fill_(10**6),
        lambda t: t.update({"0.first": t["0.first"][None]}),
        lambda t: t.update({f"0.{n}": t[f"0.{n}"].expand(2, -1, -1, -1) for n in ("keys", "values")}),
    ],
    ids=["missing", "orphaned records", "lost tokens", "short records", "floats", "unknown tiles", "negative",
         "twice", "late start", "early start", "revocable", "shape", "batch"],
)  # fmt: skip
def test_refuses_damage(saved, damage):
    tensors = load_file(saved)
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    damage(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, saved, metadata)
    refused(saved, "damaged")


@torch.no_grad()
def test_saving_refuses_or_leaves_the_old_file(tiny, tmp_path, monkeypatch, saved):
    model = tiny("qwen3")
    with pytest.raises(StropError, match="empty"):
        save_cache(METHOD.new_cache(model.config), tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
    cache, _ = read(model, METHOD)
    before = saved.read_bytes()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("strop.kv.saved.save_file", full_disk)
    with pytest.raises(StropError, match="No space left"):
        save_cache(cache, saved)
    assert saved.read_bytes() == before and list(tmp_path.iterdir()) == [saved]


@torch.no_grad()
def test_a_model_of_another_dtype_is_refused(tiny, saved):
    model = tiny("qwen3", "strop", torch.bfloat16)
    cache = load_cache(saved, METHOD, model.config)
    with pytest.raises(StropError, match="bfloat16"):
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
