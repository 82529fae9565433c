"""Sessions whose next turn begins when the last one has ended: documents with questions, agents with tools.

The sessions of AsymCache's evaluation (arXiv 2606.02964): times between sessions and times between the turns
of one are Gamma-distributed, and a turn brings all before it, answers included. "Dispersion" is taken as the
mean time between turns over that between sessions: reuse takes longer where it is high, as in the paper,
whose quantiles of reuse time also fit turns of the same coefficient of variation. Turns a session, the spread
of lengths and all numbers of agents are guesses: no paper gives them.
"""

from dataclasses import dataclass

import numpy as np

from strop.core.errors import StropError
from strop.core.files import did_you_mean
from strop.serve.base import Job, Request, Trace
from strop.serve.traces.base import Blocks, count, positive, stream, waits
from strop.serve.traces.mooncake import BLOCK

CV = 0.25
"""Of times between sessions and between turns, and of lengths."""
SHARED = 1024
"""Tokens at the start of every prompt."""
QUESTION = 100
"""Tokens that a turn adds to what was said before."""


@dataclass(frozen=True)
class Tool:
    """How long a call takes, lognormal, and how much it returns."""

    median: float
    """Seconds."""
    sigma: float
    """Standard deviation of the logarithm of the time."""
    result: int
    """Tokens, in the mean."""


DATASETS = {"longbench": (34_800, 2_600), "loogle": (24_400, 700)}
"""Mean tokens of prompts and of answers."""
TOOLS = (Tool(1.2, 0.8, 2_000), Tool(0.3, 0.5, 300), Tool(8.0, 1.0, 800))
"""A web search, a look into a file, a run of tests: each as likely as the others."""
CALL, TASK, INSTRUCTIONS = 150, 300, 2_048
"""Tokens in the mean of an agent's answer and of its task, and of the instructions that all agents share."""


def documents(
    dataset: str = "longbench",
    requests: int = 300,
    rate: float = 0.02,
    dispersion: float = 5.0,
    turns: int = 6,
    seed: int = 0,
) -> Trace:
    """Documents and questions about them, a session each of `turns` requests.

    `rate` counts requests a second; `dispersion` is the mean time from an answer to the next question over
    the mean time between sessions. A document takes what the shared start, questions and earlier answers
    leave of the data set's mean prompt.
    """
    if dataset not in DATASETS:
        raise StropError(f"there are no sessions like {dataset!r}: {did_you_mean(dataset, list(DATASETS))}")
    number, turns = count("requests", requests), count("turns", turns)
    between = turns / positive("rate", rate)
    prompt, answer = DATASETS[dataset]
    document = prompt - SHARED - QUESTION - (QUESTION + answer) * (min(turns, number) - 1) / 2
    if document < BLOCK:
        raise StropError(
            f"{turns} turns leave no room for a document in {prompt} tokens: ask for fewer turns"
        )
    sizes = [min(turns, number - start) for start in range(0, number, turns)]
    added = _tokens(seed, "question", QUESTION, number)
    added[::turns] += _tokens(seed, "document", document, len(sizes))
    gaps = waits(stream(seed, "turn"), positive("dispersion", dispersion) * between, CV, number)
    starts = np.cumsum(waits(stream(seed, "session"), between, CV, len(sizes)))
    answers = _tokens(seed, "answer", answer, number)
    return _trace(f"{dataset} sessions", starts, sizes, SHARED, added, answers, gaps, tools=False)


def agents(
    programs: int = 300, rate: float = 1.5, turns: float = 5.0, seed: int = 0, tools: tuple[Tool, ...] = TOOLS
) -> Trace:
    """Programs that call a tool after every answer but the last, whose result the next prompt brings.

    `rate` counts programs a second, Poisson; `turns` is their mean length, geometric. A call takes as long as
    one of `tools` does. Like AsymCache's runs of BFCL's web search in form, not in numbers.
    """
    number = count("programs", programs)
    if positive("turns", turns) < 1 or not tools:
        raise StropError("a program needs a mean of at least 1 turn, and tools to call: give more")
    sizes = stream(seed, "turns").geometric(1 / turns, number).tolist()
    total = count("requests of all programs", sum(sizes))
    kind = stream(seed, "tool").integers(len(tools), size=total)
    median, sigma, result = (
        np.array([getattr(tool, name) for tool in tools])[kind] for name in ("median", "sigma", "result")
    )
    gaps = median * np.exp(sigma * stream(seed, "gap").standard_normal(total))
    added = np.empty(total, dtype=np.int64)
    first = np.cumsum([0, *sizes[:-1]])
    added[1:] = _tokens(seed, "result", result[:-1], total - 1)
    added[first] = _tokens(seed, "task", TASK, number)
    starts = np.cumsum(waits(stream(seed, "session"), 1 / positive("rate", rate), 1.0, number))
    answers = _tokens(seed, "answer", CALL, total)
    return _trace("agents with tools", starts, sizes, INSTRUCTIONS, added, answers, gaps, tools=True)


def _tokens(seed: int, purpose: str, mean: float | np.ndarray, number: int) -> np.ndarray:
    """Lengths `[number]`, Gamma-distributed, at least 1."""
    drawn = waits(stream(seed, purpose), 1.0, CV, number) * mean
    return np.maximum(1, np.rint(drawn)).astype(np.int64)


def _trace(
    name: str,
    starts: np.ndarray,
    sizes: list[int],
    shared: int,
    added: np.ndarray,
    answers: np.ndarray,
    gaps: np.ndarray,
    tools: bool,
) -> Trace:
    """Sessions from what each turn adds, answers and waits for, `[requests]`, sessions one after another."""
    blocks = Blocks(BLOCK)
    root = blocks.grow((), 0, shared)
    turns = zip(added.tolist(), answers.tolist(), gaps.tolist(), strict=True)
    ids = iter(range(len(added)))
    jobs = []
    for session, (start, size) in enumerate(zip((starts - starts[0]).tolist(), sizes, strict=True)):
        said, known, before = shared, shared, root
        last: Job | None = None
        for turn in range(size):
            new, answer, gap = next(turns)
            prompt = said + new
            before, known = blocks.grow(before, known, prompt), prompt
            job = Job(Request(next(ids), prompt, before, session, tools and turn < size - 1), answer, start)
            if last is None:
                jobs.append(job)
            else:
                last.next = job
            job.gap = gap if turn < size - 1 else 0.0
            said, last = prompt + answer, job
    return Trace(name, jobs, BLOCK)
