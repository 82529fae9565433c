"""What must hold on a CUDA device: the same records, the same attention, the same study."""

import pytest
import torch

import strop
from strop.audit import speed
from strop.decode import CaDDTree, DDTree
from strop.kv import KIVI, HadamardRTN, KVarN
from strop.kv.kvarn import varn
from strop.weights import GPTQ, PMQ, RTN, AlphaQ
from strop.weights.linear import PackedLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


@pytest.mark.parametrize("method", [KVarN(), KVarN(bits=2), KIVI(bits=2), HadamardRTN(bits=2)])
def test_records_are_those_of_the_cpu(method):
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 64, 128, 128, generator=generator)
    codec = method.codec()
    here, there = codec.encode(keys, values), codec.encode(keys.cuda(), values.cuda()).cpu()
    for read in (codec._keys, codec._values):
        one, other = read(here, 128), read(there, 128)
        apart = (one.codes - other.codes).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3
        for scales, others in ((one.scale, other.scale), (one.column, other.column)):
            torch.testing.assert_close(scales, others, rtol=1e-3, atol=0)


def test_balancing_is_that_of_the_cpu():
    tile = torch.randn(8, 128, 128, generator=torch.Generator().manual_seed(1))
    for here, there in zip(varn(tile), varn(tile.cuda()), strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", [None, KVarN(), KVarN(bits=2), KIVI(bits=4)])
def test_generation_in_a_padded_batch_is_that_of_the_cpu(method):
    prompts = ["def main():\n" * 60, "import os\n" * 20]
    texts = []
    for device in ("cpu", "cuda"):
        lm = strop.load("zoo:coder", "fp32", device).with_(kv=method)
        texts.append(lm.generate(prompts, max_new_tokens=24))
    assert texts[0] == texts[1]


def test_seeded_sampling_is_that_of_the_cpu():
    texts = [
        strop.load("zoo:coder", "fp32", device).generate(["def main():\n"], 32, seed=3, samples=2)
        for device in ("cpu", "cuda")
    ]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("kv", [None, KVarN()])
@pytest.mark.parametrize("drafter", ["ngram", "zoo:coder-dflash", "zoo:coder-treeflash"])
def test_drafts_change_nothing(drafter, kv, seed, tmp_path, monkeypatch):
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    lm = strop.load("zoo:coder", "fp32", "cuda").with_(kv=kv)
    prompts = ["def main():\n" * 30, "import os\n\nclass Path"]
    plain = lm.generate(prompts, 64, seed=seed)
    for decode in (CaDDTree(drafter=drafter), DDTree(drafter=drafter, budget=24)):
        assert lm.with_(decode=decode).generate(prompts, 64, seed=seed) == plain


WEIGHTS = [
    RTN(bits=8),
    RTN(bits=3, group=128, symmetric=False),
    GPTQ(samples=8, length=128),
    AlphaQ(bits=2.5),
    PMQ(bits=2.5, samples=8, length=128),
]


@pytest.mark.parametrize("method", WEIGHTS, ids=lambda method: type(method).__name__)
def test_packed_weights_are_those_of_the_cpu(method):
    here, there = (strop.load("zoo:moe", "fp32", device).with_(weights=method) for device in ("cpu", "cuda"))
    packed = {
        name: layer.codes for name, layer in here.model.named_modules() if isinstance(layer, PackedLinear)
    }
    others = {
        name: layer.codes for name, layer in there.model.named_modules() if isinstance(layer, PackedLinear)
    }
    assert packed.keys() == others.keys() and len(packed) == 4 * (4 + 3 + 8 * 3)
    same = [(codes == others[name].cpu()).float().mean().item() for name, codes in packed.items()]
    assert min(same) > (0.5 if method.hessians else 0.999)  # a calibrated one rounds what it was fed
    ids = torch.tensor([here.encode("def main():\n    return 1\n" * 8)])
    with torch.no_grad():
        dense = here.model(ids).logits.softmax(-1)
        apart = (dense - there.model(ids.cuda()).logits.softmax(-1).cpu()).abs().sum(-1).mean()
    assert apart < (0.1 if method.hessians else 0.01)
    assert there.generate(["import os\n"], 8)[0]


def test_study_runs(tmp_path, monkeypatch):
    pytest.importorskip("plotly", reason="a study writes its report with plotly")
    from strop.tune import workload
    from strop.tune.engine import Settings, tune

    monkeypatch.setattr(workload, "SCORED_TOKENS", 2000)
    monkeypatch.setattr(speed, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    settings = Settings(device="cuda", methods=("kvarn", "rtn"), context=600)
    study = tune("zoo:coder", None, tmp_path, settings)
    assert all(row["status"] == "measured" for row in study["rows"]), [r["reason"] for r in study["rows"]]
    assert (tmp_path / "report.html").exists()
