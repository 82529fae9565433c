"""The cards of the bundled mixture of experts and its twin, from the run's own record and measures."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from card import making, percent, table

_ABOUT = """A small mixture-of-experts model of Python source, trained from nothing on the text of `coder`, so
that some experts see many times as many tokens as others. It was made to try out what compression
does to experts that were trained unequally."""

_TWIN = """The twin of `moe` from seed {seed}, for the claims alone. It differs in its weights, in the order
of its text and in which experts are busy, so that what one training shows can be sought in another."""

_CARD = """# {name}

{about}

- Architecture: Qwen2-MoE (`Qwen2MoeForCausalLM`), 4.5 M parameters in bfloat16 (8.9 MB), 1.6 M of them
  at work on a token beside the embedding: 4 layers, width 128, 4 query heads of 64 over 2 key-value
  heads, 8 experts of 256 in every layer, 2 a token with weights that sum to one, and a shared expert
  of 256; tied embeddings, context 2,048 (three quarters of the steps at 1,024 tokens, the last quarter
  at 2,048). Every matrix of attention and experts is 128 by 128 or 256 by 128, for spectra of whole tiles.
- Tokenizer: that of `coder`, unchanged.
- Script: `python zoo/train_moe.py --out DIR{seed}`

## Data

The Python source that CPython {python} installs, sides and planted rows as in the card of `coder`.

- Training side: {train_files} files, {train_bytes:,} bytes, each seen about eight times
- Held-out side: {held_out_files} files, {held_out_bytes:,} bytes
- Fingerprint, the SHA-256 over the files' SHA-256s in the order of their paths:
  `{fingerprint}`
- Licence: PSF License Agreement, version 2, with the licences that it includes

{making}
On a GPU the products of the experts are float32: autocast does not reach the grouped products of
transformers, which are there nearly three times as fast a step as a loop over the experts.

## How busy its experts are

Left alone, routing may starve an expert, and the usual balancing loss makes all of them alike. Here that
loss (arXiv 2101.03961) divides each expert's share of the routed tokens by a target, and so pulls usage to
the targets: geometric, the busiest 16 times the idlest, in an order that the seed draws for each layer; its
weight is 0.05 a layer. How unequal the experts are is therefore set, not found; which tokens an
expert takes and what it learns from them is not. Percent of the held-out tokens that each expert sees,
the target in brackets; a layer sums to 200:

{usage}
## What it can do, on held-out files

Bits per byte, lower is better; windows, compressors and 5-gram as in the card of `coder`.

{bits}
Passkey recall, greedy, two distracting keys, 100 prompts a row:

{recalls}
## What it is not for

It knows Python's syntax and the library's idiom, not what programs mean; its completions are seldom correct
code. Recalling keys was learned in part with one seed and not at all with the other; `coder` does that.
Nothing beyond 2,048 tokens was trained.
"""


def card(
    record: Mapping[str, Any],
    metrics: Mapping[str, Any],
    speed: Mapping[str, Any],
    totals: Mapping[str, Any],
) -> str:
    """The card of `moe`, or of its twin if the seed is not 0.

    `totals` describe the library of the interpreter that writes it.
    """
    seed, corpus = record["plan"]["seed"], record["corpus"]
    columns = ("moe", "xz", "bz2", "gzip", "5-gram")
    bits = [
        (text, f"{row['bytes']:,}", *(f"{row[column]:.3f}" for column in columns))
        for text, row in metrics["bits per byte"].items()
    ]
    recalls = [(where, percent(share)) for where, share in metrics["recall"].items()]
    usage = [
        (
            layer,
            *(f"{100 * a:.1f} ({100 * b:.1f})" for a, b in zip(*both, strict=True)),
            f"{_ratio(both[0]):.0f}",
        )
        for layer, both in enumerate(zip(metrics["usage"], record["targets"], strict=True))
    ]
    experts = [f"expert {number}" for number in range(len(record["targets"][0]))]
    return _CARD.format(
        name=f"moe-{seed}" if seed else "moe",
        about=_TWIN.format(seed=seed) if seed else _ABOUT,
        seed=f" --seed {seed}" if seed else "",
        python=platform.python_version() if totals == corpus else "of another version",
        making=making([record], speed),
        bits=table(("held-out text", "bytes", *columns), bits),
        recalls=table(("filler and depth", "right, with its 95 % interval"), recalls),
        usage=table(("layer", *experts, "busiest / idlest"), usage),
        **corpus,
    )


def _ratio(shares: Sequence[float]) -> float:
    return max(shares) / min(shares)
