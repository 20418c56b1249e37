"""Files and errors: what every other module needs to read and write safely."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from gzip import GzipFile
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil
from safetensors import SafetensorError

LARGEST = 1 << 28  # bytes that are read of a file of text, packed or not
_BLOCK = 4096  # bytes: what a probe writes, for a full disk still makes empty files
_OURS = re.compile(r"\..+\.\d+\.part")  # as `_begun` names them
_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # it writes beside what it is told to write, and then renames
_unfinished: set[Path] = set()  # what this process has begun to write and not put in place


class UserError(ValueError):
    """A mistake the user can mend: its message is one line that names the file, the value and the remedy."""


# ---------------------------------------------------------------- writing


def check_writable(path: str | os.PathLike) -> None:
    """Refuse a file that could not be written, before work begins that would be lost. Nothing is left behind.

    Raises
    ------
    UserError
        If it is a folder, or there is no right or no room to write it.
    """
    path = Path(path)
    try:
        found = _stat(path)
        if found is not None and stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if found is not None and _descriptor(found) is None and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "no right to write it")
        if found is None or stat.S_ISREG(found.st_mode):
            target = Path(os.path.realpath(path))
            _new_file_mode(next(folder for folder in target.parents if folder.exists()), target.name)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another file, or mend that") from None


def check_folder_writable(folder: str | os.PathLike) -> None:
    """Refuse a folder in which no file could be made, before work begins that would be lost. Nothing is left behind.

    Raises
    ------
    UserError
        If it is no folder, or there is no right or no room to write into it.
    """
    folder = Path(folder)
    try:
        place = Path(os.path.realpath(folder))
        if not (exists := place.exists()):
            place = next(parent for parent in place.parents if parent.exists())
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{'it' if exists else place} is a file")
        if exists:
            _new_file_mode(place, "probe")
        else:  # where folders can be made, so can files: /proc takes neither
            Path(tempfile.mkdtemp(dir=place)).rmdir()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written into ({error.strerror}); give another folder, or mend that"
        ) from None


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path; on success flush what was written there to disk and put it in place, else delete it.

    A reader never sees a half-written file, and a crash leaves the old one in place, whose mode the new one keeps. Of a
    symbolic link the target is written. What is no regular file (a pipe, ``/dev/null``, ``/dev/stdout``) is never
    replaced: it receives the bytes when they are all there.

    Parameters
    ----------
    path : path-like
        The file to be written. Missing parent folders are made.

    Raises
    ------
    UserError
        Before anything is written, as `check_writable`.
    OSError
        With the file's name, if it cannot be written all the same.
    """
    path = Path(path)
    check_writable(path)
    try:
        found = _stat(path)
        if found is not None and (_descriptor(found) is not None or not stat.S_ISREG(found.st_mode)):
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder) / "whole"
                yield temporary
                _send(temporary, path, _descriptor(found))
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = _new_file_mode(target.parent, target.name)
        with _begun(target.parent, target.name) as temporary:
            yield temporary
            with open(temporary, "rb+") as stream:
                os.fsync(stream.fileno())
            if found is not None:
                with suppress(OSError, AttributeError):  # only root can give files away, and Windows has no owners
                    os.chown(temporary, found.st_uid, found.st_gid)
            temporary.chmod(mode if found is None else stat.S_IMODE(found.st_mode))  # safetensors makes it private
            os.replace(temporary, target)
    except (OSError, SafetensorError) as error:  # of a full disk, some libraries tell neither file nor number
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise OSError(getattr(error, "errno", None) or errno.EIO, reason, str(path)) from error


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which must not exist; on success rename it, on failure delete it."""
    path = Path(os.path.abspath(path))
    with _begun(path.parent, path.name) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        apply_umask(temporary)
        temporary.rename(path)


def apply_umask(folder: str | os.PathLike) -> None:
    """Give the private files in a folder the mode that the umask asks for: `safetensors` makes its own private."""
    mode, private = _new_file_mode(Path(folder), "mode"), stat.S_IRUSR | stat.S_IWUSR
    for path in Path(folder).iterdir():
        found = path.lstat()
        if stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == private:
            path.chmod(mode)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, all of it or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write `value` as indented JSON, all of it or nothing. NaN is refused: JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:  # or a link to nothing, which makes its target
        return None


def clear_half_written(folder: str | os.PathLike) -> None:
    """Delete from a run's own folder what processes that were killed left of the files and folders they wrote into it."""
    for path in Path(folder).glob(".*"):
        if _OURS.fullmatch(path.name) or (_SAFETENSORS.fullmatch(path.name) and path.is_file()):
            _delete(path)


@contextmanager
def cleared_up_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP, which end the process as ever, delete what is half-written first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        # Here and not by an exception, which is lost where it comes while Python frees memory.
        if os.getpid() == ours:  # not in a process that was forked from this one
            for path in list(_unfinished):
                _delete(path)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    deadly = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [number for number in deadly if signal.getsignal(number) is signal.SIG_DFL]  # under nohup, one is not
    for number in heeded:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _begun(folder: Path, name: str) -> Iterator[Path]:
    """Yield where something is to be made that will stand in a folder under a name; what is there in the end is deleted."""
    temporary = folder / f".{name}.{os.getpid()}.part"
    _unfinished.add(temporary)
    try:
        yield temporary
    finally:
        _delete(temporary)
        _unfinished.discard(temporary)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _new_file_mode(folder: Path, name: str) -> int:
    """The mode that the system gives a new file in a folder; an `OSError` where there is no right or no room for one."""
    with _begun(folder, name) as probe, open(probe, "wb") as stream:
        stream.write(bytes(_BLOCK))
        stream.flush()
        return stat.S_IMODE(os.fstat(stream.fileno()).st_mode)


def _descriptor(found: os.stat_result) -> int | None:
    """1 or 2 if a file is what standard output or standard error goes to: opened anew, it would begin at its start."""
    for descriptor in (1, 2):
        with suppress(OSError):  # closed
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
    return None


def _send(source: Path, path: Path, descriptor: int | None) -> None:
    """Write a file's bytes to something that is no regular file, or to an open descriptor."""
    print(end="", flush=True)  # what was printed before comes before
    own = os.open(path, os.O_WRONLY) if descriptor is None else os.dup(descriptor)  # neither made nor cut short
    with open(source, "rb") as stream, open(own, "wb") as out:
        shutil.copyfileobj(stream, out)


# ---------------------------------------------------------------- reading


def read_at_most(path: str | os.PathLike, stream: IO[bytes] | GzipFile | None = None) -> bytes:
    """All of a file, or of a stream of it unpacked: never more than `LARGEST`, for a few bytes can unpack to a full disk.

    Raises
    ------
    UserError
        If there is more.
    OSError
        If it cannot be read.
    """
    if stream is None:
        with open(path, "rb") as opened:
            return read_at_most(path, opened)
    data = stream.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise UserError(f"{path}: holds more than {LARGEST >> 20} MiB; give a smaller file")
    return data


def check_memory(what: object, needed: int, remedy: str) -> None:
    """Refuse work that needs more bytes of memory than are free (`UserError`)."""
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(f"{what}: needs {needed / 1e9:,.1f} GB of memory and {free / 1e9:.1f} GB are free; {remedy}")


def read_json(path: str | os.PathLike) -> Any:  # what is in it is for the reader to know, and to check
    """Read a JSON file.

    Raises
    ------
    UserError
        If the file is missing, cannot be read or is not JSON.
    """
    try:
        if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
            raise OSError(errno.EINVAL, "it is a pipe or a device")
        return json.loads(read_at_most(path).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the name") from None
    except RecursionError:
        raise UserError(f"{path}: not valid JSON (nested without end); restore it") from None
    except UserError:
        raise
    except ValueError as error:  # not JSON, or not even text
        raise UserError(
            f"{path}: not valid JSON ({error}); restore it or run the command that wrote it again"
        ) from None


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_files(paths: Sequence[Path]) -> str:
    """One hash for a model, sharded or not: the file's own, or that of the shards' hashes in order.

    A process reads a file once, and again when its size or time has changed: one of 1 GB takes a second.
    """
    hashes = []
    for path in paths:
        found = path.stat()
        hashes.append(_sha256_once(os.path.abspath(path), found.st_size, found.st_mtime_ns))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


@lru_cache(maxsize=128)
def _sha256_once(path: str, size: int, modified: int) -> str:
    return sha256_file(path)


def sha256_json(value: object) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces): the hash of a run's settings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
