"""Measure the tables of docs/quantization.md: how fast weights are quantized, in how much memory, how well.

    python docs/measure_quantize.py --peer .peers/llmcompressor/bin/python --out docs/results/quantize.json

`speed` quantizes folders of real shapes with strop and with llm-compressor, each run in a process of its own,
by turns; seconds are without imports, and the fastest round counts. `memory` runs `strop quantize` on a
folder much larger than what it needs, and says what the process held of its own (`RssAnon`) at most.
`quality` is the cross-entropy of the bundled models on held-out text; differences are paired by text. `load`
is how many processes waited for the cores meanwhile: above their number, trust ratios. With `--parts` some
parts are measured again, and the others stay.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import shaped
import torch
import torch.nn.functional as F

import strop
from strop.core.checkpoint import inspect
from strop.core.files import atomic
from strop.core.intervals import bootstrap
from strop.core.machine import machine
from strop.model import tokenizer_of
from strop.models.zoo import zoo_path
from strop.tasks.data import bundled
from strop.weights import GPTQ
from strop.weights.plan import BitPlan
from strop.weights.stream import PLAN
from strop.weights.text import calibration_rows

HERE = Path(__file__).parent
Job = dict[str, Any]
SPEED: dict[str, list[tuple[str, Job]]] = {
    "dense": [
        ("strop rtn int4", {"method": "rtn", "settings": {"bits": 4}}),
        ("strop rtn int4, no spectra", {"method": "rtn", "settings": {"bits": 4}, "spectra": False}),
        ("strop rtn int8", {"method": "rtn", "settings": {"bits": 8}}),
        ("strop hqq int4", {"method": "hqq", "settings": {"bits": 4}}),
        ("llm-compressor rtn int4", {"method": "rtn"}),
        ("llm-compressor model_free_ptq int4", {"method": "model-free"}),
    ],
    "calibrated": [
        ("strop gptq int4", {"method": "gptq", "settings": {"bits": 4}}),
        ("llm-compressor gptq int4", {"method": "gptq"}),
    ],
    "mixture": [
        ("strop alphaq 3.5 bits", {"method": "alphaq", "settings": {"bits": 3.5}}),
        ("strop rtn int4", {"method": "rtn", "settings": {"bits": 4}}),
        ("llm-compressor rtn int4", {"method": "rtn"}),
    ],
}
"""Runs on each folder, by turns; all in groups of 128."""
QUALITY: list[tuple[str, Job]] = [
    ("strop rtn int8", {"method": "rtn", "settings": {"bits": 8}}),
    ("strop rtn int4", {"method": "rtn", "settings": {"bits": 4}}),
    ("strop gptq int4", {"method": "gptq", "settings": {"bits": 4}}),
    ("strop gptq int4 act_order", {"method": "gptq", "settings": {"bits": 4, "act_order": True}}),
    ("strop hqq int4", {"method": "hqq", "settings": {"bits": 4}}),
    ("strop hqq int3", {"method": "hqq", "settings": {"bits": 3}}),
    ("strop alphaq 3.5 bits", {"method": "alphaq", "settings": {"bits": 3.5}}),
    ("llm-compressor rtn int4", {"method": "rtn"}),
    ("llm-compressor gptq int4", {"method": "gptq"}),
]
PAIRS = (("rtn int4", "rtn int4"), ("gptq int4", "gptq int4"), ("gptq int4 act_order", "gptq int4"))
"""What of both programs is compared text by text."""
TEXTS, LENGTH = 200, 512
QWEN = ("Qwen3-30B-A3B", 48)
GB = 1e9
SETTINGS = ("rounds", "layers", "mixture_layers", "calibrated_layers", "samples", "big_layers")


def watched(argv: list[str], threads: int) -> dict[str, Any]:
    """Run a process; its wall time, processor time, peak memory and last line of JSON."""
    started = time.perf_counter()
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(HERE.parent),
    }
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(argv, env=env, stdout=said, stderr=subprocess.STDOUT)
        peaks = {"RssAnon": 0, "RssFile": 0}
        used: resource.struct_rusage | None = None
        while used is None:
            held = _status(process.pid)
            peaks = {key: max(peak, held.get(key, 0)) for key, peak in peaks.items()}
            time.sleep(0.01)
            pid, code, found = os.wait4(process.pid, os.WNOHANG)
            used = found if pid else None
        process.returncode = os.waitstatus_to_exitcode(code)
        said.seek(0)
        text = said.read()
    if process.returncode:
        raise SystemExit(f"{shlex.join(argv)} ended with {process.returncode}:\n{text[-2000:]}")
    lines = [line for line in text.splitlines() if line.startswith('{"seconds"')]
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": used.ru_utime + used.ru_stime,
        "anon_bytes": peaks["RssAnon"] << 10,
        "file_bytes": peaks["RssFile"] << 10,
        "maxrss_bytes": used.ru_maxrss << 10,
        **(json.loads(lines[-1]) if lines else {}),
    }


def _status(pid: int) -> dict[str, int]:
    """KiB by name; empty once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}


def quantized(name: str, job: Job, folder: Path, out: Path, peer: str, rows: Path, threads: int) -> Job:
    """Quantize `folder` into `out` as one of the programs; what `watched` says."""
    job = {"folder": str(folder), "out": str(out), "spectra": True} | job
    job |= {"rows": str(rows)}
    ours = name.startswith("strop")
    worker = HERE / ("quantize_once.py" if ours else "quantize_peer.py")
    return watched([sys.executable if ours else peer, str(worker), json.dumps(job)], threads)


def calibration(folder: Path, model: str, samples: int, file: Path) -> Path:
    """The text that strop calibrates on, as token ids in a file."""
    rows = calibration_rows(tokenizer_of(inspect(folder)), model, GPTQ(samples=samples))
    file.write_text(json.dumps(rows.tolist()))
    return file


def speed(args: argparse.Namespace, root: Path) -> list[Job]:
    """Every program on every folder, by turns."""
    configs = {
        "dense": shaped.dense(args.layers),
        "calibrated": shaped.dense(args.calibrated_layers),
        "mixture": shaped.mixture(args.mixture_layers, count=16, vocabulary=4096),
    }
    found = []
    for kind, runs in SPEED.items():
        size = shaped.write(configs[kind], root / kind, 256 << 20)
        rows = calibration(root / kind, str(root / kind), args.samples, root / "rows.json")
        for threads in args.threads:
            taken: dict[str, list[Job]] = {name: [] for name, _ in runs}
            for turn in range(args.rounds):
                for name, job in runs if turn % 2 == 0 else runs[::-1]:
                    if job["method"] == "gptq" and "settings" in job:
                        job = job | {"settings": job["settings"] | {"samples": args.samples}}
                    out = root / "out"
                    taken[name].append(quantized(name, job, root / kind, out, args.peer, rows, threads))
                    shutil.rmtree(out)
                    said(f"{kind}, {threads} thread(s), {name}: {taken[name][-1]['seconds']}")
            found += [timed(kind, size, name, threads, them) for name, them in taken.items()]
        shutil.rmtree(root / kind)
    return found


def timed(kind: str, size: int, name: str, threads: int, rounds: list[Job]) -> Job:
    """One row: the fastest round, and the most memory of all."""
    best = min(rounds, key=lambda one: sum(one["seconds"].values()))
    total = sum(best["seconds"].values())
    peaks = {key: max(one[key] for one in rounds) for key in ("anon_bytes", "maxrss_bytes")}
    told = {"folder": kind, "source_bytes": size, "name": name, "threads": threads}
    speed_of = {"total_s": total, "gb_per_minute": size / GB / total * 60, "rounds": len(rounds)}
    return told | speed_of | best | peaks


def memory(args: argparse.Namespace, root: Path) -> Job:
    """`strop quantize` on layers of Qwen3-30B-A3B, and what the whole model would take by that."""
    config, folder, out = shaped.mixture(args.big_layers), root / "big", root / "big-out"
    said("writing a large folder")
    size = shaped.write(config, folder, 1 << 30)
    command = ["strop", "quantize", str(folder), "--method", "rtn", "--bits", "4", "-o", str(out)]
    found = watched([str(Path(sys.executable).parent / "strop"), *command[1:]], 1)
    layer, (name, layers) = shaped.layer_bytes(config), QWEN
    packed = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    for path in (folder, out):
        shutil.rmtree(path)
    whole = size + (layers - args.big_layers) * layer
    told = {"layers": args.big_layers, "source_bytes": size, "layer_bytes": layer, "packed_bytes": packed}
    rate = size / GB / found["wall_s"] * 60
    guess = {"model": name, "layers": layers, "bytes": whole, "minutes": whole / GB / rate}
    command = [arg.replace(str(root) + "/", "") for arg in command]
    return {"command": shlex.join(command), **told, "gb_per_minute": rate, **found, "extrapolated": guess}


@torch.no_grad()
def losses(model: strop.Model, texts: list[torch.Tensor]) -> np.ndarray:
    """Summed cross-entropy in nats and tokens `[texts, 2]`."""
    found = []
    for ids in texts:
        logits = model.model(ids[None]).logits[0, :-1].float()
        found.append([float(F.cross_entropy(logits, ids[1:], reduction="sum")), len(ids) - 1])
    return np.array(found)


def difference(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """How much more nats a token `other` has, with the interval over texts."""
    units = np.stack([other[:, 0] - one[:, 0], one[:, 1]], axis=1)
    return bootstrap(units, lambda sample: sample[:, :, 0].sum(1) / sample[:, :, 1].sum(1))


def quality(args: argparse.Namespace, root: Path) -> list[Job]:
    """Every program on every bundled model."""
    found = []
    for name in ("zoo:coder", "zoo:moe"):
        folder = zoo_path(name[4:])
        base = strop.load(name)
        rows = calibration(folder, name, GPTQ().samples, root / "rows.json")
        documents = bundled(name, count=TEXTS).rows
        texts = [torch.tensor(base.encode(row.prompt)[:LENGTH]) for row in documents]
        nats = {"as is": losses(base, texts)}
        runs = [run for run in QUALITY if run[1]["method"] != "alphaq" or shaped.has_experts(folder)]
        for label, job in runs:
            out = root / f"{name[4:]}-{label}"
            quantized(label, job, folder, out, args.peer, rows, 1)
            nats[label] = losses(strop.load(out), texts)
            found.append(judged(name, label, nats, out))
            said(f"{name}, {label}: {found[-1]['rise']}")
        for ours, theirs in PAIRS:
            pair = difference(nats[f"llm-compressor {theirs}"], nats[f"strop {ours}"])
            found.append({"model": name, "name": f"strop {ours} minus llm-compressor {theirs}", "rise": pair})
    return found


def judged(model: str, label: str, nats: dict[str, np.ndarray], out: Path) -> Job:
    """One row: cross-entropy, and its rise over the model as it is."""
    total, tokens = nats[label].sum(0)
    base = nats["as is"].sum(0)[0] / tokens
    bits = BitPlan.load(out / PLAN).effective_bits if (out / PLAN).exists() else None
    rise = difference(nats["as is"], nats[label])
    told = {"model": model, "name": label, "effective_bits": bits, "texts": len(nats[label])}
    return told | {"tokens": int(tokens), "nats": total / tokens, "nats_as_is": base, "rise": rise}


def said(what: str) -> None:
    """Progress, on standard error."""
    print(what, file=sys.stderr, flush=True)


PARTS: dict[str, Callable[[argparse.Namespace, Path], Any]] = {
    "quality": quality,
    "memory": memory,
    "speed": speed,
}


def main() -> None:
    """Measure the parts that are asked for, and keep what the file says of the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="an interpreter that imports llmcompressor")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=28, help="of the dense folder, 31 MB each")
    parser.add_argument("--mixture-layers", type=int, default=4, help="of the mixture, 0.2 GB each")
    parser.add_argument("--calibrated-layers", type=int, default=2, help="of the folder that gptq quantizes")
    parser.add_argument("--samples", type=int, default=GPTQ().samples, help="calibration texts of gptq")
    parser.add_argument("--big-layers", type=int, default=5, help="of the large folder, 1.2 GB each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for part in args.parts:
        with tempfile.TemporaryDirectory() as root:
            found = PARTS[part](args, Path(root))
        settings = {key: getattr(args, key) for key in SETTINGS}
        about = {"machine": machine(), "load": os.getloadavg()[1], "command": shlex.join(sys.argv)}
        results = json.loads(args.out.read_text()) if args.out.exists() else {}
        results[part] = about | {"settings": settings, "found": found}
        with atomic(args.out) as file:
            file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
