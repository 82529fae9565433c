"""What every paper's claims must say, whichever way they fall."""

import json
from collections.abc import Sequence

from strop.claims import PAPERS, VERDICTS, Claim


def require_whole(found: Sequence[Claim], count: int, paper: str, seeds: int) -> None:
    """Fails unless each of `count` claims has a verdict, and numbers behind it where it was measured here."""
    assert len(found) == count and all(claim.paper == paper in PAPERS for claim in found)
    assert len({claim.claim for claim in found}) == count
    for claim in found:
        assert claim.verdict in VERDICTS and claim.scale == "tiny"
        if claim.verdict != "needs a GPU":
            low, high = claim.interval
            assert low <= high and claim.details and claim.seeds == seeds
    json.dumps([claim.to_dict() for claim in found], allow_nan=False)


def require_steady(shares: Sequence[float], steps: int) -> None:
    """Fails unless progress was told once a step, and rose."""
    assert len(shares) == steps and list(shares) == sorted(shares) and max(shares) < 1
