"""Drives Debian's headless Chromium: a page is judged by what a reader's browser makes of it.

Nothing is downloaded: the browser and its driver are the distribution's (`chromium`,
`chromium-driver`).  What is not covered: other browsers.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
MISSING = "needs a browser: apt-get install chromium chromium-driver"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A fresh browser with a profile of its own; the test is skipped where none is installed."""
    if not (CHROMIUM and DRIVER):
        pytest.skip(MISSING)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def show(driver: webdriver.Chrome, path: Path, width: int = 1280, dark: bool = False) -> None:
    """Open a file at a page width (CSS pixels; 500 and under is a phone) and a colour scheme."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width <= 500}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    driver.get(path.resolve().as_uri())


def complaints(driver: webdriver.Chrome) -> list[str]:
    """Warnings and errors on the console since the last call."""
    return [e["message"] for e in driver.get_log("browser") if e["level"] in ("WARNING", "SEVERE")]


def requests(driver: webdriver.Chrome) -> list[str]:
    """Addresses that the pages asked for since the last call, files and inlined data left out."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    urls = [params["request"]["url"] for params in sent]
    return [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]


def screenshot(driver: webdriver.Chrome, path: Path) -> None:
    """The whole page, not only what is in view, as a PNG."""
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(shot["data"]))


def paper(driver: webdriver.Chrome, path: Path) -> None:
    """The page as it prints on A4, as a PDF."""
    sheet = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True}
    pdf = driver.execute_cdp_cmd("Page.printToPDF", sheet | {"printBackground": False})
    path.write_bytes(base64.b64decode(pdf["data"]))
