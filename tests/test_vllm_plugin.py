"""Eviction order and hole skipping in vLLM. What needs vLLM is skipped where it is not installed.

vLLM lives in an environment of its own: see test_vllm.py.
"""

import json
import random
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from test_vllm import ROOT, SHAPE, interpreter, lines
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from strop.core.errors import StropError
from strop.core.evict import LRU
from strop.serve.vllm_plugin.queue import EvictorQueue
from strop.serve.vllm_plugin.settings import Settings

BLOCK = 32
PLUGIN = "strop.serve.vllm_plugin.scheduler"
SCATTER = """
import random, sys
from strop.core.evict import LRU, ONLINE

class Scattered(LRU):
    "Any block may go, so that sequences have many holes."
    def __init__(self):
        super().__init__()
        self.draw = random.Random(0)
    def victim(self, now):
        block = self.draw.choice(list(self.blocks))
        del self.blocks[block]
        return block

ONLINE["scattered"] = lambda around: Scattered()
sys.path.insert(0, sys.argv.pop(1))
import serve_sessions
serve_sessions.main(*sys.argv[1:])
"""
needs_vllm = [
    pytest.mark.slow,
    pytest.mark.skipif(interpreter() is None, reason="vLLM is not installed: see STROP_VLLM_PYTHON"),
]


@dataclass
class FakeBlock:
    block_id: int
    block_hash: bytes | None = None
    block_hash_num_tokens: int = 0

    def hold(self, name):
        self.block_hash, self.block_hash_num_tokens = name.to_bytes(36, "little"), BLOCK * (name % 50 + 1)


class Recorder(LRU):
    """LRU that remembers which places in their sequences it was told of."""

    def __init__(self):
        super().__init__()
        self.places = []

    def on_ref_zero(self, block, index, now):
        super().on_ref_zero(block, index, now)
        self.places.append(index)


def test_lru_takes_blocks_in_vllms_order():
    """A list with blank blocks put at its head and cached ones at its end is vLLM's queue."""
    draw, names = random.Random(0), iter(range(1, 10_000))
    blocks = [FakeBlock(i) for i in range(40)]
    queue, order, used = EvictorQueue(blocks, LRU(), BLOCK), list(blocks), []
    for _ in range(2000):
        act = draw.random()
        if act < 0.4 and order:
            taken = [order.pop(0) for _ in range(draw.randint(1, len(order)))]
            assert [b.block_id for b in queue.popleft_n(len(taken))] == [b.block_id for b in taken]
            for block in taken:
                block.block_hash = None
            used += taken
        elif act < 0.6 and (held := [block for block in order if block.block_hash]):
            block = draw.choice(held)
            queue.remove(block)
            order.remove(block)
            used.append(block)
        elif used:
            freed = [used.pop(draw.randrange(len(used))) for _ in range(draw.randint(1, len(used)))]
            for block in freed:
                if block.block_hash is None and draw.random() < 0.7:
                    block.hold(next(names))
            blank = [block for block in freed if block.block_hash is None]
            cached = [block for block in freed if block.block_hash]
            queue.prepend_n(blank)
            queue.append_n(cached)
            order = blank + order + cached
        assert queue.num_free_blocks == len(order)


def test_a_second_copy_leaves_first_and_either_may_be_used_again():
    one, other, third = blocks = [FakeBlock(i) for i in range(3)]
    queue = EvictorQueue(blocks, LRU(), BLOCK)
    assert queue.popleft_n(3) == blocks
    for block, name in zip(blocks, (7, 7, 8), strict=True):
        block.hold(name)
    queue.append_n([one, other, third])
    queue.remove(other)
    queue.append_n([other])
    assert queue.popleft_n(3) == [other, one, third]


def test_the_evictor_hears_of_places_in_the_sequence():
    blocks = [FakeBlock(i) for i in range(3)]
    queue = EvictorQueue(blocks, evictor := Recorder(), BLOCK)
    queue.popleft_n(3)
    for block, name in zip(blocks, (0, 4, 9), strict=True):
        block.hold(name)
    queue.append_n(blocks[::-1])
    assert evictor.places == [9, 4, 0]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"evictor": "belady"}, "must be one of asymcache, ghost, lru"),
        ({"holes": 1}, "strop.holes must be bool"),
        ({"lifespan": 0}, "L must be above 0"),
        ({"context": 0}, "at least 1"),
        ({"evict": "lru"}, "did you mean"),
        ([], "pairs"),
    ],
)
def test_settings_refuse(told, said):
    with pytest.raises(StropError, match=said):
        Settings.of({"strop": told}).make(10, BLOCK)


def test_settings_have_defaults_and_cost_grows_with_place():
    assert Settings.of({}) == Settings.of({"other": 1}) == Settings()
    cost = Settings(evictor="asymcache", context=1000).make(10, BLOCK).cost
    assert cost(1000 // BLOCK) == pytest.approx(2 * cost(0), rel=0.05)


def test_settings_and_queue_import_neither_torch_nor_vllm():
    code = (
        "import sys, strop.serve.vllm_plugin.queue, strop.serve.vllm_plugin.settings;"
        "sys.exit(bool({'torch', 'vllm'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def scheduled(evictor, holes=True, kind="StropScheduler", **added):
    told = {"evictor": evictor, "holes": holes, "context": 600}
    return {"scheduler_cls": f"{PLUGIN}.{kind}", "additional_config": {"strop": told}, **added}


@pytest.fixture
def sessions(tmp_path, monkeypatch):
    """What `serve_sessions.py` says of each run, by its name."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | {"max_position_embeddings": 2048})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def said(work, runs):
        (tmp_path / "work.json").write_text(json.dumps(work | {"runs": runs}))
        found = lines(interpreter(), "-c", SCATTER, ROOT / "docs", tmp_path / "work.json", tmp_path)
        return {line["run"]: line for line in found}

    return said


class TestInVllm:
    pytestmark = needs_vllm

    def test_same_text_from_fewer_computed_tokens(self, sessions):
        work = {"blocks": 90, "sessions": 6, "turns": 3, "shared": 128, "document": 500}
        work |= {"question": 48, "answer": 12, "together": 2, "chunk": 130}
        runs = {
            "stock": {},
            "lru": scheduled("lru"),
            "asymcache, no holes": scheduled("asymcache", holes=False),
            "asymcache": scheduled("asymcache"),
            "scattered": scheduled("scattered"),
            "scattered, async": scheduled("scattered", kind="AsyncStropScheduler"),
        }
        said = sessions(work, runs)
        assert said.keys() == runs.keys()
        for one in said.values():
            assert one["tokens"] == said["stock"]["tokens"]
            assert one["computed"] + one["cached"] == one["prompt"] == said["stock"]["prompt"]
            assert not one["held"] and not one["preempted"]
        assert said["lru"]["computed"] == said["stock"]["computed"]
        assert said["asymcache"]["computed"] < 0.8 * said["stock"]["computed"]
        assert said["asymcache"]["computed"] < 0.8 * said["asymcache, no holes"]["computed"]
        assert said["scattered"]["computed"] < said["stock"]["computed"]
        assert said["scattered, async"]["computed"] == said["scattered"]["computed"]

    def test_preempted_requests_write_the_same_and_drafts_are_refused(self, sessions):
        work = {"blocks": 60, "sessions": 4, "turns": 2, "shared": 70, "document": 400}
        work |= {"question": 45, "answer": 40, "together": 4, "chunk": 100}
        runs = {
            "stock": {},
            "scattered": scheduled("scattered", scheduler_reserve_full_isl=False),
            "drafts": scheduled(
                "lru",
                speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2},
            ),
        }
        said = sessions(work, runs)
        assert said["scattered"]["tokens"] == said["stock"]["tokens"]
        assert said["scattered"]["preempted"] and not said["scattered"]["held"]
        assert "speculative config" in said["drafts"]["refused"]
