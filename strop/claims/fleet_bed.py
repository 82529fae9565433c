"""What claims about fleets share: a simulation that is checked, and when a hypothesis holds in most cells."""

from collections.abc import Sequence

from strop.serve.results import Results
from strop.serve.simulate import Simulation


def checked(simulation: Simulation) -> Results:
    """One run, checked: every request ended once, and no byte was lost."""
    results = simulation.run()
    simulation.check()
    return results


def mostly(holds: Sequence[bool]) -> bool:
    """Whether more than half hold."""
    return 2 * sum(holds) > len(holds)
