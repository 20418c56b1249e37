"""From the words of a command line to a command with its options, or to help."""

from __future__ import annotations

import io
import shutil
import textwrap
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress

import tyro

from .accounts import Flops, Spent
from .data import Encode, Simulate
from .forecast import Backtest, Forecast
from .instruct import Instruct
from .measuring import Calibrate, Evaluate, Floor
from .options import REGISTRY
from .pages import Bench, FillReadme
from .training import Experiments, Export, Pretrain, Sweep, Train

Command = Callable[[], None]

COMMANDS: dict[str, Callable[..., Command]] = {
    "simulate": Simulate,
    "encode": Encode,
    "pretrain": Pretrain,
    "train": Train,
    "instruct": Instruct,
    "sweep": Sweep,
    "experiments": Experiments,
    "evaluate": Evaluate,
    "calibrate": Calibrate,
    "floor": Floor,
    "forecast": Forecast,
    "backtest": Backtest,
    "export": Export,
    "flops": Flops,
    "ledger": Spent,
    "bench": Bench,
    "readme": FillReadme,
}
"""Each command is a dataclass: its fields are the flags, the docstrings under them the help, and a call does it."""

_ABOUT = """\
Fine-tune a small language model on numbers, and know what it cost.

m2helpers COMMAND --help says more of one; m2helpers --version, which this is.
Where m2helpers is not on the path, write python -m m2helpers COMMAND."""
_ASCII = str.maketrans({"–": "-", "−": "-", "×": "x", "•": "-"})


def parse(arguments: Sequence[str]) -> Command:
    """Parse a command line.

    Raises
    ------
    SystemExit
        With status 0 once help has been printed, 2 for wrong usage.
    """
    said = io.StringIO()  # is no terminal: tyro adds no colour codes, and draws its frames in ASCII
    try:
        with redirect_stdout(said):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="m2helpers",
                description=_ABOUT,
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
                registry=REGISTRY,
            )
    finally:
        print(_plain(said.getvalue()), end="")


def help_text() -> str:
    """What ``--help`` prints."""
    with io.StringIO() as text:
        with redirect_stdout(text), suppress(SystemExit):
            parse(["--help"])
        return text.getvalue()


def _plain(text: str) -> str:
    """Help in characters that every console has, no wider than the terminal (tyro does not fold the line of usage)."""
    width = shutil.get_terminal_size().columns
    text = text.replace("{" + ",".join(COMMANDS) + "}", "COMMAND ...").translate(_ASCII)
    folded: list[str] = []
    for line in text.splitlines():
        indent = "           " if line.startswith("usage:") else ""
        folded += textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) or [""]
    return "".join(line.rstrip() + "\n" for line in folded)
