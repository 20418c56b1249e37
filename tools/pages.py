"""What the site does to a notebook's page: code that is not the argument is folded, pictures get words, tables read as people write.

The notebooks themselves stay as they are. The site's settings (docs/conf.py) call `rework` with each page that Sphinx has read.
"""

from __future__ import annotations

import ast
import re
import textwrap
from decimal import Decimal

from docutils import nodes

CONCLUSION = "What we saw"  # its code assembles sentences from variables: the page shows the sentences alone
FOLDED = {"picture": "Code of the picture", "checks": "Code that checks this", "words": "Code of these words"}
_LONGEST = 300  # characters of a description
_DECIMALS = 4  # so small a number is written out


def rework(document: nodes.document) -> None:
    """Fold and hide code, describe pictures, and tidy tables, in place."""
    for cell in list(document.findall(lambda node: _is(node, "nbinput"))):
        if CONCLUSION in _titles(cell):
            cell.parent.remove(cell)
        elif kind := kind_of(_code(cell), _outputs(cell)):
            at = cell.parent.index(cell)
            cell.parent[at : at + 1] = [
                _raw(f"<details class='fold'><summary>{FOLDED[kind]}</summary>"),
                cell,
                _raw("</details>"),
            ]
    introduction, words = "", []
    for node in document.findall():
        if isinstance(node, nodes.title) or (isinstance(node, nodes.paragraph) and not _inside_output(node)):
            introduction = node.astext()
        elif isinstance(node, nodes.image) and "alt" not in node:
            node["alt"] = description(introduction)
        elif isinstance(node, nodes.raw) and "<table" in node.astext():
            node[:] = [nodes.Text(tidy_table(node.astext()))]
        elif isinstance(node, nodes.Text) and not isinstance(
            node.parent, (nodes.literal, nodes.literal_block, nodes.math, nodes.math_block)
        ):
            words.append(node)
    for text in words:
        text.parent.replace(text, nodes.Text(plain_powers(text)))


def kind_of(code: str, outputs: list[nodes.Node]) -> str:
    """What a cell is for if it is not the argument itself: ``picture``, ``checks``, ``words``; else empty."""
    found = [node for output in outputs for node in output.findall()]
    if any(isinstance(node, nodes.image) for node in found):
        return "picture"
    if any(isinstance(node, nodes.raw) and "<table" in node.astext() for node in found):
        return ""
    try:
        statements = ast.parse(code).body
    except SyntaxError:  # a line for the shell
        return ""
    checks = sum(any(isinstance(part, ast.Assert) for part in ast.walk(statement)) for statement in statements)
    if checks and 2 * checks >= len(statements):
        return "checks"
    return "words" if "Markdown(" in code else ""


def description(introduction: str) -> str:
    """What is said before a picture, as its description: whole sentences as far as they are short."""
    words = " ".join(introduction.split())
    if len(words) <= _LONGEST:
        return words
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", words)
    kept = sentences[0]
    for sentence in sentences[1:]:
        if len(kept) + len(sentence) >= _LONGEST:
            break
        kept += f" {sentence}"
    return textwrap.shorten(kept, _LONGEST, placeholder=" …")


def tidy_table(html: str) -> str:
    """A table of pandas without its count of rows, and with large and small numbers as people write them: 2.5e14."""
    html = re.sub(r"<style scoped>.*?</style>\s*", "", html, flags=re.DOTALL)
    html = html.replace(' border="1"', "").replace(' style="text-align: right;"', "")
    rows = re.findall(r"<tr>\s*<th>(.*?)</th>", html.partition("<tbody>")[2], flags=re.DOTALL)
    if "<th></th>" in html.partition("</thead>")[0] and len(rows) > 1 and rows == [str(n) for n in range(len(rows))]:
        head, _, body = html.partition("<tbody>")
        if head.count("<tr>") == 1:  # else the column has a name of its own
            html = head.replace("<th></th>", "", 1) + "<tbody>" + re.sub(r"(<tr>\s*)<th>\d+</th>\s*", r"\1", body)
    html = re.sub(r"<thead>(.*?)</thead>", _one_header, html, flags=re.DOTALL)
    html = html.replace("<th></th>", "<td></td>")  # a corner heads nothing
    # whole numbers this long are FLOPs
    html = re.sub(r"(<t[dh]>)(\d{10,})(</t[dh]>)", lambda m: m[1] + _power(int(m[2])) + m[3], html)
    return plain_powers(html)


def _one_header(match: re.Match) -> str:
    """Names of the rows' columns, which pandas sets beneath those of the others, beside them."""
    rows = [
        re.findall(r"<th>(.*?)</th>", row, flags=re.DOTALL)
        for row in re.findall(r"<tr>.*?</tr>", match[1], flags=re.DOTALL)
    ]
    if len(rows) != 2 or len(rows[0]) != len(rows[1]) or any(a and b for a, b in zip(*rows, strict=True)):
        return match[0]
    return "<thead><tr>" + "".join(f"<th>{a or b}</th>" for a, b in zip(*rows, strict=True)) + "</tr></thead>"


def plain_powers(text: str) -> str:
    """2.5000e+14 → 2.5e14, 2.5e-03 → 0.0025, 6.87e-05 → 6.87e-5, 0.000e+00 → 0."""
    text = re.sub(r"\b0\.?0*e[+]00\b", "0", text)
    return re.sub(r"(\d(?:\.\d+)?)e([+-])0*(\d+)\b", _plain_power, text)


def _plain_power(match: re.Match) -> str:
    number, sign, power = match.groups()
    if sign == "-" and int(power) <= _DECIMALS:
        return f"{Decimal(match[0]).normalize():f}"
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{number}e{sign.strip('+')}{power}"


def _power(value: int) -> str:
    return plain_powers(f"{value:.3e}")


def _is(node: nodes.Node, kind: str) -> bool:
    return isinstance(node, nodes.container) and kind in node["classes"]


def _raw(html: str) -> nodes.raw:
    return nodes.raw("", html, format="html")


def _code(cell: nodes.Element) -> str:
    blocks = [block.astext() for block in cell.findall(nodes.literal_block) if "input_area" in block["classes"]]
    return blocks[0] if blocks else ""


def _outputs(cell: nodes.Element) -> list[nodes.Node]:
    """What follows a cell's code up to the next thing that is said or run."""
    found = []
    for node in cell.parent[cell.parent.index(cell) + 1 :]:
        if isinstance(node, nodes.comment):
            continue
        if not any(_is(part, "nboutput") for part in node.findall()):
            break
        found.append(node)
    return found


def _titles(node: nodes.Node) -> list[str]:
    """The title of each section that holds a node."""
    titles = []
    while node.parent is not None:
        node = node.parent
        if isinstance(node, nodes.section):
            titles.append(node[0].astext())
    return titles


def _inside_output(node: nodes.Node) -> bool:
    while node.parent is not None:
        node = node.parent
        if _is(node, "nboutput"):
            return True
    return False
