"""One HTML file for somebody who was not there: what all reports share.

A page is self-contained: style, scripts, chart library and data are inside, and a content security policy
forbids every request. A report brings a template, which fills `layout.html.j2`, and the script of its charts;
macros, style and scripts here are common.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from strop.core.words import MISSING, join

COMMON = "strop.core.page"


def asset(package: str, name: str) -> str:
    """A file of the page."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def fact(value: Any) -> str:
    """A setting or a property of the machine in words."""
    if isinstance(value, int) and value > 9999:
        return f"{value:,}"
    if isinstance(value, list):
        return join(*map(str, value))
    return MISSING if value is None else str(value)


def render(
    package: str, name: str, told: Mapping[str, Any], view: Callable[[dict[str, Any]], dict[str, Any]]
) -> str:
    """The page of the template `name`.html.j2 and the charts in `name`_charts.js of a package.

    `view` words the data for the template. The nonce, which only our own scripts carry, is a digest of it.
    """
    text = json.dumps(told)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda wanted: asset(COMMON, wanted)),
    )
    environment.filters["fact"] = fact
    return environment.from_string(asset(package, f"{name}.html.j2")).render(
        view(json.loads(text, parse_constant=lambda name: None)),
        nonce=hashlib.sha256(text.encode()).hexdigest(),
        style=asset(COMMON, "page.css"),
        charting=asset(COMMON, "charts.js") + asset(package, f"{name}_charts.js"),
        script=asset(COMMON, "page.js"),
        plotly=get_plotlyjs(),
    )
