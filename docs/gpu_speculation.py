"""Draft trees on a GPU: what verifying costs at the shapes of real models, and the bundled drafters in use.

Verification is timed as a caller waits and as the kernels alone run, as a CUDA graph would replay them.
Random weights accept nothing, so the two parts are not mixed: sizes chosen on a cost curve use made-up
marginals of three confidences, and tokens a second are the bundled coder's.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from statistics import median

import torch
from gpu_bench import Bench, kernels_ms, model, wall
from gpu_serving import filled

import strop
from strop.decode import Chain, FixedBudget, Throughput, load_drafter, speculative
from strop.decode.builder import BestFirst
from strop.decode.cost import CostModel
from strop.decode.proposal import Proposal
from strop.decode.stats import Stats
from strop.decode.target import Target
from strop.decode.tree import DraftTree, binary
from strop.tasks import python_source

SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
CONTEXTS = (1000, 4000, 8000)
CONFIDENCES = {"0.98 x 0.995^i": (0.98, 0.995), "0.9 x 0.97^i": (0.9, 0.97), "0.7 x 0.9^i": (0.7, 0.9)}
"""Probability of the likeliest token of slot i."""
TAIL, RANKS, SLOTS = 1.3, 512, 15
"""The other tokens follow a power law."""
PROMPTS, PROMPT, NEW = 12, 256, 128


def verify(bench: Bench) -> Iterator[tuple[str, Callable[[], dict]]]:
    """The target's pass over trees, at every shape and context."""
    for name in list(bench.models)[:2]:
        for context in CONTEXTS if bench.device == "cuda" else (64,):
            yield f"verify {name} context {context}", partial(_verify, bench, name, context)


def _verify(bench: Bench, name: str, context: int) -> dict:
    lm = model(bench, name)
    target = Target(lm, filled(bench, lm.config, None, context, rows=1), [])
    sizes = SIZES if bench.device == "cuda" else SIZES[:4]
    waited: dict[int, float] = {}
    ran: dict[int, float] = {}
    for size in sizes:
        tree = binary([1] * size)

        def score(tree: DraftTree = tree) -> None:
            target.score(tree).argmax(-1).tolist()
            target.keep(len(tree), [0])

        score()
        waited[size] = median(wall(bench, score) for _ in range(max(bench.rounds // 2, 1)))
        ran[size] = kernels_ms(bench, score)
    return {
        "wall_ms": waited,
        "kernels_ms": ran,
        "nodes": _chosen(ran, context),
    }


def _chosen(milliseconds: dict[int, float], context: int) -> dict[str, int]:
    """Nodes that the cost-aware rule verifies on a curve, by confidence; a draft costs a tenth of a step."""
    curve = {size: ms / 1e3 for size, ms in milliseconds.items()}
    cost = CostModel.fit({context: curve}, draft_s=curve[1] / 10)
    found = {}
    for name, (first, decay) in CONFIDENCES.items():
        top = first * decay ** torch.arange(SLOTS).float()
        tail = torch.arange(1, RANKS).float() ** -TAIL
        p = (
            torch.cat([top[:, None], (1 - top)[:, None] * tail / tail.sum()], dim=1)
            .sort(descending=True)
            .values
        )
        links = torch.zeros(SLOTS, 1, RANKS, dtype=torch.int64)
        links[-1] = -1
        tokens = torch.arange(RANKS).expand(SLOTS, 1, -1)
        pops = BestFirst(Proposal("marginal", tokens, p[:, None].log(), links), 0)
        found[name] = Throughput(cost, most=1024).size(iter(pops), context)
    return found


def speculate(bench: Bench) -> Iterator[tuple[str, Callable[[], dict]]]:
    """The bundled coder with its drafters, greedy: tokens a second, and how they come about."""
    for dtype in ("fp32", "bf16"):
        yield f"speculate coder {dtype}", partial(_speculate, bench, dtype)


def _speculate(bench: Bench, dtype: str) -> dict:
    lm = strop.load("zoo:coder", dtype, bench.device)
    texts = [text for text in python_source.texts("held_out").values() if len(text) > 8 * PROMPT]
    few = PROMPTS if bench.device == "cuda" else 1
    prompts = [torch.tensor([lm.encode(text)[:PROMPT]], device=lm.device) for text in texts[:few]]
    options = {
        "max_new_tokens": NEW if bench.device == "cuda" else 4,
        "do_sample": False,
        "pad_token_id": lm.pad,
    }
    ways = {"plain": None}
    for drafter, (name, tree) in product(
        ("ngram", "zoo:coder-dflash", "zoo:coder-treeflash"),
        (("chain", Chain()), ("B=16", FixedBudget(16)), ("B=64", FixedBudget(64)), ("cost-aware", None)),
    ):
        ways[f"{drafter.removeprefix('zoo:coder-')} {name}"] = speculative(
            load_drafter(drafter, lm.model), tree
        )
    seconds, stats = dict.fromkeys(ways, 0.0), {way: Stats() for way in ways}
    same = dict.fromkeys(ways, 0)
    for turn, prompt in enumerate([prompts[0], *prompts]):
        expected = None
        for way, custom in ways.items():
            out: list[torch.Tensor] = []
            given = options | ({} if custom is None else {"custom_generate": custom})
            spent = wall(bench, lambda: out.append(lm.model.generate(prompt, **given)))  # noqa: B023
            expected = out[0] if custom is None else expected
            if turn:
                seconds[way] += spent / 1e3
                same[way] += torch.equal(out[0], expected)
                stats[way] += custom.stats if custom else Stats()
    return {
        "tokens_per_s": {way: few * options["max_new_tokens"] / spent for way, spent in seconds.items()},
        "same_as_plain": {way: f"{same[way]} of {few}" for way in ways},
        "stats": {way: found.to_dict() for way, found in stats.items() if found.rounds},
    }
