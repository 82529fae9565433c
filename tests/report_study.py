"""A made-up study for the tests of the report: every slot, every outcome, plausible numbers."""

from __future__ import annotations

from typing import Any

KV = {"kvarn": [(2, 2), (3, 2), (4, 2), (4, 4)], "vase": [128, 256, 512], "rtn": [2, 3, 4, 8]}
BASE_WEIGHTS, BASE_KV, BASE_STEP = 10_469_888, 4_608_000, 0.0121


def row(
    label: str, kv: float = 1.0, weights: float = 1.0, time: float = 1.0, loss: float = 0.0
) -> dict[str, Any]:
    """A measured row, from what its recipe keeps of bytes and time, and what it loses."""
    total = BASE_WEIGHTS * weights + BASE_KV * kv
    memory = total / (BASE_WEIGHTS + BASE_KV)
    return {
        "label": label,
        "recipe": {"strop": 1, "model": "zoo:coder"},
        "slots": {"weights": "as is", "kv": "as is", "decode": "plain"},
        "status": "measured",
        "reason": None,
        "quality": {
            "ppl": 5.08 * (1 + loss), "ppl_rise": loss, "ppl_rise_hi": loss * 1.4, "kl": loss / 2,
            "kl_lo": loss * 0.45, "kl_hi": loss * 0.56, "exact_match": None,
            "exact_match_loss": None, "exact_match_loss_hi": None, "agreement": 1 - loss * 3,
            "recall": {"0.1": 1.0, "0.5": 1 - loss, "0.9": 1.0}, "drop_hi": loss * 1.4,
            "tokens": 20480,
        },
        "speed": {
            "ttft_s": 0.083, "step_s": BASE_STEP * time, "kv_s": 0.004,
            "ttft_ratio": [1.0, 0.97, 1.03], "step_ratio": [time, time * 0.975, time * 1.03],
            "kv_ratio": [time, time * 0.9, time * 1.1],
        },
        "memory": {
            "weights_bytes": BASE_WEIGHTS * weights, "kv_bytes": BASE_KV * kv,
            "kv_bytes_measured": BASE_KV * kv * 0.98, "total_bytes": total, "ratio": memory,
            "peak_rss_bytes": 612_000_000, "kv_bits_per_element": 16 * kv,
        },
        "score": (memory * time) ** 0.5,
        "on_frontier": False, "within_drop": loss * 1.4 <= 0.01, "dominated_by": None,
        "chosen": False, "seconds": 12.3,
    }  # fmt: skip


def unmeasured(label: str, status: str, reason: str) -> dict[str, Any]:
    empty = {"quality": None, "speed": None, "memory": None, "score": None, "within_drop": False}
    return row(label) | empty | {"status": status, "reason": reason}


def set_slot(entry: dict[str, Any], slot: str, method: str, value: Any) -> dict[str, Any]:
    entry["slots"][slot] = f"{method} {value}"
    entry["recipe"][slot] = {method: {"setting": str(value)}}
    return entry


def candidates() -> list[dict[str, Any]]:
    rows = [row("as is")]
    for method, settings in KV.items():
        for rank, setting in enumerate(settings):
            value = "k{}v{}".format(*setting) if isinstance(setting, tuple) else setting
            kept = 0.14 + 0.07 * rank + {"kvarn": 0, "vase": 0.05, "rtn": 0.02}[method]
            loss = 0.03 / 4**rank * {"kvarn": 1, "vase": 6, "rtn": 3}[method]
            time = {"kvarn": 0.97, "vase": 0.88, "rtn": 1.05}[method] + 0.01 * rank
            rows.append(set_slot(row(f"kv {method} {value}", kept, 1, time, loss), "kv", method, value))
    for bits, loss in ((8, 0.0004), (4, 0.006), (3, 0.08)):
        entry = row(f"rtn int{bits}", 1, bits / 16 + 0.02, 0.9 + bits / 100, loss)
        rows.append(set_slot(entry, "weights", "rtn", f"int{bits}"))
    rows.append(set_slot(row("lookup 4", 1, 1, 0.71, 0), "decode", "lookup", 4))
    pair = set_slot(row("kvarn k4v2 + rtn int8", 0.25, 0.52, 0.93, 0.004), "kv", "kvarn", "k4v2")
    rows.append(set_slot(pair, "weights", "rtn", "int8"))
    refused = unmeasured(
        "kv quantized + lookup", "refused",
        "transformers' QuantizedCache cannot be cropped, which prompt lookup needs.",
    )  # fmt: skip
    rows.append(set_slot(set_slot(refused, "kv", "quantized", 4), "decode", "lookup", 4))
    rows.append(set_slot(unmeasured("alphaq 3", "failed", "Out of memory."), "weights", "alphaq", 3))
    return rows


def judge(rows: list[dict[str, Any]]) -> None:
    """Mark the frontier in memory, time and drop, and choose the best score on it."""

    def place(entry: dict[str, Any]) -> tuple[float, float, float]:
        time = entry["speed"]["step_ratio"][0]
        return entry["memory"]["ratio"], time, entry["quality"]["drop_hi"]

    measured = [entry for entry in rows if entry["status"] == "measured"]
    for entry in measured:
        mine = place(entry)
        better = (o for o in measured if o is not entry and all(map(float.__le__, place(o), mine)))
        entry["dominated_by"] = next((other["label"] for other in better), None)
        entry["on_frontier"] = entry["dominated_by"] is None
    min((e for e in measured if e["within_drop"]), key=lambda e: e["score"])["chosen"] = True


def make_study() -> dict[str, Any]:
    """A study of nineteen recipes with made-up numbers, in the shape that the report reads."""
    rows = candidates()
    judge(rows)
    chosen = next(entry for entry in rows if entry["chosen"])
    return {
        "model": {
            "name": "zoo:coder", "arch": "Qwen3ForCausalLM", "parameters": 5234944,
            "dtype": "bfloat16", "layers": 6, "kv_heads": 2, "head_dim": 64,
            "fingerprint": "ab12cd34",
        },
        "data": {
            "name": "held-out Python source", "texts": 24, "tokens": 41234, "p95_tokens": 1500,
            "fingerprint": "5f0c2b7d",
        },
        "settings": {
            "objective": "balanced", "max_drop": 0.01, "batch": 1, "context": 1500, "device": "cpu",
            "seed": 0, "budget_minutes": None, "command": "strop tune zoo:coder --out runs/demo",
        },
        "machine": {
            "cpu": "a processor", "cores": 2, "memory_gib": 23.5, "os": "Linux", "python": "3.11.7",
            "torch": "2.13.0+cpu", "transformers": "5.23.0", "strop": "0.1.0", "gpu": None,
            "date": "2026-11-23T15:00:00+00:00",
        },
        "rows": rows,
        "chosen": chosen["label"],
        "recipe_yaml": "strop: 1\nmodel: zoo:coder\nkv:\n  kvarn:\n    bits_k: 4\n    bits_v: 2\n",
        "commands": [
            "strop generate runs/demo/recipe.yaml --prompt 'def '",
            "strop measure runs/demo/recipe.yaml --data prompts.jsonl",
        ],
        "not_measured": [{"what": "task exact match", "why": "the data has no answers"}],
    }  # fmt: skip
