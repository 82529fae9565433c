"""The experiments behind claims about KV codecs: tables of rows, without any judgement.

A row is a flat dict that says what was measured (study, model, method, bits, group, sinks, mode) and holds
one value a repetition in a list for each measure. All rivals have the same sinks and the same tail.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache

from strop.audit.quality import common_prefix
from strop.claims.accuracy import Prompted, read_prompts, right, solve
from strop.claims.base import Row
from strop.claims.codecs import Repaired, Uncoded, VarN
from strop.claims.reading import Subject, coded_cache
from strop.claims.tiles import GENERATED, capture, damage, generate
from strop.core.cache import tensor_bytes
from strop.kv import KIVI, HadamardRTN, KVarN, KVMethod, Quantized
from strop.kv.base import KVShape
from strop.kv.codec import RoundedKV
from strop.kv.tiled import TiledKV
from strop.model import Model
from strop.tasks.base import Example

Step = Callable[[str], None]
"""Called with what comes next, before each measurement."""

CODECS: dict[str, type[RoundedKV]] = {
    "KIVI": KIVI,
    "Hadamard": HadamardRTN,
    "VarN only": VarN,
    "KVarN": KVarN,
}
RIVALS = ("KIVI", "Hadamard")
MODES = ("accumulated", "static")
SINKS = (0, 4, 128)
PRESETS = {"k2v2": (2, 2), "k4v2": (4, 2), "k4v4": (4, 4)}
STOCK = {
    "HQQ 2": Quantized(backend="hqq", bits=2, group=32),
    "HQQ 4": Quantized(backend="hqq", bits=4),
    "quanto 2": Quantized(backend="quanto", bits=2),
    "quanto 4": Quantized(backend="quanto", bits=4),
}
"""transformers' own caches: the same tail, no sinks, and all they hold is rounded again at each flush."""


def tile_study(seeds: int, count: int, group: int, dim: int, step: Step) -> list[Row]:
    """Errors of 2-bit codecs on generated tiles; a repetition is a fresh draw of `count` tiles."""
    rows = []
    for kind, (part, _) in GENERATED.items():
        step(f"tiles: {kind}")
        tiles = [generate(kind, count, group, dim, seed) for seed in range(seeds)]
        rows += _tile_rows({"study": "tiles", "model": f"generated: {kind}"}, part, tiles, group)
    return rows


def captured_study(subject: Subject, group: int, sinks: int, step: Step) -> list[Row]:
    """The same on the tiles that a model's keys and values make; a repetition is a text."""
    rows = []
    for part in ("keys", "values"):
        step(f"tiles: {part} of {subject.name}")
        tiles = list(capture(subject.cache, part, group, sinks))
        rows += _tile_rows({"study": "tiles", "model": subject.name}, part, tiles, group)
    return rows


def _tile_rows(head: Row, part: str, tiles: Sequence[torch.Tensor], group: int) -> list[Row]:
    rows = []
    for name, kind in CODECS.items():
        codec = kind(bits=2, group=group).codec()
        found = [damage(codec, part, one) for one in tiles]
        measures = {key: [one[key] for one in found] for key in found[0]}
        rows.append({**head, "part": part, "method": name, "bits": 2, "group": group, **measures})
    return rows


def accumulation_study(subject: Subject, points: Sequence[tuple[int, int, int]], step: Step) -> list[Row]:
    """KL and rise of loss at points of (bits, group, sinks); at 2 bits both accumulated and static."""
    subject.check_identity(Uncoded(sinks=points[0][2], group=points[0][1]))
    rows = [{"study": "accumulation", "model": subject.name, "method": "none", "loss": subject.loss.tolist()}]
    for bits, group, sinks in points:
        for name, kind in CODECS.items():
            method = kind(bits=bits, group=group, sinks=sinks)
            for mode in MODES[: 2 if bits == 2 else 1]:
                step(f"{subject.name}: {name}, {bits} bits, {sinks} sinks, {mode}")
                cost = subject.cost(method, mode == "static")
                rise = (cost.loss / subject.loss - 1).tolist()
                head = {"study": "accumulation", "model": subject.name, "method": name}
                place = {"bits": bits, "group": group, "sinks": sinks, "mode": mode}
                rows.append({**head, **place, "kl": cost.kl.tolist(), "loss_rise": rise})
    return rows


def repair_study(subject: Subject, group: int, sinks: int, step: Step) -> list[Row]:
    """KL of 2-bit KIVI, static, with the worst 5 % of token errors put right, or all the others."""
    rows = []
    for name, method in {
        "KIVI": KIVI(bits=2, group=group, sinks=sinks),
        "worst 5 % exact": Repaired(bits=2, group=group, sinks=sinks, worst=True),
        "other 95 % exact": Repaired(bits=2, group=group, sinks=sinks, worst=False),
    }.items():
        step(f"{subject.name}: {name}")
        head = {"study": "repair", "model": subject.name, "method": name, "sinks": sinks}
        rows.append({**head, "bits": 2, "kl": subject.cost(method, static=True).kl.tolist()})
    return rows


def contenders(sinks: int, *groups: int) -> dict[str, KVMethod]:
    """Every point of the table of quality against bytes, by name; tile codecs with each of the groups."""
    points: dict[str, KVMethod] = {
        f"{name} {preset} g{group}": CODECS[name](bits_k=k, bits_v=v, group=group, sinks=sinks)
        for name in (*RIVALS, "KVarN")
        for preset, (k, v) in PRESETS.items()
        for group in groups
    }
    for preset, (k, v) in PRESETS.items():
        method = KVarN(bits_k=k, bits_v=v, group=groups[0], sinks=sinks, aux_dtype="fp8")
        points[f"KVarN {preset} g{groups[0]} fp8"] = method
    return points | STOCK


def bytes_study(subject: Subject, points: dict[str, KVMethod], step: Step) -> list[Row]:
    """Accumulated KL beside the bytes a token that the cache holds at the end of a text, in 16-bit models."""
    rows, length = [], subject.tokens.shape[1]
    for name, method in points.items():
        step(f"{subject.name}: {name}")
        size = held_bytes(method, subject.model.config, length) / length
        head = {"study": "equal bytes", "model": subject.name, "method": name, "context": length}
        rows.append({**head, "bytes_per_token": size, "kl": subject.cost(method).kl.tolist()})
    return rows


def held_bytes(method: KVMethod, config: PretrainedConfig, tokens: int) -> int:
    """Bytes of a method's own cache that holds `tokens` bfloat16 tokens of noise.

    The last 65 tokens arrive after the rest, so that a stock cache has about half of its tail waiting.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    shape, cache = KVShape.of(config), method.new_cache(config)
    noise = torch.randn(1, shape.heads, tokens, shape.dim, generator=torch.Generator().manual_seed(0))
    for part in noise.bfloat16().split([tokens - 65, 64, 1], dim=2):
        for layer in range(shape.layers):
            cache.update(part.clone(), part.clone(), layer)
    for layer in getattr(cache, "attending", ()):
        layer.settle()
    return tensor_bytes(cache)


def accuracy_study(
    lm: Model, examples: Sequence[Example], seeds: int, group: int, sinks: Sequence[int], step: Step
) -> list[Row]:
    """Exact match of answers and the share of the uncompressed solution that is repeated; a repetition is a
    set of problems."""
    step("reading the problems")
    prompted = read_prompts(lm, examples)
    full = solve(lm.model, prompted, DynamicCache(config=lm.model.config))
    control = solve(lm.model, prompted, coded_cache(lm.model, Uncoded(group=group, sinks=sinks[0])))
    if not torch.equal(control, full):
        raise RuntimeError("control failed: an identity codec changed what the model wrote")
    rows = [_accuracy_row(lm, prompted, full, full, seeds, "full cache", "", None)]
    for preset, (k, v) in PRESETS.items():
        for held in sinks:
            for name in (*RIVALS, "KVarN"):
                step(f"solving: {name} {preset}, {held} sinks")
                method = CODECS[name](bits_k=k, bits_v=v, group=group, sinks=held)
                written = solve(lm.model, prompted, coded_cache(lm.model, method))
                rows.append(_accuracy_row(lm, prompted, written, full, seeds, name, preset, held))
    for name, method in STOCK.items():
        step(f"solving: {name}")
        written = solve(lm.model, prompted, method.new_cache(lm.model.config))
        preset = "k{0}v{0}".format(name.split()[1])
        rows.append(_accuracy_row(lm, prompted, written, full, seeds, name.split()[0], preset, None))
    return rows


def _accuracy_row(
    lm: Model,
    prompted: Prompted,
    written: torch.Tensor,
    full: torch.Tensor,
    seeds: int,
    method: str,
    preset: str,
    sinks: int | None,
) -> Row:
    pairs = zip(full.tolist(), written.tolist(), strict=True)
    kept = torch.tensor([common_prefix(a, b) / len(a) for a, b in pairs]).view(seeds, -1).mean(1)
    head = {"study": "accuracy", "model": "zoo:reasoner", "method": method, "preset": preset, "sinks": sinks}
    return {**head, "exact_match": right(lm, prompted, written, seeds), "repeated": kept.tolist()}


def same_when_served(lm: Model, method: TiledKV, examples: Sequence[Example]) -> float:
    """Share of problems that `Model.generate_ids`, one at a time through the packed cache, writes alike."""
    prompted = read_prompts(lm, examples)
    batch = solve(lm.model, prompted, coded_cache(lm.model, method))
    served, end = lm.with_(kv=method), lm.tokenizer.eos_token_id
    same = 0
    for example, row in zip(examples, batch.tolist(), strict=True):
        alone = served.generate_ids([lm.encode(example.prompt)], prompted.steps)[0]
        cut = row.index(end) + 1 if end in row else len(row)
        same += alone[:cut] == row[:cut]
    return same / len(examples)
