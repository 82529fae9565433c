"""One measurement: a recipe beside the same checkpoint as is, on one workload, as one plain row."""

import dataclasses
import platform
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

from strop.audit.memory import fill_cache
from strop.audit.quality import TextQuality, agreement, exact_match_loss, text_quality
from strop.audit.speed import speed
from strop.core.errors import StropError
from strop.core.machine import cpu_name, gpu_name, require_alike
from strop.model import Model, load
from strop.prune.base import PruneMethod
from strop.recipe import SLOTS, Recipe, label
from strop.tune.greedy import in_batches
from strop.tune.reuse import ReuseBench
from strop.tune.workload import CONTINUATION, NEW_TOKENS, Workload, answered, recalled
from strop.weights.base import WeightMethod

PLAIN = {"decode": "plain"}
SURVIVORS = 2
"""Candidates of a slot that go on to compositions."""

Report = Callable[[str, float], None]
"""Called with what is going on and the share done, 0 to 1."""


class Bench:
    """A baseline on a workload; its own outputs are computed once and shared by all rows."""

    def __init__(self, base: Model, work: Workload, seed: int = 0) -> None:
        self.base, self.work, self.seed = base, work, seed
        self.read: dict[str, TextQuality] = {}
        """Of texts that are read, by prune, weights and kv: how a recipe decodes does not matter to them."""

    @cached_property
    def base_continuations(self) -> list[list[int]]:
        """The baseline's greedy continuations of the prompts."""
        return continuations(self.base, self.work)

    @cached_property
    def base_solved(self) -> list[bool]:
        """Which problems the baseline solves."""
        return solved(self.base, self.work)

    @cached_property
    def reuse(self) -> ReuseBench:
        """The same for recipes that share pages among prompts."""
        return ReuseBench(self.base, self.work, self.seed)

    def row(self, model: Model, report: Report = lambda what, share: None) -> dict[str, Any]:
        """Measure one recipe. A recipe that cannot run gives a row that says why."""
        start = time.perf_counter()
        row = describe(model.recipe)
        try:
            if model.recipe.reuse is not None:
                row |= self.reuse.measure(model, report)
                return row | {"status": "measured", "seconds": time.perf_counter() - start}
            model.prepare(lambda what, share: report(what, 0.0))
            row["memory"] = self.memory(model)
            row["quality"] = self.quality(model, report)
            row["speed"] = self.speed(model, report)
            row["status"] = "measured"
        except StropError as error:
            row |= {"status": "refused", "reason": str(error), "memory": None, "quality": None}
        return row | {"seconds": time.perf_counter() - start}

    def quality(self, model: Model, report: Report) -> dict[str, Any]:
        """Perplexity, KL, exact match, agreement and recall."""
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            report("quality", 0.6 * done / len(self.work.texts))

        read = repr((model.recipe.prune, model.recipe.weights, model.recipe.kv))
        if read not in self.read:
            self.read[read] = text_quality(self.base, model, self.work.texts, seed=self.seed, step=step)
        quality = dataclasses.asdict(self.read[read]) | {
            "agreement": None,
            "exact_match": None,
            "exact_match_loss": None,
            "exact_match_loss_hi": None,
            "recall": recall(model, self.work),
        }
        if self.work.prompts:
            quality["agreement"] = agreement(self.base_continuations, continuations(model, self.work))
        report("quality", 0.7)
        if self.work.problems:
            right = solved(model, self.work)
            quality["exact_match"] = sum(right) / len(right)
            if found := exact_match_loss(self.base_solved, right, self.seed):
                loss, _, high = found
                lossless = all(method.lossless for method in model.recipe.methods().values())
                sure = lossless and right == self.base_solved
                quality |= {"exact_match_loss": loss, "exact_match_loss_hi": 0.0 if sure else high}
        drops = (quality["ppl_rise_hi"], quality["exact_match_loss_hi"])
        return quality | {"drop_hi": max(drop for drop in drops if drop is not None)}

    def speed(self, model: Model, report: Report) -> dict[str, Any]:
        """Times and ratios; the baseline against itself shows the noise of the machine.

        Speculation is timed over more tokens, since a drafter reads the prompt before its first ones, and has
        no KV part: behind one token another text is written, of which more or less is foreseen.
        """

        def step(share: float) -> None:
            report("speed", 0.7 + 0.3 * share)

        batches = self.work.speed_batches
        if model.recipe.decode is None:
            return dataclasses.asdict(speed(self.base, model, batches, step))
        if len(batches[0]) > 1:
            raise StropError("speculation takes one prompt at a time: use --batch 1, or no decode method")
        return dataclasses.asdict(speed(self.base, model, batches, step, steps=NEW_TOKENS - 1, kv=False))

    def memory(self, model: Model) -> dict[str, Any]:
        """Weights and KV at the stated batch and context, and the ratio to the baseline."""
        rows, shape = self.work.speed_batches[0], model.kv_shape
        tokens, batch = self.work.context, len(rows)
        dense = shape.dense_bytes(tokens)
        kv = model.recipe.kv
        formula = dense if kv is None else kv.kv_bytes(shape, tokens)
        weights = model.weight_bytes()
        drafter = model.drafter_bytes(tokens)
        total = weights + batch * formula + drafter
        elements = dense * batch // shape.itemsize
        return dataclasses.asdict(fill_cache(model, rows)) | {
            "weights_bytes": weights,
            "kv_bytes": batch * formula,
            "drafter_bytes": drafter,
            "total_bytes": total,
            "ratio": total / (self.base.weight_bytes() + batch * dense),
            "kv_bits_per_element": 8 * batch * formula / elements,
            "context": tokens,
            "batch": batch,
        }


class Measurer:
    """A worker of studies: measures recipes, given as plain data, beside one baseline."""

    def __init__(self, base: Model, work: Workload, seed: int) -> None:
        self.base = base
        self.bench = Bench(base, work, seed)
        self.packed: dict[tuple[PruneMethod | None, WeightMethod | None], Model] = {}

    def __call__(self, given: dict[str, Any], report: Report) -> dict[str, Any]:
        """The row of one recipe, whatever comes of it; raises only where the baseline itself fails."""
        recipe = Recipe.from_dict(given)
        report("starting", 0.0)
        try:
            return self.bench.row(self._model(recipe), report)
        except StropError as error:
            return describe(recipe) | {"status": "refused", "reason": str(error), "seconds": 0.0}
        except Exception as error:  # a fault of one method, often a peer's, does not end the study
            if not recipe.methods():
                raise
            return failed(recipe, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _model(self, recipe: Recipe) -> Model:
        """The model under a recipe; the newest `SURVIVORS` of what changes weights is not applied again."""
        key = recipe.prune, recipe.weights
        if key not in self.packed:
            if len(self.packed) == SURVIVORS:
                self.packed.pop(next(iter(self.packed)))
            self.packed[key] = self.base.with_(prune=recipe.prune, weights=recipe.weights)
        return self.packed[key].with_(**recipe.methods())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """Makes a measurer on another node, whose rows say where they come from."""

    model: str
    """zoo:NAME or a folder that every node sees."""
    fingerprint: str
    dtype: str
    device: str
    seed: int
    work: Workload
    code: str
    environment: dict[str, Any]
    """The driver's: its threads are taken over, its versions must be the node's."""

    def __call__(self) -> Callable[[dict[str, Any], Report], dict[str, Any]]:
        """Load the model. Raises StropError unless model and software are the driver's."""
        require_alike(self.environment, self.code)
        base = load(self.model, self.dtype, self.device)
        if base.checkpoint.fingerprint() != self.fingerprint:
            raise StropError(f"{self.model} is another model than the driver's: copy it to every node")
        chip = gpu_name() if self.device == "cuda" else cpu_name()
        node = {"node": f"{platform.node()}, {chip}"}
        measurer = Measurer(base, self.work, self.seed)
        return lambda given, report: measurer(given, report) | node


def describe(recipe: Recipe) -> dict[str, Any]:
    """The part of a row that is known before measuring."""
    filled = recipe.methods()
    return {
        "label": recipe.label(),
        "recipe": recipe.to_dict(),
        "slots": {
            slot: label(slot, filled[slot]) if slot in filled else PLAIN.get(slot, "as is")
            for slot in SLOTS
            if slot in filled or slot in ("weights", "kv", "decode")
        },
        "status": "skipped",
        "reason": None,
        "quality": None,
        "speed": None,
        "memory": None,
    }


def failed(recipe: Recipe, reason: str) -> dict[str, Any]:
    """The row of a recipe that a fault ended."""
    return describe(recipe) | {"status": "failed", "reason": reason, "seconds": 0.0}


def continuations(model: Model, work: Workload) -> list[list[int]]:
    """Greedy continuations of the workload's prompts."""
    return in_batches(model, work.prompts, [CONTINUATION] * len(work.prompts))


def solved(model: Model, work: Workload) -> list[bool]:
    """Which of the workload's problems a model solves."""
    problems = work.problems
    ids = in_batches(model, [p.ids for p in problems], [p.tokens for p in problems])
    texts = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [answered(work.extract, p.answer, text) for p, text in zip(problems, texts, strict=True)]


def recall(model: Model, work: Workload) -> dict[str, float] | None:
    """Share of planted keys recalled at each depth."""
    if not work.recall:
        return None
    rows = [model.encode(example.prompt) for _, example in work.recall]
    texts = model.tokenizer.batch_decode(in_batches(model, rows, [12] * len(rows)), skip_special_tokens=True)
    hits: dict[str, list[bool]] = {}
    for (depth, example), text in zip(work.recall, texts, strict=True):
        hits.setdefault(str(depth), []).append(recalled(example, text))
    return {depth: sum(right) / len(right) for depth, right in hits.items()}
