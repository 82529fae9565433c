"""Names that share a setting, as few readable patterns that match these names and no other.

`model.layers.0.mlp.experts.(0|3|7).gate_proj` stands for three. Left out: ranges and wildcards, which would
also match names that nobody listed.
"""

import math
from collections.abc import Iterable

Product = tuple[tuple[str, ...], ...]
"""Tokens allowed at each place of a dotted name: it stands for every combination."""


def targets(names: Iterable[str]) -> list[str]:
    """Exact names, and `re:` patterns where one stands for several of `names`."""
    return [
        f"re:^{pattern(product)}$" if count(product) > 1 else ".".join(token for (token,) in product)
        for product in products(names)
    ]


def products(names: Iterable[str]) -> list[Product]:
    """Products that together stand for `names`, each once, and for nothing else.

    Two products that differ at one place are joined there: experts first, then layers, then words.
    """
    found: list[Product] = [tuple((token,) for token in name.split(".")) for name in names]
    numbers = {place for product in found for place, (token,) in enumerate(product) if token.isdigit()}
    places = range(max(map(len, found)))
    for place in sorted(places, key=lambda place: (place not in numbers, -place)):
        found = _joined(found, place)
    return found


def _joined(products: list[Product], place: int) -> list[Product]:
    """Join products that differ at `place` alone; those that end before it stay."""
    short = [product for product in products if len(product) <= place]
    tokens: dict[tuple[Product, Product], list[str]] = {}
    for product in products:
        if len(product) > place:
            tokens.setdefault((product[:place], product[place + 1 :]), []).extend(product[place])
    long = [(*left, tuple(sorted(here, key=_order)), *right) for (left, right), here in tokens.items()]
    return short + long


def _order(token: str) -> tuple[int, str]:
    """Numbers by size, words by letter."""
    return (int(token), "") if token.isdigit() else (-1, token)


def count(product: Product) -> int:
    """How many names a product stands for."""
    return math.prod(map(len, product))


def pattern(product: Product) -> str:
    """A product as a regular expression, without anchors."""
    return r"\.".join(tokens[0] if len(tokens) == 1 else f"({'|'.join(tokens)})" for tokens in product)
