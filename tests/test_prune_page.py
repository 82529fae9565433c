"""The report of `strop prune` in a browser: charts, ticks, and names that are hostile."""

import json
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, complaints, requests, show
from prune_runs import laid, planned
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from strop.prune.prune_report import write_report


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    at = tmp_path_factory.mktemp("pruned")
    return planned(laid(at), at / "out")


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_draws_its_charts(done, width):
    out, told = done
    with chromium() as driver:
        show(driver, out / "report.html", width, dark=width == 390)
        alone_ = told["plan"]["sensitivity"]
        WebDriverWait(driver, 20).until(
            lambda d: len(d.find_elements(By.CSS_SELECTOR, "#heat .shapelayer path")) == len(alone_)
        )
        lines = driver.find_elements(By.CSS_SELECTOR, "#size .scatter .lines path")
        assert len(lines) == 4  # uniform everywhere, in blocks, the walk, the frontier
        cells = driver.find_elements(By.CSS_SELECTOR, "#plan-title ~ .scroll tbody tr")
        assert len(cells) == len(told["plan"]["rows"]) + len(told["steps"])
        assert driver.execute_script("return document.documentElement.scrollWidth") == width
        assert complaints(driver) == [] and requests(driver) == []


@pytest.mark.browser
def test_ticks_of_accuracies_that_are_close_together_differ(done, tmp_path):
    told = json.loads(json.dumps(done[1]))
    for one in (tried for name in ("curves", "walk", "candidates") for tried in told["plan"][name]):
        one["accuracy"] = 0.985 + 0.004 * one["accuracy"]
    told["plan"] |= {"dense_accuracy": 0.989, "accuracy": 0.987}
    told["asked"]["tolerance"] = 0.003
    write_report(told, tmp_path / "report.html")
    with chromium() as driver:
        show(driver, tmp_path / "report.html", 1200)
        marks = (By.CSS_SELECTOR, "#size .ytick text")
        WebDriverWait(driver, 20).until(lambda d: len(d.find_elements(*marks)) > 1)
        said_ = [mark.text for mark in driver.find_elements(*marks)]
        assert len({*said_}) == len(said_), said_


def test_hostile_names_and_missing_parts_stay_in_their_place(done, tmp_path):
    told = json.loads(json.dumps(done[1]))
    told["model"] = told["plan"]["rows"][0]["name"] = "<img src=x onerror=alert(1)>"
    told["plan"]["frozen"] = [["</script>", "<i>"]]
    told["plan"]["sensitivity"] = told["plan"]["curves"] = told["plan"]["walk"] = []
    told["asked"] = dict.fromkeys(told["asked"])
    write_report(told, tmp_path / "report.html")
    body = (tmp_path / "report.html").read_text().partition("<main>")[2].partition("</main>")[0]
    assert "<img" not in body and "</script>" not in body and "<i>" not in body
    assert 'id="heat"' not in body and "None" not in body
