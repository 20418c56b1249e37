"""What runs on a GPU, on a machine without one: no step mixes tensors of two devices, and the results are the CPU's.

Every tensor stays in the CPU's memory. Those that were put on `cuda` say that they are there, and an operation that PyTorch
would refuse on a real GPU is refused here. (PyTorch's own fake tensors hold no values, so nothing that reads a choice or
a loss could run, and its CPU build ends the whole process when one of them on `cuda` wants a gradient.)
"""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m2helpers import models
from m2helpers.engine import kvcache, losses
from m2helpers.engine.attention import attend_lean
from m2helpers.engine.compiled import FixedPasses
from m2helpers.engine.losses import Diverged, head_loss
from m2helpers.engine.resume import load_state, save_state
from m2helpers.forecasting import forecast
from m2helpers.forecasting.captured import _Writing, can_capture
from m2helpers.forecasting.decoding import Chooser, End, Rules
from m2helpers.lora import apply_lora, lora_layers, merge, trainable_parameters, unmerge
from m2helpers.models import load_base
from m2helpers.pretraining import batches, record
from m2helpers.pretraining import run as pretraining
from m2helpers.pretraining.families import FAMILIES
from m2helpers.runs import load_run
from m2helpers.settings import LoraSettings, PretrainSettings, TrainSettings
from m2helpers.text import Codec, Grammar, fit_scale, tokenise
from m2helpers.training import Training, TrainState, series_loss, train_lora

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
DEVICE, IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)  # between devices
READ = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class MixedDevices(RuntimeError):
    """An operation was given tensors of two devices."""


class Waits(RuntimeError):
    """The host reads a value of the GPU's, for which it must wait until the GPU has come to it."""


class _FakeCuda:
    """Which memory counts as the GPU's, and the two modes that keep account of it."""

    def __init__(self) -> None:
        self.may_wait = True
        self.there: dict[int, torch.UntypedStorage] = {}  # kept, so that no other memory gets an address of theirs

    @contextmanager
    def without_waiting(self):
        """Refuses (`Waits`) whatever makes the host wait."""
        self.may_wait = False
        try:
            yield
        finally:
            self.may_wait = True

    def wait(self, what: object) -> None:
        if not self.may_wait:
            raise Waits(f"{what} waits for the GPU")

    def holds(self, tensor: torch.Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.device == CPU and tensor.untyped_storage()._cdata in self.there

    def put(self, made: object) -> object:
        with torch._C.DisableTorchFunction():
            for tensor in _tensors(made):
                storage = tensor.untyped_storage()
                self.there[storage._cdata] = storage
        return made

    def take(self, made: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            self.there.pop(made.untyped_storage()._cdata, None)
        return made

    def __enter__(self) -> "_FakeCuda":
        self.modes = [_Surface(self), _Rules(self)]
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


class _Surface(TorchFunctionMode):
    """What Python sees: the device of a tensor, copies between devices, and tensors made on one."""

    def __init__(self, gpu: _FakeCuda) -> None:
        self.gpu = gpu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == DEVICE:
            return CUDA if self.gpu.holds(args[0]) else function(*args)
        if function == IS_CUDA:
            return self.gpu.holds(args[0])
        if function in (torch.Tensor.numpy, torch.Tensor.__array__) and self.gpu.holds(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if function == torch.Tensor.tolist and self.gpu.holds(args[0]):
            self.gpu.wait(function)
        if function in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self._copy(function, *args, **kwargs)
        if function is torch.Tensor.backward:  # Python runs inside: our own slopes, and checkpoints computed again
            with self:  # the public functions would come back here
                slope = (torch.ones_like(args[0]),)
                run = torch.autograd.graph._engine_run_backward
                return run((args[0],), slope, False, False, (), allow_unreachable=True, accumulate_grad=True)
        if _is_cuda(kwargs.get("device")):
            return self.gpu.put(function(*args, **kwargs | {"device": CPU}))
        return function(*args, **kwargs)

    def _copy(self, function, tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """`to` with a device, a type, or a tensor that has both, in any place, or `cpu`, or `cuda`."""
        given, here = [*args, *kwargs.values()], CUDA if self.gpu.holds(tensor) else CPU
        wanted = {torch.Tensor.cpu: CPU, torch.Tensor.cuda: CUDA}.get(function, here)
        dtype = tensor.dtype
        for value in given:
            if isinstance(value, torch.Tensor):
                wanted, dtype = CUDA if self.gpu.holds(value) else CPU, value.dtype
            elif isinstance(value, (str, torch.device)):
                wanted = torch.device(value)
            elif isinstance(value, torch.dtype):
                dtype = value
        if wanted.type not in ("cpu", "cuda") or wanted.type == here.type:
            return tensor.to(CPU if wanted.type == "cuda" else wanted, dtype)
        if here.type == "cuda":
            self.gpu.wait("a copy to the CPU")
        copy = tensor.to(dtype, copy=True)
        return self.gpu.put(copy) if _is_cuda(wanted) else self.gpu.take(copy)


class _Rules(TorchDispatchMode):
    """What PyTorch does: one device an operation. Single numbers may come from the CPU, and so may indices."""

    def __init__(self, gpu: _FakeCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = _tensors((args, kwargs))
        there = [t for t in given if self.gpu.holds(t)]
        masks = function in INDEXED and any(t.dtype == torch.bool for t in _tensors(args[1]))
        if there and (function in READ or masks):  # how long the result is depends on values
            self.gpu.wait(function)
        if there and function not in COPIES:
            checked = _tensors((args[0], args[2:])) if function in INDEXED else given
            if strange := [t for t in checked if t.dim() and not self.gpu.holds(t)]:
                shapes = f"{tuple(strange[0].shape)} on the CPU, {tuple(there[0].shape)} on cuda"
                raise MixedDevices(f"{function}: {shapes}")
        made = function(*args, **kwargs or {})
        if there and (function is not aten.copy_.default):
            self.gpu.put(made)
        return made


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """Turns a GPU on, as far as our code can see: `with cuda():`."""
    monkeypatch.setenv("M2_LEDGER", str(tmp_path / "ledger.sqlite"))
    generator, group = torch.Generator, clip_grad._group_tensors_by_device_and_dtype

    @contextmanager
    def turned_on():
        with monkeypatch.context() as patch, _FakeCuda() as gpu:

            def grouped(tensors, *options):  # by device in C++, which sees the CPU
                groups = group(tensors, *options)
                there = all(map(gpu.holds, _tensors(tensors)))
                return {(CUDA if there else device, dtype): found for (device, dtype), found in groups.items()}

            patch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", grouped)
            for module in (models, pretraining):
                patch.setattr(module, "choose_device", lambda: "cuda")
            for module in (models, record):
                patch.setattr(module, "has_bfloat16", lambda device: False)
            patch.setattr(models, "_check_memory", lambda *_: None)
            # A checkpoint looks at devices from inside other operations, where the surface is off.
            patch.setitem(torch.utils.checkpoint._allowed_determinism_checks_to_fns, "default", lambda tensor: None)
            patch.setattr(torch, "Generator", lambda device: generator(None if _is_cuda(device) else device))
            yield gpu

    return turned_on


@pytest.fixture
def codec(small_data):
    return Codec(fit_scale(small_data.part("train")))


def _devices(model) -> set[torch.device]:
    return {t.device for t in [*model.parameters(), *model.buffers()]}


def _randomise(model) -> None:
    """An update that does something, the same on every device."""
    for number, (_, layer) in enumerate(lora_layers(model)):
        draws = torch.Generator(CPU).manual_seed(number)
        for part in (layer.lora_A, layer.lora_B):
            part.weight.data.copy_(torch.randn(part.weight.shape, generator=draws))


def test_mixing_is_refused(cuda):
    with cuda():
        there, here = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
        assert there.device == CUDA and (2 * there + there.to("cuda")[:1]).device == CUDA
        assert there.cpu().device == CPU and (there.to(here) + here).device == CPU
        assert (there + torch.tensor(1.0)).is_cuda and there[torch.tensor([0])].is_cuda and there.sum().item() == 6
        for mix in (lambda: there + here, lambda: torch.cat([here, there]), lambda: here.mul_(there)):
            with pytest.raises(MixedDevices):
                mix()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


def test_waiting_is_refused(cuda):
    with cuda() as gpu, gpu.without_waiting():
        there = torch.ones(2, 3, device="cuda")
        assert torch.where(there > 0, there, 0).argmax(-1).is_cuda and torch.ones(2).sum().item() == 2
        reads = [there.sum().item, there.cpu, there.nonzero, lambda: there[there > 0], lambda: bool(there.any())]
        for read in [*reads, lambda: float(there[0, 0]), there.tolist]:
            with pytest.raises(Waits):
                read()
    assert there.sum().item() == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_moves_whole_and_its_head_bias_stays_float32(dtype, tiny_base, cuda):
    with cuda():
        model = apply_lora(tiny_base(dtype=dtype).model, LoraSettings(lora_r=2))
        assert _devices(model) == {CUDA}
        assert model.lm_head.weight.dtype == getattr(torch, dtype)
        assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
        assert model.lm_head.bias.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [dict(), dict(temperature=1.0, seed=3), dict(constrained=True), dict(constrained=True, temperature=1.0)],
    ids=["greedy", "sampled", "constrained", "constrained and sampled"],
)
def test_forecasts_are_those_of_the_cpu(options, tiny_base, codec, small_data, cuda, monkeypatch):
    monkeypatch.setattr(kvcache, "PREFILL_TOKENS", 100)  # the prompts are read in several passes
    series = [values[:n] for values, n in zip(small_data.part("train"), (3, 9, 5, 9), strict=False)]
    lora = LoraSettings(lora_r=2)

    def found():
        base = tiny_base()
        _randomise(apply_lora(base.model, lora))
        return [f.text for f in forecast(base, codec, series, 2, lora=lora, batch_size=3, **options)]

    expected = found()
    with cuda():
        assert found() == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("constrained", [True, False])
def test_a_step_of_decoding_waits_for_nothing(temperature, constrained, tiny_base, codec, cuda):
    """So it can be captured as a CUDA graph: it also changes tensors in place only, and finds them where they were."""
    grammar, n = Grammar(codec, 2), 3
    with cuda() as gpu:
        base = tiny_base()
        with attend_lean(base.model), torch.inference_mode():
            assert can_capture(base)
            prompts = tokenise(["1.16,1.27;", "0.83", "1.16,1.27;"], base.tokenizer)
            chooser = Chooser(temperature, torch.full((n, 99), 0.4, device="cuda"))
            rules = Rules(grammar, base) if constrained else None
            writing = _Writing(base, prompts, End(26, 6, 90), chooser, rules, n * [grammar.walk("0.83")])
            before = {name: t.data_ptr() for name, t in _attributes(writing)}
            with gpu.without_waiting():
                writing.step()
                writing.step()
        assert {name: t.data_ptr() for name, t in _attributes(writing)} == before
        assert writing.rows.count.min() >= 2 and writing.passes.item() == 2


def _attributes(writing):
    held = vars(writing) | vars(writing.rows) | {f"room {i}": room for i, room in enumerate(writing.rooms)}
    return [(f"{name} {i}", t) for name, value in held.items() for i, t in enumerate(_tensors(value))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(numeric_head=1, average=0.9),
        dict(rescale=0.5, random_start=1, gradient_checkpointing=1),
    ],
    ids=["plain", "numeric head and averaging", "augmented and checkpointed"],
)
def test_training_is_that_of_the_cpu(changes, tiny_base, small_data, cuda, tmp_path, monkeypatch):
    """Steps, validations, saves, and the run loaded again."""
    monkeypatch.setattr(losses, "CHUNK", 16)
    monkeypatch.setattr("m2helpers.models.has_bfloat16", lambda device: False)  # on both, whatever the CPU can do
    settings = TrainSettings(lora_r=2, batch_size=3, max_steps=3, max_length=40, eval_steps=2, save_steps=2)
    settings = replace(settings, lora_dropout=0.0, learning_rate=1e-2, eval_windows=4, **changes)
    expected = train_lora(tiny_base(), small_data, settings, progress=False).history
    with cuda():
        result = train_lora(tiny_base(), small_data, settings, tmp_path / "run", progress=False, compiled=False)
        assert _devices(result.model) == {CUDA}
        run = load_run(tmp_path / "run")
        assert _devices(run.base.model) == {CUDA}
        loss = series_loss(run.base, run.codec, small_data.part("validation"), 40)
    for column in ("loss", "val_loss", "flops"):
        assert result.history[column].tolist() == pytest.approx(expected[column].tolist(), rel=1e-5)
    assert 0 < loss < 20


def test_a_stopped_run_goes_on(tiny_base, small_data, codec, cuda, tmp_path):
    settings = TrainSettings(lora_r=2, batch_size=3, max_steps=3, max_length=40, average=0.9)
    with cuda() as gpu:
        work = Training(tiny_base(), small_data, settings, codec, compiled=False)
        work.step()  # with dropout
        save_state(tmp_path, work.parameters, work.optimizer, work.state, work.best)
        again = Training(tiny_base(), small_data, settings, codec, compiled=False)
        again.state = load_state(tmp_path, again.parameters, again.optimizer, TrainState, again.best)
        for run in (work, again):
            with gpu.without_waiting():
                run.step()
        assert {m.device for state in again.optimizer.state.values() for m in state.values()} == {CUDA}
        (first, expected), (found,) = work.read_losses(2), again.read_losses(2)
        assert found == expected != first


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_found_before_it_is_saved(tiny_base, small_data, cuda, tmp_path, monkeypatch):
    """Nobody has looked since the first step; the state on disk is that of the save before, and the message names the step."""
    monkeypatch.setattr("m2helpers.training.run.LOOK", 1e9)
    settings = TrainSettings(lora_r=2, batch_size=3, max_steps=9, max_length=40, eval_steps=9, save_steps=3)
    backward, steps = FixedPasses.backward, []

    def damaged(passes, windows):
        steps.append(len(windows))
        return backward(passes, windows) * (float("nan") if len(steps) == 5 else 1.0)

    monkeypatch.setattr(FixedPasses, "backward", damaged)
    with cuda(), pytest.raises(Diverged, match="step 5: the loss is no longer a number"):
        train_lora(tiny_base(), small_data, settings, tmp_path / "run", progress=False, compiled=False)
    assert len(steps) == 6
    with safe_open(tmp_path / "run" / "state.safetensors", "pt") as state:
        assert json.loads(state.metadata()["about"])["record"]["step"] == 3


def test_updates_merge_and_come_out_again(tiny_base, cuda):
    with cuda():
        model = apply_lora(tiny_base().model, LoraSettings(lora_r=2))
        _randomise(model)
        ids = torch.arange(10, 27, device="cuda")[None]
        before = model(ids).logits
        assert torch.allclose(merge(model)(ids).logits, before, atol=1e-4)
        assert torch.equal(unmerge(model)(ids).logits, before) and _devices(model) == {CUDA}


@pytest.mark.parametrize("characters", [None, [3, 5, 9]])
def test_the_loss_of_a_head_and_its_slopes(characters, cuda, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 2)

    def found(device):
        states = torch.linspace(-1, 1, 5 * 4, device=device).view(5, 4).requires_grad_()
        head = torch.nn.Linear(4, 11, device=device)
        for p in head.parameters():
            p.data.copy_(torch.linspace(-2, 2, p.numel()).view(p.shape))
        labels = torch.tensor([3, 5, 9, 3, 5], device=device)
        loss = head_loss(states, head, labels, characters and torch.tensor(characters, device=device))
        loss.backward()
        return [x.cpu() for x in (loss.detach(), states.grad, head.bias.grad)]

    expected = found("cpu")
    with cuda():
        assert all(torch.equal(a, b) for a, b in zip(found("cuda"), expected, strict=True))


@pytest.mark.slow
def test_pretraining_is_that_of_the_cpu(cuda, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BLOCK", 8)
    for module in (batches, pretraining):
        monkeypatch.setattr(module, "FAMILIES", {"glycolysis": FAMILIES["glycolysis"]})
    monkeypatch.setattr(batches.os, "cpu_count", lambda: 1)  # the texts are drawn in this process
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    settings = PretrainSettings(tokens=3 * 4 * 32, batch_size=4, max_length=32, eval_texts=2, eval_steps=2, log_steps=1)
    architecture = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)

    def found(folder):
        done = pretraining.pretrain(settings, folder, architecture=architecture | dict(num_key_value_heads=1))
        return done["machine"], [row["loss"] for row in done["history"]]

    machine, expected = found(tmp_path / "cpu")
    with cuda():
        on_gpu, history = found(tmp_path / "gpu")
    assert "CPU" in machine and "a GPU" in on_gpu
    assert history == pytest.approx(expected, rel=1e-5)
    assert load_base(str(tmp_path / "gpu")).model.device == CPU
