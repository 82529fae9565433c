"""Measure what an audit costs: its time over that of the two bare forward passes, and its memory by length.

    python docs/measure_audit.py        # writes docs/results/audit.json

Time is the processor's, in one process, in turns: two bare passes, then the audit of the same tokens. Peak
memory is that of a process of its own at each number of tokens.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import strop
from strop.audit.memory import peak_bytes, reset_peak
from strop.audit.sae import SAE
from strop.audit.survival import dictionary, reader, survival
from strop.core.files import write_json
from strop.core.machine import machine
from strop.model import Model
from strop.models.zoo import zoo_path
from strop.weights import RTN

RESULTS = Path(__file__).parent / "results" / "audit.json"
TURNS = {"fp32": 7, "bf16": 1}
LENGTHS = (5_120, 51_200)
WIDTH = 256


def pair(dtype: str) -> tuple[Model, Model]:
    """The bundled coder, and with weights of 4 bits."""
    base = strop.load("zoo:coder", dtype)
    return base, base.with_(weights=RTN(bits=4, group=128))


def tokens(lm: Model, count: int) -> torch.Tensor:
    """Sequences of drawn tokens: what they say costs no time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(lm.vocabulary, (count // WIDTH, WIDTH), generator=generator)


def audited(base: Model, lm: Model, rows: torch.Tensor) -> None:
    """One audit."""
    sae = SAE.load(zoo_path("coder-sae"))
    with torch.no_grad():
        survival(reader(base, sae.layer), reader(lm, sae.layer), dictionary(sae), sae.m, rows)


@torch.no_grad()
def bare(base: Model, lm: Model, rows: torch.Tensor) -> None:
    """Both models read the same tokens, and nothing else."""
    for model in (base, lm):
        for part in rows.split(8):
            model.model(part, use_cache=False)


def seconds(work: Callable[[], None]) -> float:
    """Processor time."""
    start = time.process_time()
    work()
    return time.process_time() - start


def costs(dtype: str) -> dict[str, Any]:
    """Time a token of both, and their ratio turn by turn."""
    base, lm = pair(dtype)
    rows = tokens(base, 2048)
    ways = [lambda: bare(base, lm, rows), lambda: audited(base, lm, rows)]
    turns = np.array([[seconds(way) for way in ways] for _ in range(TURNS[dtype] + 1)][1:])
    ratios = turns[:, 1] / turns[:, 0]
    micros = 1e6 * np.median(turns, axis=0) / rows.numel()
    return {
        "dtype": dtype,
        "bare_us": float(micros[0]),
        "audit_us": float(micros[1]),
        "ratio": median(ratios),
        "ratios": [float(ratio) for ratio in sorted(ratios)],
    }


def peak(count: int) -> int:
    """Peak memory of an audit of so many tokens, in bytes."""
    base, lm = pair("fp32")
    reset_peak(base.device)
    audited(base, lm, tokens(base, count))
    return peak_bytes(base.device)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peak", type=int, help="only the memory at so many tokens")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.peak:
        print(peak(asked.peak))
        return
    times = []
    for dtype in TURNS:
        times.append(costs(dtype))
        print(times[-1], flush=True)
    memory = []
    for count in LENGTHS:
        command = [sys.executable, __file__, "--peak", str(count)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        memory.append({"tokens": count, "peak_bytes": int(said)})
    sae = SAE.load(zoo_path("coder-sae"))
    found = {"features": sae.m, "width": sae.d, "time": times, "memory": memory, "machine": machine()}
    write_json(RESULTS, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
