"""What every method of every slot is: a frozen dataclass that can say how it is set."""

import dataclasses
from typing import Any, ClassVar


class Method:
    """Base of all families' methods. Subclasses are frozen dataclasses with the paper's fields."""

    lossless: ClassVar[bool] = False
    """Whether the model writes the same with it, by construction."""

    def fields(self) -> dict[str, Any]:
        """All fields with their values."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: getattr(self, field.name) for field in fields}

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in self.fields().items() if value != defaults[name]}

    def settings(self) -> str:
        """The settings for people: every changed field."""
        return self.spell()

    def spell(self, short: str = "", *said: str) -> str:
        """`short`, then every changed field that it has not `said`."""
        rest = [f"{name}={value}" for name, value in self.changed().items() if name not in said]
        return " ".join(part for part in (short, *rest) if part)
