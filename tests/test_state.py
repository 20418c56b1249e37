"""Training states: everything the next step needs, and nothing that could run code."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2helpers.files import UserError
from m2helpers.state import load_state, read_record, save_state

RECORD = {"step": 2, "history": [{"loss": 0.1 + 0.2}], "best": None}


def _make(seed, fused=False):
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        "a": torch.nn.Parameter(torch.randn(3, 2, generator=generator)),
        "b": torch.nn.Parameter(torch.zeros(4)),
    }
    return parameters, torch.optim.AdamW(parameters.values(), lr=0.1, fused=fused)


def _step(parameters, optimizer, number):
    for p in parameters.values():
        p.grad = torch.sin(p.detach() + number)
    optimizer.step()


@pytest.fixture
def state(tmp_path):
    parameters, optimizer = _make(0)
    for number in range(2):
        _step(parameters, optimizer, number)
    save_state(tmp_path / "state.safetensors", parameters, optimizer, RECORD)
    return tmp_path / "state.safetensors"


@pytest.mark.parametrize("fused", [False, True])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, fused):
    parameters, optimizer = _make(0, fused)
    for number in range(2):
        _step(parameters, optimizer, number)
    save_state(tmp_path / "s", parameters, optimizer, RECORD)
    restored, other = _make(1, fused)
    assert load_state(tmp_path / "s", restored, other) == RECORD
    for number in range(2, 5):
        _step(parameters, optimizer, number)
        _step(restored, other, number)
    for name, p in parameters.items():
        assert torch.equal(restored[name], p)
        for moment, value in optimizer.state[p].items():
            assert torch.equal(other.state[restored[name]][moment], value), (name, moment)


def test_a_state_before_the_first_step_is_whole_too(tmp_path):
    parameters, optimizer = _make(0)
    save_state(tmp_path / "s", parameters, optimizer, {"step": 0})
    restored, other = _make(1)
    assert load_state(tmp_path / "s", restored, other) == {"step": 0}
    assert torch.equal(restored["a"], parameters["a"]) and not other.state


def test_the_file_holds_tensors_and_a_record(state):
    assert set(load_file(state)) == {f"{k}.{n}" for k in ("weight", "step", "exp_avg", "exp_avg_sq") for n in "ab"}
    assert read_record(state) == RECORD


def test_a_save_that_fails_keeps_the_last_one(state):
    before = state.read_bytes()
    parameters, optimizer = _make(3)
    with pytest.raises(TypeError):
        save_state(state, parameters, optimizer, {"not JSON": object()})
    assert state.read_bytes() == before and [p.name for p in state.parent.iterdir()] == [state.name]


def test_a_state_of_other_parameters_is_refused(state):
    parameters, optimizer = _make(0)
    del parameters["b"]
    with pytest.raises(UserError, match="a run with other trained parameters; give that run's settings"):
        load_state(state, parameters, optimizer)


def _no_record(path):
    save_file({"weight.a": torch.zeros(1)}, path)


@pytest.mark.parametrize(
    "damage", [lambda p: p.unlink(), lambda p: p.write_bytes(b"junk" * 50), lambda p: p.write_bytes(b""), _no_record]
)
def test_a_damaged_state_is_refused(state, damage):
    damage(state)
    parameters, optimizer = _make(0)
    with pytest.raises(UserError, match=r"not a readable training state .* delete it and start the run again") as error:
        load_state(state, parameters, optimizer)
    assert str(state) in str(error.value)
