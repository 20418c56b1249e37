"""Chromium for the tests of the site, driven by Playwright: Debian's package, not a browser of Playwright's own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tools.notebooks import ROOT

SITE = ROOT / "docs" / "_build" / "html"
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"


def lacking(what: str) -> None:
    """Leave a test out for want of something; where none may be (``M2_TEST_ALL``), fail."""
    (pytest.fail if "M2_TEST_ALL" in os.environ else pytest.skip)(what)


@contextmanager
def chromium() -> Iterator:
    """A browser of Playwright's synchronous kind."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        lacking("no Chromium here; Debian and Ubuntu: apt-get install chromium")
    sandbox = [] if os.name == "nt" or os.geteuid() else ["--no-sandbox"]  # it has none for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*_QUIET.split(), *sandbox])
        yield browser
        browser.close()


def built_site() -> Path:
    """The folder of the built site, if it was built from the pages as they are."""
    docs = ROOT / "docs"
    sources = [*docs.glob("*.md"), *docs.glob("_static/**/*.*"), *(ROOT / "notebooks").glob("*.ipynb")]
    if stale := [path.relative_to(ROOT) for path in sorted(sources) if not _built(path)]:
        lacking(f"no site here that is as new as {stale[0]}; build it: make docs")
    return SITE


def _built(path: Path) -> bool:
    """Whether the site was made from this source as it is: Sphinx keeps a copy of each."""
    if path.suffix == ".ipynb":  # outputs may be those of another execution
        copy = SITE / "_sources" / "notebooks" / f"{path.name}.txt"
        return copy.is_file() and _cells(copy) == _cells(path)
    copy = SITE / "_sources" / f"{path.name}.txt" if path.suffix == ".md" else SITE / path.relative_to(ROOT / "docs")
    return copy.is_file() and copy.read_bytes() == path.read_bytes()


def _cells(path: Path) -> list[tuple]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [("".join(cell["source"]), cell["metadata"].get("tags")) for cell in cells]
