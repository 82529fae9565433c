"""Measure every paper's claims again, with the machine that each paper's were measured on.

python docs/measure_claims.py --out docs/results/claims.json
"""

import argparse
import json
from pathlib import Path

from strop import console
from strop.claims import run_claims
from strop.core.executor import executor
from strop.core.files import atomic
from strop.core.machine import machine


def main() -> None:
    """Measure all claims and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--papers", nargs="*", default=[], help="only these; others stay as they are")
    parser.add_argument("--executor", default="local", choices=("local", "ray"))
    parser.add_argument("--address", help="a Ray cluster's; default: one on this machine")
    parser.add_argument("--workers", type=int, help="most parts at once on a cluster")
    args = parser.parse_args()
    where = executor(args.executor, args.address, args.workers)
    console.quiet()
    kept, machines = [], {}
    if args.papers and args.out.exists():
        held = json.loads(args.out.read_text(encoding="utf-8"))
        kept = [claim for claim in held["claims"] if claim["paper"] not in args.papers]
        machines = held["machines"]
    with console.progress() as report:
        found = [claim.to_dict() for claim in run_claims(args.papers, args.scale, report, where)]
    machines |= dict.fromkeys((claim["paper"] for claim in found), machine())
    with atomic(args.out) as file:
        file.write_text(json.dumps(console.plain({"machines": machines, "claims": kept + found}), indent=1))


if __name__ == "__main__":
    main()
