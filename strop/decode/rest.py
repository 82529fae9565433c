"""Not drafting where it does not pay: plain steps, and now and then a look whether it would by now.

Cost-aware trees (arXiv 2606.01813) shrink to no nodes at all, but a drafter has run by then. Here rounds are
watched as well: where the newest ones brought fewer tokens a second than plain steps do, the next rounds are
plain steps, twice as many every time in a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from strop.decode.stop import StopRule, Throughput

LOOK = 8
"""Drafted rounds by which drafting is judged."""
SHORTEST, LONGEST = 8, 256
"""Plain steps between two looks."""


@dataclass
class Resting(StopRule):
    """A cost-aware rule that rests."""

    rule: Throughput
    pause: int = field(default=SHORTEST, init=False)
    """Plain steps that follow the next look, if it fails."""
    left: int = field(default=0, init=False)
    """Plain steps until the next look."""
    seen: int = field(default=0, init=False)
    """Drafted rounds since then, their seconds, and those that plain steps would have taken."""
    elapsed: float = field(default=0.0, init=False)
    plain_s: float = field(default=0.0, init=False)

    @property
    def most(self) -> int:
        return self.rule.most

    @property
    def width(self) -> int:
        return self.rule.width

    @property
    def rests(self) -> bool:
        return self.left > 0

    def size(self, deltas: Iterator[float], context: int) -> int:
        return self.rule.size(deltas, context)

    def expected(self, nodes: int, phi: float, context: int) -> float:
        return self.rule.expected(nodes, phi, context)

    def observe(self, nodes: int, context: int, emitted: int, verify_s: float, round_s: float) -> None:
        if self.left:
            self.rule.cost.observe(1, context, verify_s)
            self.left -= 1
            return
        self.rule.observe(nodes, context, emitted, verify_s, round_s)
        self.seen += 1
        self.elapsed += round_s
        self.plain_s += emitted * self.rule.cost.verify(1, context)
        if self.seen == LOOK:
            self._judge()

    def _judge(self) -> None:
        """Rest, longer each time in a row, unless drafting was faster than plain steps."""
        if self.plain_s >= self.elapsed:
            self.pause = SHORTEST
        else:
            self.left, self.pause = self.pause, min(2 * self.pause, LONGEST)
        self.seen, self.elapsed, self.plain_s = 0, 0.0, 0.0
