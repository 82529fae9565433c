"""What strop writes, in a real vLLM: exported folders and command lines. Skipped where vLLM is not installed.

vLLM lives in an environment of its own: this interpreter, that of $STROP_VLLM_PYTHON, or `.peers/vllm`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

from strop.core.checkpoint import inspect
from strop.decode import DFlash, PromptLookup
from strop.engines import vllm_command
from strop.recipe import Recipe
from strop.weights import RTN
from strop.weights.base import quiet, row
from strop.weights.grid import Grid
from strop.weights.plan import BitPlan
from strop.weights.stream import quantize_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / ".peers" / "vllm" / "bin" / "python"
NEW_TOKENS = 16
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128),
}
PARSE = """
import sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
args = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", *sys.argv[1:]])
told = AsyncEngineArgs.from_cli_args(args).create_engine_config().speculative_config
print("TOLD", told.method, told.num_speculative_tokens, told.prompt_lookup_min, told.prompt_lookup_max)
"""


def interpreter() -> str | None:
    """A Python that imports vLLM."""
    if named := os.environ.get("STROP_VLLM_PYTHON"):
        return named
    if importlib.util.find_spec("vllm"):
        return sys.executable
    return str(PEER) if PEER.exists() else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(interpreter() is None, reason="vLLM is not installed: see STROP_VLLM_PYTHON"),
]


@dataclass(frozen=True)
class ByLayer(RTN):
    """4 bits, in groups of 64 in layer 0 and of 128 in layer 1."""

    def plan(self, walk, report=quiet):
        rows = [row(m, Grid(4, 64 if ".layers.0." in m.name else 128)) for m in walk.matrices()]
        return BitPlan(rows=tuple(rows), method="by layer", said="groups differ by layer")


METHODS = {
    "llama-uniform": ("llama", RTN(bits=4, group=32)),
    "llama-zeros": ("llama", RTN(bits=4, group=32, symmetric=False)),
    "llama-by-layer": ("llama", ByLayer()),
    "qwen3_moe-uniform": ("qwen3_moe", RTN(bits=4, group=64)),
    "qwen3_moe-by-layer": ("qwen3_moe", ByLayer()),
}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def original(architecture, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


@torch.no_grad()
def same(model, prompts, tokens):
    """The share of `tokens` that `model` ranks first after the same prefix; ties in bfloat16 cost some."""
    written = torch.tensor(tokens)
    logits = model(torch.cat([prompts, written], dim=1)).logits[:, prompts.shape[1] - 1 : -1]
    return float((logits.amax(-1) == logits.gather(-1, written[..., None])[..., 0]).float().mean())


def lines(*argv):
    run = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert found, run.stderr[-2000:]
    return found


@pytest.mark.parametrize(("architecture", "method"), METHODS.values(), ids=METHODS)
def test_vllm_writes_what_the_quantized_model_writes(architecture, method, tmp_path):
    source = original(architecture, tmp_path / "original")
    folder = tmp_path / "quantized"
    quantize_checkpoint(inspect(source), method, folder, "")
    prompts = torch.randint(96, (8, 12), generator=torch.Generator().manual_seed(0))
    (tmp_path / "prompts.json").write_text(json.dumps(prompts.tolist()))
    serve = ROOT / "docs" / "serve_vllm.py"
    told, said = lines(interpreter(), serve, tmp_path / "prompts.json", str(NEW_TOKENS), folder)

    about = told["versions"]
    if architecture == "qwen3_moe" and about["device"] == "cpu" and not about["amx"]:
        assert "No WNA16 MoE backend" in said["refused"]
        return
    assert same(method.apply(load(source)), prompts, said["tokens"]) >= 0.9
    assert same(load(source), prompts, said["tokens"]) < 0.85


@pytest.mark.parametrize(
    ("decode", "said"),
    [
        (PromptLookup(tokens=7, ngram=3), "ngram 7 1 3"),
        (DFlash(drafter="zoo:coder-dflash"), "dflash 7 0 0"),
        (DFlash(drafter="zoo:coder", tokens=4), "draft_model 4 0 0"),
    ],
    ids=["ngram", "dflash", "draft_model"],
)
def test_vllm_understands_the_command(decode, said):
    _, verb, *words = vllm_command(Recipe(model="zoo:coder", decode=decode))
    assert verb == "serve"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    run = subprocess.run(
        [interpreter(), "-c", PARSE, *words], capture_output=True, text=True, timeout=300, env=environment
    )
    assert f"TOLD {said}\n" in run.stdout, run.stderr[-2000:]
