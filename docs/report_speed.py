"""The tables of time and bytes that `report.py` writes: steps on a CPU, kernels and serving on a GPU."""

from collections.abc import Sequence
from typing import Any

STAGES = ("draft", "build", "verify", "commit")
Rows = list[dict[str, Any]]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def measured_on(machine: dict[str, Any]) -> str:
    """Machine, versions and date, in one line."""
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread(s)"
    versions = f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}"
    return f"Measured on {where}; {versions}; {machine['date'][:10]}."


def steps(results: dict[str, Any]) -> str:
    """Decode steps on a CPU."""
    rows = [
        [
            row["dtype"],
            str(row["batch"]),
            f"{row['context']:,}",
            row["method"],
            f"{row['step_ms']:.1f}",
            f"{row['step_ratio']:.2f}",
            f"{row['kv_ms']:.1f}",
            "-" if row["flush_ms"] is None else f"{row['flush_ms']:,.0f}",
            f"{row['bytes'] / 2**20:.2f}",
        ]
        for row in results["rows"]
    ]
    head = ["dtype", "batch", "context", "cache", "step, ms", "/ dense", "KV part, ms", "flush, ms", "MiB"]
    return f"{table(head, rows)}\n\n`python docs/measure_kv_speed.py`. {measured_on(results['machine'])}"


def _part(results: dict[str, Any], part: str) -> Rows:
    return [row for row in results["rows"] if row["name"].startswith(f"{part} ")]


def _gpu(head: Sequence[str], rows: Sequence[Sequence[str]], results: dict[str, Any]) -> str:
    return f"{table(head, rows)}\n\n`make gpu`. {measured_on(results['machine'])}"


def decode(results: dict[str, Any]) -> str:
    """Attention of one token in one layer, KVarN beside bf16."""
    rows = []
    for row in _part(results, "decode"):
        times = row["methods"]
        for name, found in times.items():
            rows.append(
                [
                    row["name"].removeprefix("decode "),
                    name,
                    f"{found['ms']:.3f}",
                    f"{found['speedup']:.2f}",
                    f"{found['gb_s']:,.0f}",
                    f"{row['copy_gb_s']:,.0f}",
                    f"{found['eager_ms']:.3f}",
                    f"{found['error']:.4f}" if found.get("error") is not None else "-",
                ]
            )
    head = ["case", "attention", "ms", "speed-up", "GB/s", "copy, GB/s", "eager, ms", "error"]
    return _gpu(head, rows, results)


def encode(results: dict[str, Any]) -> str:
    """Packing 128 tokens of all layers."""
    rows = [
        [
            row["name"].removeprefix("encode "),
            f"{row['triton_ms']:.2f}",
            f"{row['triton_by_layer_ms']:.2f}",
            f"{row['torch_ms']:.2f}",
            f"{row['generate_128_floor_ms']:,.0f}",
            f"{row['triton_by_layer_ms'] / row['generate_128_floor_ms']:.2%}",
            f"{row['generate_128_ms']:,.0f}",
            f"{row['triton_by_layer_eager_ms'] / row['generate_128_ms']:.2%}",
        ]
        for row in _part(results, "encode")
    ]
    head = [
        "model",
        "Triton, one launch, ms",
        "layer by layer, ms",
        "torch, ms",
        "128 steps at best, ms",
        "share",
        "128 steps by transformers, ms",
        "share",
    ]
    return _gpu(head, rows, results)


def evict(results: dict[str, Any]) -> str:
    """One eviction of one layer."""
    parts = ("observe", "range", "gumbel", "keep_top", "gather")
    rows = [
        [
            row["name"].rpartition(" ")[2],
            f"{row['triton_ms']:.2f}",
            f"{row['torch_ms']:.2f}",
            f"{row['torch_ms'] / row['triton_ms']:.1f}",
            *(f"{row[f'triton_{part}_ms']:.3f} / {row[f'torch_{part}_ms']:.3f}" for part in parts),
        ]
        for row in _part(results, "evict")
    ]
    return _gpu(["slots", "Triton, ms", "torch, ms", "speed-up", *parts], rows, results)


def serve(results: dict[str, Any]) -> str:
    """Throughput and memory of long answers."""
    found = _part(results, "serve")
    full = {row["name"].split()[1]: row["tokens_per_s_of_kernels"] for row in found if "full" in row["name"]}
    rows = [
        [
            row["name"].removeprefix("serve "),
            f"{row['tokens_per_s_of_kernels']:,.0f}",
            f"{row['tokens_per_s_of_kernels'] / full[row['name'].split()[1]]:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['peak_gib']:.1f}",
        ]
        for row in found
    ]
    head = ["case", "tokens/s of the kernels", "/ full", "tokens/s as transformers launches", "peak, GiB"]
    return _gpu(head, rows, results)


def trees(results: dict[str, Any]) -> str:
    """What verifying trees costs, and how many nodes pay."""
    sizes = ("1", "8", "16", "64", "128", "256", "512")
    rows = []
    for row in _part(results, "verify"):
        for kind in ("kernels", "wall"):
            times = row[f"{kind}_ms"]
            nodes = " / ".join(map(str, row["nodes"].values())) if kind == "kernels" else "-"
            case = row["name"].removeprefix("verify ")
            rows.append([case, kind, *(f"{times[size]:.1f}" for size in sizes), nodes])
    confidences = ", ".join(results["rows"][0]["nodes"])
    return _gpu(["case", "ms", *sizes, f"nodes that pay ({confidences})"], rows, results)


def drafts(results: dict[str, Any]) -> str:
    """The bundled coder with its drafters."""
    rows = []
    for row in _part(results, "speculate"):
        plain = row["tokens_per_s"]["plain"]
        for way, speed in row["tokens_per_s"].items():
            stats = row["stats"].get(way)
            rounds = stats["spec_verify_ct"] if stats else 1
            stages = [f"{stats[f'{stage}_s'] / rounds * 1e3:.1f}" for stage in STAGES] if stats else ["-"] * 4
            tau = f"{stats['spec_accept_length']:.2f}" if stats else "1.00"
            name = row["name"].removeprefix("speculate ")
            rows.append(
                [name, way, f"{speed:.0f}", f"{speed / plain:.2f}", tau, *stages, row["same_as_plain"][way]]
            )
    head = [
        "model",
        "drafter and tree",
        "tokens/s",
        "/ plain",
        "tau",
        *(f"{s}, ms" for s in STAGES),
        "same text",
    ]
    return _gpu(head, rows, results)


def speculation(results: dict[str, Any]) -> str:
    """Ways to decode on a CPU, side by side."""
    rows = []
    for row in results["rows"]:
        stats, (speedup, low, high) = row["stats"], row["speedup"]
        regime = f"{row['dtype']}, {row['kv']}, T={row['temperature']}"
        tau, nodes, predicted = "-", "-", "-"
        if stats:
            drafted = sum(int(nodes) * rounds for nodes, rounds in stats["nodes_by_round"].items())
            tau, nodes = f"{stats['spec_accept_length']:.2f}", f"{drafted / stats['spec_verify_ct']:.1f}"
            if stats["predicted_tokens_per_s"]:
                realised = stats.get("realised_tokens_per_s", stats["tokens_per_s"])
                predicted = f"{stats['predicted_tokens_per_s'] / realised:.2f}"
        cells = [
            f"{row['tokens_per_cpu_s']:.0f}",
            f"{speedup:.2f} ({low:.2f} to {high:.2f})",
            tau,
            nodes,
            predicted,
        ]
        rows.append([regime, row["way"], *cells, "{} of {}".format(*row["same"])])
    head = [
        "regime",
        "way",
        "tokens per CPU second",
        "/ plain (95 %)",
        "tau",
        "nodes",
        "predicted / realised",
        "same text",
    ]
    where = (
        f"{results['files']} held-out files, {results['prompt']} tokens read and {results['tokens']} written."
    )
    told = f"`python docs/measure_speculation.py`. {where} {measured_on(results['machine'])}"
    return f"{table(head, rows)}\n\n{told}"
