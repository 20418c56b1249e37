"""The command line: ``python -m m2helpers COMMAND``. Exit status 0, 1 (failed, one clear line) or 2 (wrong usage)."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

from safetensors import SafetensorError

from .cli import commands
from .engine.tracking import TRACKERS
from .files import UserError
from .paths import DATA_FILE
from .settings import STAGES, PretrainSettings, TrainSettings
from .simulator import SimulatorSettings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    options = _parser().parse_args(arguments)
    tell = lambda message, *_: print(f"m2helpers {options.command}: {message}", file=sys.stderr)  # noqa: E731
    try:
        with warnings.catch_warnings():
            warnings.showwarning = tell
            options.run_command(options)
        sys.stdout.flush()
    except UserError as error:
        tell(error)
        return 1
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more as it ends
        return 1
    except (OSError, SafetensorError) as error:  # a file that cannot be written, a full disk
        named = isinstance(error, OSError) and error.filename
        tell(f"{error.filename}: {error.strerror}; check name and disk" if named else f"{error}; check the disk")
        return 1
    except KeyboardInterrupt:
        tell("stopped; a command that has --resume goes on from its last save with it")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m m2helpers", description=__doc__.partition("Exit")[0].strip())
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function, about: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, help=about, description=about)
        added.set_defaults(run_command=function)
        return added

    def data(added) -> None:
        added.add_argument(
            "--data", type=Path, default=DATA_FILE, metavar="FILE", help="HDF5 (default: the shipped data)"
        )

    def model(added, with_run: bool = False) -> None:
        default = os.environ.get("M2_MODEL") or "embedded"
        about = "'embedded', a hub name or a folder (default: %(default)s)"
        target = added.add_mutually_exclusive_group() if with_run else added
        target.add_argument("--model", default=default, metavar="NAME_OR_DIR", help=about)
        if with_run:
            target.add_argument("--run", type=Path, metavar="DIR", help="a finished run's folder")

    added = command("simulate", commands.simulate, "write a dataset of simulated predator–prey systems")
    added.add_argument("--out", type=Path, required=True, metavar="FILE")
    added.add_argument("--systems", type=int, default=SimulatorSettings.systems)
    added.add_argument("--classic", action="store_true", help="classic Lotka–Volterra: no saturation, no damping")
    added.add_argument("--seed", type=int, default=SimulatorSettings.seed)

    added = command("encode", commands.encode, "write each split as LLMTime text, one series a line")
    added.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    added.add_argument("--precision", type=int, default=2, help="decimals (default: %(default)s)")
    data(added)

    added = command("pretrain", commands.pretrain, "train the embedded base on synthetic series")
    added.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    added.add_argument("--stop-after", type=float, metavar="MINUTES", help="save and stop then; --resume goes on")
    added.add_argument("--resume", action="store_true")
    added.add_argument("--model", help="go on from this base, with another seed (default: start from random weights)")
    _add_settings(added, PretrainSettings)

    added = command("train", commands.train, "fine-tune a base with LoRA")
    added.add_argument(
        "--stage", choices=tuple(STAGES), default="initial", help="of the base's plan: the settings to start from"
    )
    added.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    added.add_argument("--resume", action="store_true")
    added.add_argument("--track", choices=TRACKERS, help="log losses there too (default: nowhere)")
    _add_settings(added, TrainSettings)
    data(added)
    model(added)

    for name, about in (
        (
            "sweep",
            "one part of a plan: learning rate × rank, context length, decimals, or changes to the final setting",
        ),
        (
            "experiments",
            "a whole plan: untrained, initial, grid, context, precision, final, extended, and their measurements",
        ),
    ):
        added = command(name, commands.experiments, about)
        if name == "sweep":
            added.add_argument("sweep", choices=("grid", "context", "precision", "ablation"))
        added.add_argument("--output-dir", type=Path, metavar="DIR", help="default: checkpoint/<base>")
        added.add_argument("--plan", metavar="NAME", help="embedded or qwen2.5-0.5b (default: the base's)")
        added.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
        added.add_argument("--track", choices=TRACKERS, help="log losses there too (default: nowhere)")
        added.add_argument("--seeds", type=int, default=1, help="of the long runs at the end (default: %(default)s)")
        data(added)
        model(added)

    added = command("evaluate", commands.evaluate, "measure a run, or an untrained base, beside the baselines")
    added.add_argument("--protocol", choices=("P5", "L50", "L20", "all"), default="P5")
    added.add_argument("--split", choices=("train", "validation", "test"), default="test")
    added.add_argument("--context", type=int, metavar="S", help="tokens, P5 only (default: 128, 512 and 768)")
    added.add_argument("--constrained", action="store_true", help="write only what the grammar allows (numeric head)")
    added.add_argument("--json", type=Path, metavar="FILE")
    data(added)
    model(added, with_run=True)

    def own_table(added) -> None:
        added.add_argument("file", type=Path, metavar="FILE", help="CSV, Parquet or HDF5")
        added.add_argument("--steps", type=int, required=True)
        added.add_argument("--time", metavar="NAME", help="the column of times; none: rows are even steps")
        names = dict(type=lambda text: text.split(","), metavar="NAME,NAME")
        added.add_argument("--columns", **names, help="the variables (default: all other columns)")
        added.add_argument("--id", metavar="NAME", help="the column that names the series")
        added.add_argument("--header", action=argparse.BooleanOptionalAction, help="the first line holds names")
        added.add_argument("--last", type=int, metavar="N", help="use only the last N rows of each series")
        added.add_argument("--decimal", choices=(".", ","))
        added.add_argument("--together", action="store_true", help="more than three variables: write them as one text")
        added.add_argument("--plot", type=Path, metavar="FILE", help="a picture: .png, .svg or .pdf")
        added.add_argument("--seed", type=int, default=0)
        model(added, with_run=True)

    added = command("forecast", commands.forecast, "forecast your own series, from CSV, Parquet or HDF5")
    own_table(added)
    added.add_argument("--samples", type=int, default=0, help="sampled forecasts a series (default: the likeliest)")
    levels = lambda text: [float(level) for level in text.split(",")]  # noqa: E731
    added.add_argument("--levels", type=levels, metavar="0.1,0.5,0.9", help="their quantiles in place of the samples")
    added.add_argument("--out", type=Path, required=True, metavar="FILE", help="to write: .csv or .parquet")
    added.add_argument("--scale", choices=("own", "run"), default="own", help="by each column itself, or the run's")
    added.add_argument("--constrained", action="store_true", help="write only what the grammar allows: all parse")

    added = command(
        "backtest", commands.backtest, "hold back the last rows of your own series and measure the forecast"
    )
    own_table(added)
    added.add_argument("--windows", type=int, default=1, metavar="K", help="windows of --steps rows held back")
    added.add_argument("--samples", type=int, default=20, help="sampled forecasts a window (0: the likeliest)")
    added.add_argument("--out", type=Path, metavar="FILE", help="the errors as a table: .csv or .parquet")
    added.set_defaults(constrained=True)

    added = command("export", commands.export, "write a run as a plain model that transformers loads by itself")
    added.add_argument("--run", type=Path, required=True, metavar="DIR", help="a finished run's folder")
    added.add_argument("--output-dir", type=Path, required=True, metavar="DIR")

    added = command("flops", commands.flops, "the account of one step, by component")
    added.add_argument("--batch-size", type=int, default=4)
    added.add_argument("--length", type=int, default=512)
    added.add_argument("--lora-r", type=int, default=8)
    purpose = added.add_mutually_exclusive_group()
    purpose.add_argument("--train", action="store_true")
    purpose.add_argument("--infer", action="store_true", help="(the default)")
    added.add_argument("--plan", metavar="NAME", help="a plan of experiments instead: embedded or qwen2.5-0.5b")
    added.add_argument("--convention", choices=("exact", "course"), default="exact")
    added.add_argument("--json", type=Path, metavar="FILE")
    model(added)

    added = command("ledger", commands.ledger, "what has been spent, by run and kind, and what is left")
    added.add_argument("--json", type=Path, metavar="FILE")
    added.add_argument("--csv", type=Path, metavar="FILE", help="every entry, as a table")
    model(added)

    added = command("bench", commands.bench, "the benchmarks the site quotes, side by side with the alternative")
    added.add_argument("name", choices=("train", "decode", "context", "train-embedded", "decode-embedded"))
    added.add_argument(
        "--json", type=Path, metavar="FILE", help="record to put it into (default: docs/benchmarks.json)"
    )
    data(added)

    command("readme", commands.readme, "fill the marked blocks of README and pages from the records")
    return parser


def _add_settings(parser: argparse.ArgumentParser, settings: type) -> None:
    """One flag for each field of a class of settings; what is not given stays as the class or the stage has it."""
    for name, kind in get_type_hints(settings).items():
        flag = "--" + name.replace("_", "-")
        if kind in (int, float):
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper())
        else:
            parser.add_argument(flag, type=lambda text: tuple(text.split(",")), metavar="NAME,NAME")


if __name__ == "__main__":
    sys.exit(main())
