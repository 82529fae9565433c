"""Measure the table "KV methods side by side" of README and docs, on `coder` and `reasoner`.

    python docs/measure_kv.py --out docs/results/kv.json

Bytes a token are counted over the tensors that a cache holds right after reading a context, when its tail is
nearly empty; their mean over the lengths until the tail is full again is by formula. KL is per token under
pseudo-decode in blocks of 64 on held-out text, and on one text also token by token, as a control. Exact match
is over held-out problems that the model writes worked solutions for.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.progress import track

import strop
from strop.audit.memory import fill_cache
from strop.audit.quality import BLOCK, exact_match_loss, text_quality, token_losses
from strop.core.files import atomic
from strop.core.machine import machine
from strop.kv import KIVI, HadamardRTN, KVarN, KVMethod, Quantized
from strop.kv.base import KVShape
from strop.recipe import Recipe
from strop.tasks.data import bundled
from strop.tune.measure import solved
from strop.tune.workload import build

CONTEXTS = (512, 1024, 2048)
TAIL = 128
"""Tokens of tail that every method here keeps."""
BLOCKS = {"token": 1, "block": BLOCK}
METHODS: tuple[KVMethod | None, ...] = (
    None,
    *(kind(bits_k=k, bits_v=v) for kind in (KVarN, KIVI, HadamardRTN) for k, v in ((4, 4), (4, 2), (2, 2))),
    Quantized(backend="hqq", bits=4),
    Quantized(backend="hqq", bits=2, group=32),
    Quantized(backend="quanto", bits=4),
    Quantized(backend="quanto", bits=2),
)


def bytes_per_token(lm: strop.Model, context: int) -> dict[str, float]:
    """Measured over the tensors of a cache filled with `context` tokens, by formula, and on average."""
    kv, shape = lm.recipe.kv, lm.kv_shape
    measured = fill_cache(lm, [[1] * context]).kv_bytes_measured
    if kv is None:
        formula = mean = shape.dense_bytes(context) / context
    else:
        formula = kv.kv_bytes(shape, context) / context
        mean = float(np.mean([held(kv, shape, length) for length in range(context, context + TAIL)]))
    return {"measured": measured / context, "formula": formula, "mean": mean}


def held(kv: KVMethod, shape: KVShape, tokens: int) -> float:
    """Bytes a token; a stock cache's formula is for right after a flush, half a tail waits on average."""
    waiting = TAIL // 2 if isinstance(kv, Quantized) else 0
    return (kv.kv_bytes(shape, tokens - waiting) + shape.dense_bytes(waiting)) / tokens


def by_token(base: strop.Model, lm: strop.Model, ids: Sequence[int]) -> dict[str, float]:
    """KL of one text read token by token and in blocks."""
    return {name: float(token_losses(base, lm, ids, size).kl.mean()) for name, size in BLOCKS.items()}


def measure(name: str) -> list[dict]:
    """One row a method on one bundled model."""
    base = strop.load(f"zoo:{name}")
    work = build(base, bundled(f"zoo:{name}"), 1024 if name == "coder" else None, 1, 0)
    right = solved(base, work) if work.problems else []
    rows = []
    for method in track(METHODS, description=name):
        lm = base.with_(kv=method)
        quality = text_quality(base, lm, work.texts)
        row = {
            "model": f"zoo:{name}",
            "method": Recipe(kv=method).label(),
            "bytes_per_token": {str(context): bytes_per_token(lm, context) for context in CONTEXTS},
            "kl": [quality.kl, quality.kl_lo, quality.kl_hi],
            "kl_by": by_token(base, lm, work.texts[0]),
            "ppl_rise": [quality.ppl_rise, quality.ppl_rise_lo, quality.ppl_rise_hi],
            "solved": None,
        }
        if work.problems:
            now = solved(lm, work)
            row["solved"] = [sum(now), len(now)]
            row["exact_match_loss"] = exact_match_loss(right, now)
        rows.append(row)
    return rows


def main() -> None:
    """Measure both models and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [row for name in ("coder", "reasoner") for row in measure(name)]
    with atomic(args.out) as file:
        file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
