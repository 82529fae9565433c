"""The site of `make docs`: links lead somewhere, it says what code and results say, and asks for nothing."""

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from browser import chromium, complaints, requests, show
from click.testing import CliRunner
from mkdocs.__main__ import cli
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from strop.recipe import METHODS, Recipe, named

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = [(slot, name) for slot, methods in METHODS.items() for name in methods]
CLAIMS = json.loads((ROOT / "docs" / "results" / "claims.json").read_text(encoding="utf-8"))["claims"]
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.png"))
ASSETS = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src")}
VOID = {"br", "hr", "img", "input", "link", "meta"}
NAMES = re.compile(r"^strop (?:zoo |train )?[a-z]+", re.MULTILINE)


@dataclass
class Cell:
    """A cell of a table."""

    text: str = ""
    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """What a page refers to, its names, its tables and its code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.refs: list[tuple[str, str, str]] = []
        self.rows: list[list[Cell]] = []
        self.heads: list[str] = []
        self.code: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append(Cell())
        elif tag == "pre":
            self.code.append("")
        elif tag == "h2":
            self.heads.append("")
        self.refs += [(tag, name, given[name]) for name in ("href", "src") if name in given]
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if "td" in self.open:
            self.rows[-1][-1].ids += [given["id"]] if "id" in given else []
            self.rows[-1][-1].links += [given["href"]] if "href" in given else []

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.rows[-1][-1].text += data
        if "pre" in self.open:
            self.code[-1] += data
        if "h2" in self.open and "a" not in self.open:
            self.heads[-1] += data


Site = dict[Path, Page]


def read(folder: Path) -> Site:
    """Every page of a site, but for the one of a server that has no such page."""
    pages = (path for path in folder.rglob("*.html") if path.name != "404.html")
    return {path: Page(path.read_text(encoding="utf-8")) for path in pages}


def lost(site: Site) -> Iterator[str]:
    """References that lead nowhere: no file, no such name in it, or an address without a host."""
    for path, page in site.items():
        for _, _, link in page.refs:
            parts = urlsplit(link)
            if parts.scheme:
                if parts.scheme not in ("http", "https") or not parts.netloc:
                    yield f"{path.name}: {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            if not target.is_file() or (parts.fragment and parts.fragment not in site[target].ids):
                yield f"{path.name}: {link}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The site as `make docs` builds it, warnings being errors."""
    folder = tmp_path_factory.mktemp("built") / "site"
    told = ["build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml"), "-d", str(folder)]
    run = CliRunner().invoke(cli, told)
    assert run.exit_code == 0, run.output
    return folder


@pytest.fixture(scope="module")
def site(folder) -> Site:
    return read(folder)


def test_every_link_and_picture_is_there(site):
    assert len(site) > len(NAMED)
    assert not list(lost(site))


def test_a_lost_link_is_found(tmp_path):
    links = ["a.html#there", "a.html#gone", "gone.html", "https:///", "https://example.org/x"]
    text = '<p id="there"></p>' + "".join(f'<a href="{link}">x</a>' for link in links)
    (tmp_path / "a.html").write_text(f'{text}<img src="gone.png">', encoding="utf-8")
    found = ["a.html#gone", "gone.html", "https:///", "gone.png"]
    assert list(lost(read(tmp_path.resolve()))) == [f"a.html: {link}" for link in found]


def test_no_asset_comes_from_elsewhere(folder, site):
    for path, page in site.items():
        foreign = [link for tag, name, link in page.refs if (tag, name) in ASSETS and urlsplit(link).netloc]
        assert not foreign, (path, foreign)
    for style in folder.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert "@import" not in text and not re.search(r"url\(['\"]?(https?:)?//", text), style


@pytest.mark.parametrize(("slot", "name"), NAMED)
def test_a_method_has_a_page_with_its_fields_and_its_recipe(folder, site, slot, name):
    kind = METHODS[slot][name]
    page = site[folder / "methods" / slot / f"{name}.html"]
    parameters = inspect.signature(kind).parameters.values()
    defaults = ["required" if p.default is p.empty else repr(p.default) for p in parameters]
    fields = page.rows[1 : len(defaults) + 1]
    assert [[row[0].text, row[2].text] for row in fields] == [
        [p.name, default] for p, default in zip(parameters, defaults, strict=True)
    ]
    recipe = next(code for code in page.code if code.startswith("strop: 1"))
    assert getattr(Recipe.from_dict(yaml.safe_load(recipe)), slot) == named(slot, name, ())[0]
    code = next(code for code in page.code if code.startswith("import strop"))
    found = eval(code.partition(f"with_({slot}=")[2].rstrip().removesuffix(")"), {kind.__name__: kind})
    assert found == named(slot, name, ())[0] and f"from {kind.__module__.rpartition('.')[0]} import" in code
    assert f"{slot}/{name}.html" in [link for _, _, link in site[folder / "methods" / "index.html"].refs]


def test_verdicts_are_those_of_the_results(folder, site):
    told = {cell.ids[0]: row for row in site[folder / "claims.html"].rows for cell in row if cell.ids}
    shown = set()
    for path, page in site.items():
        for row in page.rows:
            anchors = [link.partition("claims.html#")[2] for link in row[-1].links if "claims.html#" in link]
            for anchor in anchors:
                paper, _, number = anchor.rpartition("-")
                claim = [claim for claim in CLAIMS if claim["paper"] == paper][int(number) - 1]
                assert [row[0].text, row[-1].text] == [claim["claim"], claim["verdict"]], path
                assert told[anchor][0].text == claim["claim"]
                assert told[anchor][-1].text == f"{claim['verdict']}: {claim['reason']}".replace("`", "")
                shown.add(anchor)
    assert len(shown) == len(CLAIMS) == len(told)


def test_a_baseline_says_that_it_is_one(folder):
    for slot, name, baseline in (("kv", "kivi", True), ("kv", "kvarn", False), ("weights", "pmq", True)):
        text = (folder / "methods" / slot / f"{name}.html").read_text(encoding="utf-8")
        assert ("It is a baseline" in text) == baseline


def test_commands_of_the_readme_are_explained(folder, site):
    heads = site[folder / "commands.html"].heads
    used = {match[0] for match in NAMES.finditer((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert len(used) > 5 and used <= set(heads)
    assert all(head.startswith("strop ") for head in heads)


def test_every_text_is_in_the_navigation(folder, site):
    links = {link for _, _, link in site[folder / "index.html"].refs}
    assert {f"{path.stem}.html" for path in SOURCES[1:]} <= links
    assert {"contributing.html", "changelog.html", "methods/index.html"} <= links


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_rows_have_the_cells_of_their_head(path):
    """A bar in a cell, unless it is escaped, ends the cell; what is too much is dropped without a word."""
    width = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        cells = len(re.split(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (cells and width) or cells == width, f"{path.name}:{number}"
        width = cells


def test_the_gallery_shows_every_picture_and_stays_small(folder, site):
    shown = {Path(link).name for tag, _, link in site[folder / "gallery.html"].refs if tag == "img"}
    assert shown == {path.name for path in PICTURES} and len(shown) >= 8
    assert sum(path.stat().st_size for path in PICTURES) < 1_500_000


@pytest.mark.browser
def test_pages_fit_a_phone_and_search_works_from_disk(folder):
    with chromium() as driver:
        for page in ("claims", "commands"):
            show(driver, folder / f"{page}.html", 390)
            assert driver.execute_script("return document.documentElement.scrollWidth") == 390
        show(driver, folder / "index.html")
        driver.find_element(By.CSS_SELECTOR, "input.md-search__input").send_keys("max_rollback")
        found = (By.CSS_SELECTOR, ".md-search-result__item h1")
        WebDriverWait(driver, 20).until(lambda driver: driver.find_elements(*found))
        assert "kvarn" in [item.text for item in driver.find_elements(*found)]
        assert not requests(driver) and not complaints(driver)
