"""Measure the table "what loads a quantized folder": strop's exports in transformers and in vLLM.

    python docs/measure_vllm.py --vllm .peers/vllm/bin/python --out docs/results/vllm-formats.json

Each case is a tiny seeded model in bfloat16, quantized by `quantize_checkpoint` with a grid for each matrix.
Both engines write greedily from the same prompts. `same` is the share of their tokens that the same weights,
run by strop on the same prefix, rank first; near 1 the rest are ties in bfloat16, and routers that such a tie
turned. `gap` is the largest difference of two logits by which a token missed that.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from strop.core.checkpoint import inspect
from strop.core.files import atomic
from strop.core.machine import machine, version
from strop.weights import RTN
from strop.weights.base import Report, quiet, row
from strop.weights.grid import Grid
from strop.weights.plan import BitPlan
from strop.weights.stream import quantize_checkpoint
from strop.weights.walk import Walk

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, head_dim=32),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "qwen2_moe": Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=128),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=32),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2),
}
MIXTURES = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe")
NEW_TOKENS = 16
SAME = 0.9
"""Share of equal tokens from which an engine runs the right weights."""
SURE = 8
"""Routers are scaled by this, so that rounding in bfloat16 does not change who is asked."""
LIMIT_S = 900

Rule = Callable[[str], Grid | None]
"""The grid of a matrix by its name; None leaves it at 16 bits."""


class Case(NamedTuple):
    architecture: str
    said: str
    rule: Rule | None
    """None: the checkpoint as it is."""


@dataclass(frozen=True)
class Ruled(RTN):
    """Round to nearest on the grids of a rule."""

    rule: Rule = lambda name: None

    def plan(self, walk: Walk, report: Report = quiet) -> BitPlan:
        grids = {matrix.name: self.rule(matrix.name) for matrix in walk.matrices()}
        rows = tuple(row(matrix, grid) for matrix in walk.matrices() if (grid := grids[matrix.name]))
        for name, grid in grids.items():
            if grid is None:
                del walk.targets[name]
        return BitPlan(rows=rows, method="ruled", said="by name")


INT4, WIDE, ZERO, INT8 = Grid(4, 32), Grid(4, 64), Grid(4, 32, symmetric=False), Grid(8, 32)


def every(grid: Grid) -> Rule:
    return lambda name: grid


def where(part: str, grid: Grid | None, other: Grid | None) -> Rule:
    """`grid` for the matrices whose name holds `part`."""
    return lambda name: grid if part in name else other


def by_layer(name: str) -> Grid:
    """Experts of layer 0 at 8 bits, all else at 4."""
    return INT8 if "layers.0." in name and ".experts." in name else INT4


def cases() -> list[Case]:
    """Grids that dense models share, grids that differ within one, then mixtures of experts."""
    grids = [Grid(bits, 32) for bits in (2, 3, 4, 8)] + [Grid(4, 64), Grid(4, 128), Grid(4), Grid(8)]
    grids += [Grid(bits, 32, symmetric=False) for bits in (2, 4, 8)] + [Grid(4, symmetric=False)]
    found = [Case("llama", f"all {grid}", every(grid)) for grid in grids]
    found += [
        Case("llama", "as is", None),
        Case("qwen3", f"all {INT4}", every(INT4)),
        Case("llama", f"layer 0 {INT4}, layer 1 {WIDE}", where("layers.0.", INT4, WIDE)),
        Case("llama", f"layer 0 {INT4}, layer 1 16 bits", where("layers.0.", INT4, None)),
        Case("llama", f"layer 0 {INT4}, layer 1 {INT8}", where("layers.0.", INT4, INT8)),
        Case("llama", f"down {WIDE}, rest {INT4}", where("down_proj", WIDE, INT4)),
        Case("llama", f"query {WIDE}, rest {INT4}", where("q_proj", WIDE, INT4)),
        Case("llama", f"gate {WIDE}, rest {INT4}", where("gate_proj", WIDE, INT4)),
    ]
    for name in MIXTURES:
        found += [
            Case(name, "as is", None),
            Case(name, f"all {INT4}", every(INT4)),
            Case(name, f"attention {INT4}, rest 16 bits", where("self_attn", INT4, None)),
            Case(name, f"attention {WIDE}, rest {INT4}", where("self_attn", WIDE, INT4)),
            Case(name, f"experts of layer 0 {INT8}, rest {INT4}", by_layer),
        ]
    found += [
        *(Case("qwen3_moe", f"all {grid}", every(grid)) for grid in (Grid(2, 32), INT8, Grid(4), ZERO)),
        Case("qwen3_moe", f"experts {INT4}, rest 16 bits", where(".experts.", INT4, None)),
        Case("qwen2_moe", f"shared expert {INT4}, rest 16 bits", where("shared_expert.", INT4, None)),
        Case("qwen3_moe", f"expert 0 {INT8}, rest {INT4}", where(".experts.0.", INT8, INT4)),
    ]
    return found


def original(architecture: str, folder: Path) -> Path:
    """The folder of a seeded model with a tokenizer."""
    if folder.exists():
        return folder
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            weight.data *= SURE
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SHAPE["vocab_size"])}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def judged(reference: PreTrainedModel, prompts: Tensor, tokens: list[list[int]]) -> dict[str, Any]:
    """How many of `tokens` the reference would have written after the same prefix."""
    written = torch.tensor(tokens)
    ids = torch.cat([prompts, written], dim=1)
    logits = reference(ids).logits[:, prompts.shape[1] - 1 : -1].float()
    gaps = logits.amax(-1) - logits.gather(-1, written[..., None])[..., 0]
    same = float((gaps == 0).float().mean())
    return {"verdict": "right" if same >= SAME else "wrong", "same": same, "gap": float(gaps.max())}


def refused(reason: str) -> dict[str, Any]:
    return {"verdict": "refused", "reason": reason[:400]}


def in_transformers(folder: Path, reference: PreTrainedModel, prompts: Tensor) -> dict[str, Any]:
    """A row's part on transformers, as a user without strop would load the folder."""
    try:
        out = load(folder).generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    except (RuntimeError, ValueError, AttributeError, AssertionError) as error:
        return refused(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return judged(reference, prompts, out[:, prompts.shape[1] :].tolist())


def in_vllm(interpreter: str, folders: list[Path], prompts: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What vLLM is, and its tokens or the reason of its refusal for each folder."""
    found: dict[str, Any] = {}
    about: dict[str, Any] = {}
    script = Path(__file__).with_name("serve_vllm.py")
    while left := [folder for folder in map(str, folders) if folder not in found]:
        argv = [interpreter, str(script), str(prompts), str(NEW_TOKENS), *left]
        run = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S)
        said = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        new = {line["folder"]: line for line in said if "folder" in line}
        died = {"refused": f"the process ended with {run.returncode}: {run.stderr[-200:]}"}
        found |= new or {left[0]: died}
        about |= next((line["versions"] for line in said if "versions" in line), {})
        print(f"vLLM: {len(found)} of {len(folders)}", flush=True)
    return about, found


def exported(case: Case, root: Path, number: int) -> tuple[Path, PreTrainedModel, dict[str, Any]]:
    """A case's folder, the same weights in memory, and what the exporter says of it."""
    source = original(case.architecture, root / case.architecture)
    if case.rule is None:
        return source, load(source), {}
    method, folder = Ruled(rule=case.rule), root / f"case-{number}"
    said = quantize_checkpoint(inspect(source), method, folder, "")
    readers = {"engines": list(said.readers.engines), "said": list(said.readers.said)}
    return folder, method.apply(load(source)), {"exporter": readers}


def measure(interpreter: str, root: Path) -> dict[str, Any]:
    prompts = torch.randint(SHAPE["vocab_size"], (8, 12), generator=torch.Generator().manual_seed(0))
    (root / "prompts.json").write_text(json.dumps(prompts.tolist()))
    rows, references, folders = [], [], []
    for number, case in enumerate(track(cases(), description="transformers")):
        folder, reference, said = exported(case, root, number)
        theirs = in_transformers(folder, reference, prompts)
        rows.append({"architecture": case.architecture, "grids": case.said, **said, "transformers": theirs})
        references.append(reference)
        folders.append(folder)
    about, found = in_vllm(interpreter, folders, root / "prompts.json")
    for line, reference, folder in zip(rows, references, folders, strict=True):
        got = found[str(folder)]
        line["vllm"] = (
            judged(reference, prompts, got["tokens"]) if "tokens" in got else refused(got["refused"])
        )
    here = machine() | {"compressed-tensors": version("compressed-tensors")}
    return {"machine": here, "vllm": about, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", required=True, help="an interpreter that imports vllm")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        result = measure(args.vllm, Path(root))
    command = f"python {Path(sys.argv[0]).as_posix()} --vllm {args.vllm} --out {args.out}"
    with atomic(args.out) as temporary:
        temporary.write_text(json.dumps({"command": command, **result}, indent=1) + "\n")
    for line in result["rows"]:
        verdicts = (line[engine]["verdict"] for engine in ("transformers", "vllm"))
        print(line["architecture"], line["grids"], *verdicts, sep=" | ")


if __name__ == "__main__":
    main()
