"""The prices that a command line asks for."""

import json
from dataclasses import replace

import pytest

from m2helpers.__main__ import main
from m2helpers.experiments.planning import PLANS, run_cost
from m2helpers.flops.architecture import QWEN_05B

QWEN = ["flops", "--model", "Qwen/Qwen2.5-0.5B-Instruct"]


def _step(path, settings, *more):
    """What `flops --train` says that a step costs."""
    flags = {
        "batch-size": settings.batch_size,
        "length": settings.max_length,
        "lora-r": settings.lora_r,
        "target-modules": ",".join(settings.target_modules),
        "numeric-head": int(settings.numeric_head),
        "gradient-checkpointing": int(settings.gradient_checkpointing),
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    assert main([*QWEN, "--train", *words, "--json", str(path), *more]) == 0
    return json.loads(path.read_text())["total"]


@pytest.mark.slow
def test_every_row_of_a_plan_is_the_price_of_its_steps(tmp_path):
    """The embedded base's plan, which adapts every layer too, on an architecture that needs no network."""
    assert main([*QWEN, "--plan", "embedded", "--json", str(tmp_path / "plan.json")]) == 0
    rows = {row["stage"]: row for row in json.loads((tmp_path / "plan.json").read_text())}
    by_hand = dict.fromkeys(rows, 0)
    for run in PLANS["embedded"].runs:
        by_hand[run.stage] += run.settings.max_steps * _step(tmp_path / "step.json", run.settings)
    assert by_hand == {stage: row["train"] for stage, row in rows.items()} and by_hand["extended"] > 0


@pytest.mark.parametrize("change", [dict(numeric_head=1), dict(gradient_checkpointing=1), dict(batch_size=1, lora_r=0)])
@pytest.mark.parametrize("convention", ["exact", "course"])
def test_what_changes_the_price_of_a_step_has_a_flag(change, convention, tmp_path, capsys):
    settings = replace(PLANS["embedded"].final, max_steps=1, **change)
    cost, _ = run_cost(QWEN_05B, settings)
    total = _step(tmp_path / "step.json", settings, "--convention", convention)
    assert total == (cost.flops if convention == "exact" else cost.flops_course)
    printed = capsys.readouterr().out
    assert f"{total:,}  (training step: 3 × forward" in printed
    assert ("the layers once more" in printed) == bool(settings.gradient_checkpointing)


def test_activations_are_computed_again_in_training_only(capsys):
    assert main([*QWEN, "--gradient-checkpointing", "1"]) == 1
    assert "add --train" in capsys.readouterr().err


def test_a_ledger_is_written_to_both_files_or_to_neither(tiny_folder, tmp_path, capsys):
    out = tmp_path / "ledger.json"
    assert main(["ledger", "--model", str(tiny_folder), "--json", str(out), "--csv", str(tmp_path)]) == 1
    assert f"{tmp_path}: cannot be written (it is a folder)" in capsys.readouterr().err and not out.exists()
