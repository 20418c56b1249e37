"""The command line: ``m2helpers COMMAND``. Exit status 0, 1 (failed, one clear line) or 2 (wrong usage)."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Sequence

from safetensors import SafetensorError

from . import __version__
from .cli.parser import Command, help_text, parse
from .files import UserError, cleared_up_on_signals

SHARED = ("train", "pretrain", "instruct")
"""The commands that several processes may share (`engine.processes`)."""
_LONGEST = 1000  # characters of a message: a cell may be as long as a file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # an old console has no × or –, and a path may hold anything
        sys.stdout.reconfigure(errors="replace")
    if not arguments:
        print(help_text(), end="", file=sys.stderr)
        return 2
    if arguments == ["--version"]:
        print(f"m2helpers {__version__}")
        return 0
    try:
        command = parse(arguments)
    except KeyboardInterrupt:  # what reads the command line takes a moment to import
        print(f"m2helpers {arguments[0]}: stopped before it began; nothing was done", file=sys.stderr)
        return 1
    return _run(arguments[0], command)


def _run(name: str, command: Command) -> int:
    """Run a command, its failures and warnings one line each; return the exit status."""

    def tell(message: object) -> None:
        print(f"m2helpers {name}: {_one_line(message)}", file=sys.stderr)

    try:
        with cleared_up_on_signals(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of numbers that are then refused or counted
            warnings.showwarning = lambda message, *_: tell(message)
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                _share(name, command)
            else:
                command()
        sys.stdout.flush()
    except UserError as error:
        tell(error)
        return 1
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more as it ends
        return 1
    except (OSError, SafetensorError) as error:  # a file that cannot be written, a full disk
        if isinstance(error, OSError) and error.filename:
            tell(f"{error.filename}: {error.strerror}; check name and disk")
        else:
            tell(f"{error}; check the disk")
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        tell(
            "not enough memory; close other programs, or give it less: fewer rows, samples or tokens, or a smaller base"
        )
        return 1
    except KeyboardInterrupt:
        tell("stopped; a command that has --resume goes on from its last save with it")
        return 1
    return 0


def _share(name: str, command: Command) -> None:
    """Run a command in one of the processes that torchrun or accelerate started for it."""
    if name not in SHARED:
        raise UserError(
            f"several processes cannot share it, only {', '.join(SHARED)}; start it once, without torchrun or WORLD_SIZE"
        )
    from .engine.processes import joined
    from .models import choose_device

    with joined(choose_device()):
        command()


def _out_of_memory(error: Exception) -> bool:
    """Python's own error, or PyTorch's: of a GPU it has a kind, of the CPU only words."""
    words = ("out of memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _one_line(message: object) -> str:
    """A message as one line that any terminal can show: a file's names and cells may hold what steers one."""
    text = re.sub(r"\s*[\r\n]+\s*", " ", str(message).strip())
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    sys.exit(main())
