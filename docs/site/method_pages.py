"""A page for each method that a recipe can name, and an index by slot, read from code and results."""

import functools
import inspect
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from claim_rows import DOCS, cell, claims, paper_of, papers, verdict_table
from field_docs import fields
from report import demo
from report import kv as kv_table

from strop.core.method import Method
from strop.recipe import METHODS, Recipe, named

GUIDES = {
    "weights": ("Low-bit weights", "quantization.md"),
    "kv": ("KV methods side by side", "kv.md"),
    "decode": ("Speculative decoding", "speculation.md"),
}
"""The page that has a slot's methods side by side."""
FOR_EXPERTS = ("alphaq", "pmq")
LOSSLESS = "lossless; the model writes the same, but for near-ties in bfloat16"
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")


@functools.cache
def method_pages() -> dict[str, str]:
    """Path and text of every page, the index first."""
    pages = {"methods/index.md": index()}
    for slot, methods in METHODS.items():
        for name, kind in methods.items():
            pages[f"methods/{slot}/{name}.md"] = page(slot, name, kind)
    return pages


def page(slot: str, name: str, kind: type) -> str:
    """All about one method."""
    idea, *rest = doc(kind)
    parts = [f"# {name}", f"**{idea}**", facts(slot, kind), *rest]
    parts += ["## Fields", field_table(slot, kind)]
    parts += ["## Try it", *trial(slot, name)]
    parts += ["## What its paper claims", *claimed(kind)]
    parts += measured(slot, name)
    if slot in GUIDES:
        title, path = GUIDES[slot]
        parts.append(f"All methods of the slot beside each other: [{title}](../../{path}).")
    return "\n\n".join(parts) + "\n"


def doc(kind: type) -> list[str]:
    """The paragraphs of a method's module; the first is one sentence."""
    text = inspect.cleandoc(sys.modules[kind.__module__].__doc__ or "")
    idea, *rest = (plain(part) for part in text.split("\n\n"))
    sentence, _, more = idea.partition(". ")
    return [sentence.rstrip(".") + ".", *([more] if more else []), *rest]


def plain(text: str) -> str:
    """A paragraph of a docstring as Markdown."""
    return " ".join(text.split()).replace("<", "&lt;")


def source_of(kind: type) -> str:
    """The file that a method lives in."""
    return kind.__module__.replace(".", "/") + ".py"


def facts(slot: str, kind: Any) -> str:
    """Slot, class, source, paper, and what it does to the text."""
    ids = list(dict.fromkeys(ARXIV.findall(sys.modules[kind.__module__].__doc__ or "")))
    links = ", ".join(f"[arXiv {found}](https://arxiv.org/abs/{found})" for found in ids)
    effect = LOSSLESS if kind.lossless else "lossy; what it costs is measured"
    home = kind.__module__.rpartition(".")[0]
    lines = [
        f"- slot: `{slot}`",
        f"- in Python: `{home}.{kind.__name__}`. {plain(kind.__doc__ or '')}",
        f"- source: `{source_of(kind)}`",
        f"- papers: {links or 'none'}",
        f"- effect: {effect}",
    ]
    return "\n".join(lines)


def field_table(slot: str, kind: type) -> str:
    """Every field with type, default and meaning."""
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields(kind):
        fit = [name for name, known in METHODS[slot].items() if issubclass(known, field.methods)]
        links = f" One of {', '.join(f'[{name}]({name}.md)' for name in fit)}." if fit else ""
        text = cell(plain(field.text)) + links
        lines.append(f"| `{field.name}` | `{field.type}` | {field.default} | {text} |")
    return "\n".join(lines)


def trial(slot: str, name: str) -> Iterator[str]:
    """A recipe with the method's defaults, and commands that run it."""
    model = "zoo:moe" if name in FOR_EXPERTS else "zoo:coder"
    method = named(slot, name, ())[0]
    yield "A recipe of it alone, every default spelled out, as `recipe.yaml`:"
    yield f"```yaml\n{Recipe(model=model, **{slot: method}).to_yaml().rstrip()}\n```"
    commands = ["strop measure recipe.yaml", f"strop tune {model} --methods {name} --out runs/{name}"]
    if slot == "weights":
        commands.append(f"strop quantize {model} --method {name} -o runs/{name}")
    if slot == "decode":
        commands.insert(0, "strop generate recipe.yaml --prompt 'def main():'")
    yield "\n".join(["```bash", *commands, "```"])
    yield f"```python\n{python(slot, model, method)}\n```"


def python(slot: str, model: str, method: Method) -> str:
    """The same from Python."""
    kind = type(method)
    home = kind.__module__.rpartition(".")[0]
    settings = ", ".join(f"{name}={value!r}" for name, value in method.changed().items())
    use = f'lm = strop.load("{model}").with_({slot}={kind.__name__}({settings}))'
    return f"import strop\nfrom {home} import {kind.__name__}\n\n{use}"


def claimed(kind: type) -> Iterator[str]:
    """The verdicts on the paper's claims, or that there are none."""
    paper = paper_of(source_of(kind))
    if paper is None:
        yield "It is a baseline: no claim of its own is measured here; others are measured beside it."
    elif paper not in claims():
        yield "Its claims have not been measured here yet."
    else:
        yield f"Measured again by `strop claims {paper}`; the verdict leads to the numbers and the regime."
        yield verdict_table(paper, "../../")


def measured(slot: str, name: str) -> Iterator[str]:
    """What the demo and the comparison of KV methods measured of the method alone."""
    tables = []
    study = results("demo")
    alone = [
        row for row in study["rows"] if list(row["recipe"])[2:] == [slot] and name in row["recipe"][slot]
    ]
    if alone:
        tables.append(demo(study | {"rows": [study["rows"][0], *alone]}))
    sizes = results("kv")
    rows = [row for row in sizes["rows"] if row["method"].split()[0] == name]
    if slot == "kv" and rows:
        tables.append(kv_table(sizes | {"rows": rows}))
    return iter(["## Measured", *tables] if tables else [])


def results(name: str) -> dict[str, Any]:
    """What one of the measuring scripts wrote."""
    return json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))


def index() -> str:
    """Every method by slot, the papers without a method of their own name, and those not yet in the code."""
    parts = ["# Methods", "A recipe fills slots, each with one of these. Slots apply in this order."]
    covered = set()
    for slot, methods in METHODS.items():
        parts.append(f"## {slot}")
        lines = ["| method | idea | output | claims of its paper |", "| --- | --- | --- | --- |"]
        for name, kind in methods.items():
            paper = paper_of(source_of(kind))
            covered.add(paper)
            effect = "the same" if kind.lossless else "changes"
            lines.append(f"| [{name}]({slot}/{name}.md) | {cell(doc(kind)[0])} | {effect} | {tally(paper)} |")
        parts.append("\n".join(lines) if methods else "Nothing yet.")
    for paper in (paper for paper in claims() if paper not in covered):
        parts += [f"## {paper}", "It is part of other methods, so no recipe names it."]
        parts.append(verdict_table(paper, "../"))
    waiting = [
        f"- {name}, arXiv {number}, for {slot}"
        for name, number, slot, file, *_ in papers()
        if file == "not yet"
    ]
    parts += ["## Not yet", "Nothing of these papers is in the code.", "\n".join(waiting)]
    return "\n\n".join(parts) + "\n"


def tally(paper: str | None) -> str:
    """How many of a paper's claims got which verdict."""
    verdicts = [claim["verdict"] for claim in claims().get(paper or "", [])]
    counted = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    return counted or "a baseline"
