"""Which devices form which replica, with what role and layers: E2LLM's planner (arXiv 2606.03770)."""

from strop.serve.plan.baselines import MemoryProportional, SinglePipeline
from strop.serve.plan.devices import Device, Link, Links, Offload, Timing, read_devices
from strop.serve.plan.exhaustive import Exhaustive
from strop.serve.plan.genetic import Genetic
from strop.serve.plan.model import ModelShape, read_model
from strop.serve.plan.plan import DeploymentPlan, PlacementPlanner, Replica, Stage
from strop.serve.plan.planners import PLANNERS, RIVALS, planner
from strop.serve.plan.workload import Workload

__all__ = [
    "PLANNERS",
    "RIVALS",
    "DeploymentPlan",
    "Device",
    "Exhaustive",
    "Genetic",
    "Link",
    "Links",
    "MemoryProportional",
    "ModelShape",
    "Offload",
    "PlacementPlanner",
    "Replica",
    "SinglePipeline",
    "Stage",
    "Timing",
    "Workload",
    "planner",
    "read_devices",
    "read_model",
]
