"""Plans: their price is that of their parts, and of the forecasts that are really made."""

from dataclasses import asdict, replace
from itertools import product

import pytest

from m2helpers.data import load_dataset
from m2helpers.evaluation.measure import evaluate
from m2helpers.experiments.planning import (
    ABLATION,
    AS_PUBLISHED,
    PLANS,
    SWEEP_SERIES,
    SWEEPS,
    Plan,
    find_plan,
    forecast_sizes,
    further_steps,
    plan_of,
    plan_table,
    run_cost,
    table_cost,
)
from m2helpers.files import UserError
from m2helpers.flops.account import CAP, training_flops
from m2helpers.flops.architecture import QWEN_05B
from m2helpers.flops.costs import Adaptation, Cost, forward_cost, generation_cost
from m2helpers.models import load_config
from m2helpers.paths import CHECKPOINTS
from m2helpers.settings import STAGES, TrainSettings
from m2helpers.text import Codec, fit_scale

SETTINGS = TrainSettings(lora_r=4, max_length=512, max_steps=250, eval_steps=100, eval_windows=10, batch_size=4)


def test_costs_add_up():
    one = forward_cost(QWEN_05B, 2, 64, Adaptation(4), loss=True)
    assert one + one == one * 2 and one + Cost() == one
    assert one.tokens == 128 and one.flops * 3 == training_flops(QWEN_05B, 2, 64, lora_r=4) < one.flops_course * 3


def test_a_run_costs_its_steps_and_validations():
    train, validate = run_cost(QWEN_05B, SETTINGS)
    assert train.flops == 250 * training_flops(QWEN_05B, 4, 512, lora_r=4)
    assert validate == forward_cost(QWEN_05B, 4, 512, Adaptation(4), loss=True) * 9  # 3 batches at steps 100, 200, 250


def test_the_tables_of_the_shipped_data():
    dataset = load_dataset()
    sizes = forecast_sizes(dataset, "P5")
    by_context = {s: sum(n for (context, _), n in sizes.items() if context == s) for s in (128, 512, 768)}
    assert by_context == {128: 400, 512: 200, 768: 100}
    assert table_cost(QWEN_05B, sizes).flops < 0.004 * CAP
    assert {s: sum(forecast_sizes(dataset, p).values()) for s, p in ((50, "L50"), (20, "L20"))} == {50: 100, 20: 100}


def test_a_forecast_as_long_as_its_truth_costs_what_was_planned(tiny_base, small_data, monkeypatch):
    """A model that writes the truth: what is billed is what was planned."""
    base, codec = tiny_base(), Codec(fit_scale(small_data.part("train")))
    sizes = forecast_sizes(small_data, "P5", contexts=[64])
    truths = iter(sorted(sizes.elements()))

    def write(base, prompts, *_):
        written = [[26] * next(truths)[1] for _ in prompts]
        return written, [len(tokens) - 1 for tokens in written]  # the last is never read

    monkeypatch.setattr("m2helpers.forecasting.generation.continue_prompts", write)
    (result,) = evaluate(base, codec, small_data, "P5", contexts=[64])
    assert result.flops == table_cost(base.model.config, sizes).flops
    assert next(truths, None) is None and sum(sizes.values()) == result.n


def test_a_plan_is_the_sum_of_its_parts(small_data):
    final = replace(SETTINGS, max_steps=100)
    plan = Plan(SETTINGS, final, learning_rates=(), contexts=(), precisions=(), sweep_steps=10, measured=("final",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2helpers.experiments.planning.PROTOCOLS", ("P5",))
        patch.setattr("m2helpers.experiments.planning.P5_CONTEXTS", (64,))
        patch.setattr("m2helpers.experiments.planning.forecast_sizes", lambda *_, limit=5, **__: {(64, 30): limit})
        table = plan_table(QWEN_05B, plan, small_data)
        rest = further_steps(QWEN_05B, plan, table)
    generate = generation_cost(QWEN_05B, 1, 64, 30).flops * 5
    assert table["generate"].tolist() == [0, 0, SWEEP_SERIES * generate // 5, generate]
    assert (table["exact"] == table["train"] + table["validate"] + table["generate"]).all()
    assert (table["course"][1:] > table["exact"][1:]).all()
    assert table["steps"].tolist() == [0, 250, 10, 100]  # the control of rank 0 stands in the grid
    a_step = sum(run_cost(QWEN_05B, plan.runs[-1].settings), Cost()).flops / 100
    assert table["exact"].sum() + (rest + 1) * a_step > CAP > table["exact"].sum() + (rest - 1) * a_step


def test_the_presets():
    for plan in PLANS.values():
        names = [run.name for run in plan.runs]
        assert names[0] == "initial" and names[14:] == ["final", "extended"][: 1 + (plan.extended is not None)]
        assert len(set(names)) == len(names) == 15 + (plan.extended is not None)  # two are asked for twice
        assert len(plan.runs_of(["context"])) == 3
        grid = {(run.settings.learning_rate, run.settings.lora_r) for run in plan.runs if run.stage == "grid"}
        assert len(grid) == 10 and sum(rank == 0 for _, rank in grid) == 1
    with pytest.raises(UserError, match=r"plan 'mine': choose from embedded, qwen2.5-0.5b"):
        find_plan("mine")


def test_the_qwen_preset_is_the_published_one():
    """In the settings of its runs, whichever field of the plan they come from."""
    plan = PLANS["qwen2.5-0.5b"]
    grid, context, precision = ([run.settings for run in plan.runs_of([stage])] for stage in SWEEPS)
    published = set(product((1e-5, 5e-5, 1e-4), (2, 4, 8)))
    assert {(s.learning_rate, s.lora_r) for s in grid} == published | {(1e-4, 0)}  # and our control
    assert [s.max_length for s in context] == [128, 512, 768] and [s.precision for s in precision] == [2, 3]
    assert {s.max_steps for s in grid + context + precision} == {500}
    assert {(s.lora_r, s.learning_rate) for s in context + precision} == {(4, 1e-4)}
    initial, final = (run.settings for run in plan.runs_of(["initial", "final", "extended"]))
    assert (initial.lora_r, initial.learning_rate, initial.max_length, initial.max_steps) == (4, 1e-4, 512, 1000)
    assert (final.lora_r, final.max_length, final.max_steps) == (8, 768, 3000)
    for s in (initial, final, *grid, *context, *precision):
        assert (s.lora_alpha, s.lora_dropout, s.target_modules) == (16, 0.05, ("q_proj", "v_proj"))


def test_the_embedded_plan_stays_under_its_share():
    """One seed, forecasts included, at most 2e15 FLOPs."""
    config = load_config("embedded")
    assert plan_table(config, PLANS["embedded"], load_dataset())["exact"].sum() < 2e15


def test_long_runs_have_seeds_and_a_rate_that_follows_from_the_grid():
    plan = replace(PLANS["embedded"], seeds=3).tuned(replace(SETTINGS, learning_rate=0.123))
    runs = plan.runs_of(["final", "extended"])
    assert [run.name for run in runs[:4]] == ["final", "final-seed1", "final-seed2", "extended"] and len(runs) == 6
    assert [run.settings.seed for run in runs] == [0, 1, 2] * 2
    assert {run.settings.learning_rate for run in runs[:3]} == {0.123 * PLANS["embedded"].long_rate}
    assert plan.extended.target_modules != plan.final.target_modules  # the grid says nothing about these layers
    assert {run.settings.learning_rate for run in runs[3:]} == {PLANS["embedded"].extended.learning_rate}


def test_an_ablation_changes_what_it_says_and_nothing_else():
    runs = {run.changed: asdict(run.settings) for run in PLANS["embedded"].runs_of([ABLATION])}
    published, final = runs[AS_PUBLISHED], asdict(STAGES["final"])
    assert {name for name in final if published[name] != final[name]} == {"max_steps", "learning_rate"}
    changed = {words: {name for name in final if run[name] != published[name]} for words, run in runs.items()}
    assert changed["three decimals"] == {"precision"} and changed["no dropout"] == {"lora_dropout"}
    assert changed["every linear layer"] == {"target_modules", "learning_rate"}
    assert all(changed[words] for words in runs if words != AS_PUBLISHED)


def test_the_grid_grows_past_the_edge_that_is_best():
    plan = PLANS["qwen2.5-0.5b"]
    inside = replace(plan.initial, learning_rate=5e-5, lora_r=4)
    assert plan.widened(inside) == plan
    high = plan.widened(replace(inside, learning_rate=1e-4, lora_r=8))
    assert high.learning_rates == (1e-5, 5e-5, 1e-4, 2e-4) and high.ranks == (2, 4, 8, 16)
    low = plan.widened(replace(inside, learning_rate=1e-5, lora_r=2))
    assert low.learning_rates == (2e-6, 1e-5, 5e-5, 1e-4) and low.ranks == (1, 2, 4, 8)
    assert plan.widened(replace(inside, lora_r=0)) == plan  # the control is no edge
    assert low.widened(replace(inside, lora_r=1)).ranks == low.ranks  # nor is there a rank below 1


def test_a_base_has_its_plan_and_a_plan_its_seeds():
    assert plan_of("embedded") is plan_of(str(CHECKPOINTS / "embedded" / "base")) is PLANS["embedded"]
    assert plan_of("Qwen/Qwen2.5-0.5B-Instruct") is PLANS["qwen2.5-0.5b"]
    with pytest.raises(UserError, match="--seeds 0: give 1 or more"):
        replace(PLANS["embedded"], seeds=0)
