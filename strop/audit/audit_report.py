"""One HTML file that says what became of a model's features: verdict, pictures, the texts of the damaged.

All numbers are worded here; the template (``audit.html.j2``) and its script only lay them out. Names and
texts are treated as hostile.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from strop.audit.survival import ACTIVE, DAMAGED, GATE, SURVIVED
from strop.core import page
from strop.core.files import atomic
from strop.core.words import MISSING, between, join, percent, ratio, share, shown, small

SHARES = {"survived": "Survived", "degraded": "Degraded", "damaged": "Damaged"}
MEANING = {
    "Feature": (
        "one of the directions that a sparse autoencoder, trained on the model as it was, found in the "
        "stream behind one layer. It fires at some tokens, with some strength, and is 0 at all others."
    ),
    "Active": (
        f"a feature that fires at more than {share(ACTIVE)} of the tokens before; only these are judged."
    ),
    "Correlation": (
        "Pearson's, of a feature's strength before and after the change, over all tokens: 1 is the same "
        "feature. Tokens where it is 0 both times count as agreement."
    ),
    "Survived, degraded, damaged": (f"a correlation above {SURVIVED}, in between, and below {DAMAGED}."),
    "Correlation where firing": (
        "the same over the tokens where the feature fires before or after: shared zeros do not help, so "
        "it is lower."
    ),
    "F1": (
        "how far the tokens where a feature fires are the same ones: 1 is the same set, 0 no token in common."
    ),
    "Fires at": (
        "the share of the tokens at which a judged feature fires before, the mean over these features: what "
        "fires more seldom is judged by fewer tokens."
    ),
    "Loss rise": (
        "how much worse the changed model predicts the same text, in nats a token. It can stay near 0 "
        "while features are lost."
    ),
    "Loss recovered": (
        "how well the autoencoder stands for the stream: 1 where the model predicts as well from what "
        "it writes, 0 where as badly as from zeros."
    ),
    "95 % interval": (
        "what is left of the answer's doubt: ends from 400 draws of the sequences with replacement."
    ),
}


def interval(value: list[Any], show: Any) -> str:
    """An estimate with its interval, where that has ends."""
    ends = between(value[1], value[2], show)
    return show(value[0]) + (f" (95\u00a0% interval {ends})" if ends else "")


def nats(value: float) -> str:
    """A small number of nats, signed where it is below 0."""
    return "0" if value == 0 else ("\N{MINUS SIGN}" if value < 0 else "") + small(abs(value))


def outcome(told: Mapping[str, Any]) -> str:
    """The audit in two sentences."""
    survived, rise = told["survival"]["survived"], told["loss"]["rise"]
    way = "rises" if rise[0] >= 0 else "changes"
    said = (
        f"{interval(survived, percent)} of {judged(told):,} active features "
        f"survive {told['after']['label']}, while the loss {way} by {interval(rise, nats)} "
        "nats a token."
    )
    if told["passed"] is None:
        return said
    verdict = "passes" if told["passed"] else "does not pass"
    return f"{said} It {verdict}: {share(told['fail_under'])} were asked for, of the interval's lower end."


def judged(told: Mapping[str, Any]) -> int:
    """Active features that are not the same at every token."""
    return told["features"]["active"] - told["features"]["constant"]


def gate(told: Mapping[str, Any]) -> str:
    """What the first token does to the model as it was: in which regime the losses hold."""
    if told["gate"] is None:
        return "First-token gate: not needed, the tokenizer has no first token."
    led, bare = told["gate"]["with_start"], told["gate"]["without"]
    return (
        f"First-token gate: passed, the model loses {led:.2f} nats a token with a first token and {bare:.2f} "
        f"without; where it were better without by more than {GATE}, nothing would be reported."
    )


def rates(rows: list[Mapping[str, Any]]) -> str:
    """Which rows of the discordance judge features that fire at other rates, or nothing."""
    first, *beside = rows
    others = [row for row in beside if row["rate"] not in (None, first["rate"])]
    if not others:
        return ""
    told = join(*(f"{row['name']} {percent(row['rate'])}" for row in others))
    return (
        f"Firing rates are not matched: judged features of the autoencoder fire at {percent(first['rate'])} "
        f"of the tokens on average; {told}."
    )


def regimes(told: Mapping[str, Any]) -> list[str]:
    """What to know beside losses and survivors, in sentences."""
    return [said for said in (gate(told), rates(told["discordance"])) if said]


def compared(rows: list[Mapping[str, Any]]) -> list[tuple[str, tuple[str, str], tuple[str, str], str]]:
    """Name, loss rise, survivors and firing rate of each row of the discordance; intervals apart."""
    return [
        (
            row["name"],
            _cells(row["rise"], nats),
            _cells(row["survived"], percent),
            MISSING if row["rate"] is None else percent(row["rate"]),
        )
        for row in rows
    ]


def scope(told: Mapping[str, Any]) -> str:
    """What the numbers hold for."""
    regime, sae = told["regime"], told["sae"]
    return (
        f"Measured on {regime['tokens']:,} tokens of {told['data']['name']}, {regime['sequences']:,} "
        f"sequences of {regime['length']:,}, {regime['first_token']}; behind layer {sae['layer']}, with the "
        f"autoencoder {sae['name']} of {sae['features']:,} features ({sae['form']}), which recovers "
        f"{ratio(sae['quality']['loss_recovered'])} of the loss on this text."
    )


def figures(told: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, value and small print of the few numbers at the top."""
    for name, title in SHARES.items():
        value = told["survival"][name]
        yield title, percent(value[0]), between(value[1], value[2], percent)
    median = told["survival"]["median"]
    yield "Median correlation", ratio(median[0]), between(median[1], median[2], "{:.3f}".format)
    rise, loss = told["loss"]["rise"], told["loss"]
    yield "Loss rise", nats(rise[0]), f"from {loss['before']:.3f} to {loss['after']:.3f} nats a token"
    counts = told["features"]
    constant = f"{counts['constant']:,} the same at every token, left out" if counts["constant"] else ""
    yield "Active features", f"{counts['active']:,}", join(f"of {counts['all']:,}", constant)


def spoken(text: str, whole: bool = False) -> str:
    """A text on one line: line ends are shown, and a token that is nothing but blanks."""
    if whole and text.isspace() and "\n" not in text:
        return "\N{OPEN BOX}" * len(text)
    return re.sub(r"[ \t]*\n\s*", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS} ", text)


def damaged(feature: Mapping[str, Any]) -> dict[str, Any]:
    """A feature that did not survive, in words."""
    sides = {
        side: [
            {
                "left": spoken(found["left"]),
                "token": spoken(found["token"], whole=True),
                "right": spoken(found["right"]),
                "strength": f"{found['strength']:.3g}",
            }
            for found in feature[side]
        ]
        for side in ("before", "after")
    }
    return sides | {
        "name": feature["feature"],
        "rho": f"{feature['rho']:.2f}",
        "said": join(
            shown(feature, "rho_firing", "{:.2f}".format, "where firing {}"),
            f"F1 {feature['f1']:.2f}",
            f"fires at {percent(feature['rate'])} of the tokens before and "
            f"{percent(feature['rate_after'])} after",
            f"peak {feature['peak']:.3g} before and {feature['peak_after']:.3g} after",
        ),
    }


def groups(rows: list[Mapping[str, Any]], show: Any) -> list[list[str]]:
    """The cells of a table of equal groups."""
    return [
        [between(row["low"], row["high"], show), f"{row['features']:,}", *(percent(row[k]) for k in
         ("survived", "damaged"))]
        for row in rows
    ]  # fmt: skip


def view(told: dict[str, Any]) -> dict[str, Any]:
    """The study in words, as the template wants it."""
    pictures = {name: told[name] for name in ("histogram", "deciles", "points")}
    pictures["discordance"] = [row for row in told["discordance"] if row["survived"][0] is not None]
    sae = told["sae"]
    return told | {
        "outcome": outcome(told),
        "scope": scope(told),
        "figures": list(figures(told)),
        "damaged": [damaged(feature) for feature in told["worst"]],
        "groups": {
            "rate": groups(told["deciles"]["rate"], percent),
            "peak": groups(told["deciles"]["peak"], "{:.3g}".format),
        },
        "shares": [(SHARES[name], *_cells(told["survival"][name], percent)) for name in SHARES]
        + [(f"{name} correlation", *_cells(told["survival"][name.lower()], "{:.4f}".format))
           for name in ("Mean", "Median")],
        "compared": compared(told["discordance"]),
        "regimes": regimes(told),
        "sae_facts": {k: v for k, v in sae.items() if k != "quality"}
        | {k: f"{v:.4g}" for k, v in sae["quality"].items()},
        "meaning": MEANING.items(),
        "charts": pictures | {"survived": SURVIVED, "damaged": DAMAGED},
    }  # fmt: skip


def _cells(value: list[Any], show: Any) -> tuple[str, str]:
    return MISSING if value[0] is None else show(value[0]), between(value[1], value[2], show)


def write_report(told: Mapping[str, Any], path: Path) -> None:
    """Write the page for an audit to `path`, whole or not at all."""
    with atomic(path) as draft:
        draft.write_text(page.render("strop.audit", "audit", told, view), encoding="utf-8")
