"""The tool that executes the notebooks, on two throwaway ones."""

import json
import os
import shutil

import nbformat
import pytest

from m2helpers.files import UserError, read_json, write_json
from tools import notebooks


def _notebook(path, *sources):
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python", "version": "1"}}), path
    )
    return path


@pytest.mark.slow
def test_copy_has_outputs_and_nothing_that_varies(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("M2_MODEL", "passed through")
    monkeypatch.setenv("OMP_WAIT_POLICY", "as here")
    source = "import os, pathlib\nfrom tqdm.auto import tqdm\nprint(*tqdm([1, 2]), os.environ['M2_MODEL'], pathlib.Path.cwd().name)"
    source += "\nprint(os.environ['OMP_WAIT_POLICY'])"
    path = _notebook(tmp_path / "a folder" / "1_first.ipynb", source, "1 + 1")
    before = path.read_bytes()
    assert notebooks.main(["--output-dir", str(tmp_path / "out"), str(path)]) == 0
    assert path.read_bytes() == before
    made = json.loads((tmp_path / "out" / "1_first.ipynb").read_text())
    assert made["metadata"] == notebooks.METADATA
    assert [cell["id"] for cell in made["cells"]] == ["cell-0", "cell-1"]
    assert [cell["metadata"] for cell in made["cells"]] == [{}, {}]
    first, second = (cell["outputs"] for cell in made["cells"])
    assert first == [
        {"name": "stdout", "output_type": "stream", "text": ["1 2 passed through a folder\n", "as here\n"]}
    ]
    assert second[0]["data"] == {"text/plain": ["2"]}
    assert "[1/1] 1_first.ipynb" in capsys.readouterr().out


@pytest.mark.slow
def test_failure_names_notebook_cell_and_error(tmp_path, capsys):
    path = _notebook(tmp_path / "3_third.ipynb", "1", "assert 1 == 2, 'one is not two'")
    before = path.read_bytes()
    assert notebooks.main(["--in-place", str(path)]) == 1
    assert path.read_bytes() == before
    assert capsys.readouterr().err == "error: 3_third.ipynb, cell 2: AssertionError: one is not two\n"


@pytest.mark.slow
def test_dead_kernel_is_named(tmp_path):
    path = _notebook(tmp_path / "4_fourth.ipynb", "import os; os._exit(1)")
    with pytest.raises(UserError, match=r"4_fourth\.ipynb, cell 1: Kernel died"):
        notebooks.execute(path)


@pytest.mark.slow
@pytest.mark.long
def test_a_changed_record_changes_the_notebook(tmp_path, monkeypatch):
    """On a copy of the project: what notebook 5 says of the initial run is read from the run's record."""
    for name in ("m2helpers", "data", "notebooks", "checkpoint", "pyproject.toml", "docs/notebook_costs.json"):
        copy = shutil.copytree if (notebooks.ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy(notebooks.ROOT / name, tmp_path / name)
    record = tmp_path / "checkpoint" / "embedded" / "initial" / "metrics.json"
    rows = read_json(record)
    rows[0]["ci_mae"][1] = 0.98765
    write_json(record, rows)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("M2_LEDGER", str(tmp_path / "ledger.sqlite"))
    (path,) = (tmp_path / "notebooks").glob("5_*.ipynb")
    assert "0.9877" not in path.read_text(encoding="utf-8")
    notebook, _, _ = notebooks.execute(path)
    changed = ["0.9877" in json.dumps(cell.get("outputs", [])) for cell in notebook.cells]
    assert sum(changed) >= 3 and any(changed[-3:])  # its tables, and "What we saw"


def test_order_and_costs(tmp_path):
    for name in ("appendix_a", "2_b", "1_z", "notes"):
        (tmp_path / f"{name}.ipynb").touch()
    assert [path.stem for path in notebooks.find_notebooks(tmp_path)] == ["1_z", "2_b", "appendix_a"]
    record = tmp_path / "costs.json"
    for name, seconds in (("2_b", 3.21), ("1_z", 1.0), ("2_b", 4.56)):
        notebooks.record_cost(name, seconds, 123_456_789, record)
    rows = read_json(record)["notebooks"]
    assert [(row["notebook"], row["seconds"], row["peak_memory_mb"]) for row in rows] == [
        ("1_z", 1.0, 123),
        ("2_b", 4.6, 123),
    ]


def test_titles_tell_the_recorded_time():
    record = read_json(notebooks.COSTS)
    seconds = {row["notebook"]: row["seconds"] for row in record["notebooks"]}
    told = 0
    for path in notebooks.find_notebooks():
        title = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        if "*Time:*" in title:
            told += 1
            assert f"runs in {seconds[path.stem]:.0f} s on {record['cores']} cores" in title, path.name
    assert told >= 5
    assert notebooks.note_time("it runs in 9 s on 2 cores.", 3.4) == f"it runs in 3 s on {os.cpu_count()} cores."
