"""Time KVarN's torch path on a CUDA device at the shapes of real models.

    python docs/measure_gpu.py --out docs/results/gpu.json

One flush packs 128 tokens of all layers; a decode step attends over a cache of the given length in one layer.
These are plain torch operations: fused kernels are not part of this measurement.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen3Config

from strop.core.files import atomic
from strop.core.machine import machine
from strop.kv import KVarN
from strop.kv.base import KVShape

SHAPES = {
    "Qwen3-4B": {"layers": 36, "heads": 32, "heads_kv": 8, "dim": 128},
    "Llama-3.1-8B": {"layers": 32, "heads": 32, "heads_kv": 8, "dim": 128},
    "Phi-4-14B": {"layers": 40, "heads": 40, "heads_kv": 10, "dim": 128},
}
CONTEXTS = (4096, 16384, 65536)
ROUNDS = 20


def milliseconds(work, other) -> list[float]:
    """Median times of two functions in interleaved runs."""
    times: list[list[float]] = [[], []]
    for index in range(ROUNDS + 3):
        for column, function in zip(times, (work, other), strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            if index >= 3:
                column.append(start.elapsed_time(end))
    return [sorted(column)[len(column) // 2] for column in times]


def flush(name: str, layers: int, heads: int, heads_kv: int, dim: int) -> dict:
    """Packing 128 tokens of all layers, beside copying them."""
    codec = KVarN().codec()
    keys, values = torch.randn(2, layers, heads_kv, 128, dim, device="cuda", dtype=torch.bfloat16)
    packing, copying = milliseconds(
        lambda: codec.encode(keys, values), lambda: (keys.clone(), values.clone())
    )
    return {"what": "flush of 128 tokens, all layers", "shape": name, "kvarn_ms": packing, "copy_ms": copying}


def step(name: str, context: int, layers: int, heads: int, heads_kv: int, dim: int) -> dict:
    """One layer's attention of one new token, beside SDPA over a bf16 cache."""
    config = Qwen3Config(
        num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads_kv, head_dim=dim
    )
    config._attn_implementation = "strop"
    cache = KVarN().new_cache(config)
    keys, values = torch.randn(2, 1, heads_kv, context, dim, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(1, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    layer = cache.layers[0]
    layer.update(keys, values)
    layer.revocable = 0
    layer.settle()

    def dense() -> torch.Tensor:
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    packed, plain = milliseconds(lambda: layer.attend(query, None, dim**-0.5, None), dense)
    shape = KVShape.of(config)
    return {
        "what": f"decode attention, one layer, {context} tokens",
        "shape": name,
        "kvarn_ms": packed,
        "sdpa_ms": plain,
        "bytes_ratio": cache.bytes() / shape.dense_bytes(context),
    }


@torch.no_grad()
def main() -> None:
    """Measure all shapes and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is visible: run this on a machine with an NVIDIA GPU")
    rows = [flush(name, **shape) for name, shape in SHAPES.items()]
    rows += [step(name, context, **shape) for name, shape in SHAPES.items() for context in CONTEXTS]
    with atomic(args.out) as file:
        file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
