"""Compare eviction here with kvpress on one bundled model and the same prompts.

    python docs/measure_kvpress.py --peer .peers/kvpress/bin/python --out docs/results/kv-kvpress.json

kvpress pins an older transformers, so it runs in an environment of its own (pip install kvpress). Each side
loads zoo:coder and continues the same token ids greedily, token by token; one prompt is read by both in turn
before the next, so that times interleave. Agreement is the share of a side's own full-cache continuation that
is repeated before the first departure; bytes are those of all tensors in the cache at the end; time is a
median over steps, stated as a ratio to the side's own full cache. kvpress cuts the prompt behind the prefill
and then every 64 steps, as strop does.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "zoo" / "coder"
PROMPTS, PROMPT, NEW = 8, 768, 256
BUDGETS = (256, 512)
BUFFER = 64
SCORERS = ("full", "snapkv", "knorm", "keydiff", "streaming", "random", "rkv", "vase", "vase in kvarn k4v4")
"""Each side runs those that it has."""

Continue = Callable[[list[int], str, int], dict]


def greedy(step: Callable[[torch.Tensor, int], torch.Tensor], ids: list[int]) -> tuple[list[int], float]:
    """Tokens written after a prompt, and the median seconds of a step."""
    logits, written, seconds = step(torch.tensor([ids]), 0), [], []
    for index in range(NEW):
        written.append(int(logits[0, -1].argmax()))
        start = time.perf_counter()
        logits = step(torch.tensor([[written[-1]]]), len(ids) + index)
        seconds.append(time.perf_counter() - start)
    return written, float(np.median(seconds))


def with_strop() -> Continue:
    """This side: caches that evict."""
    import strop
    from strop.core.cache import tensor_bytes
    from strop.kv import RKV, KVarN, RandomEviction, SnapKV, StreamingLLM, VaSE

    base = strop.load("zoo:coder")
    kinds = {
        "snapkv": SnapKV,
        "streaming": StreamingLLM,
        "random": RandomEviction,
        "rkv": RKV,
        "vase": VaSE,
        "vase in kvarn k4v4": lambda budget: VaSE(budget=budget, store=KVarN(bits=4, group=BUFFER)),
    }

    def go_on(ids: list[int], scorer: str, budget: int) -> dict | None:
        if scorer != "full" and scorer not in kinds:
            return None
        lm = base if scorer == "full" else base.with_(kv=kinds[scorer](budget=budget))
        cache = lm.new_cache()

        def step(tokens: torch.Tensor, at: int) -> torch.Tensor:
            return lm.model(tokens, past_key_values=cache, logits_to_keep=1).logits

        written, seconds = greedy(step, ids)
        return {"ids": written, "seconds": seconds, "bytes": tensor_bytes(cache.layers)}

    return go_on


def with_kvpress() -> Continue:
    """The peer: presses over transformers' own cache; its SnapKV wants a window below the interval."""
    import contextlib

    import kvpress
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).eval()
    kinds = {
        "snapkv": lambda ratio: kvpress.SnapKVPress(compression_ratio=ratio, window_size=BUFFER // 2),
        "knorm": lambda ratio: kvpress.KnormPress(compression_ratio=ratio),
        "keydiff": lambda ratio: kvpress.KeyDiffPress(compression_ratio=ratio),
        "streaming": lambda ratio: kvpress.StreamingLLMPress(compression_ratio=ratio),
        "random": lambda ratio: kvpress.RandomPress(compression_ratio=ratio, seed=0),
    }

    def press(scorer: str, budget: int) -> contextlib.AbstractContextManager:
        if scorer == "full":
            return contextlib.nullcontext()
        decoding = kvpress.DecodingPress(
            base_press=kinds[scorer](0.0),
            compression_interval=BUFFER,
            target_size=budget,
            hidden_states_buffer_size=BUFFER,
        )
        prefill = kinds[scorer](1 - budget / PROMPT)
        return kvpress.PrefillDecodingPress(prefilling_press=prefill, decoding_press=decoding)(model)

    def go_on(ids: list[int], scorer: str, budget: int) -> dict | None:
        if scorer != "full" and scorer not in kinds:
            return None
        cache = DynamicCache()

        def step(tokens: torch.Tensor, at: int) -> torch.Tensor:
            where = torch.arange(at, at + tokens.shape[1])
            return model(
                tokens,
                past_key_values=cache,
                position_ids=where[None],
                cache_position=where,
                logits_to_keep=1,
            ).logits

        with press(scorer, budget):
            written, seconds = greedy(step, ids)
        held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        return {"ids": written, "seconds": seconds, "bytes": sum(x.numel() * x.element_size() for x in held)}

    return go_on


SIDES = {"strop": with_strop, "kvpress": with_kvpress}


@torch.no_grad()
def serve(side: str) -> None:
    """Answer requests, one JSON a line, until there are no more."""
    go_on = SIDES[side]()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(go_on(**json.loads(line))), flush=True)


class Worker:
    """One side, in a process of its own."""

    def __init__(self, python: str, side: str) -> None:
        command = [python, __file__, "--side", side]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def answer(self) -> dict | None:
        """The next JSON line that the process writes."""
        return json.loads(self.process.stdout.readline())

    def ask(self, **request: object) -> dict | None:
        """Send a request and wait for its answer; None where the side has no such scorer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()


def compare(peer: str) -> list[dict]:
    """One row a side, scorer and budget."""
    from rich.progress import track

    import strop
    from strop.audit.quality import agreement
    from strop.tasks.data import bundled
    from strop.tune.workload import build

    base = strop.load("zoo:coder")
    texts = build(base, bundled("zoo:coder"), PROMPT, 1, 0).texts[:PROMPTS]
    workers = {"strop": Worker(sys.executable, "strop"), "kvpress": Worker(peer, "kvpress")}
    found: dict[tuple[str, str, int], list[dict]] = {}
    plan = [(scorer, budget) for scorer in SCORERS for budget in (BUDGETS if scorer != "full" else (PROMPT,))]
    for text in track(texts, description="prompts"):
        for scorer, budget in plan:
            for side, worker in workers.items():
                if answer := worker.ask(ids=list(text[:PROMPT]), scorer=scorer, budget=budget):
                    found.setdefault((side, scorer, budget), []).append(answer)
    rows = []
    for (side, scorer, budget), answers in found.items():
        whole = found[side, "full", PROMPT]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(answers, whole, strict=True)]
        rows.append({
            "side": side,
            "scorer": scorer,
            "budget": budget,
            "bytes": max(answer["bytes"] for answer in answers),
            "agreement": agreement([a["ids"] for a in whole], [a["ids"] for a in answers]),
            "step_ms": 1000 * float(np.median([a["seconds"] for a in answers])),
            "step_ratio": float(np.median(ratios)),
        })  # fmt: skip
    return rows


def main() -> None:
    """Run one side, or compare both and write one JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", help="the Python of an environment that has kvpress")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.side:
        serve(args.side)
        return
    if not args.peer or not args.out:
        parser.error("give --peer and --out")
    from strop.core.files import atomic
    from strop.core.machine import machine

    rows = compare(args.peer)
    with atomic(args.out) as file:
        file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
