"""One file a paper: what it claims, the experiment here, and the verdict."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from strop.claims.base import VERDICTS, Claim, Paper, Progress, Report, Tables, beside, joined
from strop.core.errors import StropError
from strop.core.executor import Executor, Local, Lost
from strop.core.files import did_you_mean
from strop.core.machine import code_version, environment, require_alike

__all__ = ["PAPERS", "SCALES", "SCHEDULERS", "VERDICTS", "Claim", "Report", "run_claims"]

SCALES = ("cpu", "gpu")
LOCAL = Local()
Task = tuple[str, str]
"""A paper and the name of a part of its experiments."""


def _kvarn() -> Paper:
    from strop.claims.kvarn import PAPER

    return PAPER


def _vase() -> Paper:
    from strop.claims.vase import PAPER

    return PAPER


def _treeflash() -> Paper:
    from strop.claims.treeflash import PAPER

    return PAPER


def _caddtree() -> Paper:
    from strop.claims.caddtree import PAPER

    return PAPER


def _alphaq() -> Paper:
    from strop.claims.alphaq import PAPER

    return PAPER


def _sae_survival() -> Paper:
    from strop.claims.sae_survival import PAPER

    return PAPER


def _netkv() -> Paper:
    from strop.claims.netkv import PAPER

    return PAPER


def _lazyattention() -> Paper:
    from strop.claims.lazyattention import PAPER

    return PAPER


def _scheduler() -> Paper:
    from strop.claims.asymcache import PAPER

    return PAPER


def _asymcache() -> Paper:
    from strop.claims.msa import PAPER

    return beside(_scheduler(), PAPER)


def _e2llm() -> Paper:
    from strop.claims.e2llm import PAPER

    return PAPER


def _psvit() -> Paper:
    from strop.claims.psvit import PAPER

    return PAPER


def _primesvt() -> Paper:
    from strop.claims.primesvt import PAPER

    return PAPER


PAPERS: dict[str, Callable[[], Paper]] = {
    "kvarn": _kvarn,
    "lazyattention": _lazyattention,
    "vase": _vase,
    "treeflash": _treeflash,
    "caddtree": _caddtree,
    "alphaq": _alphaq,
    "sae-survival": _sae_survival,
    "e2llm": _e2llm,
    "netkv": _netkv,
    "asymcache": _asymcache,
    "psvit": _psvit,
    "primesvt": _primesvt,
}
"""Key of each paper and how its claims are measured; an experiment is imported when it runs."""
SCHEDULERS: dict[str, Callable[[], Paper]] = {"asymcache": _scheduler}
"""Of papers with a model's side and a scheduler's: the latter, which loads no model."""


class Experimenter:
    """A worker that measures parts of papers, and keeps what the newest paper's experiments run on."""

    def __init__(self, papers: Mapping[str, Callable[[], Paper]], scale: str) -> None:
        self.papers, self.scale = papers, scale
        self.laid: tuple[str, object] | None = None

    def __call__(self, task: Task, report: Report) -> Tables:
        """The tables of one part."""
        name, wanted = task
        paper = self.papers[name]()
        size = paper.scales[self.scale]
        (part,) = (one for one in paper.parts(size) if one.name == wanted)
        new = self.laid is None or self.laid[0] != name
        progress = Progress(report, max(part.steps + paper.laying * new, 1))
        if new:
            self.laid = None
            self.laid = name, paper.lay(size, progress)
        return part.study(self.laid[1], progress)


class Elsewhere:
    """Makes an experimenter on another node."""

    def __init__(self, papers: Mapping[str, Callable[[], Paper]], scale: str) -> None:
        self.papers, self.scale = papers, scale
        self.environment, self.code = environment(), code_version()

    def __call__(self) -> Experimenter:
        """Raises StropError unless the software is the driver's."""
        require_alike(self.environment, self.code)
        return Experimenter(self.papers, self.scale)


def run_claims(
    papers: Sequence[str] = (),
    scale: str = "cpu",
    report: Report = lambda what, share: None,
    where: Executor = LOCAL,
    known: Mapping[str, Callable[[], Paper]] | None = None,
) -> list[Claim]:
    """Measure the claims of papers again; of all that are `known` (None: `PAPERS`) when none is named.

    Deterministic on one machine, but for claims about time, whose experiments run here, one after another,
    behind all others. "cpu" takes some minutes on two cores; "gpu" measures more of the same on a CUDA
    device. `report` hears what is being measured and the share done. Raises StropError for an unknown paper
    or scale, a missing bundled model, or a missing device.
    """
    known = PAPERS if known is None else known
    chosen = list(dict.fromkeys(papers)) or list(known)
    for paper in chosen:
        if paper not in known:
            raise StropError(f"no claims of a paper {paper!r} here; {did_you_mean(paper, list(known))}")
    if scale not in SCALES:
        raise StropError(f"unknown scale {scale!r}; {did_you_mean(scale, list(SCALES))}")
    loaded = {name: known[name]() for name in chosen}
    parts = {
        (name, part.name): part for name, paper in loaded.items() for part in paper.parts(paper.scales[scale])
    }
    makers = {name: known[name] for name in chosen}
    here, gpus = Experimenter(makers, scale), int(scale == "gpu")
    tables: dict[Task, Tables] = {}
    shares: dict[Task, float] = {}
    for timed, place in ((False, where), (True, LOCAL)):
        tasks = [task for task, part in parts.items() if part.timed is timed]
        if not tasks:
            continue

        def hear(number: int, what: str, share: float, tasks: Sequence[Task] = tasks) -> None:
            shares[tasks[number]] = share
            done = sum(max(parts[task].steps, 1) * share for task, share in shares.items())
            report(f"{tasks[number][0]}: {what}", done / sum(max(part.steps, 1) for part in parts.values()))

        with place.workers(Elsewhere(makers, scale), here, environment()["threads"], gpus) as run:
            for number, found in run(tasks, hear):
                if isinstance(found, Lost):
                    raise StropError(f"{': '.join(tasks[number])} was not measured: {found.reason}")
                tables[tasks[number]] = found
                hear(number, "measured", 1.0)
    report("done", 1.0)
    return [claim for name in chosen for claim in _judged(loaded[name], scale, name, tables)]


def _judged(paper: Paper, scale: str, name: str, tables: Mapping[Task, Tables]) -> Iterable[Claim]:
    size = paper.scales[scale]
    return paper.verdicts(joined(tables[name, part.name] for part in paper.parts(size)), size)
