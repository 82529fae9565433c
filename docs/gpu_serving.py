"""Throughput and memory of caches that evict, at the shapes of real models; rows for `measure_gpu.py`.

A long answer is not generated: caches are filled with random keys and values, steps are timed at some
lengths, and the time of the whole answer is integrated over them. An evicting cache is timed below its budget
and at it, from where on all steps cost the same on average: the timed ones hold two evictions. Times are
given twice, as a caller of transformers waits and as the kernels alone run, without launches between them.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from gpu_bench import Bench, kernels_ms, model, wall
from torch import Tensor
from transformers import DynamicCache, Qwen3Config
from transformers.cache_utils import Cache

from strop.kv import RKV, SnapKV, VaSE, VaSEDKV
from strop.kv.evicting import EvictingKV

PROMPT = 256
WARM = 8
"""Steps before the timed ones; an evicting cache at its budget is filled so that the last of them evicts."""


def serve(bench: Bench) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Every method at every budget, for a batch of long answers."""
    for name in bench.served:
        yield f"serve {name} full", partial(_serve, bench, name, None)
        for budget in bench.budgets:
            for kind in (SnapKV, RKV, VaSE, VaSEDKV):
                method = kind(budget=budget, buffer=bench.buffer)
                row = f"serve {name} {kind.__name__} {budget}"
                yield row, partial(_serve, bench, name, method)


def _serve(bench: Bench, name: str, method: EvictingKV | None) -> dict:
    lengths = bench.lengths
    if method is not None:
        lengths = (min(bench.lengths[0], method.budget // 2), method.budget)
    steps = {length: _steps(bench, name, method, length) for length in lengths}
    peak = torch.cuda.max_memory_allocated() / 2**30 if bench.device == "cuda" else None
    waited, ran = (
        {length: step[kind] for length, step in steps.items()} for kind in ("wall_ms", "kernels_ms")
    )
    return {
        "what": f"batch {bench.rows}, {PROMPT} in, {bench.generated} out, from steps at some lengths",
        "tokens_per_s": _throughput(bench, waited),
        "tokens_per_s_of_kernels": _throughput(bench, ran),
        "steps": steps,
        "peak_gib": peak,
    }


def _throughput(bench: Bench, step_ms: dict[int, float]) -> float:
    """Tokens a second of the whole answer, from the milliseconds of a step at some lengths."""
    lengths = np.arange(bench.generated) + PROMPT
    every = np.interp(lengths, list(step_ms), list(step_ms.values()))
    return float(bench.rows * bench.generated / every.sum() * 1e3)


def _steps(bench: Bench, name: str, method: EvictingKV | None, length: int) -> dict[str, float]:
    """Mean milliseconds of a step behind `length` tokens: waiting for it, and in kernels alone."""
    lm = model(bench, name)
    if bench.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    evicts = method is not None and length >= method.budget
    cache = filled(bench, lm.config, method, length + bench.buffer - WARM if evicts else length, bench.rows)
    token = torch.ones(bench.rows, 1, dtype=torch.long, device=bench.device)

    def steps(count: int) -> None:
        for _ in range(count):
            lm(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    steps(WARM)
    period = bench.buffer if evicts else WARM
    waited = wall(bench, lambda: steps(2 * period)) / (2 * period)
    return {"wall_ms": waited, "kernels_ms": kernels_ms(bench, lambda: steps(period)) / period}


def filled(bench: Bench, config: Qwen3Config, method: EvictingKV | None, length: int, rows: int) -> Cache:
    """A cache that holds random keys and values of `length` tokens in every row."""
    heads, heads_kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    cache = DynamicCache(config=config) if method is None else method.new_cache(config)
    for index, layer in enumerate(cache.layers):
        held: tuple[Tensor, Tensor] = tuple(bench.normal(2, rows, heads_kv, length, dim))
        cache.update(*held, index)
        if method is not None:
            layer.attend(bench.normal(rows, heads, length, dim), None, dim**-0.5, None)
    return cache
