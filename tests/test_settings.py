"""Settings: their types and bounds, and the form in which they are hashed and recorded."""

import ast
import inspect
import json
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest

from m2helpers import settings as module
from m2helpers.files import UserError, read_json
from m2helpers.paths import checkpoint_folder
from m2helpers.runs import settings_of, settings_sha256
from m2helpers.settings import LoraSettings, PretrainSettings, TrainSettings, canonical, changes

SWITCHES = ("random_start", "numeric_head", "gradient_checkpointing")
SHIPPED = checkpoint_folder("embedded")
RUNS = sorted(p.parent for p in SHIPPED.rglob("config.json") if p.parent.name != "base")


@pytest.mark.parametrize("kind", [TrainSettings, PretrainSettings, LoraSettings])
def test_a_default_has_the_type_of_its_field(kind):
    types = {"bool": bool, "int": int, "float": float, "tuple[str, ...]": tuple}
    assert {f.name: type(f.default) for f in fields(kind)} == {f.name: types[f.type] for f in fields(kind)}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (dict(learning_rate=np.float64(0.25)), 0.25),
        (dict(lora_alpha=32), 32.0),
        (dict(rescale=np.int64(1)), 1.0),
        (dict(seed=np.int64(7)), 7),
        (dict(target_modules=["q_proj"]), ("q_proj",)),
        *[({name: value}, bool(value)) for name in SWITCHES for value in (0, 1, False, True)],
    ],
)
def test_a_value_takes_the_type_of_its_field(given, kept):
    ((name, _),) = given.items()
    value = getattr(TrainSettings(**given), name)
    assert value == kept and type(value) is type(kept)


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (TrainSettings, dict(max_steps="ten"), "max_steps 'ten': give a whole number"),
        (TrainSettings, dict(max_steps=10.0), r"max_steps 10\.0: give a whole number"),
        (TrainSettings, dict(seed=True), "seed True: give a whole number"),
        (TrainSettings, dict(learning_rate="1e-3"), "learning_rate '1e-3': give a number"),
        (TrainSettings, dict(learning_rate=None), "learning_rate None: give a number"),
        (TrainSettings, dict(average=False), "average False: give a number"),
        (TrainSettings, dict(random_start=2), "random_start 2: give 0 or 1"),
        (TrainSettings, dict(numeric_head="yes"), "numeric_head 'yes': give 0 or 1"),
        (TrainSettings, dict(target_modules="q_proj"), "target_modules 'q_proj': give a list of names"),
        (TrainSettings, dict(target_modules=("q_proj", 1)), r"target_modules \('q_proj', 1\): give a list of names"),
        (TrainSettings, dict(lora_r=-1), "lora_r -1: must be at least 0"),
        (TrainSettings, dict(precision=-1), "precision -1: must be at least 0"),
        (TrainSettings, dict(lora_alpha=float("inf")), "lora_alpha inf: give a finite number"),
        (TrainSettings, dict(max_grad_norm=float("inf")), "max_grad_norm inf: give a number above 0"),
        (TrainSettings, dict(weight_decay=float("inf")), "weight_decay inf: give 0 or more"),
        (LoraSettings, dict(lora_r=2.5), r"lora_r 2\.5: give a whole number"),
        (PretrainSettings, dict(tokens=1e6), r"tokens 1000000\.0: give a whole number"),
        (PretrainSettings, dict(decay_fraction="half"), "decay_fraction 'half': give a number"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(kind, given, said):
    with pytest.raises(UserError, match=f"^{said}[^\n]*$"):
        kind(**given)


def test_switches_are_hashed_and_recorded_as_0_and_1():
    """As they were when they were whole numbers, so that hashes and files stay what they are."""
    recorded = canonical(TrainSettings(random_start=True))
    assert json.dumps({name: recorded[name] for name in SWITCHES}) == json.dumps(
        {"random_start": 1, "numeric_head": 0, "gradient_checkpointing": 0}
    )
    assert list(recorded) == [f.name for f in fields(TrainSettings)]
    assert TrainSettings(numeric_head=1) == TrainSettings(numeric_head=True)


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: str(folder.relative_to(SHIPPED)))
def test_a_shipped_run_has_the_hash_that_it_recorded(folder):
    config = read_json(folder / "config.json")
    dataset = type("Data", (), {"sha256": config["data_sha256"]})
    settings = settings_of(config)
    assert settings_sha256(settings, dataset, config["base_sha256"]) == config["settings_sha256"]
    assert json.dumps(canonical(settings)) == json.dumps(config["settings"])


def test_there_are_shipped_runs():
    assert len(RUNS) > 30


def test_changes_name_every_setting_that_differs():
    before, after = TrainSettings(learning_rate=0.0025), TrainSettings(learning_rate=0.001, random_start=1)
    said = "learning_rate 0.0025 then, 0.001 now; random_start 0 then, 1 now"
    assert changes(canonical(before), canonical(after)) == said
    recorded = json.loads(json.dumps(canonical(before)))
    assert changes(recorded, canonical(before)) == ""  # a list on disk, a tuple here
    one = TrainSettings(learning_rate=0.0025, target_modules=("k_proj",))
    assert changes(recorded, canonical(one)) == "target_modules q_proj,v_proj then, k_proj now"
    del recorded["seed"]
    assert changes(recorded, canonical(before)) == "seed not set then, 0 now"


def test_every_setting_says_what_it_is():
    """Its docstring is the help of its flag: a sentence or two."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            said = [
                below.value.value
                for field, below in zip(node.body, node.body[1:], strict=False)
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
            ]
            assert len(said) == sum(isinstance(field, ast.AnnAssign) for field in node.body)
            assert all(text.endswith(".") and text[0] == text[0].upper() and "`" not in text for text in said), said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["settings", "experiments.planning"])
def test_it_is_read_without_torch(name):
    code = f"import sys, m2helpers.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
