"""Tiled storage is exact: with a codec that keeps every bit, generation is that of a dense cache."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from exact_codec import Exact
from transformers import DynamicCache

PADDED = (40, 17, 3)


@dataclass(frozen=True)
class Case:
    """Prompts of these lengths, padded on the left, go through a method."""

    lengths: tuple[int, ...]
    method: Exact = field(default_factory=lambda: Exact(sinks=4))
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "shorter than a group": Case((5,)),
    "longer than a group": Case((40,)),
    "batch": Case((40, 40, 40)),
    "padded": Case(PADDED),
    "padded, no sinks": Case(PADDED, Exact(sinks=0)),
    "padded, sinks hold all": Case(PADDED, Exact(sinks=128)),
    "padded, long tail": Case(PADDED, Exact(sinks=4, tail=19)),
    "padded, no rollback": Case(PADDED, Exact(sinks=4, max_rollback=0)),
    "wide groups": Case((70, 41), Exact(sinks=4, group=24, tail=24)),
    "beams": Case((30, 9), options={"num_beams": 3}),
    "prompt lookup": Case((30,), options={"prompt_lookup_num_tokens": 4}),
}

every_model = pytest.mark.parametrize("name", CONFIGS)


def prompts(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `[B, longest]`; the second half of a row repeats the first, for prompt lookup to find."""
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width)
    generator = torch.Generator().manual_seed(1)
    for row, length in enumerate(lengths):
        half = torch.randint(2, 61, (length - length // 2,), generator=generator)
        ids[row, width - length :] = torch.cat([half, half])[:length]
        mask[row, width - length :] = 1
    return ids, mask.long()


def stock(tiny, name: str):
    """The model under transformers' own attention; only eager knows Gemma 2's soft cap."""
    return tiny(name, "eager" if name == "gemma2" else "sdpa")


@every_model
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.no_grad()
def test_generates_what_the_dense_cache_does(name, case, tiny):
    ids, mask = prompts(case.lengths)
    wanted = {
        "max_new_tokens": 14,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    beams = {"num_beams": case.options.get("num_beams", 1)}
    dense = stock(tiny, name).generate(ids, attention_mask=mask, **beams, **wanted)
    model = tiny(name)
    cache = case.method.new_cache(model.config)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **case.options, **wanted)
    assert torch.equal(out.sequences, dense.sequences)
    if "prompt_lookup_num_tokens" not in case.options:
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(dense.logits), rtol=0, atol=1e-4)
    cache.check()
    packed = [len(layer.store.records) for layer in cache.attending]
    assert all(packed) == (max(case.lengths) + 13 - case.method.sinks >= case.method.tail)


@every_model
@pytest.mark.parametrize("chunk", [7, 16])
@pytest.mark.parametrize("sinks", [0, 4])
@torch.no_grad()
def test_reads_a_prompt_in_chunks(name, chunk, sinks, tiny):
    ids, mask = prompts(PADDED)
    model, dense = tiny(name), stock(tiny, name)
    caches = Exact(sinks=sinks, max_rollback=2).new_cache(model.config), DynamicCache(config=dense.config)
    for start in range(0, ids.shape[1], chunk):
        part, upto = slice(start, start + chunk), mask[:, : start + chunk]
        out, expected = (
            m(ids[:, part], attention_mask=upto, past_key_values=cache).logits
            for m, cache in zip((model, dense), caches, strict=True)
        )
        real = mask[:, part].bool()
        torch.testing.assert_close(out[real], expected[real], rtol=0, atol=1e-4)
        caches[0].check()
    assert len(caches[0].attending[0].store.records)


@every_model
@torch.no_grad()
def test_takes_back_and_rearranges_as_the_dense_cache(name, tiny):
    ids, mask = prompts((30, 21, 5))
    model, dense = tiny(name), stock(tiny, name)
    caches = Exact(sinks=4).new_cache(model.config), DynamicCache(config=dense.config)
    for cache in caches:
        cache.activate_past_recording()

    def step(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out, expected = (
            m(tokens, attention_mask=mask, past_key_values=cache).logits[:, -1]
            for m, cache in zip((model, dense), caches, strict=True)
        )
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
        caches[0].check()
        return torch.cat([mask, mask.new_ones(len(mask), len(tokens[0]))], 1)

    def both(operation: str, argument) -> None:
        for cache in caches:
            getattr(cache, operation)(argument)
        caches[0].check()

    mask = step(ids, mask)
    both("crop", 0)
    step(ids[:, :30], mask)
    both("crop", -20)
    mask = torch.cat([mask[:, :40], mask.new_ones(3, 6)], 1)
    step(ids[:, :6], mask)
    both("crop", 0)
    both("batch_select_indices", torch.tensor([2, 0]))
    both("batch_repeat_interleave", 2)
    both("reorder_cache", torch.tensor([3, 0, 0, 1]))
    rows = torch.tensor([2, 2, 0, 0])[[3, 0, 0, 1]]
    mask = torch.cat([mask[rows], mask.new_ones(4, 1)], 1)
    for _ in range(12):
        mask = step(ids[rows, :1], mask)
        both("crop", 0)
