"""Each measure against what it should be by hand: losses, intervals, times, bytes."""

import math

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from strop.audit import speed as speeds
from strop.audit.memory import fill_cache
from strop.audit.quality import (
    agreement,
    common_prefix,
    exact_match_floor,
    exact_match_loss,
    pseudo_decode,
    text_quality,
    token_losses,
)
from strop.audit.speed import Stamps, generation_times
from strop.core.intervals import bootstrap
from strop.kv import KVarN

TEXT = torch.randint(2, 61, (1, 200), generator=torch.Generator().manual_seed(7))


class Reader:
    """A tiny model as the audit wants it, with a cache of some method."""

    device = torch.device("cpu")

    def __init__(self, model, method=None) -> None:
        self.model, self.method = model, method

    def new_cache(self):
        config = self.model.config
        return self.method.new_cache(config) if self.method else DynamicCache(config=config)


def nats(logits: torch.Tensor, ids: torch.Tensor) -> np.ndarray:
    log_p = logits[0, :-1].float().log_softmax(-1)
    return -log_p.gather(1, ids[0, 1:, None])[:, 0].numpy()


@torch.no_grad()
def test_losses_are_those_of_one_forward_pass(tiny):
    base, other = Reader(tiny("qwen3")), Reader(tiny("llama"))
    found = token_losses(base, other, TEXT[0].tolist(), block=48)
    logits = [reader.model(TEXT).logits for reader in (base, other)]
    np.testing.assert_allclose(found.base, nats(logits[0], TEXT), atol=1e-4)
    np.testing.assert_allclose(found.other, nats(logits[1], TEXT), atol=1e-4)
    p, q = (x[0, :-1].float().log_softmax(-1) for x in logits)
    np.testing.assert_allclose(found.kl, (p.exp() * (p - q)).sum(-1).numpy(), atol=1e-4)


@torch.no_grad()
def test_quality_of_a_model_beside_itself_is_undamaged(tiny):
    one, texts = Reader(tiny("qwen3")), [TEXT[0].tolist(), TEXT[0, :90].tolist()]
    found = text_quality(one, one, texts)
    assert found.ppl == found.ppl_base and found.tokens == 199 + 89
    assert found.ppl_rise == found.ppl_rise_hi == found.kl == found.kl_hi == 0
    losses = np.concatenate([token_losses(one, one, ids).base for ids in texts])
    assert found.ppl == pytest.approx(math.exp(losses.mean()))


@pytest.mark.parametrize(("sinks", "tail", "length"), [(4, 16, 160), (0, 32, 192)])
@torch.no_grad()
def test_blocks_leave_in_the_cache_what_single_tokens_would(sinks, tail, length, tiny):
    model, method = tiny("qwen3"), KVarN(group=16, sinks=sinks, tail=tail)
    caches = [method.new_cache(model.config) for _ in range(2)]
    for cache, block in zip(caches, (64, 1), strict=True):
        list(pseudo_decode(model, TEXT[:, :length], cache, block))
    stores = [[layer.store for layer in cache.attending] for cache in caches]
    for one, other in zip(*stores, strict=True):
        assert len(one.records) == len(other.records) == method.tiles(length) > 0
    assert caches[0].bytes() == caches[1].bytes()


def test_a_bootstrap_covers_the_mean_and_one_unit_bounds_nothing():
    draw = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        _, low, high = bootstrap(draw.normal(3, 1, 40), lambda sample: sample.mean(1), seed)
        hits += low <= 3 <= high
    assert 86 <= hits <= 99
    assert bootstrap(np.array([2.0]), lambda sample: sample.mean(1)) == (2, -math.inf, math.inf)


@pytest.mark.parametrize("count", [3, 24, 400])
def test_exact_match_is_never_surer_than_its_problems_allow(count):
    kept = exact_match_loss([True] * count, [True] * count)
    assert kept == (0, 0, exact_match_floor(count))
    miss = (1 - kept[2]) ** count
    assert miss == pytest.approx(0.025), "so small a loss goes unseen in one of forty tries"


def test_exact_match_loss_is_relative_to_what_the_baseline_solves():
    loss, low, high = exact_match_loss([True] * 50 + [False] * 50, [True] * 40 + [False] * 60)
    assert loss == pytest.approx(0.2) and low < 0.2 < high
    gained, _, _ = exact_match_loss([True] * 50 + [False] * 50, [True] * 75 + [False] * 25)
    assert gained == pytest.approx(-0.5)
    assert exact_match_loss([False] * 4, [True, False, False, False]) is None


def test_agreement_counts_up_to_the_first_departure():
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2 and common_prefix([1], [1, 2]) == 1
    assert agreement([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("arrivals", "first", "later"),
    [
        ([(1, 1.0), (1, 1.5), (1, 2.0), (1, 2.5)], 1.0, 0.5),
        ([(3, 1.0), (1, 1.5)], 1.0, 0.5),
        ([(4, 2.0)], 2.0, 0.5),
    ],
)
def test_time_per_token_counts_what_came_after_the_first(arrivals, first, later, monkeypatch):
    clock = iter([0.0, *(time for _, time in arrivals)])
    monkeypatch.setattr(speeds.time, "perf_counter", lambda: next(clock))

    class Speaker:
        device = torch.device("cpu")

        def generate_ids(self, rows, max_new_tokens, streamer, **options):
            streamer.put(torch.tensor(rows))
            for count, _ in arrivals:
                streamer.put(torch.zeros(count))

    assert generation_times(Speaker(), [[1, 2]], 3) == (first, later)


def test_speed_is_a_ratio_within_rounds_and_drift_cancels(monkeypatch):
    drift = iter(np.repeat(np.linspace(1, 3, 6), 2))
    fast, slow = Reader(None), Reader(None)
    monkeypatch.setattr(speeds, "generation_times", lambda *args: None)
    monkeypatch.setattr(speeds, "LEAST_ROUNDS", 6)
    monkeypatch.setattr(speeds, "SECONDS", 0.0)
    order = []

    def timings(lm, rows, steps, kv):
        order.append(lm)
        factor = next(drift) * (1 if lm is fast else 2)
        return 4 * factor, 1 * factor, 0.5 * factor

    monkeypatch.setattr(speeds, "timings", timings)
    found = speeds.speed(slow, fast, [[[1]]])
    assert order[:4] == [slow, fast, fast, slow]
    assert found.ttft_ratio == found.step_ratio == (0.5, 0.5, 0.5)
    assert found.step_s == pytest.approx(2)


def test_stamps_count_tokens():
    stamps = Stamps(torch.device("cpu"))
    for count in (5, 1, 3):
        stamps.put(torch.zeros(count))
    assert stamps.tokens == [5, 1, 3] and stamps.times == sorted(stamps.times)


@torch.no_grad()
def test_memory_of_a_filled_cache_is_counted_over_its_tensors(tiny):
    reader = Reader(tiny("qwen3"))
    found = fill_cache(reader, [[3] * 50, [4] * 50])
    assert found.kv_bytes_measured == 2 * 2 * 2 * 2 * 16 * 50 * 4  # K and V, layers, rows, heads, D, T, fp32
    assert found.peak_rss_bytes > 1 << 20
