"""What a spiking transformer is made of, and the published shapes by name."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from strop.core.errors import StropError, quoted
from strop.core.files import did_you_mean

ARCHITECTURE = "SpikingTransformer"
MOST = {
    "widths": 1 << 14,
    "depths": 256,
    "heads": 256,
    "mlp_ratio": 64,
    "channels": 256,
    "classes": 1 << 17,
    "steps": 1024,
}
"""Far beyond any published model: what is larger is a slip, found before hours of building."""
Attention = Literal["gate", "linear"]
Residual = Literal["membrane", "spike"]


@dataclass(frozen=True)
class SpikingConfig:
    """The shape of a `SpikingTransformer`. Raises StropError for one that cannot be."""

    widths: tuple[int, ...]
    """One: blocks of that width behind a stem of convolutions. Four: the pyramid of SDT-v2, e0 to e3."""
    depths: tuple[int, ...]
    """Blocks of the one width; or of the pyramid's five stages, which are e0 / 2, e0, e1, e2 and e3 wide."""
    attention: Attention = "gate"
    """`gate`: q masked by the spikes of the summed k v (SDT); `linear`: q (k^T v) in every head."""
    residual: Residual = "membrane"
    """What the residual stream adds up: real-valued `membrane` currents (SDT), or a `spike` (Spikformer)."""
    heads: int = 8
    """Parts of the channels that attend apart; the gate works by channel, so there they change nothing."""
    mlp_ratio: int = 4
    """Hidden width of feed-forward layers over that of the stream."""
    scale: float = 0.125
    """What linear attention is multiplied by."""
    pools: str = "1111"
    """One figure for each convolution of the stem, 1 where its output is halved; not of the pyramid."""
    channels: int = 3
    """Of the images."""
    classes: int = 1000
    steps: int = 4
    """T: how often a still image is shown."""

    def __post_init__(self) -> None:
        for name in ("widths", "depths"):
            object.__setattr__(self, name, self._sizes(name))
        for name in ("heads", "mlp_ratio", "channels", "classes", "steps"):
            self._require_sizes(name, (getattr(self, name),))
        for name, known in (("attention", Attention), ("residual", Residual)):
            if getattr(self, name) not in get_args(known):
                told = quoted(getattr(self, name))
                raise StropError(f"{name} is {' or '.join(get_args(known))}, got {told}")
        if type(self.scale) not in (int, float) or not 0 < self.scale < float("inf"):
            raise StropError(f"scale is a finite number above 0, got {quoted(self.scale)}")
        if not isinstance(self.pools, str) or not self.pools or set(self.pools) - set("01"):
            raise StropError(f"pools has a 0 or 1 for each convolution of the stem, got {quoted(self.pools)}")
        self._require_shape()

    def _sizes(self, name: str) -> tuple[int, ...]:
        told = getattr(self, name)
        if not isinstance(told, list | tuple) or not told:
            raise StropError(f"{name} is a list of whole numbers, got {quoted(told)}")
        self._require_sizes(name, tuple(told))
        return tuple(told)

    def _require_sizes(self, name: str, told: tuple[Any, ...]) -> None:
        if not all(type(size) is int and 0 < size <= MOST[name] for size in told):
            raise StropError(f"{name} counts from 1 to {MOST[name]:,}, got {quoted(getattr(self, name))}")

    def _require_shape(self) -> None:
        shape = (len(self.widths), len(self.depths))
        if shape not in ((1, 1), (4, 5)):
            raise StropError(
                f"one width goes with one depth, the pyramid's four with five, got {shape[0]} and {shape[1]}"
            )
        if self.pyramid and (self.attention, self.residual) != ("linear", "membrane"):
            raise StropError("the pyramid has linear attention and a membrane residual: set both")
        halved = 2 if self.pyramid else 1 << (len(self.pools) - 1)
        if self.widths[0] % halved:
            raise StropError(
                f"the stem halves the width {self.widths[0]} down to a part of {halved}: take a multiple"
            )
        if self.attention == "linear" and any(width % self.heads for width in self.widths[-2:]):
            raise StropError(f"{self.heads} heads cannot share widths {self.widths[-2:]}: take a divisor")

    @property
    def pyramid(self) -> bool:
        """Whether this is SDT-v2's."""
        return len(self.widths) == 4

    @classmethod
    def sdt(cls, depth: int, width: int, **others: Any) -> "SpikingConfig":
        """Spike-driven Transformer (arXiv 2307.01694): 8-384, 8-512, 10-512 and 8-768 of ImageNet."""
        return cls((width,), (depth,), **others)

    @classmethod
    def spikformer(cls, depth: int, width: int, **others: Any) -> "SpikingConfig":
        """Spikformer (arXiv 2209.15425)."""
        return cls((width,), (depth,), **{"attention": "linear", "residual": "spike", **others})

    @classmethod
    def sdt_v2(cls, widths: tuple[int, ...] = (64, 128, 256, 360), **others: Any) -> "SpikingConfig":
        """Meta-SpikeFormer (arXiv 2404.03663), by default of 15.1 M parameters."""
        return cls(widths, others.pop("depths", (1, 1, 2, 6, 2)), attention="linear", **others)

    def to_json(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {"architecture": ARCHITECTURE, **asdict(self)}

    @classmethod
    def from_json(cls, told: Any) -> "SpikingConfig":
        """From what `config.json` holds. Raises StropError for another architecture or unknown fields."""
        if not isinstance(told, dict) or told.get("architecture") != ARCHITECTURE:
            held = quoted(told.get("architecture") if isinstance(told, dict) else told)
            raise StropError(f"architecture is {held}, not {ARCHITECTURE}")
        known = [field.name for field in fields(cls)]
        settings = {name: value for name, value in told.items() if name != "architecture"}
        for name in settings:
            if name not in known:
                raise StropError(f"no field is called {quoted(name)}; {did_you_mean(name, known)}")
        for name in ("widths", "depths"):
            if name not in settings:
                raise StropError(f"the field {name} is missing")
        return cls(**settings)
