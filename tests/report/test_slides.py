"""The slides: one file that asks nobody for anything, with every figure of the notebooks that it names."""

import re

import pytest

from m2helpers.files import UserError
from m2helpers.paths import ROOT
from m2helpers.report import slides
from m2helpers.report.slides import Slide, argument, write_slides

FOLDERS = ROOT / "notebooks", ROOT / "notebooks" / "diagrams"


@pytest.mark.slow
def test_the_argument_is_one_file_with_all_its_figures(tmp_path):
    shown = argument()
    write_slides(shown, *FOLDERS, tmp_path / "slides.html")
    page = (tmp_path / "slides.html").read_text(encoding="utf-8")
    assert page.count("<section ") == len(shown) and page.count("<figure>") == sum(bool(s.figure) for s in shown)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page) and "@import" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert len(slides._PAGE.splitlines()) < 150


@pytest.mark.parametrize("figure", ["6:nowhere", "9:cell-01", "nothing.svg"])
def test_a_missing_figure_is_named(tmp_path, figure):
    with pytest.raises(UserError, match=r"which the slide 'Here' asks for"):
        write_slides([Slide("Here", "", figure)], *FOLDERS, tmp_path / "slides.html")
    assert not (tmp_path / "slides.html").exists()


def test_text_is_markdown_and_titles_are_escaped(tmp_path):
    write_slides([Slide("A < B", "| a |\n|---|\n| **1** |")], *FOLDERS, tmp_path / "slides.html")
    page = (tmp_path / "slides.html").read_text(encoding="utf-8")
    assert "<h1>A &lt; B</h1>" in page and "<td><strong>1</strong></td>" in page
