"""What the bundled language models share: the architecture, the tokenizer wrapper, the folder.

All have 4 query heads of 64 channels over 2 key-value heads, gated feed-forward layers and tied
embeddings, and are saved as ordinary transformers folders in bfloat16. `coder` and `reasoner` are
Qwen3 models, which normalise queries and keys.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from trainer import Batches, Penalty, Plan, Run
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

END, PAD = "<|endoftext|>", "<|pad|>"
CONTEXT = 2048

AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)


def shape(vocab: int, layers: int, end: int, pad: int) -> dict[str, Any]:
    """What the configurations of all bundled models have in common."""
    return {
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
        "use_cache": True,
    }


def new_model(vocab: int, layers: int, end: int, pad: int, seed: int) -> Qwen3ForCausalLM:
    """A freshly drawn float32 model; the same seed gives the same weights on every device."""
    torch.manual_seed(seed)
    config = Qwen3Config(**shape(vocab, layers, end, pad), hidden_size=256, intermediate_size=768)
    return shrink_writers(Qwen3ForCausalLM(config))


def shrink_writers(model: AnyModel) -> AnyModel:
    """Let the weights that write to the residual stream start smaller, by the root of their number."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter /= (2 * model.config.num_hidden_layers) ** 0.5
    return model


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers loads it; it adds no token of its own to a text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def parse(description: str) -> argparse.Namespace:
    """The options of all training scripts."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stdlib", type=Path, help="train on another Python's standard library")
    parser.add_argument("--weights-only", action="store_true", help="leave measures and card to a later run")
    parser.add_argument("--note", default="", help="a remark for the card on how it was run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    batches: Batches,
    plan: Plan,
    out: Path,
    args: argparse.Namespace,
    penalty: Penalty | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Train to the end, save the folder, and return the record in `training.json`.

    A folder with that record is finished: it is not trained again. `facts` go into the record.
    """
    record_path = out / "training.json"
    if record_path.is_file():
        return json.loads(record_path.read_text(encoding="utf-8"))
    cuda = args.device == "cuda"
    run = Run(model, batches, plan, out, args.device, 65536 if cuda else 2048, penalty)
    run.train()
    model.to("cpu", torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    record = {
        "plan": asdict(plan),
        **facts,
        "tokens": run.tokens,
        "minutes": round(run.seconds / 60, 1),
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "torch": torch.__version__,
        "note": args.note,
        "log": run.log,
    }
    lines = ",\n  ".join(json.dumps(entry) for entry in record.pop("log"))
    text = json.dumps(record, indent=1)[:-2] + f',\n "log": [\n  {lines}\n ]\n}}\n'
    write(record_path, text)
    run.checkpoint.unlink()
    return record | {"log": run.log}


def load(folder: Path, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A finished folder's model and tokenizer, as any user would load them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON in `path`, made and written first where it is missing."""
    if not path.is_file():
        write(path, json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def cpu_speed(
    model: PreTrainedModel, batches: Batches, plan: Plan, penalty: Penalty | None = None
) -> dict[str, Any]:
    """Training tokens a second on this machine's processor: the fastest of five steps.

    The fastest, since other programs can only slow a step down. `model` is a throwaway.
    """
    run = Run(model, batches, plan, Path("unused"), "cpu", 2048, penalty)
    speeds = []
    for _ in range(5):
        tokens, started = run.tokens, time.monotonic()
        run.one_step()
        speeds.append((run.tokens - tokens) / (time.monotonic() - started))
    return {
        "tokens_per_second": round(max(speeds)),
        "device": processor(),
        "torch": torch.__version__,
    }


def write(path: Path, text: str) -> None:
    """Replace a text file in one move, so that a kill leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def processor() -> str:
    """What the processor calls itself, and how many of its threads torch uses."""
    names = [
        line.split(":", 1)[1].strip()
        for line in (_read("/proc/cpuinfo") or "").splitlines()
        if line.startswith("model name")
    ]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def _read(path: str) -> str | None:
    return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else None
