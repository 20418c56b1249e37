"""Files that mean harm, one of each kind that the fuzz campaign got through with: refused in a line, within bounds.

What a reader does with files that are merely damaged stands with the tests of that reader.
"""

import gzip
import io
import json
import os
import shutil
import sqlite3
import zipfile

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from safetensors.torch import load_file, save_file

from m2helpers import __main__ as command
from m2helpers import files
from m2helpers.data import load_dataset
from m2helpers.files import UserError, check_memory, read_json
from m2helpers.flops.costs import Cost
from m2helpers.instruct.rows import read_rows
from m2helpers.ledger import Ledger, Spender
from m2helpers.lora import apply_lora, load_adapter, save_adapter
from m2helpers.models import load_base
from m2helpers.runs import load_run
from m2helpers.series import cells, read_table, table, table_of
from m2helpers.settings import LoraSettings
from m2helpers.text import Codec


def _refused(read, path, said):
    with pytest.raises(UserError, match=said) as error:
        read(path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- what unpacks without end


def _zip(data):
    with io.BytesIO() as stream:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("own.csv", data)
        return stream.getvalue()


@pytest.mark.parametrize("pack", [bytes, gzip.compress, _zip], ids=["plain", "gzip", "zip"])
def test_no_more_text_is_unpacked_than_a_table_may_have(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 1000)
    (tmp_path / "own.csv").write_bytes(pack(b"1,2\n" * 300))
    _refused(read_table, tmp_path / "own.csv", "holds more than")


def test_a_table_of_too_many_cells_is_refused_before_it_is_cut_up(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "_MEMORY", 100_000)
    monkeypatch.setattr(cells, "_rows", None)
    (tmp_path / "own.csv").write_text("a,b\n" + "1,2\n" * 300)
    _refused(read_table, tmp_path / "own.csv", "cells in 302 lines are too many")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="POSIX")
@pytest.mark.parametrize("read", [read_table, read_rows])
def test_a_device_is_not_read_without_end(read, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 1 << 20)
    (tmp_path / "own.csv").symlink_to("/dev/zero")
    _refused(read, tmp_path / "own.csv", "holds more than")


def _hdf5(path, **trajectories):
    with h5py.File(path, "w") as file:
        file.create_dataset("trajectories", **trajectories)
        file["time"] = np.arange(trajectories["shape"][1], dtype=float)
    return path


@pytest.mark.parametrize("read", [load_dataset, read_table])
def test_hdf5_that_says_it_holds_more_than_it_can(read, tmp_path):
    path = _hdf5(tmp_path / "own.h5", shape=(10**6, 1000, 2), dtype="f4", chunks=(1, 1000, 2))
    _refused(read, path, r"says it holds 16\.0 GB, and the file 0\.0 MB")


@pytest.mark.parametrize("read", [load_dataset, read_table])
def test_hdf5_does_not_read_other_files(read, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(10**5))
    path = _hdf5(tmp_path / "own.h5", shape=(12, 20, 2), dtype="f4", external=[(str(tmp_path / "secret"), 0, 10**4)])
    _refused(read, path, "lies in another file")
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["trajectories"] = h5py.ExternalLink(str(path), "/trajectories")
    _refused(read, tmp_path / "link.h5", "lies in another file")


def test_parquet_of_more_rows_than_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_CELLS", 20)
    pd.DataFrame({"a": np.zeros(30)}).to_parquet(tmp_path / "own.parquet")
    _refused(read_table, tmp_path / "own.parquet", "30 rows of 1 columns are too many")


def test_parquet_whose_note_of_its_index_is_of_another_file(tmp_path):
    frame = pd.DataFrame({"a": np.zeros(30)}, index=pd.Index([*range(30)][::-1], name="day"))
    written = pyarrow.Table.from_pandas(frame)
    note = json.loads(written.schema.metadata[b"pandas"])
    note["columns"] = [column for column in note["columns"] if column["name"] != "day"]
    written = written.replace_schema_metadata({"pandas": json.dumps(note)})
    pyarrow.parquet.write_table(written, tmp_path / "own.parquet")
    _refused(read_table, tmp_path / "own.parquet", "cannot be read as Parquet .*; give Parquet or CSV")


@pytest.mark.parametrize("cell", [[1, 2], {"k": 1}, b"bytes", np.ones(2)])
def test_a_cell_that_holds_several(cell):
    _refused(table_of, pd.DataFrame({"a": [cell] * 5, "b": np.arange(5.0)}), "row 1, column a holds a ")


# ---------------------------------------------------------------- messages


def _said(capsys, error):
    def fail():
        raise error

    assert command._run("forecast", fail) == 1
    return capsys.readouterr().err


def test_a_message_is_one_line_that_any_terminal_shows(capsys):
    said = _said(capsys, UserError("own.csv: \x1b]0;owned\x07 is\r\nno \udce9 number" + "x" * 10_000))
    assert said.count("\n") == 1 and said.strip().isprintable() and len(said) < 1200
    assert r"\x1b]0;owned\x07 is no \udce9 number" in said


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_memory_that_runs_out_is_one_line(error, capsys):
    assert _said(capsys, error).startswith("m2helpers forecast: not enough memory; close other programs")


def test_another_error_of_the_program_is_shown_whole(capsys):
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        _said(capsys, RuntimeError("a mistake of ours"))


def test_work_that_does_not_fit_is_refused():
    _refused(
        lambda needed: check_memory("--systems 9", needed, "give fewer"),
        10**18,
        r"--systems 9: needs 1,000,000,000\.0 GB .*; give fewer",
    )


def test_json_nested_without_end(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    _refused(read_json, tmp_path / "a.json", "nested without end")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_json_from_a_pipe_or_a_device_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    _refused(read_json, tmp_path / "a.json", "a pipe or a device")


# ---------------------------------------------------------------- ledgers


@pytest.mark.parametrize(
    "statement, said",
    [
        ("CREATE TRIGGER t AFTER INSERT ON entries BEGIN UPDATE entries SET flops = 0; END", "other tables"),
        ("CREATE TABLE more (x)", "other tables"),
        ("ALTER TABLE entries ADD COLUMN more TEXT", "other columns"),
        ("ALTER TABLE entries DROP COLUMN tokens", "other columns"),
        ("UPDATE entries SET flops = 'many'", "an entry that no ledger writes"),
        ("UPDATE entries SET flops = 9223372036854775807", "an entry that no ledger writes"),
        ("UPDATE entries SET time = x'ff'", "an entry that no ledger writes"),
        ("UPDATE entries SET flops_course = -1", "an entry that no ledger writes"),
    ],
)
def test_a_ledger_of_a_strangers_making(statement, said, tmp_path):
    ledger = Ledger(path := tmp_path / "ledger.sqlite")
    with ledger.reserve(Spender("run", "initial"), train=Cost(1, 10, 10)) as bill:
        bill.add("train", Cost(1, 5, 5))
    with sqlite3.connect(path) as database:
        database.execute(statement)
    database.close()
    before = path.read_bytes()
    _refused(Ledger, path, said)
    assert path.read_bytes() == before


def test_a_ledger_whose_entries_are_an_endless_view(tmp_path):
    Ledger(path := tmp_path / "ledger.sqlite")
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE entries")
        database.execute(
            "CREATE VIEW entries AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) SELECT * FROM n"
        )
    database.close()
    _refused(Ledger, path, "other tables")


@pytest.mark.parametrize("owner", ["", "h", "{host} x 1 t", "{host} 99999999999999999999999 1 t", "{host} -1 1 t"])
def test_an_owner_that_is_no_process_holds_nothing(owner, tmp_path):
    import socket

    ledger = Ledger(path := tmp_path / "ledger.sqlite")
    with ledger.reserve(Spender("run", "initial"), train=Cost(1, 10, 10)) as bill:
        bill.add("train", Cost(1, 5, 5))
    with sqlite3.connect(path) as database:
        database.execute("UPDATE entries SET state = 'reserved', owner = ?", [owner.format(host=socket.gethostname())])
    database.close()
    assert [entry["state"] for entry in Ledger(path).entries()] == ["lost"]


# ---------------------------------------------------------------- models, adapters, runs


@pytest.fixture
def model(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def _change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "values",
    [{"vocab_size": 10**12}, {"hidden_size": 10**9}, {"num_hidden_layers": 10**7}, {"intermediate_size": 10**10}, {"num_hidden_layers": -3}],
)  # fmt: skip
def test_a_config_that_asks_for_more_than_its_weights(values, model):
    """Refused before memory is taken for it; what transformers refuses itself is refused as well."""
    _change(model / "config.json", **values)
    _refused(load_base, str(model), "config.json says|cannot be loaded")


@pytest.mark.parametrize("longest", [[], "x"])
def test_a_tokenizer_that_cannot_be_used(longest, model):
    _change(model / "tokenizer_config.json", model_max_length=longest)
    _refused(load_base, str(model), "cannot be loaded from .* fetch or copy the model again")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors", "chat_template.jinja"])
def test_a_pipe_in_a_models_folder_is_not_waited_for(name, model):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    _refused(load_base, str(model), "is a pipe or a device|no config.json")


@pytest.mark.parametrize("length", [None, "long", -5, {}])
def test_a_record_of_pretraining_that_says_no_length(length, model):
    from m2helpers.forecasting.tables import _window

    (model / "pretraining.json").write_text(json.dumps({"settings": {"max_length": length}}))
    _refused(lambda name: _window(load_base(name)), str(model), "does not say how long|says it reads -5 tokens")


@pytest.fixture
def adapter(tiny_base, tmp_path):
    base, settings = tiny_base(), LoraSettings(lora_r=2)
    save_adapter(apply_lora(base.model, settings), tmp_path / "adapter", settings, base.name, base.sha256)
    return tmp_path / "adapter"


@pytest.mark.parametrize("rank", [10**12, 3, float("inf")])
def test_a_rank_that_the_weights_do_not_have(rank, adapter, tiny_base):
    _change(adapter / "adapter_config.json", r=rank)
    _refused(
        lambda path: load_adapter(tiny_base().model, path),
        adapter,
        "adapter_config.json says r|not a LoRA adapter's settings",
    )


@pytest.mark.parametrize("dropout", [1, -0.1, float("nan")])
def test_a_dropout_that_is_no_share(dropout, adapter, tiny_base):
    _change(adapter / "adapter_config.json", lora_dropout=dropout)
    _refused(lambda path: load_adapter(tiny_base().model, path), adapter, "not a LoRA adapter's settings")


def test_weights_that_hold_no_update(adapter, tiny_base):
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if ".lora_" not in name}, adapter / "adapter_model.safetensors"
    )
    _change(adapter / "adapter_config.json", r=10**9)
    _refused(lambda path: load_adapter(tiny_base().model, path), adapter, "holds no update of rank 1000000000")


@pytest.mark.parametrize(
    "values",
    [{"codec": None}, {"codec": {"scale": "x"}}, {"codec": {"scale": 1.0, "other": 2}}, {"settings": []}, {"settings": {"lora_r": "two"}}, {"stage": 3}, {"base": "a\nb"}],
)  # fmt: skip
def test_a_runs_record_of_other_values(values, adapter):
    record = {
        "settings": {},
        "codec": {"scale": 1.0},
        "base": "x/y",
        "stage": "initial",
        "data_sha256": "0",
        "base_sha256": "0",
        "settings_sha256": "0",
    }
    (adapter / "config.json").write_text(json.dumps(record | values))
    (adapter / "history.csv").touch()
    _refused(load_run, adapter, "not a run's record")


@pytest.mark.parametrize("values", [{"precision": 18}, {"precision": 10**9}, {"max_integer_digits": 10**6}])
def test_digits_without_end(values):
    _refused(lambda scale: Codec(scale, **values), 1.0, "precision must be from 0 to 17")
