"""The evicting methods that the tests run, small; a later method joins by one row."""

import pytest
import torch
from exact_codec import Exact

from strop.core.cache import tensor_bytes
from strop.kv import (
    KIVI,
    RKV,
    CurDKV,
    EvictLarge,
    KVarN,
    RandomEviction,
    SnapKV,
    StreamingLLM,
    VaSE,
    VaSEDKV,
)
from strop.kv.evicting import Candidates
from strop.kv.slot_store import SlotStore

KINDS = (VaSE, VaSEDKV, SnapKV, RKV, CurDKV, StreamingLLM, RandomEviction, EvictLarge)
SMALL = {kind.__name__: kind(budget=32, buffer=8) for kind in KINDS}
SMALL |= {
    f"VaSE {sampler}": VaSE(budget=32, buffer=8, sampler=sampler) for sampler in ("multinomial", "none")
}

STORED = {
    "VaSE in kvarn": VaSE(budget=32, buffer=8, store=KVarN(bits=8, group=16)),
    "SnapKV in kivi": SnapKV(budget=32, buffer=8, store=KIVI(bits=8, group=8)),
    "DKV, every bit kept": VaSEDKV(budget=32, buffer=8, store=Exact()),
}
EXACT = SMALL | {"every bit kept": STORED["DKV, every bit kept"]}
SMALL = SMALL | STORED

every_kind = pytest.mark.parametrize("kind", KINDS)
every_small = pytest.mark.parametrize("method", SMALL.values(), ids=SMALL)
every_exact = pytest.mark.parametrize("method", EXACT.values(), ids=EXACT)


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Random prompts, padded on the left."""
    width = max(lengths)
    ids = torch.randint(2, 61, (len(lengths), width), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def stock(tiny, name: str):
    """The model under transformers' own attention; only eager knows Gemma 2's soft cap."""
    return tiny(name, "eager" if name == "gemma2" else "sdpa")


def bookkeeping(store: SlotStore) -> int:
    """Bytes of what the host notes of each row."""
    return tensor_bytes([store.length, store.first, getattr(store, "coded", None)])


def candidates(n=64, dim=16, heads=2, seed=0, seen=200, layer=0) -> Candidates:
    """Random tokens to choose among."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, heads, n, dim, generator=generator)
    queries = torch.randn(1, 2 * heads, 64, dim, generator=generator)
    positions = torch.arange(n, dtype=torch.int32).expand(1, heads, n)
    return Candidates(keys, values, positions, queries, dim**-0.5, layer, seen)
