"""Tables of every kind that people bring: what is read, as what, and what is refused in one line."""

import bz2
import gzip
import io
import lzma
import sys
import zipfile

import h5py
import numpy as np
import pandas as pd
import pytest

from m2helpers.files import UserError
from m2helpers.series import read_series, read_table, table_of

A, B = [20.0, 22.618, 24.947, 26.732, 27.776, 27.963], [13.0, 12.78, 12.144, 11.161, 9.941, 8.617]
PLAIN = "a,b\n" + "".join(f"{a},{b}\n" for a, b in zip(A, B, strict=True))
DAYS = [f"2021-01-0{i}" for i in range(1, 7)]


@pytest.fixture
def own(tmp_path):
    """Writes text or bytes into a file and reads it as a table."""

    def read(content, name="own.csv", **how):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        return read_table(tmp_path / name, **how)

    return read


def _columns(*columns, header="", separator=","):
    """Text of a table from its columns."""
    rows = [separator.join(map(str, row)) for row in zip(*columns, strict=True)]
    return "\n".join([header, *rows] if header else rows) + "\n"


def _values(table):
    (history,) = table.histories
    return history.values


# ---------------------------------------------------------------- read_series

EXPECTED = np.array([[[1.0, -2.5], [3.0, 4.0]]])


@pytest.mark.filterwarnings("ignore:2 variables")
@pytest.mark.parametrize(
    "text",
    [
        "1,-2.5\n3,4\n",
        "prey,predator\n1.0,-2.5\n3.0,4e0\n",
        "time,prey,predator\n0,1,-2.5\n2,3,4\n",
        "\ufeffT, prey, predator\r\n0, 1, -2.5\r\n2, 3, 4\r\n",
        ",prey,predator\n0,1,-2.5\n1,3,4\n",
        ",0,1\n0,1,-2.5\n1,3,4\n",  # what pandas writes for columns without names
        "time,prey,predator\n2001-01-01,1,-2.5\n2001-02-01,3,4\n",
    ],
)
def test_read_series_reads_csv(text, tmp_path):
    (tmp_path / "own.csv").write_text(text, encoding="utf-8", newline="")
    series = read_series(tmp_path / "own.csv")
    assert series.dtype == np.float64
    np.testing.assert_array_equal(series, EXPECTED)


def _write(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
    return path


def test_read_series_reads_hdf5_of_any_number_of_variables(tmp_path):
    values = np.random.default_rng(1).standard_normal((2, 5, 3))
    np.testing.assert_array_equal(read_series(_write(tmp_path / "own.h5", trajectories=values)), values)


def test_read_series_reads_one_column(tmp_path):
    (tmp_path / "own.csv").write_text("level\n1\n2\n3\n\n\n")  # blank lines at the end are no gap
    np.testing.assert_array_equal(read_series(tmp_path / "own.csv"), [[[1.0], [2.0], [3.0]]])


def test_read_series_says_what_it_took_for_the_time(tmp_path):
    (tmp_path / "own.csv").write_text("Year,a\n1900,1\n1901,2\n")
    with pytest.warns(UserWarning, match="Year taken as time, 1900–1901"):
        read_series(tmp_path / "own.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as CSV .*No columns"),
        ("prey,predator\n", "no value in it"),
        ("time\n0\n1\n", "no value in it"),
        ("1,2\n3\n", "line 2, column variable_1 is empty; .*fill or drop"),
        ("1,2\n3,4,5\n", "cannot be read as CSV .*Expected 2 fields in line 2, saw 3"),
        ("a,b\n1,2\n3,x\n", "line 3, column b is 'x'; .*finite number"),
        ("1,2\ninf,4\n", "line 2, column variable_0 is 'inf'"),
        ("level\n1\n\n3\n", "line 3, column level is empty"),  # a gap is a blank line
        ("\n\n", "no value in it|No columns"),
        ("t,a\n0,1\n1,2\n3,3\n4,4\n", "uneven time axis, from step 1 .* by 2 "),
    ],
)
def test_read_series_refuses_csv(text, message, tmp_path):
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_series(tmp_path / "own.csv")
    assert "own.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_read_series_refuses_other_files(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_series(tmp_path / "absent.csv")
    with pytest.raises(UserError, match="no such file"):
        read_series(tmp_path / "absent.h5")
    (tmp_path / "own.csv").write_bytes(b"\xff\xfe\x00\x81\x00")  # half a character of UTF-16
    with pytest.raises(UserError, match="cannot be read as CSV"):
        read_series(tmp_path / "own.csv")
    with pytest.raises(UserError, match=r"own.h5: uneven time"):
        read_series(_write(tmp_path / "own.h5", trajectories=np.ones((1, 4, 1)), time=np.array([0, 1, 3, 4.0])))
    with pytest.raises(UserError, match=r"/trajectories has 4 steps, /time 5; they must agree"):
        read_series(_write(tmp_path / "own.h5", trajectories=np.ones((1, 4, 1)), time=np.arange(5.0)))


# ---------------------------------------------------------------- separators, encodings, compression


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace(",", "|"),
        PLAIN.replace(",", "   "),
        PLAIN.replace(",", ";").replace(".", ","),
        PLAIN.replace(",", "\t").replace(".", ","),
        "sep=;\n" + PLAIN.replace(",", ";"),
        "# pelt table, thousands\n# typed by hand\n\n" + PLAIN,
        '"a","b"\n' + PLAIN.partition("\n")[2],
        "a,b,\n" + "".join(line + ",\n" for line in PLAIN.splitlines()[1:]),  # a separator too many
        PLAIN.replace("\n", "\r"),
        PLAIN.replace("\n", "\r\n").encode("utf-8-sig"),
        PLAIN.encode("utf-16"),
        b"\xfe\xff" + PLAIN.encode("utf-16-be"),
        PLAIN.encode("utf-32"),
        gzip.compress(PLAIN.encode()),
        bz2.compress(PLAIN.encode()),
        lzma.compress(PLAIN.encode()),
    ],
    ids=map(str, range(19)),  # a compressed file holds the time at which it was made
)
def test_one_table_in_many_dresses(content, own):
    table = own(content)
    np.testing.assert_array_equal(_values(table), np.stack([A, B], axis=1))
    assert table.variables == ("a", "b") and table.time_name is None


def test_an_archive_of_one_table(own):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("table.csv", PLAIN)
    assert own(stream.getvalue(), "own.zip").variables == ("a", "b")
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr("other.csv", PLAIN)
    with pytest.raises(UserError, match="holds 2 files"):
        own(stream.getvalue(), "own.zip")
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr("xl/workbook.xml", "")
    with pytest.raises(UserError, match="is a spreadsheet; save the sheet as CSV"):
        own(stream.getvalue(), "own.xlsx")
    with pytest.raises(UserError, match=r"cannot be read as CSV .damaged archive"):
        own(gzip.compress(PLAIN.encode())[:-9], "own.csv.gz")


def test_an_umlaut_needs_no_unicode(own):
    table = own("Höhe,b\n".encode("latin-1") + PLAIN.encode().partition(b"\n")[2])
    assert table.variables == ("Höhe", "b") and "read as Windows-1252" in table.notice


@pytest.mark.parametrize("text", ["20,00\n22,62\n24,95\n", "20,00,13,00\n22,62,12,78\n24,95,12,04\n"])
def test_decimal_commas_or_two_columns_is_refused(text, own):
    with pytest.raises(UserError, match=r"line 1 .* may be \d columns or decimal commas"):
        own(text)


def test_a_name_tells_decimal_commas_from_columns(own):
    np.testing.assert_array_equal(_values(own("hare\n20,00\n22,62\n24,95\n")), [[20.0], [22.62], [24.95]])
    np.testing.assert_array_equal(_values(own("h,l\n20,10\n22,62\n24,95\n")), [[20, 10], [22, 62], [24, 95]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a;b\n1.234,5;2\n2,5;3\n", "line 2, column a is '1.234,5'; write numbers without separators of thousands"),
        ("a;b\n1,234,567;2\n2;3\n", "line 2, column a is '1,234,567'; write numbers without"),
        ("a;b\n1,234;2\n5,678;3\n", "line 2, column a is '1,234': thousands or a decimal comma.* --decimal"),
        ("a\n1\u00a0000\n1\u00a0100\n", r"line 2, column a is '1\\xa0000', neither a number"),
        ("a\n1 000\n1 100\n1 300\n1 500\n", "Expected 1 fields in line 2, saw 2"),
        ("Pelts\nYear,Hare\n1900,30\n1901,47\n", "Expected 1 fields in line 2, saw 2; delete lines above the names"),
        ("a;b\n1,25;2.5\n5,5;3.1\n", "line 2, column a is '1,25', and '2.5' has a point"),
    ],
)
def test_doubtful_figures_are_refused(text, message, own):
    with pytest.raises(UserError, match=message):
        own(text)


def test_the_decimal_mark_can_be_said(own):
    np.testing.assert_array_equal(
        _values(own("a;b\n1,234;2,000\n5,678;3,000\n", decimal=",")), [[1.234, 2], [5.678, 3]]
    )


# ---------------------------------------------------------------- headers


def test_years_as_names(own):
    text = "2019,2020\n" + PLAIN.partition("\n")[2]
    table = own(text)
    assert table.variables == ("2019", "2020") and "first line 2019, 2020 taken as names (--no-header" in table.notice
    np.testing.assert_array_equal(_values(table), np.stack([A, B], axis=1))
    assert len(_values(own(text, header=False))) == len(A) + 1


def test_names_or_data_is_asked(own):
    text = "101,205\n" + PLAIN.partition("\n")[2]
    with pytest.raises(UserError, match=r"is line 1 .101, 205. names or data.*--header or --no-header"):
        own(text)
    assert own(text, header=True).variables == ("101", "205")


def test_names_in_a_comment_as_numpy_writes_them(tmp_path):
    np.savetxt(tmp_path / "own.txt", np.stack([A, B], axis=1), header="hare lynx")
    table = read_table(tmp_path / "own.txt")
    assert table.variables == ("hare", "lynx")
    np.testing.assert_array_equal(_values(table), np.stack([A, B], axis=1))


def test_two_columns_of_one_name_are_refused(own):
    with pytest.raises(UserError, match="two columns are named 'a'; rename one"):
        own("a,a\n1,2\n3,4\n")


# ---------------------------------------------------------------- roles of columns


@pytest.mark.parametrize("name", ["Year", "time", "ds", "Date", "Jahr", "time (yr)"])
def test_years_are_the_time(name, own):
    table = own(_columns(range(1900, 1906), A, B, header=f"{name},Hare,Lynx"))
    assert table.variables == ("Hare", "Lynx") and table.time_name == name
    assert table.histories[0].rhythm.ahead(2).tolist() == [1906, 1907]
    assert f"2 variables Hare, Lynx; {name} taken as time, 1900–1905 (yearly); 6 steps" == table.notice


def test_years_without_a_name_are_the_time(own):
    table = own(_columns(range(1900, 1906), A, B))
    assert table.variables == ("variable_1", "variable_2") and "1900–1905" in table.notice


def test_a_first_column_that_counts_is_asked_about(own):
    text = _columns(range(7, 13), A, header="plot,a")
    with pytest.raises(UserError, match=r"column plot rises evenly from 7: is it the time.*--time plot.*--time none"):
        own(text)
    assert own(text, time="plot").variables == ("a",)
    assert own(text, time="none").variables == own(text, columns=["plot", "a"]).variables == ("plot", "a")


def test_t_may_be_a_temperature(own):
    ramp = own(_columns(np.arange(20, 23, 0.5), A, header="T,P"))
    assert ramp.time_name == "T" and ramp.histories[0].rhythm.ahead(1)[0] == 23
    assert "T taken as time, 20.0–22.5 (every 0.5)" in ramp.notice
    weather = own(_columns(A, B, header="T,P").replace("27.776", "20.1"))
    assert (
        weather.variables == ("T", "P") and "T taken as a variable: it does not rise evenly (--time T" in weather.notice
    )
    assert own(_columns(np.arange(20, 23, 0.5), A, header="T,P"), columns=["T", "P"]).variables == ("T", "P")
    assert own(_columns(A, header="T_K")).variables == ("T_K",)


def test_numbers_of_rows_are_no_variable(own):
    table = own(_columns(range(6), A, header=",a"))
    assert table.variables == ("a",) and table.time_name is None and "row numbers left out" in table.notice
    table = own(_columns(range(6), DAYS, A, header=",date,a"))
    assert (table.variables, table.time_name) == (("a",), "date") and "row numbers left out" in table.notice


@pytest.mark.parametrize(
    ("header", "columns", "message"),
    [
        ("Year,time,a", (range(1900, 1906), range(6), A), "columns Year and time may each be the time.*--time"),
        ("date,year,a", (DAYS, [2021] * 6, A), "columns date and year may each be the time"),
        ("year,month,a", ([2021] * 6, range(1, 7), A), "year and month together are the time"),
        ("site,species,a", ("AABBCC", "xyxyxy", A), "columns site and species may each name the series.*--id"),
        (
            "date,sky,a",
            (DAYS, ["sun", "rain"] * 3, A),
            "column sky .'sun', .... may name several series, or say something of each",
        ),
        ("flag,a", (["True", "False"] * 3, A), "column flag .* may name several series, or say something of each"),
        (",a,b", (A, A, B), "the first column has values and no name; name it"),
        ("note,a", ("uvwxyz", A), "line 2, column note is 'u', neither a number nor a date.*--columns"),
        ("time,a", ([*DAYS[:5], "soon"], A), "line 7, column time is 'soon', not a time"),
        ("time,a", ([*range(5), "soon"], A), "line 7, column time is 'soon', not a time"),
        (
            "site,a",
            (["A", "A", "A", "", "B", "B"], A),
            "line 5, column site is empty; every row needs its series' name",
        ),
    ],
)
def test_doubtful_roles_are_refused(header, columns, message, own):
    with pytest.raises(UserError, match=message):
        own(_columns(*columns, header=header))


def test_what_is_said_of_rows_can_be_left_out(own):
    text = _columns(DAYS, ["sun", "rain"] * 3, A, header="date,sky,a")
    table = own(text, columns=["a"])
    assert (table.variables, table.id_name, table.time_name) == (
        ("a",),
        None,
        "date",
    ) and "left out: sky" in table.notice
    assert own("a\n1\n", columns=["a"]).variables == ("a",)
    counted = own(_columns(DAYS, range(100, 106), header="date,index"))
    assert counted.variables == ("index",)  # there is nothing else


def test_columns_can_be_said(own):
    text = _columns(DAYS, "uvwxyz", A, B, header="date,note,a,b")
    table = own(text, columns=["b"])
    assert table.variables == ("b",) and table.time_name == "date" and "left out: note, a" in table.notice
    with pytest.raises(UserError, match="has no column 'c', only date, note, a, b"):
        own(text, columns=["c"])
    with pytest.raises(UserError, match="column note holds no times, such as 'u'"):
        own(text, columns=["b"], time="note")


def test_last_rows(own):
    table = own(_columns(DAYS, A, header="date,a"), last=4)
    assert _values(table)[:, 0].tolist() == A[-4:] and table.histories[0].lines.tolist() == [4, 5, 6, 7]
    with pytest.raises(UserError, match="--last 0"):
        own(PLAIN, last=0)


# ---------------------------------------------------------------- several series


@pytest.mark.parametrize(("ids", "names"), [("H1 H2", ["H1", "H2"]), ("1 2", ["1", "2"])])
@pytest.mark.parametrize("id_name", ["unique_id", "plant"])
def test_the_long_form(ids, names, id_name, own):
    first, second = ids.split()
    text = _columns([first] * 6 + [second] * 6, [*range(1, 7), *range(1, 7)], A + B, header=f"{id_name},ds,y")
    table = own(text)
    assert [history.name for history in table.histories] == names and table.variables == ("y",)
    np.testing.assert_array_equal([history.values[:, 0] for history in table.histories], [A, B])
    assert f"2 series {first}, {second} by {id_name}; 1 variable y" in table.notice


def test_series_may_be_interleaved_and_of_any_length(own):
    rows = sorted(
        [(day, "x", a) for day, a in zip(DAYS, A, strict=True)]
        + [(day, "y", b) for day, b in zip(DAYS[:4], B, strict=False)]
    )
    table = own("date,site,n\n" + "".join(f"{day},{site},{n}\n" for day, site, n in rows))
    assert [history.values[:, 0].tolist() for history in table.histories] == [A, B[:4]]
    assert table.histories[1].show(table.histories[1].rhythm.ahead(1)).tolist() == ["2021-01-05"]
    assert "4 to 6 steps" in table.notice


# ---------------------------------------------------------------- order, gaps, duplicates


def test_rows_are_sorted_by_time(own):
    text = _columns(DAYS[::-1], A[::-1], header="time,a")
    table = own(text)
    assert _values(table)[:, 0].tolist() == A and "rows sorted by time" in table.notice
    assert table.histories[0].lines.tolist() == [7, 6, 5, 4, 3, 2]
    assert _values(own(_columns([3, 1, 2, 0, 5, 4], A, header="time,a")))[:, 0].tolist() == [
        A[i] for i in (3, 1, 2, 0, 5, 4)
    ]


@pytest.mark.parametrize(
    ("days", "message"),
    [
        ([*DAYS[:2], *DAYS[1:]], "column time: 2021-01-02 stands twice, in lines 3 and 4; drop one"),
        (
            [*DAYS[:3], *DAYS[4:]],
            r"\(2021-01-03, line 4\) to the next \(2021-01-05\) it goes by 2 days and elsewhere by 1 day",
        ),
        (["2021-01", "2021-02", "2021-04", "2021-05"], r"\(2021-02, line 3\) .*2021-04\) it goes by 2 months"),
    ],
)
def test_gaps_and_duplicates_are_refused_by_date(days, message, own):
    with pytest.raises(UserError, match=message) as caught:
        own(_columns(days, range(len(days)), header="time,a"))
    assert "\n" not in str(caught.value)


def test_gaps_of_one_series_are_named(own):
    text = _columns(
        ["x"] * 3 + ["y"] * 4, [*DAYS[:3], *DAYS[:2], *DAYS[3:5]], [1, 2, 3, 4, 5, 6, 7], header="site,time,a"
    )
    with pytest.raises(UserError, match=r"column time of series y: uneven .*2021-01-02, line 6"):
        own(text)
    assert [len(history.values) for history in own(text, time="none", columns=["a"]).histories] == [3, 4]


# ---------------------------------------------------------------- DataFrames and Parquet


def test_a_dataframe(own):
    days = pd.date_range("2021-01-01", periods=6, freq="D")
    frames = [
        pd.DataFrame({"a": A, "b": B, "when": days}),
        pd.DataFrame({"a": A, "b": B}, index=days),
        pd.DataFrame({"a": A, "b": B}, index=days.rename("when")),
    ]
    for frame in frames:
        table = table_of(frame)
        assert table.variables == ("a", "b")
        np.testing.assert_array_equal(_values(table), np.stack([A, B], axis=1))
        assert table.histories[0].rhythm.ahead(1)[0] == pd.Timestamp("2021-01-07")
    frame = pd.DataFrame({"id": pd.Categorical(["x"] * 3 + ["y"] * 3), "y": pd.array([1, 2, 3, 4, 5, None], "Int64")})
    with pytest.raises(UserError, match="the table: row 6, column y is empty"):
        table_of(frame)


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    days = pd.date_range("2021-01-31", periods=6, freq="ME")
    pd.DataFrame({"month": days, "a": A}).to_parquet(tmp_path / "own.parquet")
    table = read_table(tmp_path / "own.parquet")
    assert table.variables == ("a",) and table.histories[0].rhythm.ahead(2).tolist() == [
        pd.Timestamp("2021-07-31"),
        pd.Timestamp("2021-08-31"),
    ]
    (tmp_path / "bad.parquet").write_text("a,b\n")
    with pytest.raises(UserError, match=r"bad.parquet: cannot be read as Parquet"):
        read_table(tmp_path / "bad.parquet")


def test_parquet_without_its_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "own.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"own.parquet: reading Parquet needs pyarrow; pip install pyarrow"):
        read_table(tmp_path / "own.parquet")


def test_hdf5_has_no_names_to_choose_from(tmp_path):
    path = _write(tmp_path / "own.h5", trajectories=np.ones((2, 5, 3)), time=np.arange(0, 2.5, 0.5))
    table = read_table(path, last=4)
    assert [history.values.shape for history in table.histories] == [(4, 3)] * 2
    assert table.histories[0].rhythm.ahead(1)[0] == 2.5
    with pytest.raises(UserError, match="columns of an HDF5 file have no names"):
        read_table(path, columns=["prey"])
