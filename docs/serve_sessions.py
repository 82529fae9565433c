"""Sessions that take turns on one small cache, in vLLM under several schedulers; runs in vLLM's interpreter.

    PYTHONPATH=. .peers/vllm/bin/python docs/serve_sessions.py WORKLOAD.json FOLDER

The file holds the fields of `Workload` and `runs`: names, and for each the engine arguments that it adds.
Prints a line of JSON a run: tokens written; prompt tokens, and how many of them were computed and said to be
cached; steps, preemptions, blocks still held at the end, and mean CPU seconds to first tokens after the first
round. A run that fails says why and is the last, since it may leave the process unusable.
"""

import gc
import json
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
VOCABULARY = 96


@dataclass(frozen=True)
class Workload:
    """Each session opens with text that all share and a document of its own; every turn adds to it."""

    blocks: int
    """Blocks of 32 tokens in the cache, one of which vLLM keeps for itself."""
    sessions: int
    turns: int
    shared: int
    document: int
    question: int
    answer: int
    together: int = 1
    """Requests that are sent at once."""
    chunk: int = 512
    """Most tokens of a step."""

    def length(self) -> int:
        """Tokens of the longest session."""
        return self.shared + self.document + self.turns * (self.question + self.answer)

    def start(self) -> list[list[int]]:
        """The tokens before the first question, of each session."""
        draw = random.Random(0)
        shared = draw.choices(range(VOCABULARY), k=self.shared)
        return [shared + draw.choices(range(VOCABULARY), k=self.document) for _ in range(self.sessions)]


def answers(engine, params, prompts: list[list[int]]) -> tuple[list, list[float]]:
    """What the engine gives back for prompts that come together; CPU seconds to the first token of each."""
    begin, first, outs = time.process_time(), {}, {}
    for place, prompt in enumerate(prompts):
        engine.add_request(str(place), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        for out in engine.step():
            first.setdefault(out.request_id, time.process_time() - begin)
            outs[out.request_id] = out
    names = [str(place) for place in range(len(prompts))]
    return [outs[name] for name in names], [first[name] for name in names]


def counted(scheduler) -> dict[str, list]:
    """What a scheduler does from now on: tokens of each step, requests that were preempted."""
    done: dict[str, list] = {"steps": [], "preempted": []}
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def counting_schedule(*args, **kwargs):
        output = schedule(*args, **kwargs)
        done["steps"].append(output.total_num_scheduled_tokens)
        return output

    def counting_preempt(request, *args, **kwargs):
        done["preempted"].append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler.schedule, scheduler._preempt_request = counting_schedule, counting_preempt
    return done


def serve(engine, work: Workload) -> dict:
    """All turns of all sessions, in rounds."""
    from vllm import SamplingParams

    scheduler = engine.engine_core.engine_core.scheduler
    done = counted(scheduler)
    params = SamplingParams(temperature=0, max_tokens=work.answer, ignore_eos=True, detokenize=False)
    draw, texts = random.Random(1), work.start()
    outs, waits, prompt_tokens = [], [], 0
    for turn in range(work.turns):
        for begin in range(0, work.sessions, work.together):
            group = texts[begin : begin + work.together]
            for text in group:
                text += draw.choices(range(VOCABULARY), k=work.question)
            prompt_tokens += sum(map(len, group))
            said, first = answers(engine, params, group)
            for text, out in zip(group, said, strict=True):
                text += out.outputs[0].token_ids
            outs += said
            waits += first if turn else []
    blocks = scheduler.kv_cache_manager.block_pool.blocks
    return {
        "tokens": [list(out.outputs[0].token_ids) for out in outs],
        "prompt": prompt_tokens,
        "computed": sum(done["steps"]) - len(outs) * (work.answer - 1),
        "cached": sum(out.num_cached_tokens for out in outs),
        "steps": sum(map(bool, done["steps"])),
        "preempted": len(done["preempted"]),
        "held": sum(block.ref_cnt > 0 for block in blocks if not block.is_null),
        "first_token_cpu_s": statistics.mean(waits),
    }


def run(folder: str, work: Workload, added: dict) -> dict:
    """The workload under one scheduler."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=work.length(),
        max_num_seqs=8,
        max_num_batched_tokens=work.chunk,
        num_gpu_blocks_override=work.blocks,
        block_size=32,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        **added,
    )
    answer = serve(llm.llm_engine, work)
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()
    return answer


def main(file: str, folder: str) -> None:
    told = json.loads(Path(file).read_text())
    runs = told.pop("runs")
    for name, added in runs.items():
        try:
            said = run(folder, Workload(**told), added)
        except Exception as error:
            print("\n" + json.dumps({"run": name, "refused": f"{type(error).__name__}: {error}"}), flush=True)
            return
        print("\n" + json.dumps({"run": name, **said}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
