"""Caches under draft trees: compaction equals reading the text, masks leak nothing, and what is refused."""

import pytest
import torch
from conftest import CONFIGS
from exact_codec import Exact
from following import are_codes, follow, same_codes
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MistralConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import Cache

from strop.core.compact import keep, most_depth, most_rollback, require_trees, tree_mask
from strop.core.errors import StropError
from strop.decode.tree import DraftTree
from strop.kv import KIVI, KVarN, Quantized, VaSE

SMALL = KVarN(group=16, tail=16, sinks=4, max_rollback=7)
LOSSY = {"kvarn": SMALL, "kivi": KIVI(group=16, tail=16, sinks=4, max_rollback=7)}
PROMPT = 20

every_model = pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
every_attention = pytest.mark.parametrize("attention", ["strop", "sdpa", "eager"])
every_lossy = pytest.mark.parametrize("method", LOSSY.values(), ids=LOSSY)


def draw(generator: torch.Generator, stop: int) -> int:
    return int(torch.randint(stop, (1,), generator=generator))


def random_tree(generator: torch.Generator, nodes: int = 7, deepest: int | None = None) -> DraftTree:
    """A root and `nodes` more, each behind a random one before it."""
    parent, depth = [-1], [0]
    while len(parent) <= nodes:
        above = draw(generator, len(parent))
        if deepest is None or depth[above] < deepest:
            parent.append(above)
            depth.append(depth[above] + 1)
    token = [2 + draw(generator, 59) for _ in parent]
    return DraftTree(token, parent, depth, [0.0] * len(parent))


def score(model: PreTrainedModel, cache: Cache, tree: DraftTree) -> Tensor:
    """Logits `[n + 1, V]` of a tree's nodes behind what the cache holds."""
    seen = cache.get_seq_length()
    mask = tree_mask(tree.ancestor_mask(), seen, model.dtype, model.config._attn_implementation)
    return model(
        torch.tensor([tree.token]),
        attention_mask=mask,
        position_ids=seen + torch.tensor([tree.depth]),
        past_key_values=cache,
    ).logits[0]


def read(model: PreTrainedModel, cache: Cache, tokens: list[int]) -> Tensor:
    """Logits `[n, V]` of plain tokens."""
    return model(torch.tensor([tokens]), past_key_values=cache).logits[0]


def prompt() -> list[int]:
    return torch.randint(2, 61, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()


def rounds(model: PreTrainedModel, cache: Cache, count: int, steady: bool = False):
    """Read a prompt and then random trees, and keep a random path of each.

    Yields the tokens of the path and their logits; `steady` trees are no deeper than `most_depth`.
    """
    generator = torch.Generator().manual_seed(0)
    read(model, cache, prompt())
    for _ in range(count):
        deepest = most_depth(cache) if steady else None
        tree = random_tree(generator, 0 if deepest == 0 else 7, deepest)
        logits = score(model, cache, tree)
        path = tree.path(draw(generator, len(tree)))
        keep(cache, len(tree), path)
        yield [tree.token[node] for node in path], logits[path]


@every_model
@every_attention
@pytest.mark.parametrize("method", [None, Exact(sinks=4, max_rollback=7)], ids=["dense", "tiles"])
@torch.no_grad()
def test_what_is_kept_equals_a_fresh_reading(method, name, attention, tiny):
    model = tiny(name, attention)
    fresh = DynamicCache(config=model.config)
    cache = method.new_cache(model.config) if method else DynamicCache(config=model.config)
    text = prompt() + [token for path, _ in rounds(model, cache, 12) for token in path]
    read(model, fresh, text)
    assert cache.get_seq_length() == len(text) > PROMPT + 12
    for kept, layer in zip(cache.layers, fresh.layers, strict=True):
        both = kept.dense() if method else (kept.keys, kept.values)
        for held, plain in zip(both, (layer.keys, layer.values), strict=True):
            assert (held - plain).abs().max() < 1e-5 * max(1, plain.abs().max())
    nearly(read(model, cache, [5]), read(model, fresh, [5]))


def nearly(logits: Tensor, others: Tensor, within: float = 1e-4) -> None:
    assert (logits - others).abs().max() < within


@every_lossy
def test_only_numbers_on_an_edge_may_be_rounded_otherwise(method):
    codec, generator = method.codec(), torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 3, 2, codec.group, 16, generator=generator)
    records = codec.encode(keys, values)
    assert are_codes(codec, records, keys * (1 + 1e-6), values * (1 - 1e-6))
    for tokens in (keys, values):
        tokens[1, 0, 5] *= 1.01
        assert not are_codes(codec, records, keys, values)
        tokens[1, 0, 5] /= 1.01
    assert are_codes(codec, records, keys, values)
    for byte in range(codec.record_bytes(16)):
        other = records.clone()
        other[2, 1, byte] ^= 16
        assert not are_codes(codec, other, keys, values), "a code by one step, or a scale"


@every_lossy
@every_model
@every_attention
@torch.no_grad()
def test_a_lossy_cache_packs_what_it_packs_after_the_same_passes(method, name, attention, tiny):
    """As a cache that reads each path alone, in one pass, and takes nothing back."""
    model = tiny(name, attention)
    cache, alone = (method.new_cache(model.config) for _ in range(2))
    follow(alone, cache)
    read(model, alone, prompt())
    for path, logits in rounds(model, cache, 30):
        nearly(logits, read(model, alone, path))
        keep(alone, len(path), range(len(path)))
    assert same_codes(cache, alone)


@every_lossy
@every_model
@every_attention
@torch.no_grad()
def test_steady_trees_over_a_lossy_cache_read_like_plain_decoding(method, name, attention, tiny):
    """And deeper ones pack as many tiles in the same places, of tokens that were read otherwise."""
    model = tiny(name, attention)
    cache, plain, deep, beside = (method.new_cache(model.config) for _ in range(4))
    follow(plain, cache)
    read(model, plain, prompt())
    deeper = 0
    for path, logits in rounds(model, cache, 40, steady=True):
        nearly(logits, torch.cat([read(model, plain, [token]) for token in path]))
        deeper += len(path) - 1
    assert deeper > 20 and same_codes(cache, plain)
    follow(beside, deep)
    read(model, beside, prompt())
    for path, _ in rounds(model, deep, 40):
        for token in path:
            read(model, beside, [token])
    assert not same_codes(deep, beside)


@torch.no_grad()
def test_kernels_read_trees_as_torch_does(tiny):
    model = tiny("qwen3")
    caches = [SMALL.new_cache(model.config) for _ in range(2)]
    for cache in caches:
        read(model, cache, prompt() * 4)
        read(model, cache, [3])
    for one, other in zip(*(cache.attending for cache in caches), strict=True):
        one._attend_packed = other._attend_tree = other.fused = None
    tree = random_tree(torch.Generator().manual_seed(3))
    nearly(*(score(model, cache, tree) for cache in caches))


@every_model
@every_attention
@pytest.mark.parametrize("method", [None, SMALL], ids=["dense", "kvarn"])
@torch.no_grad()
def test_a_node_shows_only_to_its_descendants(method, name, attention, tiny):
    model = tiny(name, attention)
    tree = random_tree(torch.Generator().manual_seed(5))
    sees = tree.ancestor_mask()

    def logits(token: list[int]) -> Tensor:
        cache = method.new_cache(model.config) if method else DynamicCache(config=model.config)
        read(model, cache, prompt() * 3)
        read(model, cache, [3])
        return score(model, cache, DraftTree(token, tree.parent, tree.depth, tree.logq))

    before = logits(tree.token)
    for node in range(len(tree)):
        token = [*tree.token]
        token[node] = 2 + (token[node] + 7) % 59
        moved = (logits(token) - before).abs().amax(-1)
        assert (moved[sees[:, node]] > 1e-3).all()
        assert (moved[~sees[:, node]] < 1e-5).all()


def test_how_much_a_cache_takes_back():
    config = CONFIGS["qwen3"]
    assert most_rollback(DynamicCache()) is most_rollback(DynamicCache(config=config)) is None
    assert most_rollback(SMALL.new_cache(config)) == 7
    assert most_depth(DynamicCache(config=config)) is None
    assert most_depth(SMALL.new_cache(config)) == 0


def holding(cache: Cache) -> list[Tensor]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]


REFUSED = {
    "evicts": lambda config: VaSE(budget=64, buffer=16).new_cache(config),
    "round drafts": lambda config: Quantized(group=16).new_cache(config),
    "StaticLayer": lambda config: StaticCache(config=config, max_cache_len=64),
}


@pytest.mark.parametrize("reason", REFUSED)
@torch.no_grad()
def test_caches_that_cannot_serve_trees_say_so(reason, tiny):
    model = tiny("qwen3")
    cache = REFUSED[reason](model.config)
    with pytest.raises(StropError, match=reason):
        require_trees(cache)
    if reason == "StaticLayer":
        return
    read(model, cache, prompt())
    for call in (lambda: keep(cache, 3, [0]), lambda: most_rollback(cache)):
        with pytest.raises(StropError, match=rf"{reason}.*decode without drafts$"):
            call()
    assert cache.get_seq_length() == PROMPT


@torch.no_grad()
def test_a_window_is_refused():
    config = MistralConfig(**{**CONFIGS["mistral"].to_dict(), "sliding_window": 12})
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = DynamicCache(config=config)
    read(model, cache, prompt())
    held = [x.clone() for x in holding(cache)]
    with pytest.raises(StropError, match=r"window.*decode without drafts$"):
        keep(cache, 3, [0, 2])
    assert all(map(torch.equal, holding(cache), held))
    with pytest.raises(StropError, match="window"):
        require_trees(DynamicCache(config=CONFIGS["gemma2"]))


@torch.no_grad()
def test_a_tree_beyond_max_rollback_is_refused(tiny):
    model = tiny("qwen3")
    cache = SMALL.new_cache(model.config)
    read(model, cache, prompt())
    tree = random_tree(torch.Generator().manual_seed(0), nodes=8)
    score(model, cache, tree)
    before = [layer.state() for layer in cache.attending]
    with pytest.raises(StropError, match=r"take back 8 tokens.*max_rollback \(7\), or draft fewer$"):
        keep(cache, 9, [0])
    for layer, state in zip(cache.attending, before, strict=True):
        assert all(torch.equal(layer.state()[name], x) for name, x in state.items())
    score(model, cache, random_tree(torch.Generator().manual_seed(0)))
    keep(cache, 8, [0])
    with pytest.raises(StropError, match="held back 0"):
        keep(cache, 2, [0])


@pytest.mark.parametrize("kept", [[], [1], [0, 2, 1], [0, 0], [0, 3]])
@pytest.mark.parametrize("method", [None, SMALL], ids=["dense", "kvarn"])
@torch.no_grad()
def test_only_paths_are_kept(kept, method, tiny):
    model = tiny("qwen3")
    cache = method.new_cache(model.config) if method else DynamicCache(config=model.config)
    read(model, cache, prompt())
    with pytest.raises(ValueError, match="path among 3 tokens"):
        keep(cache, 3, kept)
    with pytest.raises(ValueError, match="path among 21 tokens"):
        keep(cache, 21, [0])
    assert cache.get_seq_length() == PROMPT


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("method", [None, SMALL], ids=["dense", "kvarn"])
def test_modes_of_autograd_mix(first, method, tiny):
    model = tiny("qwen3")
    cache = method.new_cache(model.config) if method else DynamicCache(config=model.config)
    with first():
        read(model, cache, prompt())
        score(model, cache, random_tree(torch.Generator().manual_seed(0)))
    with torch.no_grad():
        keep(cache, 8, [0, 2, 5])
        assert read(model, cache, [3]).isfinite().all()


def test_attention_without_masks_is_refused():
    ancestors = torch.eye(2, dtype=torch.bool)
    with pytest.raises(StropError, match=r"^flash_attention_2 .*attn_implementation='sdpa'"):
        tree_mask(ancestors, 3, torch.float32, "flash_attention_2")
