"""What one client may take from the server and from the others."""

from dataclasses import dataclass

from strop.core.errors import StropError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on requests, on the work in flight, and on what a connection may hold up."""

    batch: int = 16
    """Sequences written at the same time; also the most that one request may ask for."""
    queue: int = 256
    """Sequences that may wait for a place; more are turned away."""
    prompt: int = 8192
    """Most tokens of a prompt."""
    output: int = 4096
    """Most tokens to write a sequence."""
    body: int = 1 << 20
    """Most bytes of a request."""
    read_s: float = 30.0
    """Seconds in which a request's body has to arrive."""
    send_s: float = 30.0
    """Seconds in which a client has to take the next piece of its answer."""
    idle_s: float = 15.0
    """Seconds that a connection may stay open without a whole request."""
    connections: int = 1024
    """Most open connections."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise StropError(f"the limit {name} must be above 0, got {value}")
        if self.queue < self.batch:
            raise StropError(
                f"the queue ({self.queue}) must hold a batch ({self.batch}) at least: raise --queue or lower "
                "--batch"
            )
