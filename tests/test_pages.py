"""What the site does to a notebook's page."""

import pytest
from docutils import nodes
from docutils.utils import new_document

from tools.pages import description, kind_of, plain_powers, rework, tidy_table


@pytest.mark.parametrize(
    ("written", "read"),
    [("2.5000e+14", "2.5e14"), ("1e+17", "1e17"), ("0.000e+00", "0"), ("1.250e-03", "0.00125"), ("6.870e-05", "6.87e-5"), ("10e+12", "10e12"), ("3.25, deadbeef 100", "3.25, deadbeef 100")],
)  # fmt: skip
def test_powers_of_ten_are_written_as_people_write_them(written, read):
    assert plain_powers(f"cost {written} in all") == f"cost {read} in all"


def test_a_count_of_rows_goes_and_names_stay():
    row = "<tr>\n<th>{}</th>\n<td>{}</td>\n</tr>\n"
    table = "<table><thead><tr>\n<th></th>\n<th>flops</th>\n</tr></thead><tbody>\n{}</tbody></table>"
    counted = tidy_table(table.format(row.format(0, 6686562570120) + row.format(1, "12")))
    assert (
        "<th>0</th>" not in counted
        and counted.count("<td>") == 2
        and "6.687e12" in counted
        and "<th>flops</th>" in counted
    )
    assert "<td></td>" not in counted  # no empty column is left
    named = tidy_table(table.format(row.format(0, 1) + row.format(2, 3)))
    assert "<th>0</th>" in named and "<th>2</th>" in named
    two = "<thead><tr>\n<th></th>\n<th>MAE</th>\n</tr>\n<tr>\n<th>rank</th>\n<th></th>\n</tr></thead>"
    assert tidy_table(two) == "<thead><tr><th>rank</th><th>MAE</th></tr></thead>"


def test_what_a_cell_is_for():
    picture = nodes.container("", nodes.image(uri="a.png"))
    table = nodes.container("", nodes.raw("", "<table>", format="html"))
    assert kind_of("plot(x)", [picture]) == "picture"
    assert kind_of("a = 1\nassert a == 1", []) == kind_of("if a:\n    assert b", []) == "checks"
    assert kind_of("a = 1\nb = 2\nassert a < b", []) == ""  # mostly work
    assert kind_of("assert x\nt", [table]) == ""
    assert kind_of("display(Markdown(f'{x}'))", [nodes.container()]) == "words"
    assert kind_of("!ls", []) == ""


def test_a_description_is_whole_sentences():
    assert description("Two\n lines.") == "Two lines."
    first, second = "One " + "word " * 40 + "ends.", "Another " + "word " * 40 + "ends."
    assert description(f"{first} {second}") == first


def test_a_page_folds_describes_and_hides():
    def cell(code):
        return nodes.container("", nodes.literal_block(code, code, classes=["input_area"]), classes=["nbinput"])

    document, image = new_document("page"), nodes.image(uri="a.png")
    picture = nodes.container("", image, classes=["nboutput"])
    said = nodes.container("", nodes.paragraph("", "so it is"), classes=["nboutput"])
    first = nodes.section(
        "", nodes.title("", "Look"), nodes.paragraph("", "Expect a rise."), cell("plot()"), nodes.comment(), picture
    )
    last = nodes.section("", nodes.title("", "What we saw"), cell("display(Markdown('so it is'))"), said)
    document += [first, last]
    rework(document)
    assert image["alt"] == "Expect a rise."
    assert [node.astext() for node in document.findall(nodes.raw)] == [
        "<details class='fold'><summary>Code of the picture</summary>",
        "</details>",
    ]
    assert "plot()" in document.astext() and "Markdown" not in document.astext() and "so it is" in document.astext()
