"""What reads a quantized folder: transformers, vLLM, or strop alone, and why.

The limits were found with transformers 5.23 and vLLM 0.32 (docs/quantization.md). strop reads them all.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from strop.weights.grid import Grid
from strop.weights.plan import BitPlan
from strop.weights.rules import fused_conflicts

SERVED = (4, 8)
"""Widths that vLLM has kernels for on a GPU; on a CPU it has them for 4 bits alone, and none for experts."""


@dataclass(frozen=True)
class Readers:
    """Whether compressed-tensors can say a plan, and who reads the result."""

    compressed: bool
    engines: tuple[str, ...]
    said: tuple[str, ...]
    """Why the others do not, a sentence each; it starts with the name of a tool."""


def readers(plan: BitPlan, whole_zeros: bool, layers: Mapping[str, nn.Module]) -> Readers:
    """Who reads the layers quantized by `plan`; `whole_zeros` as a method's."""
    if why := _not_compressed(plan, whole_zeros, layers):
        note = "transformers reads it after strop.weights.register()"
        return Readers(False, ("strop",), (f"strop's own format, since {why}", note))
    engines, said = ["strop"], []
    experts = {row.grid for row in plan.experts}
    if any(not row.grid.symmetric for row in plan.rows):
        said.append("transformers reads no compressed-tensors folder with zero points")
    elif len(experts) > 1:
        said.append("transformers would read all experts at one width, and so wrong")
    else:
        engines.append("transformers")
    if why := not_served(plan):
        said.append(why)
    else:
        engines.append("vLLM")
        if experts:
            said.append("vLLM serves quantized experts on a GPU only")
        elif any(row.grid.bits == 8 for row in plan.rows):
            said.append("vLLM has kernels for 4 bits only on a CPU")
    return Readers(True, tuple(engines), tuple(said))


def not_served(plan: BitPlan) -> str:
    """Why vLLM does not serve `plan` in the form of compressed-tensors; empty where it does."""
    if odd := sorted({row.grid.bits for row in plan.rows} - set(SERVED)):
        return f"vLLM has no kernel for {', '.join(map(str, odd))} bits, only for {SERVED[0]} and {SERVED[1]}"
    if conflicts := fused_conflicts(plan):
        return f"vLLM multiplies some matrices at once: {conflicts[0]}"
    if any(not row.grid.symmetric for row in plan.experts):
        return "vLLM serves no experts with zero points"
    return ""


def _not_compressed(plan: BitPlan, whole_zeros: bool, layers: Mapping[str, nn.Module]) -> str:
    if any(row.grid.bits == 1 for row in plan.rows):
        return "compressed-tensors has no 1-bit codes"
    if not whole_zeros:
        return "compressed-tensors has no zeros between two codes"
    if odd := next((name for name, layer in layers.items() if not isinstance(layer, nn.Linear)), None):
        return f"{odd} is a Conv1D, which compressed-tensors cannot describe"
    schemes: dict[str, set[Grid]] = {}
    for row in plan.experts:
        schemes.setdefault(row.name.partition(".experts.")[0], set()).add(row.grid)
    if mixed := next((name for name, grids in schemes.items() if len(grids) > 1), None):
        return f"the experts of {mixed} differ in width, and engines take one scheme a layer"
    return ""
