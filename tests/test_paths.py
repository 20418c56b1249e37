"""Where things are: in a checkout, where `M2_HOME` says, and elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from m2helpers import paths
from m2helpers.files import UserError
from m2helpers.paths import checkpoint_folder, find_base, find_run, is_embedded, own_folder

CHECKOUT = Path(__file__).resolve().parent.parent


def _roots(package=CHECKOUT, **environment):
    """`ROOT` and `HOME` as another process finds them, whose package lies in a folder."""
    program = "import json, m2helpers.paths as p; print(json.dumps([str(p.__file__), str(p.ROOT), str(p.HOME)]))"
    inherited = {key: value for key, value in os.environ.items() if key not in ("M2_HOME", "PYTHONPATH")}
    environment = inherited | environment | {"PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=package, capture_output=True, check=True
    )
    file, root, home = json.loads(done.stdout)
    assert Path(file).parent.parent == package
    return Path(root), Path(home)


@pytest.fixture
def installed(tmp_path):
    """The package by itself, as in site-packages."""
    folder = tmp_path / "site-packages"
    shutil.copytree(CHECKOUT / "m2helpers", folder / "m2helpers", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_a_checkout_holds_everything(tmp_path):
    assert _roots() == (CHECKOUT, CHECKOUT)
    assert _roots(M2_HOME=str(tmp_path)) == (CHECKOUT, tmp_path)  # writing goes there; there is nothing to read


def test_elsewhere_what_is_installed_is_read_and_the_users_folder_written(installed, tmp_path):
    own = dict(HOME=str(tmp_path / "home"), XDG_DATA_HOME=str(tmp_path / "data"), LOCALAPPDATA=str(tmp_path / "data"))
    root, home = _roots(installed, **own)
    assert root == installed / "m2helpers" / "shipped"
    assert home.is_relative_to(tmp_path) and not home.is_relative_to(installed) and home.name == "m2helpers"
    assert _roots(installed, M2_HOME="~/work", **own) == (root, tmp_path / "home" / "work")


def test_the_variable_can_name_a_checkout(installed):
    assert _roots(installed, M2_HOME=str(CHECKOUT)) == (CHECKOUT, CHECKOUT)


def test_the_embedded_base_is_known_by_path_and_by_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path / "checkpoint")
    shutil.copytree(paths.EMBEDDED_BASE, tmp_path / "net")
    (tmp_path / "link").symlink_to(paths.EMBEDDED_BASE)
    for name in ("embedded", str(paths.EMBEDDED_BASE), str(tmp_path / "net"), str(tmp_path / "link")):
        assert is_embedded(name) and own_folder(name) == tmp_path / "checkpoint" / "embedded"
        assert checkpoint_folder(name) == paths.ROOT / "checkpoint" / "embedded"  # its records are the shipped ones
    weights = bytearray((tmp_path / "net" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "net" / "model.safetensors").write_bytes(weights)
    (tmp_path / "net").rename(tmp_path / "embedded")
    monkeypatch.chdir(tmp_path)
    assert not is_embedded("./embedded") and own_folder("./embedded").name.startswith("embedded-")
    assert not is_embedded("someone/embedded") and not is_embedded("nothing")


def test_a_folder_named_by_dots_has_the_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path / "checkpoint")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path / "mine")
    assert checkpoint_folder(".") == checkpoint_folder("../mine") == checkpoint_folder(str(tmp_path / "mine"))
    assert checkpoint_folder(".").parent == tmp_path / "checkpoint"
    assert checkpoint_folder(".").name.startswith("mine-")


def test_a_base_that_is_nowhere_has_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, said in (("mine", "no such model"), ("./mine", "no such model"), ("some/mine", "hub's local cache")):
        assert find_base(name) is None
        with pytest.raises(UserError, match=f"{name}: .*{said}"):
            checkpoint_folder(name)


def test_a_shipped_run_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_run(Path("checkpoint/embedded/extended")) == paths.ROOT / "checkpoint" / "embedded" / "extended"
    assert find_run(Path("checkpoint/mine")) == Path("checkpoint/mine")
    Path("checkpoint/embedded/extended").mkdir(parents=True)  # one's own comes first
    assert find_run(Path("checkpoint/embedded/extended")) == Path("checkpoint/embedded/extended")
