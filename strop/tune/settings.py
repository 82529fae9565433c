"""What a study is told, as the command line says it."""

from collections.abc import Container
from dataclasses import asdict, dataclass

from strop.core.errors import StropError
from strop.core.executor import executor
from strop.core.files import did_you_mean
from strop.decode.base import Drafted
from strop.recipe import METHODS
from strop.tune.frontier import OBJECTIVES

DRAFTED = {name for name, kind in METHODS["decode"].items() if issubclass(kind, Drafted)}
"""Names of the methods that take a drafter."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a study is told."""

    objective: str = "balanced"
    """What the choice minimises: "memory", "speed" or "balanced"."""
    max_drop: float = 0.01
    """Most that the upper 95 % limit of the drop in quality may be."""
    batch: int = 1
    """Sequences served together, for speed and memory."""
    context: int | None = None
    """Tokens in the cache, for speed and memory; None: the data's 95th percentile."""
    budget_minutes: float | None = None
    """Start no measurement after this long."""
    methods: tuple[str, ...] | None = None
    """Names of the methods to try; None: all."""
    draft: str | None = None
    """A drafter to try besides the bundled ones."""
    audit: bool = False
    """Whether to say which share of the model's features each recipe keeps."""
    device: str = "cpu"
    dtype: str = "auto"
    seed: int = 0
    executor: str = "local"
    """Where recipes are measured: "local", or "ray" for workers side by side."""
    address: str | None = None
    """A Ray cluster's; None: one on this machine, for the study alone."""
    workers: int | None = None
    """Recipes measured side by side; None: as many as there is room for."""

    def __post_init__(self) -> None:
        executor(self.executor, self.address, self.workers)
        if self.objective not in OBJECTIVES:
            known = did_you_mean(self.objective, list(OBJECTIVES))
            raise StropError(f"unknown objective {self.objective!r}; {known}")
        if not 0 <= self.max_drop < 1:
            raise StropError(f"--max-drop must be from 0 % to below 100 %, got {self.max_drop:.0%}")
        if self.batch < 1 or (self.context is not None and self.context < 2):
            raise StropError("--batch must be at least 1 and --context at least 2")
        known = [name for methods in METHODS.values() for name in methods]
        for name in self.methods or ():
            if name not in known:
                raise StropError(f"unknown method {name!r}; {did_you_mean(name, known)}")
        if self.draft is not None and self.methods is not None and not DRAFTED & set(self.methods):
            raise StropError("--draft has a drafter tried with caddtree: name caddtree in --methods as well")

    def options(self, only: Container[str] | None = None) -> list[str]:
        """The words of a command line that say what differs from the defaults."""
        words, default = [], Settings()
        for name, value in asdict(self).items():
            if value != getattr(default, name) and (only is None or name in only):
                shown = ",".join(value) if isinstance(value, tuple) else f"{value}"
                words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [shown])
        return words
