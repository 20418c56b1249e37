"""The Makefile's choice of a Python, and what .ci/run says where it cannot go on; nothing is installed."""

import os
import shutil
import subprocess
import sys

import pytest

from m2helpers.paths import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs GNU make")


@pytest.fixture
def make(tmp_path):
    """Runs make on a copy of the Makefile."""
    shutil.copy(ROOT / "Makefile", tmp_path)

    def run(*arguments):
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        how = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
        return subprocess.run(["make", *arguments], **how)

    return run


def _script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def _python(path):
    """This Python, which notes that it was to make .venv in the place of making one."""
    return _script(
        path, f'[ "$1" = -m ] && mkdir -p .venv/bin && echo "$0 $*" >.venv/bin/pip || exec {sys.executable} "$@"'
    )


def test_a_path_with_a_space_works(make, tmp_path):
    python = _python(tmp_path / "a folder" / "python3")
    made = make(".venv/bin/pip", f"PYTHON={python}")
    assert made.returncode == 0 and "Making .venv with Python 3" in made.stdout
    assert (tmp_path / ".venv" / "bin" / "pip").read_text() == f"{python} -m venv .venv\n"


@pytest.mark.parametrize("answer", [None, "exit 1", 'case "$2" in *3,*) exit 0;; esac'], ids=["missing", "bare", "old"])
@pytest.mark.parametrize("target", [".venv/bin/pip", "check"])
def test_a_python_that_will_not_do_is_refused_in_one_line(answer, target, make, tmp_path):
    python = tmp_path / "old python"
    if answer:
        _script(python, answer)
    made = make(target, f"PYTHON={python}")
    (line,) = made.stderr.splitlines()
    assert made.returncode == 2 and f"PYTHON={python} is no Python 3.11 or newer" in line
    assert not made.stdout and not (tmp_path / ".venv").exists()


def test_another_python_than_that_of_the_venv_is_refused(make, tmp_path):
    python = _python(tmp_path / "python3")
    _python(tmp_path / ".venv" / "bin" / "python")
    (tmp_path / ".venv" / "bin" / "pip").touch()
    assert make("clean", f"PYTHON={python}").returncode == 0
    other = _script(tmp_path / "python4", "echo 4.0")
    made = make("clean", f"PYTHON={other}")
    (line,) = made.stderr.splitlines()
    assert made.returncode == 2 and f"made from another Python than PYTHON={other}" in line


def test_ci_names_what_it_lacks_and_cannot_install(tmp_path):
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    _script(tmp_path / "python3", "exit 1")
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    found = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, executable=None)
    assert found.returncode == 1 and not found.stdout
    assert (
        found.stderr.startswith("error: install make python3 python3-venv chromium first")
        and found.stderr.count("\n") == 1
    )
