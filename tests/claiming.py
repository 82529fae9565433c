"""What every paper's claims must say, whichever way they fall."""

import json
from collections.abc import Container, Sequence

from strop.claims import PAPERS, VERDICTS, Claim

SEVERAL = range(2, 1000)


def require_whole(
    found: Sequence[Claim], count: int, paper: str, seeds: Container[int] = SEVERAL, bare: int = 0
) -> None:
    """Fails unless each of `count` claims says all, with numbers behind it where it was measured here.

    `seeds` are those that such a claim may have, and `bare` of them may be without an interval.
    """
    assert len(found) == count and all(claim.paper == paper in PAPERS for claim in found)
    assert len({claim.claim for claim in found}) == count
    for claim in found:
        assert claim.verdict in VERDICTS and claim.scale == "tiny"
        assert all((claim.claim, claim.paper_value, claim.measured, claim.varied, claim.reason))
        if claim.verdict == "needs a GPU":
            assert claim.interval is None
        else:
            assert claim.details and claim.seconds >= 0 and claim.seeds in seeds
            assert claim.interval is None or claim.interval[0] <= claim.interval[1]
    measured = [claim for claim in found if claim.verdict != "needs a GPU"]
    assert sum(claim.interval is None for claim in measured) <= bare
    json.dumps([claim.to_dict() for claim in found], allow_nan=False)


def require_steady(shares: Sequence[float], steps: int) -> None:
    """Fails unless progress was told once a step, and rose."""
    assert len(shares) == steps and list(shares) == sorted(shares) and max(shares) < 1
