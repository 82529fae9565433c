"""What mkdocs calls while it builds the site: pages that have another source are made here, in memory.

README, CONTRIBUTING and CHANGELOG stay in the root; methods and commands are read from the code.
"""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
sys.path.append(str(DOCS))  # for report.py and its parts, which the pages share their tables with

from claim_rows import anchored  # noqa: E402
from command_page import command_page  # noqa: E402
from method_pages import method_pages  # noqa: E402

OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository's root, and the pages that they are."""
FOLDERS = {"examples": "examples.md", "docs/results": "results.md"}
"""Folders that a link may name, and the pages that stand for them."""
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#|/)([^)\s#]+)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in what of the navigation follows from the code and from the folder."""
    nav: list[dict[str, Any]] = config.nav or []
    sections = {title: pages for entry in nav for title, pages in entry.items()}
    slots: dict[str, list[str]] = {}
    for path in method_pages():
        slots.setdefault(posixpath.dirname(path).removeprefix("methods").strip("/"), []).append(path)
    sections["Methods"][:] = [*slots.pop(""), *({slot: pages} for slot, pages in slots.items())]
    told = str(nav)
    sections["More"] += [page.name for page in sorted(DOCS.glob("*.md")) if f"'{page.name}'" not in told]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of this folder."""
    pages = method_pages() | {
        "commands.md": command_page(),
        "examples.md": examples_page(),
        "results.md": results_page(),
    }
    for name, page in OUTSIDE.items():
        pages[page] = (ROOT / name).read_text(encoding="utf-8")
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links to files of the repository links to pages, and every claim a place to link to."""
    path = page.file.src_uri
    source = next((name for name, made in OUTSIDE.items() if made == path), f"docs/{path}")
    if page.file.generated_by and path not in OUTSIDE.values():
        return markdown
    text = LINK.sub(lambda link: relinked(link[1], source, path), markdown)
    return anchored(text) if path == "claims.md" else text


def relinked(link: str, source: str, page: str) -> str:
    """A link in the file `source` of the repository, as the page made of it has to say it."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if not (target.startswith("docs/") and (ROOT / target).is_file()):
        target = OUTSIDE.get(target) or FOLDERS.get(target) or FOLDERS.get(posixpath.dirname(target), target)
    return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(page) or ".")


def examples_page() -> str:
    """Every example, whole."""
    parts = ["# Examples", "Each runs from a fresh clone after `make install`, with `.venv/bin/python`."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        code = path.read_text(encoding="utf-8").rstrip()
        parts.append(f"## {path.stem.replace('_', ' ')}\n\n`examples/{path.name}`\n\n```python\n{code}\n```")
    return "\n\n".join(parts) + "\n"


def results_page() -> str:
    """The files behind every measured table."""
    files = sorted((DOCS / "results").glob("*.json"))
    listed = [
        f"- [{path.name}](results/{path.name}), {path.stat().st_size / 1024:,.0f} KiB" for path in files
    ]
    text = (
        "What `make report` and `make gpu` wrote, machine and versions included. Every table is made of it."
    )
    return "\n\n".join(["# Raw results", text, "\n".join(listed)]) + "\n"
