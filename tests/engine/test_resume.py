"""Training states: everything the next step needs, and nothing that could run code."""

from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2helpers.engine.resume import State, delete_state, has_state, load_state, save_state
from m2helpers.engine.writer import LOCK_NAME
from m2helpers.files import UserError


@dataclass(kw_only=True)
class Noted(State):
    """A state with fields of its own, as each kind of run has them."""

    history: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None


STATE = Noted(step=2, losses=[1 / 3], due=True, history=[{"loss": 0.1 + 0.2}])


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
    save_state(tmp_path, parameters, optimizer, STATE)
    return tmp_path / "state.safetensors"


@pytest.mark.parametrize("fused", [False, True])
def test_a_restored_run_resumes_bit_for_bit(tmp_path, fused):
    parameters, optimizer = _make(0, fused)
    for number in range(2):
        _step(parameters, optimizer, number)
    save_state(tmp_path, parameters, optimizer, STATE)
    restored, other = _make(1, fused)
    assert load_state(tmp_path, restored, other, Noted) == STATE
    for number in range(2, 5):
        _step(parameters, optimizer, number)
        _step(restored, other, number)
    for name, p in parameters.items():
        assert torch.equal(restored[name], p)
        for moment, value in optimizer.state[p].items():
            assert torch.equal(other.state[restored[name]][moment], value), (name, moment)


def test_a_state_before_the_first_step_is_whole_too(tmp_path):
    parameters, optimizer = _make(0)
    save_state(tmp_path, parameters, optimizer, State())
    restored, other = _make(1)
    assert load_state(tmp_path, restored, other, State) == State(step=0)
    assert torch.equal(restored["a"], parameters["a"]) and not other.state


def test_the_file_holds_tensors_and_no_code(state):
    assert set(load_file(state)) == {f"{k}.{n}" for k in ("weight", "step", "exp_avg", "exp_avg_sq") for n in "ab"}


def test_the_best_weights_come_back(tmp_path):
    parameters, optimizer = _make(0)
    best = {"a": torch.ones(3, 2), "b": torch.arange(4.0)}
    save_state(tmp_path, parameters, optimizer, STATE, best)
    found = {"a": torch.zeros(3, 2), "b": torch.zeros(4)}
    load_state(tmp_path, parameters, optimizer, Noted, found)
    assert all(torch.equal(found[name], best[name]) for name in best)


def test_a_save_that_fails_keeps_the_last_one(state):
    before = state.read_bytes()
    parameters, optimizer = _make(3)
    with pytest.raises(TypeError):
        save_state(state.parent, parameters, optimizer, State(step=object()))
    assert state.read_bytes() == before and [p.name for p in state.parent.iterdir()] == [state.name]


def test_a_state_of_other_parameters_is_refused(state):
    parameters, optimizer = _make(0)
    del parameters["b"]
    with pytest.raises(UserError, match="a run with other trained parameters; give that run's settings"):
        load_state(state.parent, parameters, optimizer, Noted)


def _no_record(path):
    save_file({"weight.a": torch.zeros(1)}, path)


def _another_kind(path):
    """Whole, but with a field that no run here has."""

    @dataclass(kw_only=True)
    class Other(State):
        unknown: int = 0

    parameters, optimizer = _make(0)
    save_state(path.parent / "other", parameters, optimizer, Other())
    (path.parent / "other" / path.name).rename(path)
    (path.parent / "other").rmdir()


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGES = [
    lambda p: p.unlink(),
    lambda p: p.write_bytes(b"junk" * 50),
    lambda p: p.write_bytes(b""),
    lambda p: p.write_bytes(p.read_bytes()[:-1]),
    _flip_a_bit,
    _no_record,
    _another_kind,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused(state, damage):
    damage(state)
    parameters, optimizer = _make(0)
    with pytest.raises(UserError, match=r"not a readable training state .* delete it and start the run again") as error:
        load_state(state.parent, parameters, optimizer, Noted)
    assert str(state) in str(error.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_falls_back_to_the_one_before(state, damage):
    parameters, optimizer = _make(0)
    load_state(state.parent, parameters, optimizer, Noted)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    _step(parameters, optimizer, 2)
    save_state(state.parent, parameters, optimizer, State(step=3))
    damage(state)
    with pytest.warns(UserWarning, match="resuming from the save before it, step 2"):
        assert load_state(state.parent, parameters, optimizer, Noted) == STATE
    assert all(torch.equal(parameters[name], before[name]) for name in before)
    save_state(state.parent, parameters, optimizer, State(step=4))
    damage(state)  # once more: the save before it must be the good one still
    with pytest.warns(UserWarning, match="resuming from the save before it, step 2"):
        assert load_state(state.parent, parameters, optimizer, Noted) == STATE


def test_states_are_deleted_together(state):
    parameters, optimizer = _make(0)
    save_state(state.parent, parameters, optimizer, State(step=3))
    assert has_state(state.parent) and len(list(state.parent.iterdir())) == 2
    state.unlink()
    assert has_state(state.parent)
    for half in (".state.safetensors.123.part", ".tmpSxQoKF", LOCK_NAME):  # of a process that was killed
        (state.parent / half).touch()
    delete_state(state.parent)
    assert not has_state(state.parent) and not list(state.parent.iterdir())
