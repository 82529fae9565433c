"""Drafters, trees and verification: fewer passes of the target model per token."""

from strop.decode.base import DecodeMethod
from strop.decode.builder import Chain, Drawn, Grown
from strop.decode.caddtree import CaDDTree
from strop.decode.chain import DFlash
from strop.decode.ddtree import DDTree
from strop.decode.load import load_drafter
from strop.decode.prompt_lookup import PromptLookup
from strop.decode.sampler import Greedy, KeyedGumbel, Multinomial
from strop.decode.speculative import speculative
from strop.decode.stop import FixedBudget, Throughput
from strop.decode.verify import AncestralWalk, RecursiveRejection, Traversal

__all__ = [
    "AncestralWalk",
    "CaDDTree",
    "Chain",
    "DDTree",
    "DFlash",
    "DecodeMethod",
    "Drawn",
    "FixedBudget",
    "Greedy",
    "Grown",
    "KeyedGumbel",
    "Multinomial",
    "PromptLookup",
    "RecursiveRejection",
    "Throughput",
    "Traversal",
    "load_drafter",
    "speculative",
]
