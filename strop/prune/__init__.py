"""Structured pruning: the `prune` slot, which saves channels."""

from strop.prune.base import PruneMethod
from strop.prune.baselines import GlobalRanking, Uniform, magnitude_masked
from strop.prune.cut import cut, difference, masked
from strop.prune.plan import PrunePlan
from strop.prune.primesvt import PrimeSVT
from strop.prune.psvit import PSViT
from strop.prune.recover import finetune, reestimate, validated
from strop.prune.saved import load, save
from strop.prune.trace import trace
from strop.prune.units import Axis, Unit, Units

__all__ = [
    "Axis",
    "GlobalRanking",
    "PSViT",
    "PrimeSVT",
    "PruneMethod",
    "PrunePlan",
    "Uniform",
    "Unit",
    "Units",
    "cut",
    "difference",
    "finetune",
    "load",
    "magnitude_masked",
    "masked",
    "reestimate",
    "save",
    "trace",
    "validated",
]
