"""What the plans would cost on GPUs: the arithmetic, held against counts of another kind, and where the figures come from."""

import json
from itertools import product

import pytest

from m2helpers.data import load_dataset
from m2helpers.experiments.planning import PLANS, plan_table
from m2helpers.files import read_json
from m2helpers.flops import QWEN_05B, QWEN_7B, forward_account
from m2helpers.report import prices
from m2helpers.report.prices import Step, exchange_seconds, gradient_bytes, makespan, measured_steps


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Writes what the pages read: `docs/cost.json` with changes, and a record of benchmarks."""

    def write(changes=None, record=None):
        costs = read_json(prices.SHIPPED_COSTS) | (changes or {})
        for name, content in {"SHIPPED_COSTS": costs, "SHIPPED_BENCHMARKS": record or {}}.items():
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps(content))
            monkeypatch.setattr(prices, name, path)

    return write


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2, 3, 9])
def test_jobs_on_several_machines_take_near_the_least_time(machines):
    jobs = [5.0, 3.0, 3.0, 2.0, 2.0, 1.0]
    least = min(
        max(sum(job for job, place in zip(jobs, places, strict=True) if place == m) for m in range(machines))
        for places in product(range(machines), repeat=len(jobs))
    )
    assert least <= makespan(jobs, machines) <= 4 / 3 * least
    assert makespan(jobs, 1) == sum(jobs) and makespan(jobs, 9) == max(jobs)


def test_a_step_is_about_two_or_three_forward_passes_of_two_flops_a_weight():
    step = Step("ours", 32, 512, False, 1.0, None)
    weights, tokens = forward_account(QWEN_05B, 1, 1).parameters, 32 * 512
    assert step.account == pytest.approx(3 * 2 * weights * tokens, rel=0.3)
    assert step.needed == pytest.approx(2 * 2 * weights * tokens, rel=0.3)
    assert Step("ours", 32, 512, True, 1.0, None).needed < step.needed


def test_gradients_are_those_of_what_is_trained():
    settings = PLANS["qwen2.5-0.5b"].final
    assert gradient_bytes(QWEN_05B, settings, full=True) == 2 * 494_032_768
    assert gradient_bytes(QWEN_05B, settings, full=False) == 4 * (540_672 + 151_936)
    assert gradient_bytes(QWEN_7B, settings, full=True) == 2 * 7_615_616_512  # as its page on the hub has it
    assert exchange_seconds(800, 2, 100.0) == 8 and exchange_seconds(800, 64, 100.0) == pytest.approx(15.75)


@pytest.mark.slow
def test_a_plan_costs_its_hours_times_its_gpus(recorded):
    """One GPU does all work one after the other, at the utilisation of its kind; half the price is half the dollars."""
    gpu = dict(name="G", dollars_per_hour=2.0, peak_flops=1e15, gpus_a_server=8)
    steps = [dict(side="a", rows=4, length=512, numeric=False, seconds=0.05, peak_gb=None)]
    recorded(dict(gpu=gpu, measured=steps, decoding_utilisation=0.01))
    table = plan_table(QWEN_05B, PLANS["qwen2.5-0.5b"], load_dataset())
    share = Step(**steps[0]).account / 0.05 / 1e15
    seconds = table[["train", "validate"]].sum().sum() / (share * 1e15) + table["generate"].sum() / (0.01 * 1e15)
    row = prices.plan_prices(load_dataset()).splitlines()[2]
    assert f"| {60 * seconds / 3600:.2g} min; ${2 * seconds / 3600:.2f} |" in row
    recorded(dict(gpu=gpu | {"dollars_per_hour": 1.0}, measured=steps, decoding_utilisation=0.01))
    assert f"; ${seconds / 3600:.2f} |" in prices.plan_prices(load_dataset()).splitlines()[2]


def test_a_benchmark_that_ran_on_a_gpu_takes_the_place_of_the_assumed_steps(recorded):
    recorded()
    assert len(measured_steps()[0]) == len(read_json(prices.SHIPPED_COSTS)["measured"])
    row = dict(side="ours", rows=4, length=512, numeric=True, seconds=0.02, peak_gb=3.0, ratio=1.0, times=[0.02])
    recorded(record={"rivals-cuda": dict(machine="a GPU", date="2026-12-01", rows=[row])})
    assert measured_steps() == ([Step("ours", 4, 512, True, 0.02, 3.0)], "a GPU; 2026-12-01")
    assert "| ours | 4 × 512 | 20 | 3 |" in prices.utilisation_table()
