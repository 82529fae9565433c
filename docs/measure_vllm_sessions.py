"""Measure the scheduler plug-in: sessions in turns on a small cache, in vLLM with and without it.

    python docs/measure_vllm_sessions.py --vllm .peers/vllm/bin/python --out docs/results/vllm-sessions.json

A random Llama of 10 M parameters in float32; greedy. `same` is the share of tokens that are stock vLLM's.
Each run is a process of its own, so that CPU seconds do not carry over.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import chain
from operator import eq
from pathlib import Path
from typing import Any

import torch
from serve_sessions import VOCABULARY
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from strop.core.files import write_json
from strop.core.machine import machine

ROOT = Path(__file__).resolve().parents[1]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONTEXT = 2300
"""Tokens whose attention takes as many operations as a token's matrices, in this shape."""
WORK = {
    "sessions": 8,
    "turns": 5,
    "shared": 256,
    "document": 1200,
    "question": 96,
    "answer": 8,
    "chunk": 1024,
}
BLOCKS = (181, 301, 421)
"""Of 32 tokens; all sessions together fill 440 at the end."""
LIMIT_S = 900


def runs() -> dict[str, dict]:
    """What each run adds to the engine's arguments."""
    named: dict[str, dict] = {"stock": {}}
    for evictor, holes in (("lru", False), ("asymcache", False), ("asymcache", True), ("ghost", True)):
        told = {"evictor": evictor, "holes": holes, "context": CONTEXT}
        named[f"{evictor}{' + holes' if holes else ''}"] = {
            "scheduler_cls": "strop.serve.vllm_plugin.scheduler.StropScheduler",
            "additional_config": {"strop": told},
        }
    return named


def write_model(folder: Path) -> None:
    """A seeded model and the tokenizer that vLLM wants beside it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.float32).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def measured(python: str, folder: Path, blocks: int, name: str, added: dict) -> dict[str, Any]:
    """One run in a process of its own."""
    file = folder / "work.json"
    file.write_text(json.dumps(WORK | {"blocks": blocks, "runs": {name: added}}))
    argv = [python, ROOT / "docs" / "serve_sessions.py", file, folder]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not found or "refused" in found[0]:
        sys.exit(f"{name}: {found or done.stderr[-2000:]}")
    return {"blocks": blocks, **found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vllm", required=True, help="Python of an environment with vLLM")
    parser.add_argument("--out", type=Path, required=True)
    told = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch))
        for blocks in BLOCKS:
            size = [measured(told.vllm, Path(scratch), blocks, *run) for run in runs().items()]
            stock = list(chain(*size[0]["tokens"]))
            for row in size:
                written = chain(*row.pop("tokens"))
                row["same"] = sum(map(eq, stock, written)) / len(stock)
                print(json.dumps(row), flush=True)
            rows += size
    command = f"python {Path(sys.argv[0]).as_posix()} --vllm {told.vllm} --out {told.out}"
    write_json(told.out, {"command": command, "machine": machine(), "work": WORK, "rows": rows})


if __name__ == "__main__":
    main()
