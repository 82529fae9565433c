"""A recipe: which method, with which settings, sits in each slot of which model.

The only place where names become objects. A slot holds one node `{method: {field: scalar or node}}`; methods
nest. Everything strop does is a function over recipes.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from strop.core.errors import StropError, quoted
from strop.core.files import atomic, did_you_mean, digest
from strop.core.method import Method
from strop.core.nodes import construct, read_yaml
from strop.decode import CaDDTree, DDTree, DecodeMethod, DFlash, PromptLookup
from strop.decode.base import Drafted
from strop.kv import (
    KIVI,
    RKV,
    CurDKV,
    EvictLarge,
    HadamardRTN,
    KVarN,
    KVMethod,
    Quantized,
    RandomEviction,
    SnapKV,
    StreamingLLM,
    VaSE,
    VaSEDKV,
)
from strop.kv.reuse import Documents, ReuseMethod, Segments
from strop.prune.base import PruneMethod
from strop.prune.baselines import Uniform
from strop.prune.primesvt import PrimeSVT
from strop.prune.psvit import PSViT
from strop.weights import GPTQ, HQQ, PMQ, RTN, AlphaQ, WeightMethod

VERSION = 1
AS_IS = "as is"
"""The label of a recipe without methods."""

METHODS: dict[str, dict[str, type]] = {
    "prune": {"psvit": PSViT, "primesvt": PrimeSVT, "uniform": Uniform},
    "weights": {"rtn": RTN, "gptq": GPTQ, "hqq": HQQ, "alphaq": AlphaQ, "pmq": PMQ},
    "kv": {
        "kvarn": KVarN,
        "kivi": KIVI,
        "hadamard": HadamardRTN,
        "quantized": Quantized,
        "vase": VaSE,
        "vase_dkv": VaSEDKV,
        "snapkv": SnapKV,
        "rkv": RKV,
        "curdkv": CurDKV,
        "streaming": StreamingLLM,
        "random": RandomEviction,
        "evict_large": EvictLarge,
    },
    "reuse": {"documents": Documents, "segments": Segments},
    "decode": {"prompt_lookup": PromptLookup, "dflash": DFlash, "ddtree": DDTree, "caddtree": CaDDTree},
    "rollout": {},
}
SLOTS = tuple(METHODS)

ALWAYS: dict[str, tuple[Method, ...]] = {
    "prune": (),
    "weights": (RTN(bits=8), RTN(bits=4, group=128), GPTQ(bits=4, group=128, samples=32)),
    "kv": (
        Quantized(backend="fp8", bits=8),
        Quantized(backend="hqq", bits=4),
        Quantized(backend="hqq", bits=2, group=32),
        Quantized(backend="quanto", bits=4),
        Quantized(backend="quanto", bits=2),
        KVarN(bits_k=4, bits_v=4),
        KVarN(bits_k=4, bits_v=2),
        KVarN(bits_k=2, bits_v=2),
    ),
    "reuse": (),
    "decode": (PromptLookup(), CaDDTree(drafter="ngram")),
}
"""What `tune` tries in each slot at any length."""

EXPERTS = (AlphaQ(bits=3.5), AlphaQ(bits=2.5))
"""What it tries for the weights of a mixture of experts besides."""
LONG = 1024
"""Tokens of context from which `tune` tries to evict some."""


def candidates(
    context: int, drafters: Sequence[str] = (), experts: bool = False, reuse: Sequence[Method] = ()
) -> dict[str, tuple[Method, ...]]:
    """What `tune` tries in each slot where `context` tokens are cached; a method joins by one entry.

    Where that is `LONG`, half and a quarter of the tokens are budgets for eviction, alone and over a store.
    `drafters` exist for the model, which may have `experts`; `reuse` fits what prompts of the data share.
    """
    tried = ALWAYS | {"decode": (*ALWAYS["decode"], *(CaDDTree(drafter=drafter) for drafter in drafters))}
    tried["reuse"] = tuple(reuse)
    if experts:
        tried["weights"] = (*ALWAYS["weights"], *EXPERTS)
    if context < LONG:
        return tried
    buffer = VaSE.buffer
    budgets = [context // part // buffer * buffer for part in (2, 4)]
    evicting = [kind(budget=budget) for kind in (VaSE, RKV) for budget in budgets]
    stored = [VaSE(budget=budget, store=KVarN(bits=4, group=buffer)) for budget in budgets]
    return tried | {"kv": (*ALWAYS["kv"], *evicting, *stored)}


def named(slot: str, name: str, drafters: Sequence[str]) -> list[Method]:
    """A method by its name, with its defaults; one for each drafter where it takes a drafter."""
    kind: Any = METHODS[slot][name]
    if issubclass(kind, Drafted):
        return [kind(drafter=drafter) for drafter in ("ngram", *drafters)]
    return [kind()]


def drafting(drafter: str, tree: str = "caddtree", budget: int | None = None) -> Drafted:
    """The decode method that verifies a drafter's tokens in trees of a kind, of `budget` nodes for ddtree."""
    if budget is not None and tree != "ddtree":
        raise StropError(f"a budget is for ddtree, and {tree} does without: leave it out, or use ddtree")
    return METHODS["decode"][tree](drafter=drafter, **({} if budget is None else {"budget": budget}))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Immutable; slots apply in the order of `SLOTS`. None leaves a slot as it is."""

    model: str | None = None
    prune: PruneMethod | None = None
    weights: WeightMethod | None = None
    kv: KVMethod | None = None
    reuse: ReuseMethod | None = None
    decode: DecodeMethod | None = None
    rollout: None = None

    def methods(self) -> dict[str, Method]:
        """The filled slots."""
        filled = {slot: getattr(self, slot) for slot in SLOTS}
        return {slot: method for slot, method in filled.items() if method is not None}

    def check(self) -> None:
        """Raise StropError for a composition that cannot work, naming the reason."""
        if self.reuse is not None and (self.kv is not None or self.decode is not None):
            other = label("kv", self.kv) if self.kv is not None else label("decode", self.decode)  # type: ignore[arg-type]
            raise StropError(
                f"{label('reuse', self.reuse)} keeps pages of its own, which replace the recipe's cache and "
                f"take no drafts, so {other} cannot join it: leave one of the two slots empty"
            )
        if self.kv is None or self.decode is None:
            return
        if self.kv.max_rollback < self.decode.least_rollback:
            raise StropError(
                f"{label('decode', self.decode)} may take {self.decode.least_rollback} tokens back and "
                f"{label('kv', self.kv)} can take back {self.kv.max_rollback}: propose fewer tokens, raise "
                "max_rollback where the method has it, or leave one of the two slots empty"
            )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as its file says it, every field spelled out."""
        head: dict[str, Any] = {"strop": VERSION}
        if self.model is not None:
            head["model"] = self.model
        return head | {slot: _node(slot, method) for slot, method in self.methods().items()}

    def to_yaml(self) -> str:
        """The recipe as text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def save(self, path: Path) -> None:
        """Write the recipe, whole or not at all."""
        with atomic(path) as temporary:
            temporary.write_text(self.to_yaml(), encoding="utf-8")

    def label(self) -> str:
        """A short name for people, such as `rtn int8 + kvarn k2v2`."""
        return " + ".join(label(*filled) for filled in self.methods().items()) or AS_IS

    def digest(self) -> str:
        """16 hex digits that name the recipe, every field included."""
        return digest(self.model, [repr(method) for method in self.methods().values()])

    @classmethod
    def load(cls, path: Path) -> "Recipe":
        """Read a recipe file. Raises StropError with one sentence for anything wrong in it."""
        recipe = cls.from_dict(read_yaml(path, "recipe"))
        if recipe.model and not recipe.model.startswith("zoo:") and os.path.isdir(path.parent / recipe.model):
            recipe = dataclasses.replace(recipe, model=str(path.parent / recipe.model))
        return recipe

    @classmethod
    def from_dict(cls, data: Any) -> "Recipe":
        """Parse what `to_dict` writes."""
        if not isinstance(data, dict):
            raise StropError("a recipe is a mapping that starts with `strop: 1`")
        if data.get("strop") != VERSION:
            raise StropError(f"a recipe starts with `strop: {VERSION}`, got {quoted(data.get('strop'))}")
        model = data.get("model")
        if model is not None and not isinstance(model, str):
            raise StropError(f"`model` names a folder or zoo:NAME, got {quoted(model)}")
        slots = {key: node for key, node in data.items() if key not in ("strop", "model")}
        for slot in slots:
            if slot not in METHODS:
                raise StropError(f"unknown slot {quoted(slot)}; {did_you_mean(str(slot), list(SLOTS))}")
        parsed = {slot: _parse(slot, node) for slot, node in slots.items() if node is not None}
        return cls(model=model, **parsed)


def method_name(slot: str, method: Method) -> str:
    """The name by which `METHODS` knows a method object."""
    for name, kind in METHODS[slot].items():
        if type(method) is kind:
            return name
    raise StropError(f"a {type(method).__name__} has no name in recipes: use it from Python")


def label(slot: str, method: Method) -> str:
    """A method and its settings for people, such as `kvarn k2v2`."""
    return f"{method_name(slot, method)} {method.settings()}".strip()


def _node(slot: str, method: Method) -> dict[str, Any]:
    fields = {
        name: _node(slot, value)
        if isinstance(value, Method)
        else list(value)
        if isinstance(value, tuple)
        else value
        for name, value in method.fields().items()
    }
    return {method_name(slot, method): fields}


def _parse(slot: str, node: Any) -> Any:
    if isinstance(node, str):
        node = {node: {}}
    if not isinstance(node, dict) or len(node) != 1:
        raise StropError(f"slot {slot!r} holds one node `method: {{fields}}`, got {quoted(node)}")
    name, fields = next(iter(node.items()))
    kind = METHODS[slot].get(name)
    if kind is None:
        known = list(METHODS[slot])
        raise StropError(f"unknown {slot} method {quoted(name)}; {did_you_mean(str(name), known)}")
    what = f"{slot} method {name!r}"
    return construct(kind, {} if fields is None else fields, name, partial(_nested, slot), what)


def _nested(slot: str, where: str, node: Any, wanted: tuple[type, ...]) -> Method:
    """A method that is a field of another."""
    method: Method = _parse(slot, node)
    if not isinstance(method, wanted):
        fit = [name for name, kind in METHODS[slot].items() if issubclass(kind, wanted)]
        raise StropError(f"{where} cannot be {method_name(slot, method)}; known: {', '.join(fit)}")
    return method
