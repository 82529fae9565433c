"""The report of a study: self-contained, safe against its own labels, and readable in a browser."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, complaints, paper, requests, show
from report_study import KV, make_study
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from strop.core.errors import StropError
from strop.tune.report import render, write_report

HOSTILE = "<script>window.stolen = 1</script></script><img src=x onerror='window.stolen=1'> & \"%{x}\""


@pytest.fixture
def study() -> dict[str, Any]:
    return make_study()


def page_of(study: dict[str, Any], folder: Path) -> str:
    write_report(study, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def markup(page: str) -> str:
    """The page without what is inside its scripts and its style."""
    return re.sub(r"(<(script|style)\b[^>]*>).*?(</\2>)", r"\1\3", page, flags=re.DOTALL)


def words(page: str) -> str:
    text = html.unescape(re.sub(r"<[^>]+>", " ", markup(page)))
    return re.sub(r"\s+", " ", text)


def test_the_page_asks_for_nothing(study, tmp_path):
    page = page_of(study, tmp_path)
    assert not re.search(r"""\b(src|href|srcset|action)\s*=""", markup(page))
    style = page[page.index("<style>") : page.index("</style>")]
    assert "@import" not in style and "url(" not in style and "http" not in style
    assert "default-src 'none'" in page


def test_the_outcome_is_one_sentence_with_the_measured_numbers(study, tmp_path):
    text = words(page_of(study, tmp_path))
    assert (
        "kvarn k4v2 + rtn int8 keeps the perplexity rise within 1 % (measured 0.40 %, upper limit "
        "0.56 %), needs 0.44 of the memory and takes 0.93 of the time per token "
        "(95 % interval 0.91 to 0.96)." in text
    )


def test_an_interval_around_one_is_no_difference(study, tmp_path):
    chosen = next(entry for entry in study["rows"] if entry["chosen"])
    chosen["speed"]["step_ratio"] = [0.99, 0.95, 1.04]
    assert "(95 % interval 0.95 to 1.04: no clear difference)" in words(page_of(study, tmp_path))


def test_the_baseline_stays_when_nothing_is_within_the_drop(study, tmp_path):
    for entry in study["rows"][1:]:
        entry |= {"within_drop": False, "chosen": False}
    study["rows"][0]["chosen"] = True
    text = words(page_of(study, tmp_path))
    assert "The model stays as it is: no recipe out of 16 is shown to be within" in text
    assert "The nearest is lookup 4, with an upper limit of 0 %." in text


def test_every_row_is_in_the_table_and_says_why(study, tmp_path):
    text = words(page_of(study, tmp_path))
    assert all(entry["label"] in text for entry in study["rows"])
    assert "refused: transformers' QuantizedCache cannot be cropped" in text
    assert "failed: Out of memory." in text
    assert "task exact match : the data has no answers" in text


def test_a_slot_that_only_one_recipe_fills_has_a_column(study, tmp_path):
    study["rows"][3]["slots"]["prune"] = "psvit 0.25"
    text = words(page_of(study, tmp_path))
    assert "Prune" in text and "psvit 0.25" in text


def test_exact_match_has_a_curve_where_it_was_measured(study):
    assert 'id="accuracy"' not in render(study)
    for row in study["rows"]:
        if row["quality"]:
            row["quality"]["exact_match"] = 0.5
    assert 'id="accuracy"' in render(study)


def test_a_store_has_a_curve_of_its_own(study):
    row = next(row for row in study["rows"] if "vase" in row["recipe"].get("kv", {}))
    row["recipe"]["kv"]["vase"]["store"] = {"kvarn": {"bits_k": 4}}
    assert "</span> vase in kvarn</li>" in render(study)


def test_hostile_text_stays_text(study, tmp_path):
    for entry in study["rows"]:
        entry |= {"label": HOSTILE, "reason": HOSTILE}
        entry["recipe"]["model"] = HOSTILE
    study |= {"chosen": HOSTILE, "recipe_yaml": HOSTILE, "commands": [HOSTILE]}
    study["model"]["name"] = study["machine"]["cpu"] = study["settings"]["command"] = HOSTILE
    page = page_of(study, tmp_path)
    assert "<img" not in markup(page)
    own = re.findall(r"<script\b[^>]*>", markup(page))
    assert len(own) == 4 and len(set(re.findall(r'nonce="(\w{64})"', "".join(own)))) == 1
    assert page.count("</script>") == page.count("</script") == 4
    data = re.search(r'id="charts">(.*?)</script>', page, re.DOTALL)
    assert data and json.loads(data[1])["points"][0]["label"] == HOSTILE


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a row that may be null: numbers, intervals, whole measures."""
    if not isinstance(value, dict):
        return [path]
    return [path, *(leaf for key in value for leaf in leaves(value[key], (*path, key)))]


def test_any_number_may_be_missing(study):
    chosen = next(entry for entry in study["rows"] if entry["chosen"])
    for part in ("quality", "speed", "memory", "score"):
        for path in leaves(chosen[part], (part,)):
            *parents, last = path
            place = chosen
            for key in parents:
                place = place[key]
            kept, place[last] = place[last], None
            assert "</html>" in render(study), path
            place[last] = kept


def test_settings_and_infinite_numbers_may_be_missing(study, tmp_path):
    study["settings"] = dict.fromkeys(study["settings"])
    study["machine"] = dict.fromkeys(study["machine"])
    study["data"] = dict.fromkeys(study["data"])
    study["rows"][1]["quality"] |= {"ppl_rise": float("inf"), "kl": float("nan")}
    text = words(page_of(study, tmp_path))
    assert "nan" not in text.split() and "inf" not in text.split()


def test_a_failed_write_leaves_the_old_page_alone(study, tmp_path, monkeypatch):
    page = page_of(study, tmp_path)

    def fail(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    study["model"]["name"] = "another"
    with pytest.raises(StropError, match="disk full"):
        write_report(study, tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


def test_the_same_study_gives_the_same_bytes(study, tmp_path):
    assert page_of(study, tmp_path) == page_of(study, tmp_path)


@pytest.fixture(scope="module")
def driver():
    with chromium() as opened:
        yield opened


def points(driver, chart: str) -> int:
    return len(driver.find_elements(By.CSS_SELECTOR, f"#{chart} .points .point"))


def drawn(driver) -> bool:
    return WebDriverWait(driver, 20).until(lambda d: points(d, "speed") > 0)


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_charts_are_drawn_and_the_page_fits(study, tmp_path, driver, width, dark):
    write_report(study, tmp_path / "report.html")
    show(driver, tmp_path / "report.html", width, dark)
    assert drawn(driver)
    measured = [entry for entry in study["rows"] if entry["status"] == "measured"]
    assert points(driver, "speed") == points(driver, "quality") == len(measured) + 1  # and a ring
    assert points(driver, "kv") == sum(map(len, KV.values()))
    assert driver.execute_script("return document.documentElement.scrollWidth") == width
    assert complaints(driver) == [] and requests(driver) == []


@pytest.mark.browser
def test_charts_follow_the_colour_scheme(study, tmp_path, driver):
    write_report(study, tmp_path / "report.html")
    seen = "return document.querySelector('#speed .main-svg').style.background"
    show(driver, tmp_path / "report.html")
    assert drawn(driver)
    light = driver.execute_script(seen)
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    WebDriverWait(driver, 20).until(lambda d: d.execute_script(seen) != light)


@pytest.mark.browser
def test_a_header_sorts_and_says_so(study, tmp_path, driver):
    write_report(study, tmp_path / "report.html")
    show(driver, tmp_path / "report.html")

    def column(number: int) -> list[str]:
        cells = f"return [...document.querySelectorAll('.wide tbody tr')].map(r => r.cells[{number}]"
        return driver.execute_script(f"{cells}.dataset.sort)")

    header = driver.find_elements(By.CSS_SELECTOR, ".wide thead th")[2]
    button = header.find_element(By.TAG_NAME, "button")
    for key, state in ((Keys.ENTER, "ascending"), (Keys.SPACE, "descending")):
        button.send_keys(key)
        assert header.get_attribute("aria-sort") == state
        numbers = [float(value) for value in column(2) if value]
        assert numbers == sorted(numbers, reverse=state == "descending")
        assert column(2)[-2:] == ["", ""]
    driver.find_elements(By.CSS_SELECTOR, ".wide thead button")[0].click()
    assert column(0) == sorted(column(0)) and header.get_attribute("aria-sort") == "none"


@pytest.mark.browser
def test_copy_puts_the_recipe_on_the_clipboard(study, tmp_path, driver):
    write_report(study, tmp_path / "report.html")
    show(driver, tmp_path / "report.html")
    button = driver.find_element(By.CSS_SELECTOR, ".copy[aria-label='Copy the recipe']")
    button.click()
    WebDriverWait(driver, 20).until(lambda d: button.text == "Copied")
    driver.execute_script("document.body.append(document.createElement('textarea'))")
    area = driver.find_element(By.TAG_NAME, "textarea")
    area.send_keys(Keys.CONTROL, "v")
    assert area.get_attribute("value") == study["recipe_yaml"]


@pytest.mark.browser
def test_hostile_labels_do_not_run(study, tmp_path, driver):
    for entry in study["rows"]:
        entry["label"] = HOSTILE
    write_report(study, tmp_path / "report.html")
    show(driver, tmp_path / "report.html", 390)
    assert drawn(driver)
    assert driver.execute_script("return window.stolen") is None
    assert driver.find_element(By.CSS_SELECTOR, "tbody th").text == HOSTILE
    assert driver.find_element(By.CSS_SELECTOR, "#speed .annotation text").text == HOSTILE[:21] + "…"
    assert driver.execute_script("return document.documentElement.scrollWidth") == 390
    assert complaints(driver) == []


@pytest.mark.browser
def test_one_row_and_print(study, tmp_path, driver):
    study["rows"] = study["rows"][:1]
    study["rows"][0] |= {"chosen": True}
    write_report(study, tmp_path / "report.html")
    show(driver, tmp_path / "report.html", dark=True)
    assert drawn(driver)
    assert "no other recipe was measured" in driver.find_element(By.CLASS_NAME, "lead").text
    paper(driver, tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
    assert complaints(driver) == []
