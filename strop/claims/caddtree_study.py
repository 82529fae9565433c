"""Tree sizes chosen by cost, against every fixed size: timed, and replayed from recorded proposals.

Replays are deterministic: they take their seconds from cost curves that are written down here, those of this
kind of machine and those that the authors measured on theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from strop.claims.base import Row
from strop.claims.codec_bed import Progress
from strop.claims.draft_bed import DFLASH, NGRAM, Bed, Racer, Recording, Scale, decode, race
from strop.claims.stock import GREEDY, stock
from strop.decode import Chain, FixedBudget, Grown, Throughput, speculative
from strop.decode.cost import CostModel
from strop.decode.rest import Resting
from strop.decode.simulate import Trace, expected, replay
from strop.decode.stop import StopRule

AWARE, GLOBAL, FREE = "CaDDTree", "CaDDTree, global price", "constant cost"
LOOP, CHAIN, NGRAM_AWARE = "plain, same loop", "DFlash chain", "CaDDTree, n-grams"
SHIPPED = "CaDDTree that rests"
"""What this package decodes with: the paper's rule, and plain steps where drafts did not pay."""

CPU = "CPU"
CURVES: dict[str, tuple[Mapping[int, float], float, tuple[int, ...]]] = {
    CPU: ({1: 6.3, 64: 18.6}, 3.5, (2, 4, 8, 16, 32, 64)),
    **{
        f"A800, context {context}": (
            dict(zip((2, 65, 129, 193, 257, 385, 513), row, strict=True)),
            6.5,
            (16, 32, 64, 128, 256, 512),
        )
        for context, row in {
            1000: (33.8, 33.8, 33.8, 34.0, 34.9, 41.0, 48.5),
            4000: (34.6, 34.7, 36.3, 40.6, 46.3, 58.6, 72.4),
            8000: (44.3, 47.6, 51.4, 57.6, 64.7, 81.5, 104.0),
        }.items()
    },
}
"""Milliseconds by verified tokens, of the rest of a round, and the fixed budgets: the bundled coder on one
core behind 256 tokens, and what the authors ship for Qwen3-4B."""
WIDTH = 64
"""Candidates of a slot that are recorded."""
MISJUDGED = {"C_d / C_v halved": 0.5, "C_d / C_v doubled": 2.0}
"""Errors of a cost model, by what C_d is multiplied with; a factor of both parts would change no decision."""


def speed_study(bed: Bed, scale: Scale, progress: Progress) -> list[Row]:
    """Everything that decodes without a second language model, on the same texts, transformers' ways too."""
    drafter, ngram = bed.drafter(DFLASH), bed.drafter(NGRAM)
    ways = {
        LOOP: (ngram, FixedBudget(0)),
        CHAIN: (drafter, Chain()),
        **{ddtree(budget): (drafter, FixedBudget(budget)) for budget in scale.fixed},
        AWARE: (drafter, Throughput(bed.cost(DFLASH, progress))),
        SHIPPED: (drafter, Resting(Throughput(bed.cost(DFLASH, progress)))),
        GLOBAL: (drafter, Throughput(bed.cost(DFLASH, progress), price="global")),
        NGRAM_AWARE: (ngram, Throughput(bed.cost(NGRAM, progress))),
    }
    racers = [
        *(
            Racer(name, options, (0,) if name in GREEDY else (0, 1))
            for name, options in stock(drafter).items()
        ),
        *(Racer(name, {"custom_generate": speculative(*way)}) for name, way in ways.items()),
    ]
    return race(bed, racers, scale, progress)


def ddtree(budget: int) -> str:
    """The name of a fixed budget."""
    return f"DDTree {budget}"


@dataclass
class Heard(Throughput):
    """The rule, which keeps what it hears of verification: seconds predicted and measured."""

    rounds: list[tuple[float, float]] = field(default_factory=list, init=False)

    def observe(self, nodes: int, context: int, emitted: int, verify_s: float, round_s: float) -> None:
        self.rounds.append((self.cost.verify(nodes + 1, context), verify_s))
        super().observe(nodes, context, emitted, verify_s, round_s)


def prediction_study(bed: Bed, scale: Scale, progress: Progress) -> list[Row]:
    """Predicted and measured seconds of verification in real rounds, the median error of each text's."""
    rule = Heard(bed.cost(DFLASH, progress))
    racer = Racer(AWARE, {"custom_generate": speculative(bed.drafter(DFLASH), rule)})
    errors, biases = [], []
    for index, prompt in enumerate(bed.prompts):
        progress(f"predicting the cost: text {index + 1}")
        decode(bed.model, prompt[None], racer, scale.new, [])
        predicted, measured = np.array(rule.rounds).T
        errors.append(float(np.median(np.abs(predicted / measured - 1))))
        biases.append(float(np.median(predicted / measured - 1)))
        rule.rounds.clear()
    return [{"study": "prediction", "factor": rule.cost.factor, "error": errors, "bias": biases}]


@dataclass
class Deaf(Throughput):
    """The rule as published: what it is told of the cost stays as it is."""

    def observe(self, nodes: int, context: int, emitted: int, verify_s: float, round_s: float) -> None:
        """Nothing is learned."""


def replay_study(
    bed: Bed, scale: Scale, progress: Progress, temperatures: Sequence[int] = (0, 1)
) -> list[Row]:
    """Tokens and predicted seconds of rounds along recorded texts, by cost curve and stop rule.

    Greedy texts are replayed under all curves; those at temperature 1 under the CPU's, and there the target's
    probabilities take the place of the tokens that happened to be drawn. Raises RuntimeError when a fixed
    budget promises more tokens a second than the chosen size in any round.
    """
    rows = []
    for temperature in temperatures:
        nodes = max(scale.fixed) if temperature else 0
        recording = Recording("proposals", bed.drafter(DFLASH), Grown(FixedBudget(nodes)), WIDTH)
        traces = recording.traces(bed, temperature, scale.new if temperature else 2 * scale.new, progress)
        for name in CURVES if temperature == 0 else (CPU,):
            progress(f"replaying at temperature {temperature}: {name}")
            _require_highest(traces, name)
            for policy, rule in policies(name).items():
                head = {"study": "replay", "curve": name, "temperature": temperature, "method": policy}
                rows.append(head | _replayed(traces, rule, curve(name), bool(temperature)))
    return rows


def curve(name: str, times: float = 1.0) -> CostModel:
    """A cost model of CURVES, with `times` its C_d."""
    milliseconds, rest, _ = CURVES[name]
    return CostModel.fit({0: {n: ms / 1e3 for n, ms in milliseconds.items()}}, times * rest / 1e3)


def policies(name: str) -> dict[str, StopRule]:
    """What decides on sizes under a cost curve."""
    budgets = CURVES[name][2]
    found: dict[str, StopRule] = {ddtree(budget): FixedBudget(budget) for budget in budgets}
    found[AWARE] = Deaf(curve(name), most=max(budgets))
    found[GLOBAL] = Throughput(curve(name), price="global", most=max(budgets))
    found[FREE] = Deaf(CostModel({0: {1: 1.0, 2: 1.0}}), most=max(budgets))
    for error, times in MISJUDGED.items():
        found[error] = Deaf(curve(name, times), most=max(budgets))
    return found


def _replayed(traces: list[Trace], rule: StopRule, cost: CostModel, by_chance: bool) -> Row:
    """One value a text; the sizes of all rounds as percentiles.

    By chance, rounds count that drafted: the target's probabilities are known of these.
    """
    row: Row = {"tokens": [], "seconds": [], "promised": [], "spread": []}
    sizes: list[int] = []
    for trace in traces:
        found = replay(trace, Grown(rule), cost)
        moments = [trace.moments[at] for at in found.at if at < len(trace.moments)]
        nodes = found.nodes[: len(moments)]
        emitted = expected(moments, nodes) if by_chance else found.emitted
        drafted = sum(sum(moment.deltas(n)) for moment, n in zip(moments, nodes, strict=True))
        row["tokens"].append(float(sum(emitted)))
        row["seconds"].append(sum(found.seconds[: len(emitted)]))
        row["promised"].append(len(emitted) + drafted)
        row["spread"].append(_spread(nodes))
        sizes += nodes
    percentiles = {f"nodes_{share}": float(np.percentile(sizes, share)) for share in (10, 50, 90)}
    return {**row, "rounds": len(sizes), **percentiles}


def _spread(nodes: list[int]) -> float:
    """How many times the tokens of small rounds large ones verify, a tenth at each end left out."""
    low, high = np.percentile(nodes, [10, 90]) + 1
    return float(high / low)


def _require_highest(traces: list[Trace], name: str) -> None:
    cost, budgets = curve(name), CURVES[name][2]
    rule = Deaf(cost, most=max(budgets))
    for moment in (moment for trace in traces for moment in trace.moments):
        deltas = moment.deltas(max(budgets))
        theta = [
            rule.expected(n, sum(deltas[:n]), moment.context)
            for n in (rule.size(iter(deltas), moment.context), *(min(b, len(deltas)) for b in budgets))
        ]
        if max(theta) > theta[0] * (1 + 1e-9):
            raise RuntimeError(f"control failed: a fixed budget promises more than the chosen size, {name}")
