"""What speculation brought and took, under the names that users of serving engines know."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

STAGES = ("draft", "build", "verify", "commit")


@dataclass
class Stats:
    """Of one generation, or of several: sums."""

    prefill_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    """By stage: the drafter's pass, the tree, the target's pass with the walk, and the caches."""
    accepted: Counter[int] = field(default_factory=Counter)
    """Rounds by the number of drafted tokens that were accepted."""
    nodes: Counter[int] = field(default_factory=Counter)
    """Rounds by the number of drafted nodes that were verified."""
    emitted: int = 0
    """Tokens that rounds emitted; the first token of a generation comes from the prompt."""
    promised: float = 0.0
    """Tokens that the drafter's word promised in drafted rounds whose cost was predicted, 1 + Phi each."""
    predicted_s: float = 0.0
    """Seconds predicted for these rounds."""
    realised: int = 0
    """Tokens that they emitted, and seconds that they took."""
    realised_s: float = 0.0

    @property
    def rounds(self) -> int:
        """Passes of the target behind the prompt."""
        return self.accepted.total()

    @property
    def tau(self) -> float:
        """Tokens emitted a round."""
        return self.emitted / max(self.rounds, 1)

    def note(
        self, nodes: int, emitted: int, stages: list[float], promised: float, theta: float | None
    ) -> None:
        """Add a round: seconds by stage, tokens promised and, where its cost is known, tokens a second."""
        for stage, seconds in zip(STAGES, stages, strict=True):
            self.seconds[stage] += seconds
        self.emitted += emitted
        self.accepted[emitted - 1] += 1
        self.nodes[nodes] += 1
        if theta is not None:
            self.promised += promised
            self.predicted_s += promised / theta
            self.realised += emitted
            self.realised_s += sum(stages)

    def __add__(self, other: "Stats") -> "Stats":
        return Stats(
            self.prefill_s + other.prefill_s,
            {stage: self.seconds[stage] + other.seconds[stage] for stage in STAGES},
            self.accepted + other.accepted,
            self.nodes + other.nodes,
            self.emitted + other.emitted,
            self.promised + other.promised,
            self.predicted_s + other.predicted_s,
            self.realised + other.realised,
            self.realised_s + other.realised_s,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON, ratios included."""
        elapsed = sum(self.seconds.values())
        return {
            "spec_accept_length": self.tau,
            "spec_verify_ct": self.rounds,
            "emitted": self.emitted,
            "accepted_by_depth": {str(k): self.accepted[k] for k in sorted(self.accepted)},
            "nodes_by_round": {str(k): self.nodes[k] for k in sorted(self.nodes)},
            "prefill_s": self.prefill_s,
            **{f"{stage}_s": self.seconds[stage] for stage in STAGES},
            "tokens_per_s": self.emitted / elapsed if elapsed else None,
            "predicted_tokens_per_s": self.promised / self.predicted_s if self.predicted_s else None,
            "realised_tokens_per_s": self.realised / self.realised_s if self.realised_s else None,
        }
