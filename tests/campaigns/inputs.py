"""Inputs that a stranger might hand over, for `fuzz`: good files damaged in many ways, and files nobody would write.

Strategies of `hypothesis`, a kind of reader each. A `Case` is a folder's files and the command line that reads them.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import sqlite3
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from hypothesis import strategies as st

HERE = "{here}"
SPECIAL = ("folder", "fifo", "zero", "loop", "nothing", "empty")
"""What may stand where a file should: a folder, a pipe, a link to /dev/zero, to itself or to nothing, an empty file."""


@dataclass
class Case:
    """One input."""

    files: dict[str, bytes | str]
    """Content by name, or a word of `SPECIAL`."""
    words: list[str]
    """The command line; `HERE` stands for the folder."""
    outputs: tuple[str, ...] = ()
    """What it may write; nothing else may be there afterwards, and none of it if it failed."""
    changes: tuple[str, ...] = ()
    """Files that it may change or leave behind whatever comes of it: a ledger, a run that goes on."""
    environment: dict[str, str] = field(default_factory=dict)
    expected: Any = None
    """For the check of the result."""


# ---------------------------------------------------------------- damage

_POOL = [
    b"\0" * 8,
    b"\xff" * 8,
    b"9" * 20,
    b"1e999",
    b"NaN",
    b"-",
    b",",
    b";",
    b"\n",
    b'"',
    b"\r",
    b"\x1b[31m",
    b"{",
    b"]",
    b"\xed\xa0\x80",
]
_EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "overwrite", "delete", "cut", "twice"]),
        st.floats(0, 1),
        st.one_of(st.sampled_from(_POOL), st.binary(min_size=1, max_size=8)),
    ),
    min_size=1,
    max_size=3,
)  # fmt: skip


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """A file's bytes with a few edits."""
    return _EDITS.map(lambda edits: _edited(good, edits))


def _edited(data: bytes, edits: list) -> bytes:
    for how, where, piece in edits:
        at = int(where * len(data))
        if how == "flip" and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ (piece[0] or 1)]) + data[at + 1 :]
        elif how == "insert":
            data = data[:at] + piece + data[at:]
        elif how == "overwrite":
            data = data[:at] + piece + data[at + len(piece) :]
        elif how == "delete":
            data = data[:at] + data[at + 1 + 8 * piece[0] :]
        elif how == "cut":
            data = data[:at]
        else:
            data = data[:at] + data
    return data


_STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 3, 10**6, 10**12, 10**30, -(10**18), 0.5, 1e308, float("inf"), float("nan"), "", "x", "1", "../../x", "a\nb",
    "\x1b[31m", "\ud800", "é" * 300, [], {}, [[]], [1, "a"], {"a": 1}, [None] * 40, "torch.nn.Linear", "float8_e4m3fn", "own.Code",
]  # fmt: skip


def strange_json(good: Any) -> st.SearchStrategy[bytes]:
    """A JSON value with a part replaced, left out or added; or nested as deep as no reader goes."""
    places = list(_places(good))

    def change(edits: list) -> bytes:
        value = json.loads(json.dumps(good))
        for where, how, new in edits:
            value = _replaced(value, places[int(where * (len(places) - 1))], how, new)
        return json.dumps(value).encode()

    edits = st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from(["replace", "replace", "delete", "add"]), st.sampled_from(_STRANGE)),
        min_size=1,
        max_size=3,
    )
    whole = st.sampled_from(
        [b"[" * 100_000, b'{"a":' * 50_000, b"null", b"[]", b"3", b'""', b"\xff\xfe{\0}\0", b"9" * 5000]
    )
    return st.one_of(edits.map(change), edits.map(change), edits.map(change), whole)


def _places(value: Any, path: tuple = ()) -> Any:
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(min(len(value), 3)):
            yield from _places(value[key], (*path, key))


def _replaced(value: Any, path: tuple, how: str, new: Any) -> Any:
    if not path:
        return {**value, "added": new} if how == "add" and isinstance(value, dict) else new
    try:
        inside = value
        for key in path[:-1]:
            inside = inside[key]
        if how == "delete":
            del inside[path[-1]]
        else:
            inside[path[-1] if how == "replace" or isinstance(inside, list) else f"{path[-1]}_"] = new
    except (KeyError, IndexError, TypeError):  # an edit before took it away
        pass
    return value


def _safetensors(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    from safetensors.numpy import save

    return save(tensors, metadata)


def damaged_tensors(good: bytes) -> st.SearchStrategy[bytes]:
    """Weights with bytes damaged, a header that lies, or tensors of other shapes, kinds and values."""
    from safetensors.numpy import load

    tensors, length = load(good), int.from_bytes(good[:8], "little")
    header, names = json.loads(good[8 : 8 + length]), sorted(load(good))
    metadata = header.get("__metadata__")

    def lying(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + good[8 + length :]

    def other(parts: tuple) -> bytes:
        which, how = parts
        name = names[int(which * (len(names) - 1))]
        value = tensors[name]
        changed = {
            "nan": np.full_like(value, np.nan) if value.dtype.kind == "f" else value,
            "inf": np.full_like(value, np.inf) if value.dtype.kind == "f" else value,
            "huge": np.full_like(value, 3e38) if value.dtype.kind == "f" else value,
            "double": value.astype(np.float64),
            "half": value.astype(np.float16),
            "whole": value.astype(np.int64),
            "longer": np.concatenate([value, value]) if value.ndim else value[None],
            "flat": value.reshape(-1),
            "empty": value[:0] if value.ndim else value.reshape(())[None][:0],
        }.get(how)
        rest = {key: kept for key, kept in tensors.items() if key != name}
        if how == "renamed":
            return _safetensors({**rest, f"{name}.other": value}, metadata)
        return _safetensors(rest if changed is None else {**rest, name: changed}, metadata)

    hows = ["nan", "inf", "huge", "double", "half", "whole", "longer", "flat", "empty", "renamed", "missing"]
    return st.one_of(
        damaged(good), strange_json(header).map(lying), st.tuples(st.floats(0, 1), st.sampled_from(hows)).map(other)
    )


@st.composite
def in_folder(draw: Any, good: dict[str, bytes], name: str, protect: tuple[str, ...] = ()) -> dict[str, bytes | str]:
    """A folder's files, below `name`, with one or two damaged, missing, or replaced by something else."""
    files: dict[str, bytes | str] = {f"{name}/{key}": data for key, data in good.items()}
    for key in draw(st.lists(st.sampled_from(sorted(set(good) - set(protect))), max_size=2, unique=True)):
        how = draw(st.integers(0, 9))
        if how == 0:
            del files[f"{name}/{key}"]
        elif how == 1:
            files[f"{name}/{key}"] = draw(st.sampled_from(SPECIAL))
        elif key.endswith(".json") and how < 8:
            files[f"{name}/{key}"] = draw(strange_json(json.loads(good[key])))
        elif key.endswith(".safetensors") and how < 8:
            files[f"{name}/{key}"] = draw(damaged_tensors(good[key]))
        else:
            files[f"{name}/{key}"] = draw(damaged(good[key]))
    if draw(st.integers(0, 9)) == 0:
        files[f"{name}/pytorch_model.bin"] = b"cos\nsystem\n(S'touch mark'\ntR."  # a pickle that runs a command
    if draw(st.integers(0, 9)) == 0:
        files[f"{name}/code.py"] = b"open('mark', 'w')"
    return files


# ---------------------------------------------------------------- tables

_CELLS = st.one_of(
    st.floats(-100, 100).map(lambda x: f"{x:.2f}"),
    st.floats().map(repr),
    st.integers(-(10**20), 10**20).map(str),
    st.sampled_from(
        ["", " ", "NaN", "inf", "-inf", "1e400", "1,5", "1.234,5", "0x10", "١٢", "1_000", "2020-01-31", "31.12.2020", "2020-02-30", "x", "=1+1", "\x1b]0;x\x07",
         '"', "'", "a\nb", "NULL", "TRUE", "Unnamed: 0", "9" * 400, "é\u202e", "1900Q1", "12:00", "20200101", "1e-400", "-0", "+5", ".", "-"]
    ),
    st.text(max_size=6),
)  # fmt: skip


@st.composite
def _text_table(draw: Any) -> bytes:
    width, height = draw(st.integers(1, 5)), draw(st.integers(0, 12))
    rows = [draw(st.lists(_CELLS, min_size=width, max_size=width)) for _ in range(height)]
    if draw(st.booleans()):  # mostly numbers, so that something is forecast
        rows = [[f"{i + j}.{i % 10}" for j in range(width)] for i in range(draw(st.integers(1, 30)))] + rows[:1]
    if draw(st.booleans()):
        rows.insert(0, draw(st.lists(st.one_of(st.text(max_size=8), _CELLS), min_size=width, max_size=width)))
    separator = draw(st.sampled_from([",", ";", "\t", " ", "|", ", "]))
    text = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"])).join(separator.join(row) for row in rows)
    data = text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"])), errors="replace")
    pack = draw(st.sampled_from([None] * 6 + [gzip.compress, bz2.compress, _zipped]))
    return pack(data) if pack else data


@st.composite
def _plain_table(draw: Any) -> bytes:
    """Numbers under names or not, perhaps with one cell that is none."""
    width, height = draw(st.integers(1, 4)), draw(st.integers(3, 30))
    scale, level = (
        draw(st.sampled_from([1e-9, 0.01, 1, 1, 1, 50, 1e9, 1e200])),
        draw(st.sampled_from([0, 0, 1, -5, 1e6])),
    )
    values = draw(st.lists(st.floats(-1, 1), min_size=width * height, max_size=width * height))
    cells = [f"{level + scale * value:.{draw(st.sampled_from([0, 2, 3, 17]))}f}" for value in values]
    if draw(st.integers(0, 2)) == 0:
        cells[draw(st.integers(0, len(cells) - 1))] = draw(_CELLS)
    rows = [cells[i * width : (i + 1) * width] for i in range(height)]
    if draw(st.booleans()):
        rows.insert(0, [f"v{i}" for i in range(width)])
    separator = draw(st.sampled_from([",", ";", "\t", " "]))
    return "\n".join(separator.join(row) for row in rows).encode()


def _zipped(data: bytes) -> bytes:
    with io.BytesIO() as stream:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("table.csv", data)
        return stream.getvalue()


@cache
def _zip_bomb() -> bytes:
    """A few bytes of zip that unpack to half a gibibyte."""
    return _zipped(b"1,2\n" * (1 << 27))


@cache
def _bomb(size: int = 6 << 30) -> bytes:
    """A few bytes of gzip that unpack to six gibibytes."""
    block = gzip.compress(b"1,2\n" * (1 << 22), 9)
    return block * (size // (1 << 24))


_TABLE_FLAGS = st.one_of(
    st.just([]),
    st.just([]),
    st.lists(
        st.sampled_from(
            ["--header", "--no-header", "--last 3", "--last 0", "--time none", "--time a", "--columns a,b", "--columns x", "--id a", "--decimal ,",
             "--together", "--samples 2", "--samples 2 --levels 0.1,0.9"]
        ),
        max_size=2,
        unique=True,
    ),
)  # fmt: skip


def _forecast(name: str, data: bytes | str, flags: list[str], steps: int = 2) -> Case:
    if name.startswith("back-"):
        words = ["backtest", f"{HERE}/{name}", "--steps", str(steps), "--samples", "2", "--out", f"{HERE}/out.csv"]
        flags = [flag for flag in flags if not flag.startswith("--samples")]
    else:
        words = ["forecast", f"{HERE}/{name}", "--steps", str(steps), "--constrained", "--out", f"{HERE}/out.csv"]
    return Case({name: data}, [*words, *" ".join(flags).split()], outputs=("out.csv",), expected=steps)


_GOOD_TABLES = [
    b"a,b\n" + b"".join(b"%d.5,%d.25\n" % (i, 2 * i) for i in range(20)),
    b"time;x;y\n" + b"".join(b"2020-01-%02d;%d,5;%d,25\n" % (i + 1, i, i % 3) for i in range(20)),
    b"id,day,x\n" + b"".join(b"%s,%d,%d.5\n" % (b"ab"[i % 2 : i % 2 + 1], i // 2, i) for i in range(24)),
    "# from a lynx\nYear\tHäre\tLynx\n".encode()
    + b"".join(b"%d\t%d\t%d\n" % (1900 + i, i * 7 % 11, i) for i in range(21)),
]


@st.composite
def csv_cases(draw: Any) -> Case:
    """Separated values."""
    good = draw(st.sampled_from(_GOOD_TABLES))
    data: bytes | str = draw(
        st.one_of(
            _plain_table(), _text_table(), damaged(good), damaged(gzip.compress(good, mtime=0)), damaged(_zipped(good))
        )
    )
    if draw(st.integers(0, 60)) == 0:
        data = draw(st.sampled_from(["folder", "nothing", "loop", "zero", "empty", _bomb(), _zip_bomb()]))
    name = draw(st.sampled_from(["own.csv", "own.csv", "own.txt", "back-own.csv", "own"]))
    return _forecast(name, data, draw(_TABLE_FLAGS), draw(st.sampled_from([1, 2, 2, 5])))


def _parquet(frame: pd.DataFrame) -> bytes:
    with io.BytesIO() as stream:
        frame.to_parquet(stream)
        return stream.getvalue()


_DAYS = pd.date_range("2020-01-01", periods=15)
_FRAMES = [
    pd.DataFrame({"a": np.arange(15.0), "b": np.arange(15) % 4}),
    pd.DataFrame({"day": _DAYS, "a": np.arange(15.0), "name": ["x"] * 15}),
    pd.DataFrame({"a": np.arange(15.0), "b": pd.Categorical(["u", "v", "w"] * 5), "c": [None, 1.0, 2.0] * 5}),
    pd.DataFrame({"a": [[1, 2]] * 15, "b": np.arange(15.0)}),
    pd.DataFrame({"a": [{"k": 1}] * 15, "b": [b"bytes"] * 15, "c": np.arange(15.0)}),
    pd.DataFrame({"a": pd.to_timedelta(np.arange(15), "h"), "b": np.arange(15, dtype=np.float16)}),
    pd.DataFrame({"a": np.arange(15.0)}, index=_DAYS.tz_localize("Europe/Berlin")),
    pd.DataFrame({"a": np.arange(15.0), "b": [True, False, True] * 5}, index=pd.MultiIndex.from_product([range(3), range(5)])),
    pd.DataFrame({"a": [10**400 if i == 3 else i for i in range(15)]}, dtype=str),
    pd.DataFrame({"a\nb": np.arange(15.0), "": np.arange(15.0), "\x1b[31m": np.arange(15.0)}),
    pd.DataFrame(),
    pd.DataFrame({"a": np.array([2**63 + 5] * 15, np.uint64), "b": np.full(15, np.inf)}),
    pd.DataFrame({"day": _DAYS.to_period("M"), "a": np.arange(15.0)}),
    pd.DataFrame({"day": pd.Series(_DAYS).dt.date, "a": np.arange(15.0)}),
]  # fmt: skip


@st.composite
def parquet_cases(draw: Any) -> Case:
    """Parquet."""
    good = _parquet(draw(st.sampled_from(_FRAMES)))
    data: bytes | str = draw(st.one_of(st.just(good), damaged(good), damaged(good)))
    if draw(st.integers(0, 40)) == 0:
        data = draw(st.sampled_from(SPECIAL[:1] + SPECIAL[3:]))
    return _forecast(draw(st.sampled_from(["own.parquet", "own.pq", "back-own.parquet"])), data, draw(_TABLE_FLAGS))


def _hdf5(fill: Callable[[h5py.File], None]) -> bytes:
    with io.BytesIO() as stream:
        with h5py.File(stream, "w") as file:
            fill(file)
        return stream.getvalue()


def _strange_hdf5(file: h5py.File, where: str, how: str, n: int) -> None:
    """The schema, with one dataset made in a way that is none."""
    good = {
        "trajectories": np.abs(np.random.default_rng(0).normal(2, 1, (12, 20, 2))).astype("f4"),
        "time": np.linspace(0, 40, 20),
    }
    for name, value in good.items():
        if name != where:
            file[name] = value
            continue
        match how:
            case "huge":  # a few bytes that say they are a thousand gigabytes
                file.create_dataset(name, (10**6, 10**5, 2)[: value.ndim], "f4", chunks=(1, 100, 2)[: value.ndim])
            case "large":
                file.create_dataset(
                    name,
                    (10**5, 10**5, 2)[: value.ndim],
                    "f4",
                    chunks=(1000, 1000, 2)[: value.ndim],
                    compression="gzip",
                )
            case "external":
                file.create_dataset(name, value.shape, "f4", external=[("/etc/passwd", 0, 10**6)])
            case "link":
                file[name] = h5py.ExternalLink("/proc/self/environ", "/x")
            case "soft":
                file[name] = h5py.SoftLink(f"/{name}")
            case "group":
                file.create_group(name)
            case "strings":
                file.create_dataset(name, value.shape, h5py.string_dtype())
            case "compound":
                file.create_dataset(name, value.shape, np.dtype([("a", "f4"), ("b", "i4")]))
            case "object":
                file.create_dataset(name, (3,), h5py.vlen_dtype(np.float64))
            case "reference":
                file.create_dataset(name, value.shape, h5py.ref_dtype)
            case "null":
                file[name] = h5py.Empty("f4")
            case "scalar":
                file[name] = 3.0
            case "other":
                file[name] = np.resize(value, [(0, 1, 2, 3, 12, 20, 30)[n % 7]] * value.ndim)
            case "values":
                value.flat[n % value.size] = (np.nan, np.inf, -1, 1e30, -0.0)[n % 5]
                file[name] = value
            case "kind":
                file[name] = np.clip(value, 0, 100).astype(("i1", "u8", ">f8", "f2", "c8", "?", "g")[n % 7])
            case _:
                pass  # missing


_HOW_STRANGE = ["huge", "large", "external", "link", "soft", "group", "strings", "compound", "object", "reference", "null", "scalar", "other", "values", "kind",
                "missing"]  # fmt: skip


@st.composite
def hdf5_cases(draw: Any) -> Case:
    """HDF5, as data for training and as a table."""
    where, how, n = (
        draw(st.sampled_from(["trajectories", "time"])),
        draw(st.sampled_from(_HOW_STRANGE)),
        draw(st.integers(0, 200)),
    )
    data: bytes | str = _hdf5(lambda file: _strange_hdf5(file, where, how, n))
    if draw(st.booleans()):
        data = draw(damaged(_hdf5(lambda file: _strange_hdf5(file, "", "", 0))))
    if draw(st.integers(0, 40)) == 0:
        data = draw(st.sampled_from(["folder", "nothing", "loop", "zero", "empty"]))
    if draw(st.booleans()):
        return _forecast("own.h5", data, draw(_TABLE_FLAGS))
    outputs = tuple(f"text/{name}" for name in ("train.txt", "validation.txt", "test.txt", "settings.json"))
    words = ["encode", "--data", f"{HERE}/data.h5", "--output-dir", f"{HERE}/text"]
    return Case({"data.h5": data}, [*words, "--precision", draw(st.sampled_from("0122345"))], outputs=outputs)


# ---------------------------------------------------------------- instructions

_ROW = {"instruction": "Continue.", "input": "1.0;2.0;", "output": "3.0;"}
_LINES = st.one_of(
    strange_json(_ROW),
    st.just(json.dumps(_ROW).encode()),
    st.dictionaries(st.sampled_from(["instruction", "input", "output"]), st.text(max_size=30)).map(lambda row: json.dumps(row).encode()),
    st.binary(max_size=20),
    st.sampled_from([b"", b"{}", b"[1]", b'{"instruction": "a", "input": "\\ud800", "output": "b"}', b"\xef\xbb\xbf", b'{"instruction": "' + b"x" * 10**5]),
)  # fmt: skip


@st.composite
def jsonl_cases(draw: Any) -> Case:
    """Instructions in JSON lines."""
    good = json.dumps(_ROW).encode()
    lines = draw(st.lists(st.one_of(st.just(good), st.just(good), _LINES), max_size=6))
    data: bytes | str = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n"])).join(lines)
    if draw(st.integers(0, 40)) == 0:
        data = draw(st.sampled_from(["folder", "nothing", "loop", "zero", "empty"]))
    words = ["instruct", "--train", f"{HERE}/rows.jsonl", "--val", f"{HERE}/rows.jsonl", "--output-dir", f"{HERE}/run"]
    return Case({"rows.jsonl": data}, words)


# ---------------------------------------------------------------- folders and ledgers

_SERIES = b"a,b\n" + b"".join(b"%d.5,%d.25\n" % (i % 5 + 1, i % 3 + 1) for i in range(12))
_ONE_STEP = ["forecast", f"{HERE}/own.csv", "--steps", "1", "--constrained", "--out", f"{HERE}/out.csv"]


def folder_cases(good: dict[str, dict[str, bytes]], kind: str, model: str) -> st.SearchStrategy[Case]:
    """Folders of adapters, models or runs, forecast with, exported, priced or gone on with."""

    @st.composite
    def cases(draw: Any) -> Case:
        files = {"own.csv": _SERIES, **draw(in_folder(good[kind], kind))}
        match kind:
            case "adapter":
                words, outputs = [*_ONE_STEP, "--model", model, "--adapter", f"{HERE}/adapter"], ("out.csv",)
            case "model" if draw(st.integers(0, 3)) == 0:
                words, outputs = ["flops", "--train", "--model", f"{HERE}/model"], ()
            case "model":
                words, outputs = [*_ONE_STEP, "--model", f"{HERE}/model"], ("out.csv",)
            case "run" if draw(st.integers(0, 3)) == 0:
                words, outputs = ["export", "--run", f"{HERE}/run", "--output-dir", f"{HERE}/plain"], ("plain/",)
            case "run":
                words, outputs = (
                    [*_ONE_STEP, "--run", f"{HERE}/run", "--scale", draw(st.sampled_from(["own", "run"]))],
                    ("out.csv",),
                )
            case _:
                flags = "--max-steps 4 --save-steps 2 --eval-steps 2 --eval-windows 2 --batch-size 2 --max-length 48 --lora-r 2"
                words = [
                    "train",
                    "--resume",
                    "--output-dir",
                    f"{HERE}/{kind}",
                    "--model",
                    model,
                    "--data",
                    good["data"][""].decode(),
                    *flags.split(),
                ]
                return Case(files, words, changes=(f"{kind}/",))
        return Case(files, words, outputs, expected=1)

    return cases()


def _ledger(statements: list[str], path: str) -> bytes:
    with sqlite3.connect(path) as database:
        for statement in statements:
            with suppress(sqlite3.Error):
                database.execute(statement)
    database.close()
    return Path(path).read_bytes()


_SQL = [
    "UPDATE entries SET flops = 'many'", "UPDATE entries SET flops = x'00ff'", "UPDATE entries SET flops = 9223372036854775807",
    "UPDATE entries SET flops = 1.5e300", "UPDATE entries SET tokens = 'x'", "UPDATE entries SET owner = ''", "UPDATE entries SET owner = 'a b c', state = 'reserved'",
    "UPDATE entries SET state = 'reserved', owner = 'h 99999999999999999999 1 x'", "UPDATE entries SET time = x'ff'", "UPDATE entries SET run = 'a' || char(10) || 'b'",
    "UPDATE entries SET run = CAST(x'ff' AS TEXT)", "UPDATE entries SET kind = NULL", "ALTER TABLE entries DROP COLUMN tokens", "ALTER TABLE entries RENAME TO others",
    "ALTER TABLE entries RENAME COLUMN flops TO cost", "ALTER TABLE entries ADD COLUMN more TEXT", "DELETE FROM entries", "PRAGMA application_id = 7", "DROP TABLE entries",
    "CREATE VIEW entries AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x AS id, x AS flops, 'a' AS owner, 'reserved' AS state FROM n",
    "CREATE TRIGGER t AFTER INSERT ON entries BEGIN UPDATE entries SET flops = 0; END", "CREATE TABLE more (x)", "PRAGMA journal_mode = WAL", "PRAGMA user_version = -1",
    "CREATE VIEW v AS SELECT load_extension('x')", "CREATE TABLE entries AS SELECT 1 AS id", "UPDATE entries SET run = printf('%.*c', 5000, 'x')",
    "UPDATE entries SET flops_course = NULL", "UPDATE entries SET settings_sha256 = 5", "UPDATE entries SET id = -5 WHERE id = 1",
]  # fmt: skip


def ledger_cases(good: bytes, model: str, scratch: Path) -> st.SearchStrategy[Case]:
    """Ledgers, read and spent on."""

    @st.composite
    def cases(draw: Any) -> Case:
        data: bytes | str
        if draw(st.booleans()):
            path = scratch / "ledger.sqlite"
            path.write_bytes(good)
            data = _ledger(draw(st.lists(st.sampled_from(_SQL), min_size=1, max_size=3)), str(path))
        else:
            data = draw(damaged(good))
        if draw(st.integers(0, 30)) == 0:
            data = draw(st.sampled_from(SPECIAL))
        files: dict[str, bytes | str] = {"ledger.sqlite": data, "own.csv": _SERIES}
        reading = draw(st.booleans())
        words = (
            ["ledger", "--model", model, "--json", f"{HERE}/out.json", "--csv", f"{HERE}/out.csv"]
            if reading
            else [*_ONE_STEP, "--model", model]
        )
        outputs = ("out.json", "out.csv") if reading else ("out.csv",)
        changes = ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", "ledger.sqlite-journal")
        return Case(files, words, outputs, changes, {"M2_LEDGER": f"{HERE}/ledger.sqlite"}, 1)

    return cases()


# ---------------------------------------------------------------- command lines

_VALUES = ["", "-1", "0", "1", "2", "3", "1000000", "10" * 9, "10" * 15, "9" * 5000, "nan", "inf", "-inf", "1e3", "1e-9", "0x10", "١", " 1", "0.5", "x", "None", "true", "a,b",
           ",", "q_proj", "q_proj,nothing", "embedded", "nobody/nothing", "nobody/nothing/more", ".", "..", "/", "/dev/null", "/dev/full", "/etc/passwd", f"{HERE}/own.csv",
           f"{HERE}/own.h5", f"{HERE}/new", f"{HERE}/new.csv", f"{HERE}/new.png", f"{HERE}/{'n' * 300}", f"{HERE}/caf\udce9.csv", "--", "-", "--help", "P5", "L50", "all", "final",
           "validation", "exact", "course", "grid", "train", "classic", "~", "~nobody/x", "file:///etc/passwd", "https://example.org/x.csv", "postgresql://x@y/z", "\x1b[31m", "a\nb"]  # fmt: skip


_LINES_ = """simulate --out {here}/new.h5 --systems 12 --seed 1
simulate --out {here}/own.h5 --systems 12 --overwrite --classic
encode --output-dir {here}/new --precision 2 --data {here}/own.h5
pretrain --output-dir {here}/new --tokens 100000 --batch-size 2 --stop-after 1 --seed 3
train --output-dir {here}/new --stage initial --max-steps 3 --learning-rate 0.01 --lora-r 2 --target-modules q_proj,v_proj --data {here}/own.h5
instruct --output-dir {here}/new --epochs 1 --batch-size 2 --four-bit 0
sweep grid --output-dir {here}/new --data {here}/own.h5
experiments --output-dir {here}/new --seeds 2 --plan embedded --data {here}/own.h5
evaluate --protocol P5 --split validation --context 128 --samples 2 --limit 1 --json {here}/new.json --data {here}/own.h5
calibrate --samples 3 --limit 1 --json {here}/new.json --data {here}/own.h5
floor --split test --context 128 --limit 1 --json {here}/new.json --data {here}/own.h5
forecast {here}/own.csv --steps 2 --out {here}/new.csv --constrained --samples 2 --levels 0.1,0.9 --seed 1
forecast {here}/own.csv --steps 2 --out {here}/new.csv --plot {here}/new.png --last 5
backtest {here}/own.csv --steps 2 --windows 2 --samples 2 --out {here}/new.csv
flops --train --batch-size 2 --length 64 --lora-r 4 --target-modules q_proj --json {here}/new.json
flops --infer --convention course --numeric-head 1
ledger --json {here}/new.json --csv {here}/new.csv
bench train --json {here}/new.json
export --run checkpoint/embedded/final --output-dir {here}/new""".splitlines()  # fmt: skip


def command_cases(flags: dict[str, list[str]]) -> st.SearchStrategy[Case]:
    """Command lines that are right, with a word or two replaced, left out, or added: a flag of this or another command, any value."""
    every = sorted({flag for own in flags.values() for flag in own})

    @st.composite
    def cases(draw: Any) -> Case:
        words = draw(st.sampled_from(_LINES_)).split()
        for _ in range(draw(st.integers(0, 2))):
            at, how = draw(st.integers(0, len(words) - 1)), draw(st.integers(0, 9))
            if how == 0:
                del words[at]
            elif how == 1:
                words.insert(at + 1, draw(st.sampled_from(every + _VALUES)))
            elif words[at].startswith("--"):
                words[at] = draw(st.sampled_from((flags.get(words[0]) or every) * 4 + every))
            else:
                words[at] = draw(st.sampled_from(_VALUES))
            words = words or [""]
        files: dict[str, bytes | str] = {
            "own.csv": _SERIES,
            "own.h5": _hdf5(lambda file: _strange_hdf5(file, "", "", 0)),
        }
        return Case(files, words, outputs=("new",), changes=("own.h5",) if "--overwrite" in words else ())

    return cases()


def lay(case: Case, folder: Path) -> list[str]:
    """Write a case's files into an empty folder; return its command line."""
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        match content:
            case bytes():
                path.write_bytes(content)
            case "folder":
                path.mkdir()
            case "fifo":
                os.mkfifo(path)
            case "zero":
                path.symlink_to("/dev/zero")
            case "loop":
                path.symlink_to(path.name)
            case "nothing":
                path.symlink_to("not-there")
            case _:
                path.touch()
    return [word.replace(HERE, str(folder)) for word in case.words]
