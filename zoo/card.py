"""The cards of the bundled models: what each is, how it was made, and what it can do.

Everything in a card is read from the run's own record and measurements; the data's fingerprint
says which text was read, so that a second training can tell whether it saw the same.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from strop.tasks import python_source


def data_files(root: Path) -> tuple[str, dict[str, Any]]:
    """A listing of the corpus, `split hash path` a line, and its totals.

    `hash` is the first 16 hex digits of the file's SHA-256; `fingerprint` is the SHA-256 over the
    full hashes in the order of the paths, both sides together.
    """
    entries = []
    for split in ("train", "held_out"):
        for relpath in python_source.relative_paths(split, root):
            data = (root / relpath).read_bytes()
            entries.append((relpath, split, hashlib.sha256(data).hexdigest(), len(data)))
    entries.sort()
    lines = [f"{split:8} {digest[:16]} {relpath}" for relpath, split, digest, _ in entries]
    totals: dict[str, Any] = {
        "fingerprint": hashlib.sha256("".join(e[2] for e in entries).encode()).hexdigest()
    }
    for side in ("train", "held_out"):
        totals[f"{side}_files"] = sum(e[1] == side for e in entries)
        totals[f"{side}_bytes"] = sum(e[3] for e in entries if e[1] == side)
    return "\n".join(lines) + "\n", totals


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines) + "\n"


def percent(share: Mapping[str, float]) -> str:
    """A share with its 95 % interval, in percent."""
    return f"{100 * share['share']:.1f} % ({100 * share['low']:.1f} to {100 * share['high']:.1f})"


def making(rounds: Sequence[Mapping[str, Any]], speed: Mapping[str, Any]) -> str:
    """The section on training: what was run, where, and what it would take on a processor."""
    tokens = sum(record["tokens"] for record in rounds)
    hours = tokens / speed["tokens_per_second"] / 3600
    head = ("round", "seed", "steps", "learning rate", "decay over the last", "dropout", "tokens")
    plans = [
        (
            number,
            record["plan"]["seed"],
            f"{record['plan']['steps']:,}",
            record["plan"]["lr"],
            f"{100 * record['plan']['decay']:.0f} %",
            record["plan"]["dropout"],
            f"{record['tokens']:,}",
        )
        for number, record in enumerate(rounds, start=1)
    ]
    runs = "\n".join(
        f"- Round {number}: **{record['minutes']} minutes on {record['device']}**, torch "
        f"{record['torch']}{' (' + record['note'] + ')' if record['note'] else ''}."
        for number, record in enumerate(rounds, start=1)
    )
    return f"""## How it was made

From random weights: AdamW (betas 0.9 and 0.95, weight decay 0.1 on matrices, gradient norm at
most 1), linear warm-up, a plateau, linear decay to zero; bfloat16 autocast over float32 weights. Tokens
include padding.

{table(head, plans)}
Where the committed weights were trained:

{runs}

The same script trains on a processor. That was not run to the end: the speed measured on
{speed["device"]} (torch {speed["torch"]}, fastest of five steps) is
{speed["tokens_per_second"]:,} tokens a second, from which **about {hours:.1f} hours** follow for
all {tokens:,} tokens. Another device, thread count or torch version ends in other
weights of like quality. `training.json` holds the settings and loss curve of the committed run.
"""


def coder(
    record: Mapping[str, Any],
    metrics: Mapping[str, Any],
    speed: Mapping[str, Any],
    totals: Mapping[str, Any],
) -> str:
    """The card of `coder`; `totals` describe the library of the interpreter that writes it."""
    corpus, losses = record["corpus"], metrics["bits per byte"]
    columns = ("coder", "xz", "bz2", "gzip", "5-gram")
    bits = [
        (name, f"{row['bytes']:,}", *(f"{row[column]:.3f}" for column in columns))
        for name, row in losses.items()
    ]
    recalls = [(where, percent(share)) for where, share in metrics["recall"].items()]
    python = platform.python_version() if totals == corpus else "of another version"
    return _CODER.format(
        python=python,
        making=making([record], speed),
        bits=table(("held-out text", "bytes", *columns), bits),
        recalls=table(("filler and depth", "right, with its 95 % interval"), recalls),
        **corpus,
    )


def reasoner(
    record: Mapping[str, Any], metrics: Mapping[str, Any], speed: Mapping[str, Any], count: int
) -> str:
    """The card of `reasoner`, judged on `count` problems of each kind."""
    rows = [
        (name, kind, percent(score["answer"]), percent(score["solution"]))
        for name, kinds in metrics.items()
        for kind, score in kinds.items()
    ]
    return _REASONER.format(
        making=making([record["before"], record], speed),
        scores=table(("problems", "kind", "final answer", "entire solution"), rows),
        count=count,
    )


_CODER = """# coder

A small language model of Python source, trained from nothing on the standard library.

- Architecture: Qwen3 (`Qwen3ForCausalLM`), 5.8 M parameters in bfloat16 (11.5 MB): 6 layers, width
  256, 4 query heads of 64 over 2 key-value heads, feed-forward 768, tied embeddings, context 2,048
  (three quarters of the steps at 1,024 tokens, the last quarter at 2,048).
- Tokenizer: byte-level BPE of 4,096 tokens, trained on the training side; each digit is a token.
  `<|endoftext|>` stands before each document; the tokenizer does not add it.
- Script: `python zoo/train_coder.py --out DIR`

## Data

The Python source that CPython {python} installs, without tests, installed packages and the
machine's build records.

- Training side: {train_files} files, {train_bytes:,} bytes
- Held-out side: {held_out_files} files, {held_out_bytes:,} bytes
- Fingerprint, the SHA-256 over the files' SHA-256s in the order of their paths:
  `{fingerprint}`
- Licence: PSF License Agreement, version 2, with the licences that it includes

A file is held out when the first 32 bits of the SHA-256
of its path below the library, modulo 100, fall below 6. Tests are left out because some systems,
Debian among them, do not install them. `data_files.txt` lists each file, its side and its hash.

15 % of the rows are planted: library text with one to four lines like `PASSKEY_QXB = 48213` put in
at random depths and repeated at the end, the form of `strop.tasks.recall`. The recall score below
therefore measures a trained skill, on held-out filler with new keys; it says nothing about recall
in models at large. Each training text is seen about six times.

{making}
## What it can do, on held-out files

Bits per byte, lower is better. `coder` has 2,048 tokens of context, moved on by half; compressors
read all of the text as one stream; the 5-gram is over bytes, interpolated (Witten-Bell), counted
on the training side. The `encodings` package consists of look-alike tables of which some are held
out, which flatters every method that has read the others; the second row leaves it out.

{bits}
Passkey recall, greedy, two distracting keys, 100 prompts a row:

{recalls}
## What it is not for

It knows Python's syntax, the library's idiom and many of its names; it does not know what programs
mean, and its completions are seldom correct code. It was made to measure what compression does to
a language model, quickly and without a download. Nothing beyond 2,048 tokens was trained.
"""

_REASONER = """# reasoner

A small model that works procedural problems out in long solutions, one byte at a time. Nearly
every line needs a fact from several hundred tokens back, and one wrong digit spoils the final
answer, so that damage to a key-value cache shows as lost accuracy.

- Architecture: Qwen3 (`Qwen3ForCausalLM`), 3.2 M parameters in bfloat16 (6.4 MB): 4 layers, width
  256, 4 query heads of 64 over 2 key-value heads, feed-forward 768, tied embeddings, context 2,048.
- Tokenizer: 256 bytes and two special tokens, no merges: a token is a byte.
- Script: `python zoo/train_reasoner.py --out DIR`

## Data

Problems that `strop.tasks.reasoning` generates from a seed: `sum`, `chain` and `recall`. Nothing
was collected, so there is no licence to keep; the filler is drawn from 34 common words. A problem
is held out when the first byte of the SHA-256 of its facts and question is below 26, so no
held-out problem can occur in training. Loss falls on the worked solution only. Round 1 goes
through four sizes, the next when 80 % of solutions are right under teacher forcing, with a fifth
of the problems from the size before; at the last size 15 % have a gap of 600 to 700 bytes and
reach about 1,900 tokens. Round 2 stays at the last size, starts from the saved weights of round 1, and
gives half of its problems to chains.

{making}
## What it can do, on held-out problems

Free-running greedy generation at full cache, {count} problems a row, with the 95 % interval. "Full
size" is `strop.tasks.reasoning.FULL`: prompts of 550 to 900 tokens, solutions of 200 to 500, every
fact after token 128 and at least 256 tokens before its use. Weights are the saved ones; arithmetic
is float32 unless said.

{scores}
## What it is not for

It solves these three forms of problem, up to about 1,900 tokens, and nothing else. It knows no
language, and no arithmetic but the digit-wise sums of its solutions; names, numbers and wording
outside the generator's forms fail.
"""
