"""One HTML file that says what became of a model's features: verdict, pictures, the texts of the damaged.

All numbers are worded here; the template (``audit.html.j2``) and its script only lay them out. Names and
texts are treated as hostile.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from strop.audit.survival import ACTIVE, DAMAGED, SURVIVED
from strop.core import page
from strop.core.files import atomic
from strop.core.words import between, join, percent, ratio, share, shown, small

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
        f"{interval(survived, percent)} of {told['features']['active']:,} active features "
        f"survive {told['after']['label']}, while the loss {way} by {interval(rise, nats)} "
        "nats a token."
    )
    if told["passed"] is None:
        return said
    verdict = "passes" if told["passed"] else "does not pass"
    return f"{said} It {verdict}: {share(told['fail_under'])} were asked for, of the interval's lower end."


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
    yield "Active features", f"{counts['active']:,}", f"of {counts['all']:,}"


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
    pictures = {name: told[name] for name in ("histogram", "deciles", "points", "discordance")}
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
        "compared": [
            (row["name"], _cells(row["rise"], nats), _cells(row["survived"], percent))
            for row in told["discordance"]
        ],
        "sae_facts": {k: v for k, v in sae.items() if k != "quality"}
        | {k: f"{v:.4g}" for k, v in sae["quality"].items()},
        "meaning": MEANING.items(),
        "charts": pictures | {"survived": SURVIVED, "damaged": DAMAGED},
    }  # fmt: skip


def _cells(value: list[Any], show: Any) -> tuple[str, str]:
    return show(value[0]), between(value[1], value[2], show)


def write_report(told: Mapping[str, Any], path: Path) -> None:
    """Write the page for an audit to `path`, whole or not at all."""
    with atomic(path) as draft:
        draft.write_text(page.render("strop.audit", "audit", told, view), encoding="utf-8")
