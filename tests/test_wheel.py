"""The package as others install it: what it asks for, what it brings, and that its commands work with no checkout near."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import m2helpers
from m2helpers import report

CHECKOUT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
NAMES = {"sklearn": "scikit-learn", "lazy_loader": "lazy-loader", "huggingface_hub": "huggingface-hub"}  # as imported


def _requirements(lines):
    found = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


NEEDED = _requirements(PROJECT["project"]["dependencies"])
EXTRAS = {name: _requirements(lines) for name, lines in PROJECT["project"]["optional-dependencies"].items()}
PINNED = _requirements((CHECKOUT / "requirements.txt").read_text(encoding="utf-8").splitlines())

# ---------------------------------------------------------------- what it asks for


def test_every_pin_lies_in_its_range_and_every_range_has_a_pin():
    ranges = NEEDED | {name: found for extra in EXTRAS.values() for name, found in extra.items()}
    assert set(PINNED) == set(ranges)
    for name, requirement in ranges.items():
        (pin,) = PINNED[name].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), f"{requirement} is pinned to {pin}"


def test_every_range_ends_before_a_release_that_may_break():
    for name, requirement in NEEDED.items():
        assert {part.operator for part in requirement.specifier} == {">=", "<"}, name


def test_what_is_imported_is_asked_for():
    """At the top of a module or inside a function, and nothing else is."""
    imported = set()
    for path in (CHECKOUT / "m2helpers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    imported = {canonicalize_name(NAMES.get(name, name)) for name in imported - set(sys.stdlib_module_names)}
    extras = {"pyarrow", "bitsandbytes", "emcee", "numba", "sqlalchemy", "psycopg", "ray"}
    extras |= {"trl", "datasets", "markdown-it"}  # of a benchmark, and of what the site alone needs
    assert imported - {"-typeshed"} == set(NEEDED) | extras  # one is of the type checker alone


def test_there_is_one_version():
    assert m2helpers.__version__ in (PROJECT["project"]["version"], "0+unknown")
    program = """
import importlib.metadata as metadata
def nowhere(name): raise metadata.PackageNotFoundError(name)
metadata.version = nowhere
import m2helpers
print(m2helpers.__version__)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout == "0+unknown\n"  # a checkout that was never installed runs as well


# ---------------------------------------------------------------- what it brings


def _copy_of_the_checkout(folder):
    """What is tracked; where there is no history, as in a container, what is there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if listed.returncode:
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "_build", "*.part")
        shutil.copytree(CHECKOUT, folder, ignore=ignored)
        return folder
    for name in filter(None, listed.stdout.split("\0")):
        if (CHECKOUT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CHECKOUT / name, folder / name)
    return folder


def _pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the source archive, so that this is whole too; without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = _copy_of_the_checkout(folder / "source")
    program = "import setuptools.build_meta as b; b.build_sdist('..')"
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    (unpacked,) = [path for path in folder.glob("m2helpers-*") if path.is_dir()]
    assert {"tests/conftest.py", "tests/campaigns/ledger.py", "tools/notebooks.py", "docs/conf.py"} <= {
        path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*.py")
    }
    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, unpacked)
    (built,) = folder.glob("*.whl")
    yield built
    shutil.rmtree(folder)  # pytest keeps the folders of three runs


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory):
    """The wheel installed into an empty folder."""
    folder = tmp_path_factory.mktemp("target") / "site"
    _pip("install", "--no-deps", "--no-index", "--no-compile", "--target", folder, wheel)
    return folder


@pytest.mark.slow
def test_the_wheel_brings_base_data_records_and_types(wheel):
    about = f"m2helpers-{PROJECT['project']['version']}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"{about}/METADATA").decode()
        scripts = archive.read(f"{about}/entry_points.txt").decode()
    shipped = {name.removeprefix("m2helpers/shipped/") for name in names if name.startswith("m2helpers/shipped/")}
    assert {"checkpoint/embedded/base/model.safetensors", "checkpoint/embedded/base/tokenizer.json"} <= shipped
    assert {"data/lotka_volterra_data.h5", "checkpoint/embedded/ledger.csv", "docs/benchmarks.json"} <= shipped
    weights = {name.split("/")[2] for name in shipped if name.endswith(".safetensors")}
    assert weights == {"base", "initial", "final", "extended"}
    assert {"m2helpers/py.typed", "m2helpers/__init__.pyi", "m2helpers/report/__init__.pyi"} <= names
    assert not any(name.startswith(("tests/", "docs/", "tools/")) for name in names)
    assert 14e6 < wheel.stat().st_size < 20e6
    asked = [line.partition(";")[0] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    assert "Requires-Dist: torch<3,>=2.13" in asked and not any("==" in line for line in asked)
    assert "Author: the m2helpers authors\n" in metadata and "License-Expression: MIT\n" in metadata
    assert {f"Provides-Extra: {name}" for name in ("notebooks", "test", "docs")} <= set(metadata.splitlines())
    assert "m2helpers = m2helpers.__main__:main" in scripts


# ---------------------------------------------------------------- that it works


@pytest.fixture
def m2(target, tmp_path):
    """Runs Python in an empty folder with what is installed, and nothing of the checkout, to be imported."""
    (cwd := tmp_path / "empty").mkdir()
    own = {name: str(tmp_path / "home") for name in ("HOME", "USERPROFILE", "XDG_DATA_HOME", "LOCALAPPDATA")}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("M2_", "PYTHON"))}
    environment = kept | own | {"HF_HUB_OFFLINE": "1"}
    before = f"import sys; sys.path.insert(0, {str(target)!r}); import m2helpers; "
    before += f"assert m2helpers.__file__.startswith({str(target)!r}), m2helpers.__file__; "

    def run(program, **more):
        # -I: neither the working directory nor PYTHONPATH is looked into; -B: no bytecode is kept beside the modules
        command = [sys.executable, "-I", "-B", "-c", before + program]
        return subprocess.run(command, cwd=cwd, env=environment | more, capture_output=True, text=True)

    return run


def _commands(*lines):
    """A program that runs commands one after the other, and ends with the status of the first that fails."""
    return f"from m2helpers.__main__ import main; sys.exit(max(main(line.split()) for line in {list(lines)!r}))"


def _files(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_every_command_works_in_an_empty_folder(m2, target, tmp_path):
    before = _files(target)
    brief = "--max-steps 1 --batch-size 1 --max-length 64 --eval-windows 1"
    (tmp_path / "empty" / "own.csv").write_text("a,b\n" + "".join(f"{2 + x % 3},{1 + x % 2}\n" for x in range(30)))
    done = m2(
        _commands(
            "simulate --out small.h5 --systems 10",
            "encode --output-dir text --data small.h5",
            "flops --train",
            "ledger",
            f"train --output-dir run --data small.h5 {brief}",
            "forecast own.csv --steps 2 --constrained --out base.csv",
            "forecast own.csv --steps 2 --run checkpoint/embedded/extended --out extended.csv",
            "evaluate --run run --data small.h5 --protocol P5 --context 512 --json own.json",
            "ledger --csv entries.csv",
        )
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nothing has been spent yet" in done.stdout and "FLOPs spent or reserved" in done.stdout
    made = {path.name for path in (tmp_path / "empty").iterdir()}
    assert made == {"own.csv", "small.h5", "text", "run", "base.csv", "extended.csv", "own.json", "entries.csv"}
    (ledger,) = (tmp_path / "home").rglob("ledger.sqlite")
    assert ledger.parent.name == "embedded" and ledger.parent.parent.name == "checkpoint"
    assert _files(target) == before


@pytest.mark.slow
def test_pages_are_refused_and_tables_are_read(m2, target, tmp_path):
    before = _files(target)
    assert "usage:" in m2(_commands("bench --help")).stdout
    program = "import json, m2helpers.report as r; from m2helpers.ledger import default_ledger as d; "
    program += "from m2helpers.__main__ import main; "
    program += "print(json.dumps([main(['readme']), r.blocks(), str(d('embedded').where)]))"
    done = m2(program, M2_HOME=str(tmp_path / "own"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "has no pages to fill; run this in a checkout" in done.stderr and done.stderr.count("\n") == 1
    status, blocks, ledger = json.loads(done.stdout)
    assert status == 1 and blocks == report.blocks()  # the same records say the same
    assert ledger == str(tmp_path / "own" / "checkpoint" / "embedded" / "ledger.sqlite")
    assert _files(target) == before
