"""Measure every paper's claims again, with the machine that they were measured on.

python docs/measure_claims.py --out docs/results/claims.json
"""

import argparse
import json
from pathlib import Path

from strop import console
from strop.claims import run_claims
from strop.core.files import atomic
from strop.core.machine import machine


def main() -> None:
    """Measure all claims and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", default="cpu", choices=("cpu", "gpu"))
    args = parser.parse_args()
    console.quiet()
    with console.progress() as report:
        found = [claim.to_dict() for claim in run_claims((), args.scale, report)]
    with atomic(args.out) as file:
        file.write_text(json.dumps(console.plain({"machine": machine(), "claims": found}), indent=1))


if __name__ == "__main__":
    main()
