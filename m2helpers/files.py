"""Files and errors: what every other module needs to read and write safely."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class UserError(ValueError):
    """A mistake the user can mend: its message is one line that names the file, the value and the remedy."""


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it, on failure delete it.

    A reader never sees a half-written file, and a crash leaves the old one in place.

    Parameters
    ----------
    path : path-like
        The file to be written. Missing parent folders are made.

    Raises
    ------
    OSError
        With the file's name, if it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # of a full disk, some libraries tell neither file nor number
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise OSError(getattr(error, "errno", None) or errno.EIO, reason, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, all of it or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write `value` as indented JSON, all of it or nothing. NaN is refused: JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> object:
    """Read a JSON file.

    Raises
    ------
    UserError
        If the file is missing, cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the name") from None
    except ValueError as error:  # not JSON, or not even text
        raise UserError(
            f"{path}: not valid JSON ({error}); restore it or run the command that wrote it again"
        ) from None


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces): the hash of a run's settings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
