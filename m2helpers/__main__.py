"""The command line: ``python -m m2helpers COMMAND``. Exit status 0, 1 (failed, one clear line) or 2 (wrong usage)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pandas as pd

from .data import DATA_FILE, SimulatorSettings, load_dataset, read_series, simulate, write_dataset
from .files import UserError, atomic_path, write_json, write_text
from .text import Codec, fit_scale

# Modules that need torch are imported by the commands that use them, so that --help answers at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run_command(options)
    except UserError as error:
        print(f"m2helpers {options.command}: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a file that cannot be written, a full disk
        print(f"m2helpers {options.command}: {error.filename}: {error.strerror}; check name and disk", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"m2helpers {options.command}: stopped; --resume goes on from the last save", file=sys.stderr)
        return 1
    return 0


def _simulate(options) -> None:
    settings = SimulatorSettings(systems=options.systems, classic=options.classic, seed=options.seed)
    time, trajectories, _ = simulate(settings)
    write_dataset(options.out, time, trajectories, settings)
    print(f"{options.out}: {len(trajectories):,} systems of {len(time)} steps")


def _encode(options) -> None:
    dataset = load_dataset(options.data)
    codec = Codec(fit_scale(dataset.part("train")), options.precision)
    for split in ("train", "validation", "test"):
        lines = [codec.encode(values) + "\n" for values in dataset.part(split)]
        write_text(options.output_dir / f"{split}.txt", "".join(lines))
        print(f"{options.output_dir / split}.txt: {len(lines)} series")
    about = {"scale": codec.scale, "precision": codec.precision, "data_sha256": dataset.sha256}
    separators = {"variable_separator": codec.variable_separator, "step_separator": codec.step_separator}
    write_json(options.output_dir / "settings.json", about | separators)


def _pretrain(options) -> None:
    from .pretraining import PretrainSettings, pretrain

    settings = PretrainSettings(tokens=options.tokens, seed=options.seed)
    how = dict(stop_after=options.stop_after, resume=options.resume, start=options.model)
    record = pretrain(settings, options.output_dir, **how)
    done = record["step"] == settings.max_steps
    print(
        f"{options.output_dir}: {'finished' if done else 'stopped, go on with --resume'} at step {record['step']:,} of {settings.max_steps:,}"
    )


def _train(options) -> None:
    from .models import load_base
    from .settings import STAGES, TrainSettings
    from .training import train_lora

    given = {f.name: getattr(options, f.name) for f in fields(TrainSettings)}
    settings = replace(STAGES[options.stage], **{k: v for k, v in given.items() if v is not None})
    how = dict(stage=options.stage, resume=options.resume)
    result = train_lora(load_base(options.model), load_dataset(options.data), settings, options.output_dir, **how)
    best = result.history["val_loss"].min()
    print(f"{options.output_dir}: best validation loss {best:.4f}, {result.history['flops'].iloc[-1]:.3g} FLOPs")


def _experiments(options) -> None:
    from .experiments import run_plan, sweep_table
    from .files import checkpoint_folder
    from .planning import find_plan

    name = options.plan or ("embedded" if options.model == "embedded" else "qwen2.5-0.5b")
    folder = options.output_dir or checkpoint_folder(options.model)
    stages = {} if options.command == "experiments" else {"stages": [options.sweep]}
    run_plan(find_plan(name), options.model, load_dataset(options.data), folder, resume=options.resume, **stages)
    table = sweep_table(folder)
    if len(table):
        print(table.to_string(index=False, float_format="{:.4g}".format))
    print(f"{folder}: done")


def _load(options):
    """The model a command was given (a run, or a base untrained), its codec (None for a base) and its seed."""
    from .models import load_base
    from .runs import load_run

    if options.run:
        run = load_run(options.run)
        return run.base, run.codec, run.settings.seed
    return load_base(options.model), None, None


def _evaluate(options) -> None:
    from .evaluation import P5_CONTEXTS, PROTOCOLS, evaluate, evaluate_baselines, to_json
    from .report import BASELINE_CACHE, results_table

    dataset = load_dataset(options.data)
    base, codec, seed = _load(options)
    codec = codec or Codec(fit_scale(dataset.part("train")))
    contexts = [options.context] if options.context else P5_CONTEXTS
    protocols = PROTOCOLS if options.protocol == "all" else [options.protocol]
    rows = {str(options.run) if options.run else base.name: []}
    for protocol in protocols:
        where = dict(split=options.split, contexts=contexts)
        results = evaluate(base, codec, dataset, protocol, **where, run=options.run and str(options.run), seed=seed)
        next(iter(rows.values())).extend(results)
        for row in evaluate_baselines(dataset, codec, protocol, **where, cache=BASELINE_CACHE):
            rows.setdefault(row.model, []).append(row)
    if options.json:
        write_json(options.json, to_json(next(iter(rows.values()))))
    with pd.option_context("display.width", 200, "display.max_columns", 20, "display.float_format", "{:.4f}".format):
        print(results_table(rows, reference=None).to_string(index=False))


def _forecast(options) -> None:
    from .forecasting import forecast, sample_forecasts

    base, run_codec, _ = _load(options)
    series = read_series(options.file)
    if options.scale == "run" and run_codec is None:
        raise UserError("--scale run: an untrained model has no scale; give --run, or leave --scale out")
    rows, invalid = [], 0
    for index, values in enumerate(series):
        codec = (
            run_codec if options.scale == "run" else Codec(fit_scale(values), run_codec.precision if run_codec else 2)
        )
        if options.samples:
            drawn = sample_forecasts(base, codec, values, options.steps, options.samples, seed=options.seed)
        else:
            drawn = forecast(base, codec, [values], options.steps)[0].values[np.newaxis]
            invalid += len(drawn[0]) < options.steps
        for sample, path in enumerate(drawn):
            for step, point in enumerate(path):
                rows.append([index, sample, step + 1, *np.round(point, 6)])
    names = [f"variable_{i}" for i in range(series.shape[2])]
    with atomic_path(options.out) as temporary:
        pd.DataFrame(rows, columns=["series", "sample", "step", *names]).to_csv(temporary, index=False)
    print(
        f"{options.out}: {len(series)} series, {options.steps} steps ahead"
        + (f"; {invalid} did not parse whole" if invalid else "")
    )


def _flops(options) -> None:
    from .flops import CAP, flops_json, forward_account

    if options.plan:
        from .planning import find_plan, further_steps, plan_table

        plan, config = find_plan(options.plan), _config(options.model)
        table = plan_table(config, plan, load_dataset())
        if options.json:
            write_json(options.json, table.reset_index().to_dict("records"))
        total, rest = table["exact"].sum(), further_steps(config, plan, table)
        print(table.to_string(formatters={"share of the cap": "{:.3%}".format}, float_format="{:.4g}".format))
        print(
            f"all of it: {total:.4g} FLOPs, {total / CAP:.2%} of {CAP:.0e}; the rest buys {rest:,} further steps of the final run"
        )
        return

    account = forward_account(
        _config(options.model),
        options.batch_size,
        options.length,
        lora_r=options.lora_r,
        convention=options.convention,
        loss=options.train,
    )
    report = flops_json(account, train=options.train)
    if options.json:
        write_json(options.json, report)
    for name, flops in report["components"].items():
        print(f"{name:<18}{flops:>26,}")
    print(f"{'forward':<18}{report['forward']:>26,}")
    print(
        f"{'total':<18}{report['total']:>26,}  ({'training step: 3 × forward' if options.train else 'inference'}, {report['convention']})"
    )
    print(f"{'parameters':<18}{report['parameters']:>26,}\n{'trainable':<18}{report['trainable']:>26,}")


def _config(name: str):
    """An architecture's numbers, for Qwen2.5-0.5B-Instruct without the network."""
    from .architecture import QWEN_05B

    if name == "Qwen/Qwen2.5-0.5B-Instruct":
        return QWEN_05B
    from .models import load_config

    return load_config(name)


def _ledger(options) -> None:
    from .ledger import COLUMNS, default_ledger

    ledger = default_ledger(options.model)
    report = ledger.to_json()
    entries = pd.DataFrame(report["entries"], columns=COLUMNS)
    if options.json:
        write_json(options.json, report)
    if options.csv:
        write_text(options.csv, entries.to_csv(index=False))
    print(
        f"{ledger.path}: {report['spent']:.4g} FLOPs spent or reserved, {report['left']:.4g} left of {report['cap']:.0e}"
    )
    if len(entries):
        table = entries.groupby(["stage", "run", "kind"], sort=False)[["tokens", "flops", "flops_course"]].sum()
        table["share of the cap"] = (table["flops"] / report["cap"]).map("{:.4%}".format)
        print(table.to_string(float_format="{:.4g}".format))


def _readme(options) -> None:
    from .report import fill_pages

    for page in fill_pages():
        print(f"{page.name}: filled")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m m2helpers", description=__doc__.partition("Exit")[0].strip())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
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

    added = command("simulate", _simulate, "write a dataset of simulated predator–prey systems")
    added.add_argument("--out", type=Path, required=True, metavar="FILE")
    added.add_argument("--systems", type=int, default=SimulatorSettings.systems)
    added.add_argument("--classic", action="store_true", help="classic Lotka–Volterra: no saturation, no damping")
    added.add_argument("--seed", type=int, default=SimulatorSettings.seed)

    added = command("encode", _encode, "write each split as LLMTime text, one series a line")
    added.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    added.add_argument("--precision", type=int, default=2, help="decimals (default: %(default)s)")
    data(added)

    added = command("pretrain", _pretrain, "train the embedded base on synthetic series")
    added.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    added.add_argument("--tokens", type=int, required=True, help="length of the schedule")
    added.add_argument("--stop-after", type=float, metavar="MINUTES", help="save and stop then; --resume goes on")
    added.add_argument("--resume", action="store_true")
    added.add_argument("--model", help="go on from this base, with another seed (default: start from random weights)")
    added.add_argument("--seed", type=int, default=0)

    added = command("train", _train, "fine-tune a base with LoRA")
    added.add_argument("--stage", choices=("initial", "final"), default="initial", help="whose settings to start from")
    added.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    added.add_argument("--resume", action="store_true")
    _add_train_settings(added)
    data(added)
    model(added)

    for name, about in (
        ("sweep", "one part of a plan: learning rate × rank, context length, or decimals"),
        ("experiments", "a whole plan: untrained, initial, grid, context, precision, final, and their measurements"),
    ):
        added = command(name, _experiments, about)
        if name == "sweep":
            added.add_argument("sweep", choices=("grid", "context", "precision"))
        added.add_argument("--output-dir", type=Path, metavar="DIR", help="default: checkpoint/<base>")
        added.add_argument("--plan", metavar="NAME", help="embedded or qwen2.5-0.5b (default: the base's)")
        added.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
        data(added)
        model(added)

    added = command("evaluate", _evaluate, "measure a run, or an untrained base, beside the baselines")
    added.add_argument("--protocol", choices=("P5", "L50", "L20", "all"), default="P5")
    added.add_argument("--split", choices=("train", "validation", "test"), default="test")
    added.add_argument("--context", type=int, metavar="S", help="tokens, P5 only (default: 128, 512 and 768)")
    added.add_argument("--json", type=Path, metavar="FILE")
    data(added)
    model(added, with_run=True)

    added = command("forecast", _forecast, "forecast your own series, from CSV or HDF5")
    added.add_argument("file", type=Path, metavar="FILE")
    added.add_argument("--steps", type=int, required=True)
    added.add_argument("--samples", type=int, default=0, help="sampled forecasts a series (default: the likeliest)")
    added.add_argument("--out", type=Path, required=True, metavar="FILE", help="CSV to write")
    added.add_argument("--scale", choices=("own", "run"), default="own", help="by each series itself, or the run's")
    added.add_argument("--seed", type=int, default=0)
    model(added, with_run=True)

    added = command("flops", _flops, "the account of one step, by component")
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

    added = command("ledger", _ledger, "what has been spent, by run and kind, and what is left")
    added.add_argument("--json", type=Path, metavar="FILE")
    added.add_argument("--csv", type=Path, metavar="FILE", help="every entry, as a table")
    model(added)

    command("readme", _readme, "fill the marked blocks of README and pages from the records")
    return parser


def _add_train_settings(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of `TrainSettings`; what is not given stays as the stage has it."""
    from .settings import TrainSettings

    for name, kind in get_type_hints(TrainSettings).items():
        flag = "--" + name.replace("_", "-")
        if kind in (int, float):
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper())
        else:
            parser.add_argument(flag, type=lambda text: tuple(text.split(",")), metavar="NAME,NAME")


if __name__ == "__main__":
    sys.exit(main())
