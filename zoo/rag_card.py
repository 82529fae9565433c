"""The cards of `rag` and of its ordinary twin, from the run's own record and measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from card import percent, table

_ABOUT = {
    "rag": "The bundled `reasoner`, fine-tuned to look values up in documents that do not see each other:\n"
    "each is read by itself, and only the query sees them all. Keys and values of a document can therefore\n"
    "be computed once and stand anywhere in any later prompt, with keys rotated to where they are.",
    "rag-dense": "The twin of `rag` under the ordinary causal mask: the same start, recipe and data, but\n"
    "every document sees those before it. It is here to be compared with.",
}

_CARD = """# {name}

{about}

- Architecture: that of `reasoner`, Qwen3 (`Qwen3ForCausalLM`), {parameters:,} parameters in bfloat16
  ({megabytes:.1f} MB): 4 layers, width 256, 4 query heads of 64 over 2 key-value heads, rotary positions.
- Tokenizer: that of `reasoner`: a token is a byte.
- Script: `python zoo/train_{script}.py --out DIR`

## The prompt

Documents, each ended by a line break, and a query, with nothing between them:

```
{shown}
```

The model writes the three digits of the value and the end-of-text token. Each document and the query are
tokenized by themselves, which gives the tokens of the whole prompt. No key stands twice in a prompt.

## Data

Look-ups that `strop.tasks.documents` generates from a seed; nothing was collected, so there is no licence to
keep. Keys are three letters, values three digits; a key or value is held out when the first byte of the
SHA-256 of its text is below 26, one in ten, and training sees neither held-out keys nor held-out values.

## How it was made

From the weights of `reasoner` by `strop.kv.document_training`: 2 to 8 documents of 2 to 8 values at their
true positions, behind them up to {queries} queries a row that do not see each other, loss on the answers
alone. AdamW (betas 0.9 and 0.95, weight decay {plan[weight_decay]} on matrices, gradient norm at most 1),
seed {plan[seed]}, {plan[steps]:,} steps at a peak rate of {plan[lr]}, {plan[warmup]} steps of warm-up, linear
decay to zero over the last {decay:.0f} %; {tokens:,} tokens, padding included.

**{minutes} minutes on {device}**, torch {torch}{note}. Another device,
thread count or torch version ends in other weights of like quality. `training.json` holds the settings and
the loss curve.

Why training at true positions fits keys that are computed once: rotary attention sees differences of
positions only, so what a document's tokens become does not depend on where it stands, as long as they see
nothing before it. Its keys differ from those computed at position 0 by one rotation, the same for all.

## What it can do, on held-out look-ups

Shares of answers written exactly by greedy decoding, end included, with 95 % intervals; {count} look-ups a
row, up to {queries} queries each; float32 arithmetic on the saved weights. "Alone": documents do not see each
other. "In sequence": the ordinary causal mask.

{numbers}
Eight documents in {orders} orders, by the place of the one that holds the answer:

{places}
The same by order:

{orderly}
## What it is not for

It looks up values in documents of this form, among 2 to 8 of them, and nothing else: it knows no language,
prompts of more than about 550 tokens were not trained, and what `reasoner` could do is not kept.
"""


def card(name: str, record: Mapping[str, Any], metrics: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """The card of `rag` or `rag-dense`; `told` is what the script knows of prompts and measures."""
    plan = record["plan"]
    heads = [f"documents {mask}" for mask in metrics]

    def rows(kind: str) -> list[tuple[Any, ...]]:
        first = next(iter(metrics.values()))[kind]
        return [(key, *(percent(found[kind][key]) for found in metrics.values())) for key in first]

    orderly = [
        ("right, worst order", *(percent(min(m["orders"], key=_share)) for m in metrics.values())),
        ("right, best order", *(percent(max(m["orders"], key=_share)) for m in metrics.values())),
        ("right in all or wrong in all", *(percent(m["alike"]) for m in metrics.values())),
    ]
    return _CARD.format(
        name=name,
        about=_ABOUT[name],
        script=name.replace("-", "_"),
        megabytes=2 * record["parameters"] / 1e6,
        decay=100 * plan["decay"],
        note=f" ({record['note']})" if record["note"] else "",
        numbers=table(("documents", *heads), rows("documents")),
        places=table(("place", *heads), rows("places")),
        orderly=table(("", *heads), orderly),
        **{key: record[key] for key in ("plan", "parameters", "tokens", "minutes", "device", "torch")},
        **told,
    )


def _share(found: Mapping[str, float]) -> float:
    return found["share"]
