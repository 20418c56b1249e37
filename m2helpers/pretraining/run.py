"""Pre-training of the embedded base on synthetic series: from random weights, from where a run stopped, or from a base.

The batch of every step is a function of the seed and the step alone, so a stopped run resumes exactly as if it had not
been stopped. The learning rate warms up, stays, and decays linearly to zero at the end (warm-up–stable–decay, Hu et al.,
MiniCPM, 2024).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Qwen2ForCausalLM

from ..engine.attention import attend_lean
from ..engine.loop import run_steps
from ..engine.losses import refuse_nan
from ..engine.processes import add_up, by_first, check_batch, rank, share, sums
from ..engine.resume import delete_state, has_state, load_state, save_state
from ..engine.writer import one_writer
from ..files import UserError, apply_umask, read_json, write_json, write_text
from ..flops.costs import forward_cost
from ..ledger import Ledger, default_ledger, spender_of
from ..models import Base, choose_device, embedded_config, embedded_tokenizer, load_base, mixed_precision
from ..settings import PretrainSettings as PretrainSettings
from .batches import held_out, step_texts
from .card import model_card
from .families import FAMILIES
from .muon import Muon
from .record import PretrainState, Record, Sitting, as_sitting, check_same, finished_record

CPU_TEXTS = 8  # of a step that a CPU works on at once: with 64, it took four times as long


@one_writer
def pretrain(
    settings: PretrainSettings,
    output_dir: Path,
    *,
    stop_after: float | None = None,
    resume: bool = False,
    start: str | None = None,
    architecture: dict[str, Any] | None = None,
) -> Record:
    """Train the embedded base and write it to `output_dir` in hub format, with tokenizer, record and model card.

    Parameters
    ----------
    settings : PretrainSettings
    output_dir : Path
        Where the model goes, and ``state.safetensors`` while it is being trained.
    stop_after : float, optional
        Minutes after which to save and stop.
    resume : bool
        Resume from the last save in `output_dir`.
    start : str, optional
        A base that was pre-trained here, to start from its weights; give the run another seed than it had.
    architecture : dict, optional
        Changes to `embedded_config`, for tests.

    Returns
    -------
    Record
        Settings, history, validation loss by family, tokens, FLOPs, seconds, machine; under ``before`` the sittings
        whose weights it started from, under ``total`` the sums over all of them.

    Raises
    ------
    UserError
        If the folder holds another run, there is nothing to resume, or `start` has no record of its pre-training.
    Diverged
        If the loss is no longer a finite number.
    Stopped
        On Ctrl-C or SIGTERM, after a save.
    """
    output_dir = Path(output_dir)
    check_batch("batch_size", settings.batch_size)
    by_first(lambda: _check_folder(output_dir, resume))
    torch.manual_seed(settings.seed)
    device = choose_device()
    model: PreTrainedModel
    before: list[Sitting] = []
    if start is None:
        model = Qwen2ForCausalLM(embedded_config(**architecture or {}))
    else:
        model, before = _pretrained(start, settings)
    model.to(device).train()  # type: ignore[arg-type]  # transformers' decorator hides `self` from the type checker
    if device == "cuda":
        model.compile()  # inside its layers most of a GPU's time goes to reading and writing, which fused kernels save
    state = PretrainState(settings=asdict(settings), before=before)
    parameters = dict(model.named_parameters())
    optimizer = _optimizer(settings, parameters)
    if resume:
        asked, state = state, load_state(output_dir, parameters, optimizer, PretrainState)
        check_same(output_dir, asked, state)
    work = _Pretraining(model, optimizer, settings, state, output_dir)
    with _no_denormals():
        run_steps(work, output_dir.resolve().name, stop_after=stop_after)
    if state.step < settings.max_steps:
        return state.record()
    record = finished_record(state, settings, model)
    if rank():
        return record
    model.eval().save_pretrained(output_dir)
    embedded_tokenizer().save_pretrained(output_dir)
    apply_umask(output_dir)
    write_json(output_dir / "pretraining.json", record)
    write_text(output_dir / "README.md", model_card(dict(record)))
    delete_state(output_dir)
    return record


def _check_folder(folder: Path, resume: bool) -> None:
    if resume and not has_state(folder):
        raise UserError(f"{folder}: nothing to resume, leave --resume out")
    if not resume and has_state(folder):
        raise UserError(f"{folder}: holds a run that was stopped; add --resume or delete it")
    if not resume and (folder / "config.json").exists():
        raise UserError(f"{folder}: holds a model; choose another folder or delete it")


class _Pretraining:
    """A run as the loop sees it. Reading a loss waits until a GPU has come to it, so they are read together."""

    def __init__(
        self, model: PreTrainedModel, optimizer: Muon, settings: PretrainSettings, state: PretrainState, folder: Path
    ) -> None:
        self.model, self.optimizer, self.settings, self.state, self.folder = model, optimizer, settings, state, folder
        self.max_steps, self.save_steps = settings.max_steps, settings.save_steps
        self.parameters = dict(model.named_parameters())
        self.texts = step_texts(settings, state.step, model.device.type)
        self.unread: list[torch.Tensor] = []
        self.shown = ""
        self.began = time.monotonic() - state.seconds

    @property
    def speed(self) -> float:
        """Tokens a second, over all sittings of this run."""
        return self.state.step * self.settings.batch_size * self.settings.max_length / self.state.seconds

    def interval(self, stop: int) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self) -> str:
        settings, state = self.settings, self.state
        for group in self.optimizer.param_groups:
            group["lr"] = group["plateau"] * settings.schedule(state.step)
        self.unread.append(_backward(self.model, next(self.texts)))
        add_up(self.parameters.values())
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.max_grad_norm)
        with mixed_precision(self.model):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.seconds = time.monotonic() - self.began
        state.due = state.step % settings.eval_steps == 0 or state.step == settings.max_steps
        if state.due or state.step % settings.log_steps == 0:
            self._read_losses()
            if not state.due:
                self._add_row(None)
        return self.shown

    def validate(self, asked_to_stop: Callable[[], bool]) -> None:
        self.state.loss_by_family = _validate(self.model, self.settings)
        val_loss = float(np.mean(list(self.state.loss_by_family.values())))
        loss = self._add_row(val_loss)
        tqdm.write(f"step {self.state.step}: training loss {loss:.4f}, validation loss {val_loss:.4f}")
        self.state.due = False

    def save(self) -> None:
        self._read_losses()
        if rank() == 0:
            save_state(self.folder, self.parameters, self.optimizer, self.state)

    def _read_losses(self) -> None:
        self.state.losses += sums(map(float, self.unread))
        self.unread.clear()
        refuse_nan(self.state.losses, self.state.step)

    def _add_row(self, val_loss: float | None) -> float:
        """Add a row to the history and return its training loss."""
        state = self.state
        loss = float(np.mean(state.losses))
        state.history.append(
            {
                "step": state.step,
                "loss": loss,
                "val_loss": val_loss,
                "tokens_per_second": self.speed,
                "learning_rate": self.settings.learning_rate * self.settings.schedule(state.step - 1),
            }
        )
        state.losses.clear()
        self.shown = f"loss {loss:.3f}, {self.speed:,.0f} tokens/s"
        return loss


@contextmanager
def _no_denormals() -> Iterator[None]:
    """Round to zero the tiny numbers that momenta of bytes that never occur fade into: CPUs are slow at them."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)  # the processor's state is that of the whole process


def mixture_loss(
    base: Base, n_per_family: int = 2, length: int = 512, ledger: Ledger | None = None
) -> dict[str, float]:
    """Loss per token of a model on held-out texts of each pre-training family: what fine-tuning made it forget.

    It is charged to the base's ledger, as if every text had `length` tokens.

    Returns
    -------
    dict
        Family → mean cross-entropy in nats.
    """
    settings = PretrainSettings(eval_texts=n_per_family, max_length=length)
    cost = forward_cost(base.model.config, n_per_family, length, loss=True) * len(FAMILIES)
    ledger = ledger or default_ledger(base)
    with ledger.reserve(spender_of(base), validate=cost) as bill:
        losses = _validate(base.model, settings)
        bill.add("validate", cost)
    return losses


def _pretrained(start: str, settings: PretrainSettings) -> tuple[PreTrainedModel, list[Sitting]]:
    """The weights of a base, and what every sitting before has cost, the latest last."""
    base = load_base(start, head_bias=False)
    path = Path(base.model.name_or_path or "") / "pretraining.json"
    if not path.is_file():
        raise UserError(
            f"{start}: no pretraining.json in {path.parent}; only a base pre-trained here can be trained further"
        )
    last = cast(Record, read_json(path))
    if settings.seed in [sitting["seed"] for sitting in last["before"]] + [last["settings"]["seed"]]:
        raise UserError(f"{start}: has seen the texts of seed {settings.seed}; give another --seed")
    return base.model, [*last["before"], as_sitting(last, base.sha256)]


def _optimizer(settings: PretrainSettings, parameters: dict[str, torch.nn.Parameter]) -> Muon:
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in parameters.items() if p.ndim != 2 or "embed" in name]
    groups = [
        {"params": matrices, "muon": True, "weight_decay": settings.weight_decay, "plateau": settings.learning_rate},
        {"params": others, "weight_decay": 0.0, "plateau": settings.adamw_learning_rate},
    ]
    return Muon(groups, lr=settings.learning_rate)


def _backward(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The loss of a step's texts (batch, length), its gradients added up; of several processes each does its share.

    A CPU takes a few texts at a time, which fit its caches.
    """
    tokens, total = _scored(model, ids), torch.zeros((), device=model.device)
    for part in share(ids).split(len(ids) if model.device.type == "cuda" else CPU_TEXTS):
        with mixed_precision(model):
            loss = _loss(model, part) * (_scored(model, part) / tokens)
        loss.backward()
        total += loss.detach()
    return total


def _scored(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """How many tokens of texts are predicted from the ones before them."""
    return int((ids[:, 1:] != model.config.pad_token_id).sum())


def _loss(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the tokens of texts (batch, length), padding left out."""
    ids = ids.to(model.device, torch.int64)
    forward = model if model.training else model.forward  # only the shape of training is worth a compilation
    with attend_lean(model):
        logits = forward(input_ids=ids, use_cache=False).logits  # (batch, length, vocab)
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), ignore_index=model.config.pad_token_id
    )


@torch.no_grad()
def _validate(model: PreTrainedModel, settings: PretrainSettings) -> dict[str, float]:
    was_training = model.training
    model.eval()
    shape = (settings.eval_texts, settings.max_length)
    losses = [0.0] * len(FAMILIES)
    for number in share(range(len(FAMILIES))):
        losses[number] = _loss(model, held_out(number, *shape)).item()
    model.train(was_training)
    return dict(zip(FAMILIES, sums(losses), strict=True))
