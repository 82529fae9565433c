"""Quantize one folder with llm-compressor and say how long its parts took; runs in its own interpreter.

    .peers/llmcompressor/bin/python docs/quantize_peer.py '{"folder": ..., "out": ..., "method": "rtn", ...}'

Methods: `rtn` (`oneshot` without data), `gptq` (`oneshot` on the token ids in the file `rows`), `model-free`
(`model_free_ptq`, shard by shard); W4A16 in groups of 128, all else at its defaults. Fused experts are split
by `oneshot` itself. The last line is JSON: `seconds` by part, without imports, and versions.
"""

import json
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from datasets import Dataset
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")
IGNORED = ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$"]
FREE_IGNORED = [*IGNORED, "re:.*embed_tokens$"]
AT_ONCE = 8
"""Sequences of calibration text that run together, as in strop."""


def quantize(job: dict[str, Any]) -> dict[str, float]:
    """Seconds by part."""
    marks = [time.perf_counter()]
    if job["method"] == "model-free":
        model_free_ptq(job["folder"], job["out"], scheme="W4A16", ignore=FREE_IGNORED)
        return {"load, quantize, save": time.perf_counter() - marks[0]}
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype="auto")
    marks.append(time.perf_counter())
    told: dict[str, Any] = {"targets": "Linear", "scheme": "W4A16", "ignore": IGNORED}
    if job["method"] == "rtn":
        oneshot(model=model, recipe=QuantizationModifier(**told))
    else:
        ids = json.loads(Path(job["rows"]).read_text())
        data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
        oneshot(
            model=model,
            dataset=data,
            num_calibration_samples=len(ids),
            max_seq_length=len(ids[0]),
            shuffle_calibration_samples=False,
            batch_size=AT_ONCE,
            recipe=GPTQModifier(**told),
        )
    marks.append(time.perf_counter())
    model.save_pretrained(job["out"], save_compressed=True)
    marks.append(time.perf_counter())
    return {
        part: after - before
        for part, before, after in zip(("load", "quantize", "save"), marks, marks[1:], strict=False)
    }


def main(told: str) -> None:
    """Quantize as the job says."""
    job = json.loads(told)
    seconds = quantize(job)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(job["folder"]) / name, Path(job["out"]) / name)
    versions = {package: metadata.version(package) for package in PACKAGES}
    print("\n" + json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main(sys.argv[1])
