"""Carrying out a plan: in order, once, on from where it stopped, and never over another plan's runs."""

from dataclasses import asdict, replace
from functools import partial

import pandas as pd
import pytest

from m2helpers.engine.losses import Diverged
from m2helpers.engine.resume import has_state
from m2helpers.evaluation.measure import evaluate
from m2helpers.experiments import runner as experiments
from m2helpers.experiments.planning import Plan
from m2helpers.experiments.runner import best_of_grid, run_plan, sweep_table
from m2helpers.files import UserError, read_json, sha256_file, write_json
from m2helpers.ledger import CapReached, Ledger
from m2helpers.paths import checkpoint_folder
from m2helpers.settings import TrainSettings
from m2helpers.text import fit_scale

INITIAL = TrainSettings(
    lora_r=2, learning_rate=1e-2, batch_size=3, max_steps=4, max_length=48, eval_steps=2, save_steps=2, eval_windows=4
)
PLAN = Plan(
    INITIAL,
    replace(INITIAL, learning_rate=1e-5, max_length=64, max_steps=3),
    learning_rates=(1e-4, 1e-3, 1e-2),
    ranks=(1, 2, 4),
    contexts=(32, 48),
    precisions=(2, 1),
    sweep_steps=2,
)


@pytest.fixture(autouse=True)
def short_series(monkeypatch):
    """The small dataset's series are too short for the protocols as they are."""
    monkeypatch.setattr(experiments, "evaluate", partial(evaluate, contexts=[64]))
    monkeypatch.setattr(experiments, "PROTOCOLS", ("P5",))
    monkeypatch.setattr(experiments, "P5_CONTEXTS", (64,))


@pytest.fixture
def run(tiny_folder, small_data, tmp_path):
    """Carries out a plan in one folder; returns the plan as carried out and what was said."""

    def carry_out(plan=PLAN, **options):
        said = []
        done = run_plan(plan, str(tiny_folder), small_data, tmp_path / "out", say=said.append, **options)
        return done, said

    return carry_out


@pytest.mark.slow
def test_a_whole_plan(run, tmp_path, small_data):
    plan, said = run()
    folder = tmp_path / "out"
    table = sweep_table(folder)
    rates, ranks = plan.learning_rates, plan.ranks
    grid = table[(table["max_length"] == 48) & (table["precision"] == 2)]
    assert set(PLAN.learning_rates) <= set(rates) and len(grid) == len(rates) * len(ranks) + 1
    assert len(table) == len(grid) + 2  # one context and one precision more; the others are in the grid
    best = grid.loc[grid["val_loss"].idxmin()]
    assert best_of_grid(plan, folder).learning_rate == best["learning_rate"] == plan.final.learning_rate
    assert read_json(folder / "final" / "config.json")["settings"]["learning_rate"] == best["learning_rate"]
    widenings = said.count(
        "the best run lies on the edge of the grid: one value more"
    )  # two steps train best at the edge
    assert 1 <= widenings <= 2 and len(rates) + len(ranks) > len(PLAN.learning_rates) + len(PLAN.ranks)
    for name, split in (("base", "test"), ("initial", "test"), ("final", "test"), (best["run"], "validation")):
        (row,) = read_json(folder / name / "metrics.json")
        assert row["split"] == split and row["data_sha256"] == small_data.sha256
    assert "MAE, S = 64" in table  # None throughout: the tiny base keeps to no grammar

    again, said = run()  # harmless
    assert again.final == plan.final
    assert sum("done before" in line for line in said) == len(again.runs) and not any(
        "forecasts" in line for line in said
    )


@pytest.mark.slow
def test_a_stopped_plan_goes_on(run, tmp_path, monkeypatch, tiny_folder):
    """The cap leaves room for half of the initial run; with another ledger it goes on from there."""
    small = Ledger(tmp_path / "small.sqlite", 2_000_000)
    with monkeypatch.context() as patch:
        patch.setattr("m2helpers.training.run.default_ledger", lambda base: small)
        small.cap = int(1e12)
        run(stages=["initial"])
        spent = sum(e["flops"] for e in small.entries() if e["kind"] == "train")
        for path in sorted((tmp_path / "out").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        small.cap = small.spent() + int(0.8 * spent)
        with pytest.raises(CapReached, match="stopped at step 2 of 4; --resume goes on from step 2"):
            run(stages=["initial"])
    with pytest.raises(UserError, match="holds a run that was stopped; add --resume"):
        run(stages=["initial"])
    run(stages=["initial"], resume=True)
    assert pd.read_csv(tmp_path / "out" / "initial" / "history.csv")["step"].tolist() == [2, 4]


@pytest.mark.slow
def test_another_plans_runs_are_not_overwritten(run, tmp_path):
    run(stages=["initial"])
    before = (tmp_path / "out" / "initial" / "history.csv").read_bytes()
    with pytest.raises(
        UserError, match="holds a finished run with other settings, data or base; choose another --output-dir"
    ):
        run(replace(PLAN, initial=replace(INITIAL, weight_decay=0.1)), stages=["initial"])
    assert (tmp_path / "out" / "initial" / "history.csv").read_bytes() == before


@pytest.mark.slow
def test_measurements_of_another_base_are_not_taken_over(run, tmp_path):
    run(stages=["untrained"])
    path = tmp_path / "out" / "base" / "metrics.json"
    rows = read_json(path)
    write_json(path, [row | {"base_sha256": "another"} for row in rows])
    with pytest.raises(UserError, match=r"metrics.json: measured with other data or base; choose another --output-dir"):
        run(stages=["untrained"])
    path.unlink()
    run(stages=["untrained"])
    assert [row["base_sha256"] for row in read_json(path)] == [row["base_sha256"] for row in rows]


@pytest.mark.slow
def test_measurements_that_are_missing_are_made(run, tmp_path, monkeypatch):
    """Such as after `evaluate --split validation --json …/metrics.json`, or a plan that was stopped among its forecasts."""
    run(stages=["untrained"])
    path = tmp_path / "out" / "base" / "metrics.json"
    (row,) = read_json(path)
    write_json(path, [row | {"split": "validation"}])
    run(stages=["untrained"])
    assert [found["split"] for found in read_json(path)] == ["validation", "test"]
    measure = experiments.evaluate
    named = lambda *a, **o: [replace(found, protocol=a[3]) for found in measure(*a[:3], "P5", **o)]  # noqa: E731
    monkeypatch.setattr(experiments, "evaluate", named)
    monkeypatch.setattr(experiments, "PROTOCOLS", ("P5", "L20"))
    run(stages=["untrained"])
    assert [found["protocol"] for found in read_json(path)] == ["P5", "P5", "L20"]


@pytest.mark.slow
def test_a_plan_says_how_far_it_is(run):
    _, said = run(stages=["initial", "context"])
    runs = [line for line in said if line.startswith("[")]
    assert "[1/3] initial: 4 steps; 0% of the training behind" in runs[0] and "minutes left" not in runs[0]
    shares = [int(line.split("; ")[1].split("%")[0]) for line in runs]
    assert shares == sorted(set(shares)) and all("minutes left" in line for line in runs[1:])
    _, said = run(stages=["initial", "context"])
    assert not any("minutes left" in line for line in said)  # nothing was left to do


def test_every_shipped_record_belongs_to_the_shipped_base():
    """What the pages show is of one base: nothing is left over from the one before it."""
    folder = checkpoint_folder("embedded")
    base = sha256_file(folder / "base" / "model.safetensors")
    hashes = {
        str(path): read_json(path)["base_sha256"] for path in folder.rglob("config.json") if path.parent.name != "base"
    }
    measured = [path for path in folder.rglob("metrics.json") if "instruct" not in path.parts]  # those count answers
    hashes |= {str(path): row["base_sha256"] for path in measured for row in read_json(path)}
    assert len(hashes) > 30 and {path for path, found in hashes.items() if found != base} == set()


@pytest.fixture
def diverge(monkeypatch):
    """Lets the runs that `which` picks by their settings diverge, once begun and saved; counts the tries."""
    train, tries = experiments.train_lora, []

    def among(which):
        def trained(base, dataset, settings, folder, **options):
            if not which(settings):
                return train(base, dataset, settings, folder, **options)
            tries.append(settings)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "state.safetensors").touch()
            raise Diverged("step 2: the loss is no longer a number")

        monkeypatch.setattr(experiments, "train_lora", trained)
        return tries

    return among


@pytest.mark.slow
def test_a_run_that_diverges_is_left_out_and_the_best_is_chosen_among_the_others(run, diverge, tmp_path):
    plan = replace(PLAN, learning_rates=(1e-3, 1e-2), ranks=(2,), contexts=(32,), precisions=())
    tries = diverge(lambda settings: settings.learning_rate == 1e-2 and settings.max_steps == 2 and settings.lora_r)
    lost = [f"sweep/lr0.01-r2-n{n}-p2-seed0" for n in (48, 32)]  # of the grid, and of the context sweep
    done, said = run(plan)
    for name in lost:
        assert f"{name}: diverged (step 2: the loss is no longer a number) and is left out" in said
        folder = tmp_path / "out" / name
        assert not has_state(folder) and not (folder / "metrics.json").exists()
    others = set(sweep_table(tmp_path / "out")["run"])
    assert others == {run.name for run in done.runs_of(["grid", "context"])} - set(lost)
    assert best_of_grid(done, tmp_path / "out") is not None
    assert (tmp_path / "out" / "final" / "metrics.json").is_file() and len(tries) == 2

    _, said = run(plan, resume=True)  # they are not tried again, and it says so
    for name in lost:
        folder = tmp_path / "out" / name
        expected = "diverged before (step 2: the loss is no longer a number) and is left out; delete"
        assert f"{name}: {expected} {folder} to try it again" in said
    assert len(tries) == 2

    other = replace(
        plan, initial=replace(INITIAL, batch_size=2)
    )  # another setting, which the folder's name does not tell
    diverge(lambda settings: False)
    run(other, stages=["context"])
    assert (tmp_path / "out" / lost[1] / "history.csv").is_file()
    assert not (tmp_path / "out" / lost[1] / "diverged.json").exists()


@pytest.mark.slow
def test_where_the_whole_grid_diverges_the_long_runs_keep_their_rate(run, diverge, tmp_path):
    plan = replace(PLAN, learning_rates=(1e-3,), ranks=(2,))
    tries = diverge(lambda settings: settings.max_steps == 2)
    done, _ = run(plan, stages=["grid", "final"])
    assert done == plan and len(tries) == 2 and best_of_grid(plan, tmp_path / "out") is None
    assert read_json(tmp_path / "out" / "final" / "config.json")["settings"]["learning_rate"] == 1e-5


def test_a_long_run_that_diverges_ends_the_plan(run, diverge):
    diverge(lambda settings: True)
    with pytest.raises(Diverged, match="step 2"):
        run(stages=["initial"])
    with pytest.raises(Diverged, match="step 2"):
        run(stages=["final"])


@pytest.mark.slow
def test_a_plan_is_charged_to_the_ledger_it_is_given(run, tmp_path, monkeypatch):
    def none(base):
        raise AssertionError("the base's own ledger was asked for")

    for module in ("training.run", "forecasting.generation"):
        monkeypatch.setattr(f"m2helpers.{module}.default_ledger", none)
    ledger = Ledger(tmp_path / "own.sqlite")
    run(replace(PLAN, contexts=(32,)), stages=["untrained", "context"], ledger=ledger)
    spent = {(entry["stage"], entry["kind"]) for entry in ledger.entries()}
    assert spent == {("untrained", "generate"), *(("context", kind) for kind in ("train", "validate", "generate"))}


@pytest.mark.slow
def test_every_seed_of_a_long_run_is_measured(run, tmp_path):
    run(replace(PLAN, seeds=2), stages=["final"])
    for name, seed in (("final", 0), ("final-seed1", 1)):
        (row,) = read_json(tmp_path / "out" / name / "metrics.json")
        assert row["seed"] == seed and row["split"] == "test"


@pytest.mark.slow
def test_one_sweep_alone(run, tmp_path):
    plan, _ = run(stages=["context"])
    assert plan == PLAN and best_of_grid(plan, tmp_path / "out") is None
    assert sorted(sweep_table(tmp_path / "out")["max_length"]) == [32, 48]


@pytest.mark.slow
def test_a_plan_measures_what_it_says_and_names_its_stages(run, tmp_path, small_data, monkeypatch):
    ledger, seen, measure = Ledger(tmp_path / "ledger.sqlite"), [], experiments.evaluate
    for module in ("training.run", "forecasting.generation", "evaluation.measure"):
        monkeypatch.setattr(f"m2helpers.{module}.default_ledger", lambda base: ledger)
    monkeypatch.setattr(experiments, "SWEEP_SERIES", 0)  # noted, not passed on: no series would be refused
    monkeypatch.setattr(
        experiments, "evaluate", lambda *a, limit=None, **o: seen.append((o["split"], limit)) or measure(*a, **o)
    )
    run(replace(PLAN, contexts=(32,)), stages=["untrained", "initial", "context"])
    assert seen == [("test", None), ("test", None), ("validation", 0)]
    (row,) = read_json(tmp_path / "out" / "base" / "metrics.json")
    assert row["scale"] == fit_scale(small_data.part("train"))
    assert {entry["stage"] for entry in ledger.entries()} == {"untrained", "initial", "context"}


def test_the_grid_is_judged_by_the_least_validation_loss(tmp_path):
    runs = PLAN.runs_of(["grid"])
    for number, planned in enumerate(runs):
        (folder := tmp_path / planned.name).mkdir(parents=True)
        least, last = (0.3, 0.9) if number == 4 else (0.5, 0.5)  # one run was best, and then lost its way
        (folder / "history.csv").write_text(f"step,loss,val_loss,flops\n1,0.1,{least},1\n2,0.1,{last},2\n")
        write_json(folder / "config.json", {"settings": asdict(planned.settings)})
        rows = [
            dict(protocol="P5", split=split, context=64, mae=mae) for split, mae in (("validation", 2), ("test", 0))
        ]
        write_json(folder / "metrics.json", rows)
    assert best_of_grid(PLAN, tmp_path) == runs[4].settings
    assert set(sweep_table(tmp_path)["MAE, S = 64"]) == {2}
