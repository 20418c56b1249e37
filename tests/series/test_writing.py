"""Where a forecast may be written."""

import os

import pandas as pd
import pytest

from m2helpers.files import UserError
from m2helpers.series.writing import PICTURES, refuse_output, write_frame


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("a\n1\n")
    return path


def test_the_input_is_never_the_output(source, monkeypatch):
    link = source.with_name("link.csv")
    link.symlink_to(source)
    hard = source.with_name("hard.csv")
    os.link(source, hard)
    monkeypatch.chdir(source.parent)
    for out in (source, link, hard, source.parent / "." / "mine.csv", type(source)("mine.csv")):
        with pytest.raises(UserError, match=r"is the input .*; give another name"):
            refuse_output(out, source)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is a folder"),
        ("out.xlsx", "unknown ending '.xlsx'; end it in .csv or .parquet"),
        ("out", "unknown ending ''"),
        ("mine.csv/out.csv", "cannot be written .Not a directory"),
    ],
)
def test_what_cannot_be_written_is_refused(name, message, source):
    with pytest.raises(UserError, match=message):
        refuse_output(source.parent / name, source)
    assert [path.name for path in source.parent.iterdir()] == ["mine.csv"]


def test_a_new_folder_and_a_picture_are_well(source):
    refuse_output(source.parent / "new" / "out.csv", source)
    refuse_output(source.parent / "out.PNG", source, PICTURES, "--plot")
    with pytest.raises(UserError, match=r"--plot .*out.csv: unknown ending '.csv'; end it in .png or .svg or .pdf"):
        refuse_output(source.parent / "out.csv", source, PICTURES, "--plot")


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_tables_are_written_by_their_ending(name, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"series": [0, 1], "a": [0.5, 1.5]})
    write_frame(frame, tmp_path / name)
    read = pd.read_parquet if name.endswith("parquet") else pd.read_csv
    pd.testing.assert_frame_equal(read(tmp_path / name), frame)
