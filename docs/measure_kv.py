"""Measure the table "KV methods side by side" of README and docs, on both bundled models.

    python docs/measure_kv.py --out docs/results/kv.json

Bytes a token are counted over the tensors that a filled cache holds. KL is per token under pseudo-decode on
held-out text, exact match over held-out problems that the model writes worked solutions for.
"""

import argparse
import json
from pathlib import Path

from rich.progress import track

import strop
from strop.audit.memory import fill_cache
from strop.audit.quality import exact_match_loss, text_quality
from strop.core.files import atomic
from strop.core.machine import machine
from strop.kv import KIVI, HadamardRTN, KVarN, KVMethod, Quantized
from strop.recipe import Recipe
from strop.tasks.data import bundled
from strop.tune.measure import solved
from strop.tune.workload import build

CONTEXTS = (512, 1024, 2048)
METHODS: tuple[KVMethod | None, ...] = (
    None,
    *(kind(bits_k=k, bits_v=v) for kind in (KVarN, KIVI, HadamardRTN) for k, v in ((4, 4), (4, 2), (2, 2))),
    *(Quantized(backend=backend, bits=bits) for backend in ("hqq", "quanto") for bits in (4, 2)),
)


def bytes_per_token(lm: strop.Model, context: int) -> dict[str, float]:
    """Measured over the tensors of a cache filled with `context` tokens, and by formula."""
    kv, shape = lm.recipe.kv, lm.kv_shape
    formula = shape.dense_bytes(context) if kv is None else kv.kv_bytes(shape, context)
    measured = fill_cache(lm, [[1] * context]).kv_bytes_measured
    return {"measured": measured / context, "formula": formula / context}


def measure(name: str) -> list[dict]:
    """One row a method on one bundled model."""
    base = strop.load(f"zoo:{name}")
    work = build(base, bundled(f"zoo:{name}"), 1024 if name == "coder" else None, 1, 0)
    right = solved(base, work)
    rows = []
    for method in track(METHODS, description=name):
        lm = base.with_(kv=method)
        quality = text_quality(base, lm, work.texts)
        row = {
            "model": f"zoo:{name}",
            "method": Recipe(kv=method).label(),
            "bytes_per_token": {str(context): bytes_per_token(lm, context) for context in CONTEXTS},
            "kl": [quality.kl, quality.kl_lo, quality.kl_hi],
            "ppl_rise": [quality.ppl_rise, quality.ppl_rise_lo, quality.ppl_rise_hi],
            "exact_match": None,
        }
        if work.problems:
            now = solved(lm, work)
            row["exact_match"] = sum(now) / len(now)
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
