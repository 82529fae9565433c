"""What requests look like on average, which is all that a plan rests on."""

from dataclasses import asdict, dataclass
from pathlib import Path

from strop.core.errors import StropError, quoted
from strop.core.nodes import read_yaml
from strop.serve.base import Trace
from strop.serve.plan.devices import mapping

MOST = 1e9
"""Tokens or seconds."""
KEYS = {"in": "prompt", "out": "output", "period": "period"}
"""What files and the command line call the fields."""


@dataclass(frozen=True)
class Workload:
    """Mean tokens in and out, and the mean seconds between arrivals."""

    prompt: float
    output: float
    period: float | None = None

    def __post_init__(self) -> None:
        for name, field in KEYS.items():
            value = getattr(self, field)
            least = 1 if name != "period" else 0
            if value is not None and not (least <= value <= MOST and value > 0):
                kind = "tokens from 1 to 1e9" if least else "seconds above 0, 1e9 at most"
                raise StropError(f"{name} of a workload is a number of {kind}, got {quoted(value)}")

    def to_dict(self) -> dict[str, float | None]:
        """As files say it."""
        said = asdict(self)
        return {name: said[field] for name, field in KEYS.items()}

    @classmethod
    def of(cls, trace: Trace) -> "Workload":
        """The means of a trace."""
        jobs = trace.all()
        if not jobs:
            raise StropError(f"trace {trace.name} holds no request: plan for in=TOKENS,out=TOKENS instead")
        count = len(jobs)
        prompt = sum(job.request.prompt for job in jobs) / count
        span = max(job.arrival for job in jobs) - min(job.arrival for job in trace.jobs)
        return cls(prompt, sum(job.output for job in jobs) / count, span / (count - 1) if span > 0 else None)

    @classmethod
    def parse(cls, text: str) -> "Workload":
        """`in=576,out=588[,period=2.0]`, or the path of a YAML file of the same fields."""
        if "=" not in text:
            return cls.from_dict(read_yaml(Path(text), "workload"), text)
        pairs = [part.partition("=") for part in text.split(",")]
        return cls.from_dict({name.strip(): _number(name, value) for name, _, value in pairs}, "--workload")

    @classmethod
    def from_dict(cls, node: object, where: str) -> "Workload":
        """From a mapping of `in`, `out` and perhaps `period`."""
        said = mapping(node, where, ("in", "out"), ("period",))
        for name, value in said.items():
            if type(value) not in (int, float) and not (name == "period" and value is None):
                raise StropError(f"{name} of {where} is a number, got {quoted(value)}")
        return cls(**{KEYS[name]: value for name, value in said.items()})


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise StropError(f"--workload: {name.strip()} is a number, got {quoted(text)}") from error
