"""Atomic writes, JSON and hashes."""

import hashlib
import os
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from m2helpers import files
from m2helpers.files import (
    UserError,
    apply_umask,
    atomic_folder,
    atomic_path,
    check_folder_writable,
    check_writable,
    clear_half_written,
    read_json,
    sha256_file,
    sha256_files,
    sha256_json,
    write_json,
    write_text,
)


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


# ---------------------------------------------------------------- what stands at the path already


@pytest.fixture
def umask():
    """Sets the umask for a test."""
    if os.name != "posix":
        pytest.skip("only POSIX has modes")
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)


def _mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_that_the_umask_asks_for(umask, mask, mode, tmp_path):
    umask(mask)
    with atomic_path(tmp_path / "a.safetensors") as temporary:
        save_file({"a": np.zeros(2)}, temporary)  # makes it private, whatever the umask
    write_text(tmp_path / "a.txt", "new")
    assert _mode(tmp_path / "a.safetensors") == _mode(tmp_path / "a.txt") == mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_an_existing_file_keeps_its_mode(umask, mode, tmp_path):
    umask(0o022)
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "a.txt").chmod(mode)
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new" and _mode(tmp_path / "a.txt") == mode


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_root_leaves_a_file_to_its_owner(tmp_path):
    (tmp_path / "a.txt").touch(mode=0o600)
    os.chown(tmp_path / "a.txt", 12345, 23456)
    write_text(tmp_path / "a.txt", "new")
    found = (tmp_path / "a.txt").stat()
    assert (found.st_uid, found.st_gid, _mode(tmp_path / "a.txt")) == (12345, 23456, 0o600)


def test_of_a_symbolic_link_the_target_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.txt").symlink_to("there/target.txt")  # to nothing, yet
    (tmp_path / "second.txt").symlink_to("link.txt")
    for text in ("first", "again"):
        write_text(tmp_path / "second.txt", text)
        assert (tmp_path / "there" / "target.txt").read_text() == text
    assert os.readlink(tmp_path / "link.txt") == "there/target.txt" and (tmp_path / "second.txt").is_symlink()
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["target.txt"]


def test_devices_are_written_and_stay_devices(tmp_path):
    write_json(os.devnull, {"a": 1})
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    (tmp_path / "sink").symlink_to(os.devnull)
    with atomic_path(tmp_path / "sink") as temporary:
        save_file({"a": np.zeros(2)}, temporary)
    assert (tmp_path / "sink").is_symlink() and stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_a_pipe_gets_what_is_whole_and_stays_a_pipe(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    with pytest.raises(KeyboardInterrupt), atomic_path(pipe) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert not read
    write_text(pipe, "whole")
    reader.join(10)
    assert read == ["whole"] and pipe.is_fifo() and [p.name for p in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="Windows has no such name")
@pytest.mark.parametrize("where", ["pipe", "file", "appended"])
def test_standard_output_gets_it_in_its_place(where, tmp_path):
    program = (
        "from m2helpers.files import write_text; print('one'); write_text('/dev/stdout', 'two\\n'); print('three')"
    )
    command = [sys.executable, "-c", program]
    (tmp_path / "out").write_text("zero\n")
    if where == "pipe":
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "one\ntwo\nthree\n"
        return
    with open(tmp_path / "out", "w" if where == "file" else "a") as out:
        subprocess.run(command, stdout=out, check=True)
    expected = "one\ntwo\nthree\n" if where == "file" else "zero\none\ntwo\nthree\n"
    assert (tmp_path / "out").read_text() == expected and os.path.exists("/dev/stdout")


def test_a_full_device_is_an_error_with_its_name():
    if not os.path.exists("/dev/full"):
        pytest.skip("only Linux has a device that is always full")
    with pytest.raises(OSError, match="No space left on device") as error:
        write_text("/dev/full", "text")
    assert error.value.filename == "/dev/full"


# ---------------------------------------------------------------- refused before work begins


def _refused(path, said):
    """Both functions refuse it in one line that names it, and run nothing."""
    with pytest.raises(UserError, match=said) as error:
        check_writable(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=said), atomic_path(path):
        raise AssertionError("the work began")


def test_a_folder_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    for name in ("folder", "link"):
        _refused(tmp_path / name, "it is a folder")


def test_a_name_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    _refused(tmp_path / "file" / "deep" / "a.txt", "Not a directory")


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    _refused(tmp_path / "loop", "symbolic links")


def test_no_right_is_refused(tmp_path, monkeypatch):
    """By the folder, by the file, and by a folder that would have to be made; root is told so as well, by the system."""
    (tmp_path / "shut").mkdir()
    (tmp_path / "kept.txt").write_text("old")

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    if os.name != "posix" or os.geteuid() == 0:  # who may write everywhere: as the system answers another
        monkeypatch.setattr(files, "open", denied, raising=False)
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    else:
        (tmp_path / "shut").chmod(0o500)
        (tmp_path / "kept.txt").chmod(0o400)
    _refused(tmp_path / "shut" / "a.txt", "Permission denied")
    _refused(tmp_path / "shut" / "deep" / "a.txt", "Permission denied")
    _refused(tmp_path / "kept.txt", "no right to write it")
    assert (tmp_path / "kept.txt").read_text() == "old"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has a file system that takes no file")
def test_a_file_system_that_takes_no_file_is_refused():
    """Even of root, really."""
    _refused("/proc/m2helpers.txt", "cannot be written")


def test_no_room_is_refused(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "open", lambda *_: Full(), raising=False)
    _refused(tmp_path / "a.txt", "No space left on device")


def test_a_check_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "new" / "deep" / "a.txt")
    (tmp_path / "old.txt").write_text("old")
    check_writable(tmp_path / "old.txt")
    check_writable(os.devnull)
    assert [p.name for p in tmp_path.iterdir()] == ["old.txt"] and (tmp_path / "old.txt").read_text() == "old"


# ---------------------------------------------------------------- folders


def test_a_folder_that_takes_no_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "link").symlink_to("old")
    refused = {tmp_path / "file": "it is a file", tmp_path / "file" / "deep" / "run": "file is a file"}
    if sys.platform.startswith("linux"):
        refused |= {"/proc/self": "cannot be written into", "/proc/m2helpers/run": "cannot be written into"}
    for folder, said in refused.items():
        with pytest.raises(UserError, match=said) as error:
            check_folder_writable(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
    for name in ("old", "link", "new", "new/deep"):
        check_folder_writable(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "link", "old"]


def test_a_folder_is_there_whole_or_not_at_all(umask, tmp_path):
    umask(0o022)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "new" / "model") as temporary:
        (temporary / "half").touch()
        raise KeyboardInterrupt
    assert list((tmp_path / "new").iterdir()) == []
    with atomic_folder(tmp_path / "new" / "model") as temporary:
        save_file({"a": np.zeros(2)}, temporary / "model.safetensors")
        assert _mode(temporary / "model.safetensors") == 0o600  # else there is nothing to mend
        (temporary / "config.json").touch()
        (temporary / "run.sh").touch(mode=0o755)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model"]
    modes = {p.name: _mode(p) for p in (tmp_path / "new" / "model").iterdir()}
    assert modes == {"model.safetensors": 0o644, "config.json": 0o644, "run.sh": 0o755}


def test_private_files_stay_private_where_the_umask_says_so(umask, tmp_path):
    umask(0o077)
    save_file({"a": np.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "link").symlink_to(os.devnull)
    apply_umask(tmp_path)
    assert _mode(tmp_path / "model.safetensors") == 0o600 and sorted(os.listdir(tmp_path)) == [
        "link",
        "model.safetensors",
    ]


# ---------------------------------------------------------------- JSON and hashes


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


def test_a_model_has_one_hash_and_is_read_once(tmp_path, monkeypatch):
    parts = [tmp_path / f"model-{number}.safetensors" for number in (1, 2)]
    for number, part in enumerate(parts):
        part.write_bytes(bytes([number]) * 10)
    first, second = map(sha256_file, parts)
    read = []
    monkeypatch.setattr(files, "sha256_file", lambda path: read.append(path) or sha256_file(path))
    for _ in range(2):
        assert sha256_files(parts[:1]) == first
        assert sha256_files(parts) == hashlib.sha256((first + second).encode()).hexdigest()
    assert len(read) == 2
    parts[0].write_bytes(b"changed it")  # as long as before
    os.utime(parts[0], ns=(1, 1))
    assert sha256_files(parts[:1]) == sha256_file(parts[0]) != first


def test_only_what_writing_leaves_is_cleared_up(tmp_path):
    """Also folders, and the files that safetensors writes beside what it is told to write; nothing else that is hidden."""
    (tmp_path / ".adapters.123.part").mkdir()
    (tmp_path / ".adapters.123.part" / "weights").touch()
    for name in (".config.json.123.part", ".tmpSxQoKF"):
        (tmp_path / name).touch()
    (tmp_path / ".tmpfolder").mkdir()
    kept = {".tmpfolder", ".tmp-notes", ".mine.part", "a.1.part", "config.json"}
    for name in kept - {".tmpfolder"}:
        (tmp_path / name).touch()
    clear_half_written(tmp_path)
    assert set(os.listdir(tmp_path)) == kept
