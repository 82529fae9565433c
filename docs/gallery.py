"""Take the pictures of docs/gallery.md with headless Chromium, from the study in docs/results/demo.json.

    python docs/gallery.py

Needs the dev extra and the distribution's `chromium` and `chromium-driver`; asks the network for nothing.
"""

import contextlib
import html
import io
import json
import os
import shutil
import tempfile
from base64 import b64decode
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from strop import tables
from strop.tune.report import write_report

HERE = Path(__file__).parent
PICTURES = HERE / "pictures"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
)
WIDE, PHONE = 1200, 390
MARGIN = 16
HIGH = 1000
SHOTS = (
    ("speed", "figure:has(#speed)", WIDE, False),
    ("quality", "figure:has(#quality)", WIDE, False),
    ("cache", "figure:has(#kv)", WIDE, False),
    ("recipe", "section[aria-labelledby=recipe-title]", WIDE, False),
    ("tried", "section[aria-labelledby=all-title] .scroll", 1600, False),
    ("slots", "section[aria-labelledby=slots-title] .group", WIDE, False),
    ("dark", "figure:has(#speed)", WIDE, True),
    ("phone", "header", PHONE, False),
)
"""Name of each picture, the part of the report that it shows, the width of the page, whether it is dark."""
PAGE = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0 }}
pre {{ display: inline-block; margin: 0; padding: 16px 20px; background: #16201c; color: #e6ede9;
font: 14px/1.35 "DejaVu Sans Mono", monospace }}
</style><pre>$ {command}
{text}</pre>"""


def browser() -> webdriver.Chrome:
    """A headless browser with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def terminal(study: dict[str, Any]) -> str:
    """What `strop tune` printed at its end, as a page."""
    os.environ["COLUMNS"] = "88"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        tables.show_frontier(study, Path("runs/demo"))
    return PAGE.format(
        command=html.escape(study["settings"]["command"]), text=html.escape(printed.getvalue())
    )


def shoot(
    driver: webdriver.Chrome, page: Path, name: str, part: str, width: int, dark: bool, scale: float = 1
) -> None:
    """Save a part of a page, down to `HIGH`, or all of it made smaller, as docs/pictures/NAME.png."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    driver.get(page.as_uri())
    box = driver.find_element(By.CSS_SELECTOR, part).rect
    edge = min(MARGIN, box["x"], box["y"])
    clip = {
        "x": box["x"] - edge,
        "y": box["y"] - edge,
        "width": box["width"] + 2 * edge,
        "height": (box["height"] if scale < 1 else min(HIGH, box["height"])) + 2 * edge,
        "scale": scale,
    }
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    (PICTURES / f"{name}.png").write_bytes(b64decode(shot["data"]))


def main() -> None:
    """Take every picture again."""
    study = json.loads((HERE / "results" / "demo.json").read_text(encoding="utf-8"))
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        report, said = Path(folder) / "report.html", Path(folder) / "terminal.html"
        write_report(study, report)
        said.write_text(terminal(study), encoding="utf-8")
        driver = browser()
        try:
            for name, part, width, dark in SHOTS:
                shoot(driver, report, name, part, width, dark)
            shoot(driver, report, "whole", "main", WIDE, False, scale=0.4)
            shoot(driver, said, "terminal", "pre", WIDE, False)
        finally:
            driver.quit()
    for picture in sorted(PICTURES.glob("*.png")):
        print(f"{picture.name:<14} {picture.stat().st_size / 1024:5.0f} KiB")


if __name__ == "__main__":
    main()
