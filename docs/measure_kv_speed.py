"""Time a decode step over packed caches on a CPU, beside a dense cache and transformers' quantized ones.

    OMP_NUM_THREADS=1 python docs/measure_kv_speed.py --out docs/results/kv-speed.json

A Qwen3 of zoo:coder's shape (6 layers, d = 256, 2 KV heads of 64) with random weights. Caches are filled with
random keys and values, then every method in turn takes one step there and one at context 1, 24 times, the
twelfth of which is where packed caches flush. A step is the median, the flush the slowest of these; the KV
part is the median of the differences to the step at context 1. The stock caches are left out above `LARGE`
tokens in all, where one flush of theirs takes minutes. Rows are written as they are measured and not measured
again.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, Qwen3Config
from transformers.cache_utils import Cache

from strop.core.cache import KVCache, tensor_bytes
from strop.core.files import atomic
from strop.core.machine import machine
from strop.kv import KVarN, KVMethod, Quantized, attach

CODER = Path(__file__).parents[1] / "zoo" / "coder" / "config.json"
STEPS, BEFORE, TAIL = 24, 12, 128
"""Timed steps, how many of them come before the flush, and the tokens between flushes."""
CONTEXTS = {1: (1024, 2048, 4096, 16384), 4: (1024, 4096, 16384), 16: (1024, 4096)}
"""Contexts of every batch."""
LARGE = 16384
METHODS: dict[str, KVMethod | None] = {
    "dense": None,
    "kvarn k4v4": KVarN(bits=4),
    "kvarn k4v2": KVarN(),
    "kvarn k2v2": KVarN(bits=2),
    "hqq int4": Quantized(backend="hqq", bits=4),
    "quanto int4": Quantized(backend="quanto", bits=4),
}


def models(dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """The model under strop's attention and under SDPA, with the same random weights."""
    shape = json.loads(CODER.read_text()) | {"max_position_embeddings": 1 << 15}
    config = Qwen3Config(**{name: value for name, value in shape.items() if name != "architectures"})
    torch.manual_seed(0)
    packed = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa")
    plain.load_state_dict(packed.state_dict())
    return {"strop": attach(packed), "sdpa": plain.eval()}


def filled(model: PreTrainedModel, method: KVMethod | None, batch: int, context: int) -> Cache:
    """A cache `BEFORE` tokens before `context`, its tail as far from empty."""
    cache = DynamicCache(config=model.config) if method is None else method.new_cache(model.config)
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    bulk = max(context - TAIL, 1)
    for index, layer in enumerate(cache.layers):
        for tokens in (bulk, *(1,) * (context - bulk - BEFORE)):
            cache.update(*torch.randn(2, batch, heads, tokens, dim).to(model.dtype), index)
            if isinstance(cache, KVCache):
                layer.commit()
    return cache


def seconds(model: PreTrainedModel, cache: Cache, batch: int) -> float:
    """One step's time."""
    ids, start = torch.full((batch, 1), 7), time.perf_counter()
    model(ids, past_key_values=cache)
    return time.perf_counter() - start


@torch.no_grad()
def step_times(pair: dict[str, PreTrainedModel], batch: int, context: int) -> dict[str, dict]:
    """Seconds of the steps at `context` and at context 1, `[STEPS, 2]`, and bytes of a cache, by method."""
    held = {}
    for name, method in METHODS.items():
        if isinstance(method, Quantized) and batch * context > LARGE:
            continue
        model = pair["strop" if isinstance(method, KVarN) else "sdpa"]
        held[name] = model, [filled(model, method, batch, at) for at in (context, 1)]
    times = {name: [] for name in held}
    for _ in range(STEPS):
        for name, (model, caches) in held.items():
            times[name].append([seconds(model, cache, batch) for cache in caches])
    return {
        name: {"s": np.array(times[name]), "bytes": tensor_bytes(held[name][1][0].layers)} for name in held
    }


def rows(pair: dict[str, PreTrainedModel], dtype: str, batch: int, context: int) -> list[dict]:
    """One row a method."""
    timed = step_times(pair, batch, context)
    dense = timed["dense"]["s"][:, 0]
    kv = {name: 1000 * float(np.median(found["s"] @ (1, -1))) for name, found in timed.items()}
    return [
        {
            "dtype": dtype,
            "batch": batch,
            "context": context,
            "method": name,
            "step_ms": 1000 * float(np.median(found["s"][:, 0])),
            "kv_ms": kv[name],
            "flush_ms": None if name == "dense" else 1000 * float(found["s"][:, 0].max()),
            "bytes": found["bytes"],
            "step_ratio": float(np.median(found["s"][:, 0] / dense)),
            "kv_ratio": kv[name] / kv["dense"],
        }
        for name, found in timed.items()
    ]


def main() -> None:
    """Measure what is missing and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    done = {(row["dtype"], row["batch"], row["context"]) for row in known}
    plan = [
        (dtype, batch, at)
        for dtype in ("bfloat16", "float32")
        for batch in CONTEXTS
        for at in CONTEXTS[batch]
    ]
    pairs = {dtype: models(getattr(torch, dtype)) for dtype in ("bfloat16", "float32")}
    for pair in pairs.values():
        step_times(pair, 1, 512)  # compiles what compiles at its first call
    for dtype, batch, context in track([case for case in plan if case not in done], description="steps"):
        known += rows(pairs[dtype], dtype, batch, context)
        with atomic(args.out) as file:
            file.write_text(json.dumps({"machine": machine(), "rows": known}, indent=1))


if __name__ == "__main__":
    main()
