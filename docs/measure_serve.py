"""Measure `strop serve` under load: what clients get beside clients that misbehave, and whether memory stays.

    python docs/measure_serve.py --streams 200 --minutes 10 --out docs/results/serve.json

A server of the bundled coder in float32 with `kvarn k4v4` runs beside it on 127.0.0.1. `streams` clients ask
in a closed loop for streamed texts to fixed prompts, greedy and drawn; meanwhile clients hang, lie about
their length, send garbage, and leave in mid-stream. Each text is compared to what `Model.generate` writes for
the prompt alone. `gaps` says of greedy texts that differ by how much the first other token was behind in the
scores: 0 is a tie. `tokens` are those of whole texts of clients that behave; `tokens_of_all` are also those
of clients that left and of texts under way at the end. `--guidellm BIN` lets that benchmark ask too, once,
afterwards.
"""

import argparse
import asyncio
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families
from serve_clients import NEW, SEED, TEMPERATURE, Load, prompts

from strop.core.files import atomic
from strop.core.machine import machine, version
from strop.model import Model, load
from strop.models.zoo import zoo_path

RECIPE = "strop: 1\nmodel: zoo:coder\nkv: {kvarn: {bits_k: 4, bits_v: 4}}\n"
WARM = 0.2
"""Share of the time after which memory should not grow."""


def alone(lm: Model, asked: list[str]) -> tuple[dict[tuple[int, bool], str], float]:
    """What each prompt becomes by itself, and tokens a second, one after the other."""
    expected, tokens, start = {}, 0, time.perf_counter()
    for drawn in (False, True):
        for i, prompt in enumerate(asked):
            chance: dict[str, Any] = {"seed": SEED, "temperature": TEMPERATURE} if drawn else {}
            ids = lm.generate_ids([lm.encode(prompt)], NEW, **chance, eos_token_id=[lm.vocabulary])[0]
            tokens += len(ids)
            expected[i, drawn] = lm.tokenizer.decode(ids, skip_special_tokens=True)
    seconds = time.perf_counter() - start
    return expected, tokens / seconds


def gaps(lm: Model, asked: list[str], expected: dict, other: dict) -> list[float]:
    """By how much the first token that differs was behind, of each greedy text that differs."""
    found = []
    for key, text in other.items():
        if key[1]:
            continue
        ours, theirs = (lm.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (expected[key], text))
        at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if at is None:
            found.append(math.inf)
            continue
        ids = torch.tensor([lm.encode(asked[key[0]]) + ours[:at]])
        with torch.no_grad():
            scores = lm.model(ids, past_key_values=lm.new_cache()).logits[0, -1].float()
        found.append(float(scores.max() - scores[theirs[at]]))
    return found


def quantiles(numbers: list[float]) -> dict[str, float]:
    ranked = sorted(numbers)
    return {f"p{share}": ranked[min(len(ranked) * share // 100, len(ranked) - 1)] for share in (50, 90, 99)}


def memory_row(samples: list[tuple[float, float]]) -> dict[str, Any]:
    """Memory once warm: its range, and how much a minute adds by least squares."""
    warm = [pair for pair in samples if pair[0] >= WARM * samples[-1][0]]
    slope = statistics.linear_regression(*zip(*warm, strict=True)).slope
    sizes = [size for _, size in warm]
    return {
        "start_mib": samples[0][1],
        "warm_min_mib": min(sizes),
        "warm_max_mib": max(sizes),
        "last_mib": sizes[-1],
        "mib_per_minute": 60 * slope,
        "samples": [[round(at), round(size, 1)] for at, size in samples[:: max(len(samples) // 60, 1)]],
    }


def guidellm(binary: Path, url: str, out: Path) -> dict[str, Any]:
    """What that benchmark says of 64 requests in 16 streams, offline."""
    target = f"target={url.removesuffix('/v1')},model=recipe.yaml,request_format=/v1/completions"
    command = [
        str(binary), "run", "--disable-console-interactive",
        "--backend", f"kind=openai_http,{target}",
        "--profile", "kind=concurrent,streams=16",
        "--constraint", "kind=max_requests,count=64",
        "--tokenizer", f"kind=huggingface_auto,model={zoo_path('coder')}",
        "--data", "kind=synthetic_text,prompt_tokens=128,output_tokens=64",
        "--output", f"kind=json,path={out}",
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, timeout=300)
    report = json.loads(out.read_text(encoding="utf-8"))
    metrics = report["benchmarks"][0]["metrics"]
    return {
        "command": shlex.join(command).replace(str(out), "OUT").replace(str(zoo_path("coder")), "zoo/coder"),
        "metrics": _short(metrics),
    }


def _short(metrics: dict[str, Any]) -> dict[str, Any]:
    """Medians and means of what succeeded."""
    kept = {}
    for name, found in metrics.items():
        good = found.get("successful") if isinstance(found, dict) else None
        if isinstance(good, dict) and "median" in good:
            kept[name] = {"mean": good["mean"], "median": good["median"]}
        elif isinstance(found, dict) and "successful" in found:
            kept[name] = found
    return kept


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--guidellm", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/results/serve.json"))
    return parser.parse_args()


def written(port: int) -> float:
    """Tokens that the server wrote so far, as its metrics have it."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == "vllm:generation_tokens_total")


def serve(options: argparse.Namespace, recipe: Path, asked: list[str], expected: Any) -> dict[str, Any]:
    """What clients of a server saw, and what it took."""
    command = [
        sys.executable,
        "-m",
        "strop",
        "serve",
        str(recipe),
        "--dtype",
        "fp32",
        "--port",
        "0",
        "--json",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            facts = json.loads(server.stdout.readline())
            clients = Load(urlsplit(facts["url"]).port or 0, asked, expected)
            start, process = time.perf_counter(), psutil.Process(server.pid)
            memory = asyncio.run(clients.run(options.streams, 60 * options.minutes, process))
            seconds, tokens = time.perf_counter() - start, written(clients.port)
            peer = None
            if options.guidellm:
                peer = guidellm(options.guidellm, facts["url"], recipe.with_name("guidellm.json"))
        finally:
            server.terminate()
            code = server.wait(60)
    tally = clients.tally
    return {
        "streams": options.streams,
        "seconds": seconds,
        "texts": tally.texts,
        "tokens": tally.texts * NEW,
        "tokens_per_s": tally.texts * NEW / seconds,
        "tokens_of_all": tokens,
        "first_token_s": quantiles(tally.first_s),
        "whole_s": quantiles(tally.whole_s),
        "errors": dict(tally.errors),
        "texts_that_differ": tally.others,
        "other": tally.other,
        "misbehaved": dict(tally.disturbed),
        "memory": memory_row(memory),
        "exit_code": code,
        "guidellm": peer,
    }


def main() -> None:
    options, asked = arguments(), prompts()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        recipe = Path(place) / "recipe.yaml"
        recipe.write_text(RECIPE, encoding="utf-8")
        lm = load(recipe, "fp32")
        expected, _ = alone(lm, asked)  # kernels are compiled
        before = alone(lm, asked)[1]
        served = serve(options, recipe, asked, expected)
        after = alone(lm, asked)[1]
    other = served.pop("other")
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "recipe": lm.recipe.to_dict(),
        "dtype": "float32",
        "new_tokens": NEW,
        "prompt_tokens": [len(lm.encode(prompt)) for prompt in asked],
        "machine": machine() | {name: version(name) for name in ("starlette", "uvicorn", "h11")},
        "load_average": os.getloadavg(),
        "alone_tokens_per_s": [before, after],
        "served": served | {"prompts_that_differ": len(other), "gaps": gaps(lm, asked, expected, other)},
        "speedup": sorted(served["tokens_per_s"] / one for one in (before, after)),
    }
    with atomic(options.out) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
