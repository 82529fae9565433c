"""Write the measured tables into README and docs, between `<!-- NAME -->` and `<!-- end NAME -->`.

    python docs/report.py

Reads docs/results/*.json, which `make report` measures; a table whose file is missing keeps what it says.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from report_audit import TABLES as AUDIT
from report_fleet import TABLES as FLEET
from report_prune import TABLES as PRUNE
from report_speed import (
    decode,
    drafts,
    encode,
    evict,
    measured_on,
    serve,
    speculation,
    steps,
    table,
    trees,
)
from report_weights import WEIGHTS

from strop.claims import PAPERS
from strop.claims.base import VERDICTS

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", *sorted(HERE.glob("*.md")))


def demo(study: dict[str, Any]) -> str:
    """The frontier of the demo."""
    rows = []
    for row in study["rows"]:
        if row["status"] != "measured":
            rows.append([row["label"], f"{row['status']}: {row['reason']}", "", "", "", ""])
            continue
        quality, speed, memory = row["quality"], row["speed"], row["memory"]
        step, low, high = speed["step_ratio"]
        rows.append(
            [
                f"**{row['label']}**" if row["chosen"] else row["label"],
                f"{quality['ppl_rise']:z.2%} (≤ {quality['ppl_rise_hi']:.2%})",
                f"{quality['kl']:.4f}",
                f"{memory['ratio']:.2f}",
                f"{memory['kv_bits_per_element']:.1f}",
                f"{step:.2f} ({low:.2f} to {high:.2f})",
            ]
        )
    head = [
        "recipe",
        "perplexity rise (upper limit)",
        "KL, nats/token",
        "memory ratio",
        "KV bits",
        "step-time ratio",
    ]
    settings = study["settings"]
    where = f"`{settings['command']}`, context {settings['context']}, {study['model']['dtype']}."
    return f"{table(head, rows)}\n\n{where} {measured_on(study['machine'])}"


def kv(results: dict[str, Any]) -> str:
    """KV methods side by side on `coder` and `reasoner`."""
    rows = []
    for row in results["rows"]:
        sizes = [f"{size['measured']:.0f} ({size['mean']:.0f})" for size in row["bytes_per_token"].values()]
        kl, low, high = row["kl"]
        single = f"{row['kl_by']['token']:.4f} ({row['kl_by']['block']:.4f})"
        rows.append(
            [
                row["model"],
                row["method"],
                *sizes,
                f"{kl:.4f} ({low:.4f} to {high:.4f})",
                single,
                "{} of {}".format(*row["solved"]) if row["solved"] else "-",
            ]
        )
    contexts = [f"bytes/token at {context} (mean)" for context in results["rows"][0]["bytes_per_token"]]
    single = "KL of one text by tokens (by blocks)"
    head = ["model", "kv method", *contexts, "KL, nats/token (95 %)", single, "exact match"]
    return f"{table(head, rows)}\n\n`python docs/measure_kv.py`. {measured_on(results['machine'])}"


def kvpress(results: dict[str, Any]) -> str:
    """Eviction here and in kvpress, at equal budgets."""
    rows = [
        [
            row["scorer"],
            "-" if row["scorer"] == "full" else str(row["budget"]),
            row["side"],
            f"{row['bytes'] / 1024:.0f} KiB",
            f"{row['agreement']:.0%}",
            f"{row['step_ms']:.2f} ms",
            f"{row['step_ratio']:.2f}",
        ]
        for row in sorted(results["rows"], key=lambda row: (row["budget"], row["scorer"]))
    ]
    head = [
        "scorer",
        "budget",
        "in",
        "cache at the end",
        "agreement with its full cache",
        "step",
        "step ratio",
    ]
    return f"{table(head, rows)}\n\n`python docs/measure_kvpress.py`. {measured_on(results['machine'])}"


def claims(results: dict[str, Any]) -> str:
    """Every claim with its verdict, a section a paper."""
    head = ["claim", "paper", "measured", "95 % interval", "verdict"]
    sections = []
    for paper in _papers(results):
        rows = [_claim(claim) for claim in results["claims"] if claim["paper"] == paper]
        where = (
            f"{part}: {measured_on(machine)}"
            for part, machine in results["machines"].items()
            if part.partition(",")[0] == paper
        )
        sections.append(f"## {paper}\n\n{table(head, rows)}\n\n{' '.join(where)}")
    return f"\n`strop claims`, scale {results['claims'][0]['scale']}.\n\n" + "\n\n".join(sections) + "\n"


def _papers(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(claim["paper"] for claim in results["claims"]))


def _claim(claim: dict[str, Any]) -> list[str]:
    span = "-" if claim["interval"] is None else "{:.3g} to {:.3g}".format(*claim["interval"])
    verdict = f"**{claim['verdict']}**: {claim['reason']}"
    return [claim["claim"], claim["paper_value"], claim["measured"], span, verdict]


def short(results: dict[str, Any]) -> str:
    """How many claims of each paper got which verdict."""
    tally = Counter((claim["paper"], claim["verdict"]) for claim in results["claims"])
    rows = [
        [f"[{paper}](docs/claims.md#{paper})", *(str(tally[paper, verdict] or "") for verdict in VERDICTS)]
        for paper in _papers(results)
    ]
    return table(["paper", *VERDICTS], rows)


def verdicts(results: dict[str, Any], paper: str) -> str:
    """How many claims of a paper got which verdict, in one line."""
    tally = Counter(claim["verdict"] for claim in results["claims"] if claim["paper"] == paper)
    return ", ".join(f"{count} {verdict}" for verdict, count in tally.items())


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "demo": ("demo.json", demo),
    "kv": ("kv.json", kv),
    "steps": ("kv-speed.json", steps),
    "decode": ("gpu-kvarn.json", decode),
    "encode": ("gpu-kvarn.json", encode),
    "evict": ("gpu-evict.json", evict),
    "serve": ("gpu-evict.json", serve),
    "kvpress": ("kv-kvpress.json", kvpress),
    "speculation": ("speculation.json", speculation),
    "trees": ("gpu-speculation.json", trees),
    "drafts": ("gpu-speculation.json", drafts),
    "claims": ("claims.json", claims),
    "short": ("claims.json", short),
    **{paper: ("claims.json", partial(verdicts, paper=paper)) for paper in PAPERS},
    **WEIGHTS,
    **AUDIT,
    **FLEET,
    **PRUNE,
}


def main() -> None:
    """Fill in every table whose results exist."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, (file, render) in TABLES.items():
            path = HERE / "results" / file
            if path.exists():
                body = render(json.loads(path.read_text(encoding="utf-8")))
                edge = "\n" if "\n" in body else ""
                block = f"<!-- {name} -->{edge}{body}{edge}<!-- end {name} -->"
                text = re.sub(
                    rf"<!-- {name} -->.*?<!-- end {name} -->", lambda _, block=block: block, text, flags=re.S
                )
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
