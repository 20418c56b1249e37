"""What each command does with its options. Modules that need torch are imported by the commands that use them."""

from __future__ import annotations

import os
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd

from ..data import load_dataset
from ..files import UserError, atomic_path, write_json, write_text
from ..paths import checkpoint_folder
from ..series import read_table
from ..simulator import SimulatorSettings, write_dataset
from ..simulator import simulate as simulate_systems
from ..text import Codec, fit_scale


def simulate(options) -> None:
    settings = SimulatorSettings(systems=options.systems, classic=options.classic, seed=options.seed)
    time, trajectories, _ = simulate_systems(settings)
    write_dataset(options.out, time, trajectories, settings)
    print(f"{options.out}: {len(trajectories):,} systems of {len(time)} steps")


def encode(options) -> None:
    dataset = load_dataset(options.data)
    codec = Codec(fit_scale(dataset.part("train")), options.precision)
    for split in ("train", "validation", "test"):
        lines = [codec.encode(values) + "\n" for values in dataset.part(split)]
        write_text(options.output_dir / f"{split}.txt", "".join(lines))
        print(f"{options.output_dir / split}.txt: {len(lines)} series")
    about = {"scale": codec.scale, "precision": codec.precision, "data_sha256": dataset.sha256}
    separators = {"variable_separator": codec.variable_separator, "step_separator": codec.step_separator}
    write_json(options.output_dir / "settings.json", about | separators)


def pretrain(options) -> None:
    from ..pretraining.run import pretrain
    from ..settings import PretrainSettings

    settings = PretrainSettings(**_given(options, PretrainSettings))
    how = dict(stop_after=options.stop_after, resume=options.resume, start=options.model)
    record = pretrain(settings, options.output_dir, **how)
    done = record["step"] == settings.max_steps
    print(
        f"{options.output_dir}: {'finished' if done else 'stopped, go on with --resume'} at step {record['step']:,} of {settings.max_steps:,}"
    )


def _given(options, settings: type) -> dict:
    """The settings that a command was given, those left to their defaults left out."""
    given = {f.name: getattr(options, f.name) for f in fields(settings)}
    return {name: value for name, value in given.items() if value is not None}


def train(options) -> None:
    from ..experiments.planning import plan_of
    from ..models import load_base
    from ..settings import TrainSettings
    from ..training import train_lora

    planned = getattr(plan_of(options.model), options.stage)  # learning rates that suit the base
    if planned is None:
        raise UserError(f"--stage {options.stage}: the plan of {options.model} has no such run; give initial or final")
    settings = replace(planned, **_given(options, TrainSettings))
    how = dict(stage=options.stage, resume=options.resume, track=options.track)
    result = train_lora(load_base(options.model), load_dataset(options.data), settings, options.output_dir, **how)
    best = result.history["val_loss"].min()
    print(f"{options.output_dir}: best validation loss {best:.4f}, {result.history['flops'].iloc[-1]:.3g} FLOPs")


def experiments(options) -> None:
    from ..experiments.planning import find_plan, plan_of
    from ..experiments.runner import run_plan, sweep_table

    folder = options.output_dir or Path(os.path.relpath(checkpoint_folder(options.model)))  # records hold it
    stages = {} if options.command == "experiments" else {"stages": [options.sweep]}
    plan = find_plan(options.plan) if options.plan else plan_of(options.model)
    plan = replace(plan, seeds=options.seeds)
    if stages and not plan.runs_of(**stages):
        raise UserError(f"sweep {options.sweep}: this plan has no such runs; choose another sweep or --plan embedded")
    how = dict(resume=options.resume, track=options.track)
    run_plan(plan, options.model, load_dataset(options.data), folder, **how, **stages)
    for kind in ("sweep", "ablation"):
        table = sweep_table(folder, kind)
        if len(table):
            print(table.to_string(index=False, float_format="{:.4g}".format))
    print(f"{folder}: done")


def _load(options):
    """The model a command was given (a run, or a base untrained), the run (None for a base), and whether to constrain it."""
    from ..models import load_base
    from ..runs import load_run

    if options.run:
        run = load_run(options.run)
        return run.base, run, options.constrained or run.constrained
    return load_base(options.model), None, options.constrained


def evaluate(options) -> None:
    from ..evaluation.measure import evaluate, evaluate_baselines
    from ..evaluation.protocols import P5_CONTEXTS, PROTOCOLS
    from ..evaluation.scores import to_json
    from ..paths import BASELINE_CACHE
    from ..report.tables import results_table

    dataset = load_dataset(options.data)
    base, run, constrained = _load(options)
    codec = run.codec if run else Codec(fit_scale(dataset.part("train")))
    contexts = [options.context] if options.context else P5_CONTEXTS
    protocols = PROTOCOLS if options.protocol == "all" else [options.protocol]
    ours = []
    rows = {str(options.run) if options.run else base.name: ours}
    about = dict(run=options.run and str(options.run), seed=run and run.settings.seed, constrained=constrained)
    where = dict(split=options.split, contexts=contexts)
    for protocol in protocols:
        ours.extend(evaluate(base, codec, dataset, protocol, **where, **about))
    if options.json:  # before the baselines: a fit that is stopped loses no measurement
        write_json(options.json, to_json(ours))
    for protocol in protocols:
        for row in evaluate_baselines(dataset, codec, protocol, **where, cache=BASELINE_CACHE):
            rows.setdefault(row.model, []).append(row)
    with pd.option_context("display.width", 200, "display.max_columns", 20, "display.float_format", "{:.4f}".format):
        print(results_table(rows, reference=None).to_string(index=False))


def forecast(options) -> None:
    from ..series.writing import PICTURES, refuse_output, write_frame

    refuse_output(options.out, options.file)
    if options.plot:
        refuse_output(options.plot, options.file, PICTURES, "--plot")
    if options.levels and not options.samples:
        raise UserError("--levels needs samples to take quantiles of; add --samples 20")
    if options.scale == "run" and options.run is None:
        raise UserError("--scale run: an untrained model has no scale; give --run, or leave --scale out")
    table = _own_table(options)
    base, run, constrained = _load(options)

    from ..frames import wide_frame
    from ..outlooks import forecast_table

    how = dict(constrained=constrained, samples=options.samples, seed=options.seed, together=options.together or None)
    made = forecast_table(base, table, options.steps, codec=run and run.codec, own_scale=options.scale == "own", **how)
    _tell(made.notices)
    write_frame(wide_frame(made, options.levels), options.out)
    if options.plot:
        _draw(made, options.plot)
    invalid = f"; {made.n_invalid} did not parse whole: with --constrained all do" if made.n_invalid else ""
    n = sum(not outlook.problem for outlook in made.outlooks)
    print(f"{options.out}: {n} series, {options.steps} steps ahead{invalid}")


def backtest(options) -> None:
    from ..series.writing import PICTURES, TABLES, refuse_output, write_frame

    for path, kinds, option in ((options.out, TABLES, "--out"), (options.plot, PICTURES, "--plot")):
        if path:
            refuse_output(path, options.file, kinds, option)
    table = _own_table(options)
    base, run, constrained = _load(options)

    from ..frames import forecast_held_back, scores

    how = dict(constrained=constrained, samples=options.samples, seed=options.seed, together=options.together or None)
    made = forecast_held_back(base, table, options.steps, options.windows, codec=run and run.codec, **how)
    _tell(made.notices)
    frame = scores(made)
    if options.out:
        write_frame(frame, options.out)
    if options.plot:
        _draw(made, options.plot)
    print(frame.to_string(index=False, float_format="{:.4g}".format, na_rep=""))


def _own_table(options):
    """The user's own series, as the options say; what was read is told."""
    names = {"time": options.time, "id": options.id, "header": options.header, "columns": options.columns}
    table = read_table(options.file, last=options.last, decimal=options.decimal, **names)
    _tell([table.notice])
    return table


def _tell(notices) -> None:
    for notice in notices:
        warnings.warn(notice, stacklevel=3)


def _draw(made, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from ..report.plots import plot_own_forecast, use_style

    use_style()
    with atomic_path(path) as temporary:
        plot_own_forecast(made).savefig(temporary, format=path.suffix[1:].lower(), dpi=150)


def export(options) -> None:
    from ..runs import export_run

    export_run(options.run, options.output_dir)
    print(f"{options.output_dir}: a plain model for transformers, updates merged")


def flops(options) -> None:
    from ..flops.account import CAP, flops_json, forward_account

    if options.plan:
        from ..experiments.planning import find_plan, further_steps, plan_table

        plan, config = find_plan(options.plan), _config(options.model)
        table = plan_table(config, plan, load_dataset())
        if options.json:
            write_json(options.json, table.reset_index().to_dict("records"))
        total, rest = table["exact"].sum(), max(0, further_steps(config, plan, table))
        print(table.to_string(formatters={"share of the cap": "{:.3%}".format}, float_format="{:.4g}".format))
        print(
            f"all of it: {total:.4g} FLOPs, {total / CAP:.2%} of {CAP:.0e}; the rest buys {rest:,} further steps of its last run"
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
    from ..flops.architecture import QWEN_05B

    if name == "Qwen/Qwen2.5-0.5B-Instruct":
        return QWEN_05B
    from ..models import load_config

    return load_config(name)


def ledger(options) -> None:
    from ..ledger import COLUMNS, default_ledger

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


def readme(options) -> None:
    from ..report.pages import fill_pages

    for page in fill_pages():
        print(f"{page.name}: filled")


def bench(options) -> None:
    from ..experiments.bench import run_benchmark
    from ..paths import BENCHMARKS

    entry = run_benchmark(options.name, load_dataset(options.data), options.json or BENCHMARKS)
    print(entry["about"], entry["machine"], sep="\n")
    print(pd.DataFrame(entry["rows"]).drop(columns="times").to_string(index=False, float_format="{:.4g}".format))
