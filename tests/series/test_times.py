"""Times: spellings, rhythms, and how they go on."""

import numpy as np
import pandas as pd
import pytest

from m2helpers.files import UserError
from m2helpers.series.times import find_rhythm, read_times


def _read(cells, named=True):
    column = pd.Series(cells) if not isinstance(cells, pd.Series) else cells
    return read_times(column, np.zeros(len(column), int), named=named, where="own.csv, column time")


def _ahead(cells, n=2):
    times = _read(cells)
    rhythm = find_rhythm(times.index)
    return [str(when) for when in times.show(rhythm.ahead(n))]


@pytest.mark.parametrize(
    ("cells", "ahead"),
    [
        (["2021-01-01", "2021-01-02", "2021-01-03"], ["2021-01-04", "2021-01-05"]),
        (["2020-02-27", "2020-02-28"], ["2020-02-29", "2020-03-01"]),
        (["2021-01-29", "2021-02-05", "2021-02-12"], ["2021-02-19", "2021-02-26"]),
        (["2020-11-01", "2020-12-01", "2021-01-01"], ["2021-02-01", "2021-03-01"]),
        (["2020-12-31", "2021-01-31", "2021-02-28"], ["2021-03-31", "2021-04-30"]),
        (["2020-11-30", "2020-12-30", "2021-01-30", "2021-02-28"], ["2021-03-30", "2021-04-30"]),
        (["2020-10-15", "2020-11-15", "2020-12-15"], ["2021-01-15", "2021-02-15"]),
        (["2020-06-30", "2020-09-30", "2020-12-31"], ["2021-03-31", "2021-06-30"]),
        (["2018-02-28", "2019-02-28"], ["2020-02-29", "2021-02-28"]),
        (["2021-01", "2021-02", "2021-03"], ["2021-04", "2021-05"]),
        (["2020Q3", "2020Q4", "2021Q1"], ["2021Q2", "2021Q3"]),
        (["Q3 2020", "Q4 2020"], ["Q1 2021", "Q2 2021"]),
        (["Nov 2020", "Dec 2020"], ["Jan 2021", "Feb 2021"]),
        (["2021-01-06", "2021-01-07", "2021-01-08", "2021-01-11", "2021-01-12"], ["2021-01-13", "2021-01-14"]),
        (["2021-01-07", "2021-01-08", "2021-01-11", "2021-01-12", "2021-01-13", "2021-01-14", "2021-01-15"], ["2021-01-18", "2021-01-19"]),
        (["2021-01-01 23:00", "2021-01-01 23:30", "2021-01-02 00:00"], ["2021-01-02 00:30", "2021-01-02 01:00"]),
        (["2021-01-01T00:00:00Z", "2021-01-01T01:00:00Z"], ["2021-01-01T02:00:00Z", "2021-01-01T03:00:00Z"]),
        (["01.01.2021", "02.01.2021", "03.01.2021"], ["04.01.2021", "05.01.2021"]),
        (["12/30/2020", "12/31/2020"], ["01/01/2021", "01/02/2021"]),
        (["30/12/2020", "31/12/2020"], ["01/01/2021", "02/01/2021"]),
        (["20201230", "20201231"], ["20210101", "20210102"]),
        ([1900, 1901, 1902], ["1903", "1904"]),
        (["0.1", "0.2", "0.3"], ["0.4", "0.5"]),
        (["1900.083", "1900.167", "1900.25", "1900.333"], ["1900.41633", "1900.49967"]),  # rounded months
        (["1/1/2021 10:00 AM", "1/1/2021 11:00 AM"], ["01/01/2021 12:00 PM", "01/01/2021 01:00 PM"]),
        # clocks put forward on 28 March and back on 31 October, with and without a zone
        (["2021-03-28T01:00+01:00", "2021-03-28T03:00+02:00", "2021-03-28T04:00+02:00"], ["2021-03-28T05:00+02:00", "2021-03-28T06:00+02:00"]),
        (["2021-03-27T00:00+01:00", "2021-03-28T00:00+01:00", "2021-03-29T00:00+02:00"], ["2021-03-30T00:00+02:00", "2021-03-31T00:00+02:00"]),
        (["2021-03-28 00:00", "2021-03-28 01:00", "2021-03-28 03:00", "2021-03-28 04:00"], ["2021-03-28 05:00", "2021-03-28 06:00"]),
        (["2021-10-31 01:00", "2021-10-31 02:00", "2021-10-31 02:00", "2021-10-31 03:00"], ["2021-10-31 04:00", "2021-10-31 05:00"]),
    ],
)  # fmt: skip
def test_times_go_on_as_they_are_spelt(cells, ahead):
    assert _ahead(cells) == ahead


@pytest.mark.parametrize(
    ("index", "ahead"),
    [
        (pd.date_range("2021-03-27", periods=3, freq="D", tz="Europe/Berlin"), "2021-03-30 00:00:00+02:00"),
        (pd.date_range("2021-03-28", periods=3, freq="h", tz="Europe/Berlin"), "2021-03-28 04:00:00+02:00"),
        (pd.period_range("2021-01", periods=3, freq="M"), "2021-04"),
        (pd.date_range("2021-01-04", periods=7, freq="B"), "2021-01-13 00:00:00"),
    ],
)
def test_typed_times_keep_their_type(index, ahead):
    times = _read(pd.Series(index))
    shown = times.show(find_rhythm(times.index).ahead(1))
    assert str(shown[0]) == ahead and shown.dtype.kind == index.dtype.kind


def test_day_or_month_first_is_refused_where_both_are_even():
    with pytest.raises(UserError, match="'01/02/2021' may be day first or month first; write dates as 2021-12-31"):
        _read(["01/02/2021", "01/03/2021", "01/04/2021"])
    times = _read(["10/02/2021", "11/02/2021", "12/02/2021", "13/02/2021"])
    assert times.about == "day first" and times.index[0] == pd.Timestamp("2021-02-10")
    halves = ["05/02/2021 00:00", "05/02/2021 12:00", "06/02/2021 00:00", "06/02/2021 12:00"]  # uneven as May and June
    assert _read(halves).about == "day first"


def test_names_are_no_times():
    assert _read(["H1", "H2", "H1"]) is None and _read([1.5, 2.5], named=False) is None
    assert _read(["2021", "2022"], named=False) is None


@pytest.mark.parametrize(
    "index",
    [pd.Index([0.0, 1, 3]), pd.Index([1.0, 1, 1]), pd.DatetimeIndex(["2021-01-01", "2021-01-02", "2021-01-04"])],
)
def test_uneven_times_have_no_rhythm(index):
    assert find_rhythm(index) is None
