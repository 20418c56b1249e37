"""The teaching kit: a solution to every exercise, and environments whose files are whole."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from tools.notebooks import ROOT, find_notebooks

NUMBERED = [path for path in find_notebooks() if path.stem[0].isdigit()]
matplotlib.use("Agg")


def _cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_every_exercise_has_a_solution(path):
    asked = [s for s in ("".join(cell["source"]) for cell in _cells(path)) if s.startswith("## Exercises")]
    (exercises,) = asked
    numbers = re.findall(r"^(\d+)\. ", exercises, re.MULTILINE)
    solved = _cells(ROOT / "solutions" / f"{path.stem}_solutions.ipynb")
    text = "\n".join("".join(cell["source"]) for cell in solved)
    assert numbers and re.findall(r"^## Exercise (\d+)$", text, re.MULTILINE) == numbers
    assert f"](../notebooks/{path.name})" in text
    assert all(
        cell["outputs"] or "say" in cell["id"] or cell["id"] == "setup"
        for cell in solved
        if cell["cell_type"] == "code"
    )


def test_binder_installs_what_is_pinned():
    folder = ROOT / "binder"
    lines = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (named,) = [line.split()[1] for line in lines if line.startswith("-r ")]
    assert (folder / named).resolve() == ROOT / "requirements.txt"
    assert os.access(folder / "postBuild", os.X_OK)
    subprocess.run([shutil.which("bash") or "bash", "-n", folder / "postBuild"], check=True)
    commands = (folder / "postBuild").read_text(encoding="utf-8")
    (data,) = re.findall(r"m2helpers forecast (\S+)", commands)
    assert (ROOT / data).is_file()
    wanted = re.search(r"python-(3\.\d+)", (folder / "runtime.txt").read_text(encoding="utf-8"))
    assert wanted and wanted.group(1) in {"3.11", "3.12", "3.13"}


@pytest.mark.slow
def test_what_is_pinned_for_binder_is_what_these_tests_run_with():
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-index",
        "-r",
        ROOT / "binder" / "requirements.txt",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Would install" not in done.stdout, done.stderr


@pytest.mark.slow
def test_the_colab_notebook_runs_in_a_checkout(monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(plt, "show", lambda: None)
    cells = [cell for cell in _cells(Path("binder/colab.ipynb")) if cell["cell_type"] == "code"]
    fetch, *rest = ("".join(cell["source"]) for cell in cells)
    compile(fetch, "fetch", "exec")
    scope: dict = {}
    for source in rest:
        exec(source, scope)
    assert scope["found"].valid and len(plt.gcf().axes) == 1
    plt.close("all")
