"""The steps of fine-tuning: which windows, what loss, what it costs, and how validation judges it.

The windows of a step, and its dropout, are functions of the seed and the step alone. So one seed gives one result on one
machine, and a run that was stopped resumes as if it had not been. Several processes (`engine.processes`) share the windows of
a step; what it costs, and but for rounding its loss, stay what they are with one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypedDict

import numpy as np
import torch
from torch import nn

from ..data import Dataset
from ..engine.activations import lean_activations
from ..engine.attention import attend_lean
from ..engine.compiled import FixedPasses
from ..engine.losses import head_loss, refuse_nan
from ..engine.processes import add_up, count, rank, share, sums
from ..engine.resume import State
from ..engine.windows import augmented_window, endless_series, pick, text_windows
from ..flops.costs import BatchCost, Cost, batch_costs
from ..ledger import Bill, Ledger, default_ledger, spender_of
from ..lora import apply_lora, trainable_parameters
from ..models import Base, mixed_precision
from ..settings import TrainSettings
from ..simulator import Law
from ..text import Codec, numeric_tokens, right_pad


class TrainRow(TypedDict):
    """A row of the history: what is known after a validation."""

    step: int
    loss: float
    """Mean of the steps since the last row."""
    val_loss: float
    learning_rate: float
    tokens_per_second: float
    flops: int
    """Of training and validation so far."""


@dataclass(kw_only=True)
class TrainState(State):
    """Where a fine-tuning run stands."""

    flops: int = 0
    history: list[TrainRow] = field(default_factory=list)
    best: float | None = None
    """The least validation loss so far."""
    speed: float = 0.0
    """Tokens a second, of this sitting."""


class Training:
    """A run in hand: what it trains, and where it stands."""

    def __init__(
        self,
        base: Base,
        dataset: Dataset,
        settings: TrainSettings,
        codec: Codec,
        law: Law | None = None,
        compiled: bool = True,
    ) -> None:
        self.base, self.settings, self.law = base, settings, law
        self.codec, self.series = codec, dataset.part("train")
        self.train = text_windows(self.series, codec, base.tokenizer, settings.max_length)
        self.augmented = bool(settings.rescale or settings.random_start or law)
        self.longest = settings.max_length if self.augmented else max(map(len, self.train))  # no batch costs more
        validation = text_windows(dataset.part("validation"), codec, base.tokenizer, settings.max_length)
        chosen = np.random.default_rng(0).permutation(len(validation))[: settings.eval_windows]
        self.validation = [validation[i] for i in chosen]
        torch.manual_seed(settings.seed)
        self.parameters = trainable_parameters(apply_lora(base.model, settings))
        on_gpu = base.model.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=on_gpu or None,
        )
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.state = TrainState()
        self.characters = (
            torch.from_numpy(np.sort(numeric_tokens(codec, base.tokenizer))).to(base.model.device)
            if settings.numeric_head
            else None
        )
        self.step_cost, self.cost = batch_costs(base.model.config, settings.adaptation)
        self.unread: list[torch.Tensor] = []
        """Losses of the last steps, still on the GPU: reading one waits until it has come to it."""
        self.fixed: FixedPasses | None = None
        if on_gpu and count() == 1:  # a share of a batch has no fixed shape
            context = partial(mixed_precision, base.model)
            self.fixed = FixedPasses(
                base.model, base.pad_id, settings.max_length, self.characters, context, compiled=compiled
            )
        if settings.gradient_checkpointing:
            # The re-entrant kind would want embeddings that learn.
            base.model.activation_checkpointing_enable({"use_reentrant": False})

    def most(self, stop: int) -> dict[str, Cost]:
        """What the steps up to `stop` and their validations can cost, by kind."""
        first, settings = self.state.step, self.settings
        step = self.step_cost((settings.batch_size, self.longest))
        validations = settings.validations(first, stop) + self.state.due
        validation = _validation_at_most(self.validation, settings, self.cost)
        return {"train": step * (stop - first), "validate": validation * validations}

    def step(self, bill: Bill | None = None) -> Cost:
        """Take one optimizer step, and put it on the bill before a loss that is no number ends the run (`Diverged`)."""
        state, settings = self.state, self.settings
        step = state.step
        dropout = np.random.SeedSequence([settings.seed, step, rank()])  # a last 0 is as good as none
        torch.manual_seed(int(dropout.generate_state(1)[0]))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(step)
        self.base.model.train()
        places = range(step * settings.batch_size, (step + 1) * settings.batch_size)
        loss, shape = self._backward([self.window(place) for place in places])
        spent = self.step_cost(shape)
        if bill:
            bill.add("train", spent)
        self.unread.append(loss)
        if not self.fixed:
            self.read_losses(step + 1)
        add_up(self.parameters.values())
        nn.utils.clip_grad_norm_(self.parameters.values(), settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if settings.average:
            for p in self.parameters.values():  # kept beside the moments, to be saved with them
                average = self.optimizer.state[p].setdefault("average", p.detach().clone())
                average.lerp_(p.detach(), 1 - settings.average)
        state.step, state.due = step + 1, settings.validates(step + 1)
        state.flops += spent.flops
        return spent

    def _backward(self, windows: list[np.ndarray]) -> tuple[torch.Tensor, tuple[int, int]]:
        """The loss of a step, whose gradients are added to the parameters', and the shape of the batch."""
        if self.fixed:
            return self.fixed.backward(windows), (len(windows), max(map(len, windows)))
        with lean_activations(self.base.model), attend_lean(self.base.model):  # checkpoints are computed again inside
            with mixed_precision(self.base.model):
                loss, shape = _loss(self.base, windows, self.characters)
            loss.backward()
        return loss.detach(), shape

    def read_losses(self, step: int) -> list[float]:
        """Put the losses up to a step that are not read yet into the state, and return them (`Diverged`)."""
        if not self.unread:
            return []
        losses = sums(torch.stack(self.unread).tolist())  # each process has its share of a loss
        self.unread.clear()
        for number, loss in enumerate(losses, step - len(losses) + 1):
            refuse_nan([loss], number)
        self.state.losses += losses
        return losses

    def window(self, place: int) -> np.ndarray:
        """The training window at a place in an endless row, of shuffled epochs or of systems drawn from the law: its token ids."""
        settings = self.settings
        if not self.augmented:
            return self.train[pick(settings.seed, place, len(self.train))]
        if self.law:
            values = endless_series(self.law, settings.seed, place)
        else:
            values = self.series[pick(settings.seed, place, len(self.series))]
        return augmented_window(values, place, settings, self.codec, self.base.tokenizer)

    def validate(self, asked_to_stop: Callable[[], bool], bill: Bill | None = None) -> None:
        """Measure the validation loss and keep the weights if they are the best; when asked to stop, leave it due."""
        state = self.state
        self.read_losses(state.step)
        with self._averaged() as weights:
            loss, spent = _validate(
                self.base, self.settings, self.validation, self.cost, asked_to_stop, self.characters
            )
        if bill:
            bill.add("validate", spent)
        if loss is None:
            return
        state.flops += spent.flops
        state.history.append(
            {
                "step": state.step,
                "loss": float(np.mean(state.losses)),
                "val_loss": loss,
                "learning_rate": self.settings.rate(state.step - 1),
                "tokens_per_second": state.speed,
                "flops": state.flops,
            }
        )
        state.losses, state.due = [], False
        if state.best is None or loss < state.best:
            state.best, self.best = loss, weights

    @contextmanager
    def _averaged(self) -> Iterator[dict[str, torch.Tensor]]:
        """The weights to be judged, by name: inside, they stand in the model in place of those that are trained."""
        own = {name: p.data for name, p in self.parameters.items()}
        for p in self.parameters.values():
            p.data = self.optimizer.state.get(p, {}).get("average", p.data).clone()
        try:
            yield {name: p.data for name, p in self.parameters.items()}
        finally:
            for name, p in self.parameters.items():
                p.data = own[name]


def series_loss(
    base: Base, codec: Codec, trajectories: np.ndarray, length: int = 512, ledger: Ledger | None = None
) -> float:
    """Mean loss per token of a model, in nats, on the text of series (n_series, n_steps, n_variables); charged."""
    settings, parts = TrainSettings(lora_r=0), text_windows(trajectories, codec, base.tokenizer, length)
    _, cost = batch_costs(base.model.config, settings.adaptation)
    ledger = ledger or default_ledger(base)
    with ledger.reserve(spender_of(base), validate=_validation_at_most(parts, settings, cost)) as bill:
        loss, spent = _validate(base, settings, parts, cost)
        bill.add("validate", spent)
    assert loss is not None  # nothing asked it to stop
    return loss


def _loss(
    base: Base, batch: Sequence[np.ndarray], characters: torch.Tensor | None = None
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Mean cross-entropy over the tokens of a batch, padding left out, and the batch's shape.

    Of several processes each works on its share of the rows, padded like the rest: their losses, and gradients, add up.
    """
    padded = right_pad(batch, base.pad_id)
    shape, part = padded[0].shape, share(padded[1])[:, 1:].sum() / padded[1][:, 1:].sum()
    ids, mask = (torch.from_numpy(share(a)).to(base.model.device) for a in padded)  # (batch, length)
    if not len(ids):  # the last batch of a validation may be too small
        return torch.zeros(()), shape
    # Padding comes after all that is scored, and a causal model never looks ahead: it needs no mask.
    hidden = base.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (batch, length, hidden)
    scored = mask[:, 1:] == 1
    loss = head_loss(hidden[:, :-1][scored], base.model.get_output_embeddings(), ids[:, 1:][scored], characters)
    return loss * float(part), shape


def _validation_at_most(validation: Sequence[np.ndarray], settings: TrainSettings, cost: BatchCost) -> Cost:
    """What one validation can cost: every batch full, and as long as its longest window."""
    longest = max(map(len, validation))
    return cost((settings.batch_size, longest)) * math.ceil(len(validation) / settings.batch_size)


@torch.no_grad()
def _validate(
    base: Base,
    settings: TrainSettings,
    validation: list[np.ndarray],
    cost: BatchCost,
    asked_to_stop: Callable[[], bool] = lambda: False,
    characters: torch.Tensor | None = None,
) -> tuple[float | None, Cost]:
    """Mean loss per token over the validation windows (None when stopped before the end), and what it cost."""
    base.model.eval()
    total, count, spent = 0.0, 0, Cost()
    ordered = sorted(validation, key=len)
    for first in range(0, len(ordered), settings.batch_size):
        if asked_to_stop():
            return None, spent
        batch = ordered[first : first + settings.batch_size]
        with attend_lean(base.model):
            loss, shape = _loss(base, batch, characters)
        n = sum(len(w) - 1 for w in batch)
        total, count = total + loss.item() * n, count + n
        spent += cost(shape)
    return sums([total])[0] / count, spent
