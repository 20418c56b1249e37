"""Atomic writes, JSON and hashes."""

import hashlib

import pytest
from safetensors import SafetensorError

from m2helpers.files import UserError, atomic_path, read_json, sha256_file, sha256_json, write_json, write_text
from m2helpers.paths import checkpoint_folder


def test_atomic_path_makes_parents_and_leaves_only_the_file(tmp_path):
    path = tmp_path / "new" / "deep" / "a.bin"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary != path
        temporary.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("failure", [SafetensorError("No space left on device"), OSError("No space left on device")])
def test_a_write_that_fails_names_the_file(failure, tmp_path):
    """Whatever the library that writes says, or does not say."""
    with pytest.raises(OSError, match="No space left on device") as error, atomic_path(tmp_path / "a.bin"):
        raise failure
    assert error.value.filename == str(tmp_path / "a.bin")


def test_text_and_json_round_trip(tmp_path):
    write_text(tmp_path / "a.txt", "predator–prey\n")
    assert (tmp_path / "a.txt").read_bytes() == "predator–prey\n".encode()
    value = {"a": [1, 2.5, None, "é"], "b": {"c": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"mae": float("nan")})
    assert read_json(tmp_path / "a.json") == 1


@pytest.mark.parametrize("content, said", [(b'{"a": ', "not valid JSON"), (b"\xff\xfe\x00", "not valid JSON")])
def test_damaged_json_is_refused(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, said", [("missing.json", "No such file"), (".", "directory")])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, said):
    with pytest.raises(UserError, match=said):
        read_json(tmp_path / name)


def test_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


def test_hashes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert sha256_json({"b": 1, "a": [2]}) == sha256_json({"a": (2,), "b": 1})
    assert sha256_json({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})


def test_a_folder_named_by_dots_has_the_folder_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert checkpoint_folder(".") == checkpoint_folder("mine") == checkpoint_folder(str(tmp_path / "mine"))
    assert checkpoint_folder("Qwen/Qwen2.5-0.5B").name == "Qwen2.5-0.5B"
