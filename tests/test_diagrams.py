"""The diagrams of notebooks and pages: whole, described, and true to the code whose numbers they show."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from m2helpers import Codec, fit_scale, load_dataset
from m2helpers.models import embedded_tokenizer
from m2helpers.text import tokenise
from tools import notebooks

ROOT = notebooks.ROOT
FOLDER = ROOT / "notebooks" / "diagrams"
_IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<path>[^)]*diagrams/[^)]+\.svg)\)")


def _pages() -> dict[Path, str]:
    """The Markdown of notebooks and pages."""
    pages = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    for path in notebooks.find_notebooks():
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        pages[path] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return pages


def _words(name: str) -> list[str]:
    """The texts of a diagram, in their order."""
    root = ElementTree.parse(FOLDER / name).getroot()
    return ["".join(text.itertext()).strip() for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_every_diagram_is_shown_with_a_description():
    shown = set()
    for page, text in _pages().items():
        for image in _IMAGE.finditer(text):
            path = (page.parent / image["path"]).resolve()
            assert path.parent == FOLDER and path.is_file(), f"{page.name}: {image['path']}"
            assert len(image["alt"]) > 60, f"{page.name}: {path.name} has no description to speak of"
            shown.add(path.name)
    assert shown == {path.name for path in FOLDER.iterdir()}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.svg")), ids=lambda path: path.stem)
def test_a_diagram_stands_alone(path):
    text, root = path.read_text(encoding="utf-8"), ElementTree.parse(path).getroot()
    assert root.find("{http://www.w3.org/2000/svg}title").text
    assert not re.findall(r"(?:href|src)=|@import|url\((?!#)", text), "asks for another file"


def test_encoding_shows_what_the_codec_does():
    train = load_dataset().part("train")
    codec = Codec(fit_scale(train))
    first = train[0, 0]
    text = codec.encode(first[None])
    (ids,) = tokenise([text], embedded_tokenizer())
    words = _words("encoding.svg")
    expected = [*(f"{x:.4f}" for x in (*first, codec.scale, *np.multiply(first, codec.scale))), *text, *map(str, ids)]
    assert [word for word in expected if not any(word in shown.split() for shown in words)] == []
    row = [word for word in words if len(word) == 1]
    assert "".join(row) == text and [int(word) for word in words if word.isdigit() and len(word) == 2] == ids.tolist()
    assert text in _words("pipeline.svg")
