"""Measure ways to decode side by side, transformers' own and strop's, on the bundled coder and its drafters.

    python docs/measure_speculation.py --out docs/results/speculation.json [--files 20] [--tokens 128]

Every way continues the same held-out files; ways take turns on each file, in alternating order, and are
compared by CPU seconds of the whole call, the prompt included, for that is what a user pays. `transformers
dflash` is transformers' own loop (`speculation_type="dflash"`) around the same drafter.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

import strop
from strop.claims.stock import TransformersDFlash
from strop.core.files import atomic
from strop.core.intervals import bootstrap
from strop.core.machine import machine
from strop.core.sampling import KeyedSampler
from strop.decode import Chain, FixedBudget, load_drafter, speculative
from strop.decode.stats import Stats
from strop.kv import KVarN
from strop.tasks import python_source

PROMPT = 256
PLAIN = "transformers generate"
BUDGETS = (4, 8, 16, 32, 64)
DRAFTERS = ("ngram", "zoo:coder-dflash", "zoo:coder-treeflash")
Options = dict[str, Any]


def ways(model: PreTrainedModel, temperature: int) -> dict[str, Options]:
    """What `generate` is told, by way."""
    found: dict[str, Options] = {
        PLAIN: {},
        "transformers prompt lookup 3": {"prompt_lookup_num_tokens": 3},
        "transformers prompt lookup 10": {"prompt_lookup_num_tokens": 10},
    }
    dflash = load_drafter("zoo:coder-dflash", model)
    if not temperature:
        found["transformers dflash"] = {
            "speculation_type": "dflash",
            "assistant_model": TransformersDFlash(dflash),
        }
    for name in DRAFTERS:
        short = name.removeprefix("zoo:coder-")
        trees = {"chain": Chain(), "cost-aware": None}
        if name == "zoo:coder-dflash":
            trees |= {f"tree of {budget}": FixedBudget(budget) for budget in BUDGETS}
        elif name == "zoo:coder-treeflash":
            trees |= {"tree of 8": FixedBudget(8)}
        for tree, builder in trees.items():
            found[f"{short}, {tree}"] = {"custom_generate": speculative(load_drafter(name, model), builder)}
    return found


def generator(lm: strop.Model, temperature: int, tokens: int) -> Callable[[Tensor, Options], list[int]]:
    """What continues a prompt `[1, T]` in one way."""

    def continued(prompt: Tensor, options: Options) -> list[int]:
        drawn = [KeyedSampler(0, [0], [0])] if temperature else []
        out = lm.model.generate(
            prompt,
            past_key_values=lm.new_cache(),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=lm.pad,
            logits_processor=drawn,
            **options,
        )
        return out[0, prompt.shape[1] :].tolist()

    return continued


def compare(lm: strop.Model, prompts: list[Tensor], temperature: int, tokens: int, label: str) -> list[dict]:
    """One row a way."""
    found, run = ways(lm.model, temperature), generator(lm, temperature, tokens)
    seconds: dict[str, list[float]] = {way: [] for way in found}
    same, stats = dict.fromkeys(found, 0), {way: Stats() for way in found}
    for options in found.values():
        run(prompts[0], options)
    written = 0
    for index, prompt in enumerate(track(prompts, label)):
        texts = {}
        for way in list(found) if index % 2 == 0 else list(found)[::-1]:
            started = time.process_time()
            texts[way] = run(prompt, found[way])
            seconds[way].append(time.process_time() - started)
            if "custom_generate" in found[way]:
                stats[way] += found[way]["custom_generate"].stats
        written += len(texts[PLAIN])
        for way, text in texts.items():
            same[way] += text == texts[PLAIN]
    plain = np.array(seconds[PLAIN])
    rows = []
    for way, spent in seconds.items():
        pairs = np.array([plain, spent]).T
        speedup = bootstrap(pairs, lambda sample: sample[:, :, 0].sum(1) / sample[:, :, 1].sum(1))
        rows.append(
            {
                "way": way,
                "tokens_per_cpu_s": written / sum(spent),
                "speedup": speedup,
                "same": [same[way], len(prompts)],
                "stats": stats[way].to_dict() if stats[way].rounds else None,
            }
        )
    return rows


def main() -> None:
    """Measure all regimes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    rows = []
    for dtype in ("fp32", "bf16"):
        dense = strop.load("zoo:coder", dtype)
        texts = [text for text in python_source.held_out_text() if len(text) > 8 * PROMPT][: args.files]
        prompts = [torch.tensor([dense.encode(text)[:PROMPT]]) for text in texts]
        packed = dense.with_(kv=KVarN(bits_k=4, bits_v=2))
        regimes = [(dense, "dense", 0), (dense, "dense", 1)] + (
            [(packed, "kvarn k4v2", 0)] if dtype == "fp32" else []
        )
        for lm, kv, temperature in regimes:
            regime = {"dtype": dtype, "kv": kv, "temperature": temperature}
            rows += [
                regime | row
                for row in compare(lm, prompts, temperature, args.tokens, f"{dtype} {kv} T={temperature}")
            ]
    told = {"files": len(prompts), "prompt": PROMPT, "tokens": args.tokens}
    with atomic(args.out) as file:
        file.write_text(json.dumps({"machine": machine(), **told, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
