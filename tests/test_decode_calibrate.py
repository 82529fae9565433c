"""The cost of rounds is measured where it can be, at the contexts it names, and never in a model's way."""

import pytest
import torch
from drafting import drafter, target
from transformers.cache_utils import DynamicCache

from strop.core.errors import StropError
from strop.decode import calibrate, load_drafter, speculative
from strop.decode.calibrate import _Rig, cost_model
from strop.decode.cost import BUCKET
from strop.kv import KVarN, attach

OPTIONS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def brief(monkeypatch, tmp_path):
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    monkeypatch.setattr("strop.decode.cost.SECONDS", 0.0)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@pytest.mark.parametrize("kind", ["ngram", "dflash"])
def test_a_short_context_is_enough(name, kind):
    model = target(name)
    rig = _Rig(model, drafter(kind, model), DynamicCache(config=model.config))
    limit = model.config.max_position_embeddings
    assert rig.contexts[-1] + rig.drift + rig.sizes[-1] <= limit and rig.sizes[-1] > 1
    ids = torch.arange(1, 9)[None]
    spec = speculative(drafter(kind, model))
    assert torch.equal(model.generate(ids, custom_generate=spec, **OPTIONS), model.generate(ids, **OPTIONS))


def test_passes_are_timed_near_the_context_they_name():
    model = target()
    rig = _Rig(model, drafter("ngram", model), DynamicCache(config=model.config))
    context, seen = rig.contexts[0], []
    for _ in range(3 * BUCKET):
        rig.verify(2, context)
        seen.append(rig.target.seen)
    assert min(seen) > context and max(seen) <= context + rig.drift + 1 and len(set(seen)) > 1


def test_the_target_is_timed_once_for_all_drafters(monkeypatch):
    model, timed = target(), []
    monkeypatch.setattr(
        calibrate, "profile", lambda *given: timed.append(1) or {1: {1: 1.0, 2: 1.5}, 9: {1: 1.0, 2: 1.5}}
    )
    for kind in ("ngram", "dflash", "treeflash", "ngram"):
        cost = cost_model(model, drafter(kind, model), DynamicCache(config=model.config))
        assert cost.verify(2, 1) - cost.node_s == pytest.approx(1.5)
    assert len(timed) == 1


def test_a_cache_folder_that_cannot_be_written_stops_nobody(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "file"))
    model = target()
    spec = speculative(load_drafter("ngram", model))
    assert model.generate(torch.arange(1, 9)[None], custom_generate=spec, **OPTIONS).shape == (1, 20)


@pytest.mark.parametrize("rollback", [0, 1, 2, 7])
def test_caches_that_take_little_back(rollback):
    model = attach(target("llama", 2))
    kv = KVarN(group=8, tail=8, sinks=4, max_rollback=rollback)
    ids = torch.arange(1, 30)[None]
    spec = speculative(drafter("dflash", model))

    def written(**more):
        return model.generate(ids, past_key_values=kv.new_cache(model.config), **OPTIONS, **more)

    if rollback == 0:
        with pytest.raises(StropError, match="takes no tokens back"):
            written(custom_generate=spec)
    else:
        assert torch.equal(written(custom_generate=spec), written())
        assert max(spec.stats.nodes) <= rollback
