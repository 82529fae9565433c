"""One file a paper: what it claims, the experiment here, and the verdict."""

from collections.abc import Callable, Sequence

from strop.claims.base import VERDICTS, Claim, Report
from strop.core.errors import StropError
from strop.core.files import did_you_mean

__all__ = ["PAPERS", "SCALES", "VERDICTS", "Claim", "Report", "run_claims"]

SCALES = ("cpu", "gpu")


def _kvarn(scale: str, report: Report) -> list[Claim]:
    from strop.claims.kvarn import claims

    return claims(scale, report)


def _vase(scale: str, report: Report) -> list[Claim]:
    from strop.claims.vase import claims

    return claims(scale, report)


def _treeflash(scale: str, report: Report) -> list[Claim]:
    from strop.claims.treeflash import claims

    return claims(scale, report)


def _caddtree(scale: str, report: Report) -> list[Claim]:
    from strop.claims.caddtree import claims

    return claims(scale, report)


def _alphaq(scale: str, report: Report) -> list[Claim]:
    from strop.claims.alphaq import claims

    return claims(scale, report)


PAPERS: dict[str, Callable[[str, Report], list[Claim]]] = {
    "kvarn": _kvarn,
    "vase": _vase,
    "treeflash": _treeflash,
    "caddtree": _caddtree,
    "alphaq": _alphaq,
}
"""Key of each paper and what measures its claims; an experiment is imported when it runs."""


def run_claims(
    papers: Sequence[str] = (), scale: str = "cpu", report: Report = lambda what, share: None
) -> list[Claim]:
    """Measure the claims of papers again; of all papers when none is named.

    Deterministic on one machine, but for claims about time. "cpu" takes some minutes on two cores; "gpu"
    measures more of the same on a CUDA device. `report` hears what is being measured and the share done.
    Raises StropError for an unknown paper or scale, a missing bundled model, or a missing device.
    """
    chosen = list(dict.fromkeys(papers)) or list(PAPERS)
    for paper in chosen:
        if paper not in PAPERS:
            raise StropError(f"no claims of a paper {paper!r} here; {did_you_mean(paper, list(PAPERS))}")
    if scale not in SCALES:
        raise StropError(f"unknown scale {scale!r}; {did_you_mean(scale, list(SCALES))}")
    found = []
    for index, paper in enumerate(chosen):
        found += PAPERS[paper](
            scale, lambda what, share, done=index: report(what, (done + share) / len(chosen))
        )
    return found
