"""Fine-tuning: LoRA updates and the head bias, trained on the text of many series.

The windows of a step, and its dropout, are functions of the seed and the step alone. So one seed gives one result on one
machine, and a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from .data import Dataset
from .engine.activations import lean_activations
from .engine.attention import attend_lean
from .engine.loop import Stopped, stop_on_signal
from .engine.losses import head_loss, refuse_nan
from .engine.resume import load_state, save_state
from .engine.tracking import tracked
from .files import UserError, write_json
from .flops.costs import BatchCost, Cost, batch_costs
from .ledger import Ledger, Spender, default_ledger, spender_of
from .lora import apply_lora, trainable_parameters
from .models import Base, mixed_precision
from .runs import check_folder, describe, finish, one_writer
from .settings import STAGES, TrainSettings
from .text import Codec, fit_scale, numeric_tokens, right_pad, tokenise, windows


class TrainResult(NamedTuple):
    """What `train_lora` gives back."""

    model: nn.Module
    """The base with the best updates loaded, in evaluation mode."""
    history: pd.DataFrame
    """One row a validation: step, loss, val_loss, learning_rate, tokens_per_second, flops."""


@one_writer
def train_lora(
    base: Base,
    dataset: Dataset,
    settings: TrainSettings = STAGES["initial"],
    output_dir: Path | None = None,
    *,
    stage: str = "trial",
    resume: bool = False,
    progress: bool = True,
    track: str | None = None,
    ledger: Ledger | None = None,
) -> TrainResult:
    """Fine-tune a base on the training split of a dataset, and charge it to the base's ledger.

    Parameters
    ----------
    base : Base
        As `load_base` gives it; its model is adapted in place.
    dataset : Dataset
    settings : TrainSettings
    output_dir : Path, optional
        The run folder. Without one, nothing is written.
    stage : str
        Part of the plan that the run belongs to, for the ledger.
    resume : bool
        Go on from the last save in `output_dir`.
    progress : bool
        Show a bar with loss, tokens/s, FLOPs and the time left.
    track : str, optional
        Log losses to this tracker (`tracking.TRACKERS`) as well; needs `output_dir`.
    ledger : Ledger, optional
        Where it is charged; by default the base's own (`default_ledger`).

    Returns
    -------
    TrainResult

    Raises
    ------
    UserError
        If the folder holds a run already, or nothing to resume, or a run with other settings; or the loss diverges.
    CapReached
        If the steps up to the next save do not fit under the cap; what was saved before stays, to be gone on with.
    Stopped
        On Ctrl-C or SIGTERM, once the step in hand is done and everything is saved.
    """
    folder = Path(output_dir) if output_dir is not None else None
    if track and not folder:
        raise UserError("track needs the output_dir of the run")
    name = folder.resolve().name if folder else "unsaved"
    codec = Codec(fit_scale(dataset.part("train")), settings.precision)
    config = describe(base, dataset, settings, codec, stage)
    check_folder(folder, config, resume)
    work = Training(base, dataset, settings, codec)
    if resume:
        work.record = load_state(folder, work.parameters, work.optimizer, work.best)
    elif folder:
        write_json(folder / "config.json", config)

    record, spender = work.record, Spender(name, stage, config["settings_sha256"])
    ledger = ledger or default_ledger(base)
    started, tokens = time.monotonic(), 0
    shown = dict(desc=name, unit="step", disable=not progress, total=settings.max_steps, initial=record["step"])
    with stop_on_signal() as asked_to_stop, tqdm(**shown) as bar, tracked(track, folder, asdict(settings)) as log:
        while not work.finished:
            first = record["step"]
            stop = min(settings.max_steps, (first // settings.save_steps + 1) * settings.save_steps)
            saved = f"; --resume goes on from step {first:,}" if folder and first else ""
            place = f"stopped at step {first:,} of {settings.max_steps:,}{saved}. "
            with ledger.reserve(spender, place, **work.most(stop)) as bill:
                while (record["step"] < stop or record["due"]) and not asked_to_stop():
                    if record["due"]:
                        bill.add("validate", work.validate(asked_to_stop))
                        if not record["due"]:
                            log({"val_loss": record["history"][-1]["val_loss"]}, record["step"])
                        continue
                    spent = work.step()
                    bill.add("train", spent)
                    tokens += spent.tokens
                    record["speed"] = round(tokens / (time.monotonic() - started), 1)
                    bar.update()
                    now = (
                        f"loss {record['losses'][-1]:.3f}, {record['speed']:,.0f} tokens/s, {record['flops']:.2e} FLOPs"
                    )
                    bar.set_postfix_str(now, refresh=False)
                    log(
                        {"loss": record["losses"][-1], "learning_rate": settings.rate(record["step"] - 1)},
                        record["step"],
                    )
            if folder:
                save_state(folder, work.parameters, work.optimizer, record, work.best)
            if asked_to_stop() and not work.finished:
                saved = "; --resume goes on from there" if folder else ""
                raise Stopped(f"{name}: stopped at step {record['step']:,} of {settings.max_steps:,}{saved}")
    for key, p in work.parameters.items():
        p.data.copy_(work.best[key])
    history = pd.DataFrame(record["history"])
    if folder:
        finish(folder, history, config, settings, base)
    return TrainResult(base.model.eval(), history)


class Training:
    """A run in hand: what it trains, what is due next, and what the steps kept so far were and cost."""

    def __init__(self, base: Base, dataset: Dataset, settings: TrainSettings, codec: Codec) -> None:
        self.base, self.settings = base, settings
        self.codec, self.series = codec, dataset.part("train")
        self.train = _windows(self.series, codec, base, settings.max_length)
        augmented = settings.rescale or settings.random_start
        self.longest = settings.max_length if augmented else max(map(len, self.train))  # no batch costs more
        validation = _windows(dataset.part("validation"), codec, base, settings.max_length)
        chosen = np.random.default_rng(0).permutation(len(validation))[: settings.eval_windows]
        self.validation = [validation[i] for i in chosen]
        torch.manual_seed(settings.seed)
        self.parameters = trainable_parameters(apply_lora(base.model, settings))
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        # due: a validation is; losses: of the steps since the last validation
        self.record = {"step": 0, "flops": 0, "history": [], "best": None, "losses": [], "due": False, "speed": 0.0}
        self.characters = (
            torch.from_numpy(np.sort(numeric_tokens(codec, base.tokenizer))).to(base.model.device)
            if settings.numeric_head
            else None
        )
        self.step_cost, self.cost = batch_costs(base.model.config, settings.adaptation)
        if settings.gradient_checkpointing:
            # The re-entrant kind would want embeddings that learn.
            base.model.activation_checkpointing_enable({"use_reentrant": False})

    @property
    def finished(self) -> bool:
        return self.record["step"] == self.settings.max_steps and not self.record["due"]

    def most(self, stop: int) -> dict[str, Cost]:
        """What the steps up to `stop` and their validations can cost, by kind."""
        first, settings = self.record["step"], self.settings
        step = self.step_cost((settings.batch_size, self.longest))
        validations = settings.validations(first, stop) + self.record["due"]
        validation = _validation_at_most(self.validation, settings, self.cost)
        return {"train": step * (stop - first), "validate": validation * validations}

    def step(self) -> Cost:
        """Take one optimizer step."""
        step, settings = self.record["step"], self.settings
        torch.manual_seed(int(np.random.SeedSequence([settings.seed, step]).generate_state(1)[0]))  # dropout's
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(step)
        self.base.model.train()
        places = range(step * settings.batch_size, (step + 1) * settings.batch_size)
        with lean_activations(self.base.model), attend_lean(self.base.model):  # checkpoints are computed again inside
            with mixed_precision(self.base.model):
                loss, shape = _loss(self.base, [self.window(place) for place in places], self.characters)
            loss.backward()
        refuse_nan([loss.item()], step + 1)
        nn.utils.clip_grad_norm_(self.parameters.values(), settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if settings.average:
            for p in self.parameters.values():  # kept beside the moments, to be saved with them
                average = self.optimizer.state[p].setdefault("average", p.detach().clone())
                average.lerp_(p.detach(), 1 - settings.average)
        spent = self.step_cost(shape)
        self.record |= {"step": step + 1, "due": settings.validates(step + 1)}
        self.record["losses"].append(loss.item())
        self.record["flops"] += spent.flops
        return spent

    def window(self, place: int) -> np.ndarray:
        """The training window at a place in an endless row of shuffled epochs: its token ids."""
        settings = self.settings
        if not settings.rescale and not settings.random_start:
            return self.train[_pick(settings.seed, place, len(self.train))]
        draw = np.random.default_rng([settings.seed, 1, place])
        values = self.series[_pick(settings.seed, place, len(self.series))]
        values = values * np.exp(draw.uniform(-settings.rescale, settings.rescale))
        (ids,) = tokenise([self.codec.encode(values)], self.base.tokenizer)
        length = settings.max_length
        if settings.random_start:
            last = max(1, len(ids) - max(2, length // 4) + 1)  # so that a window is no mere stub
            start = draw.integers(last) * draw.integers(2)
            return ids[start : start + length]
        start, stop = draw.choice([w for w in windows(len(ids), length, length) if w[1] - w[0] > 1])
        return ids[start:stop]

    def validate(self, asked_to_stop: Callable[[], bool]) -> Cost:
        """Measure the validation loss and keep the weights if they are the best; when asked to stop, leave it due."""
        record = self.record
        with self._averaged() as weights:
            loss, spent = _validate(
                self.base, self.settings, self.validation, self.cost, asked_to_stop, self.characters
            )
        if loss is None:
            return spent
        record["flops"] += spent.flops
        row = {"step": record["step"], "loss": float(np.mean(record["losses"])), "val_loss": loss}
        row |= {"learning_rate": self.settings.rate(record["step"] - 1), "tokens_per_second": record["speed"]}
        record["history"].append(row | {"flops": record["flops"]})
        record |= {"losses": [], "due": False}
        if record["best"] is None or loss < record["best"]:
            record["best"] = loss
            self.best = weights
        return spent

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
    settings, parts = TrainSettings(lora_r=0), _windows(trajectories, codec, base, length)
    _, cost = batch_costs(base.model.config, settings.adaptation)
    ledger = ledger or default_ledger(base)
    with ledger.reserve(spender_of(base), validate=_validation_at_most(parts, settings, cost)) as bill:
        loss, spent = _validate(base, settings, parts, cost)
        bill.add("validate", spent)
    return loss


def _windows(trajectories: np.ndarray, codec: Codec, base: Base, length: int) -> list[np.ndarray]:
    """Token ids of consecutive windows, the last of each series as short as it must be (one token predicts nothing)."""
    series = tokenise([codec.encode(values) for values in trajectories], base.tokenizer)
    return [ids[start:stop] for ids in series for start, stop in windows(len(ids), length, length) if stop - start > 1]


def _pick(seed: int, place: int, n: int) -> int:
    """Which of `n` things stands at a place in an endless row of shuffled epochs."""
    return int(_epoch(seed, place // n, n)[place % n])


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def _loss(
    base: Base, batch: Sequence[np.ndarray], characters: torch.Tensor | None = None
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Mean cross-entropy over the tokens of a batch, padding left out, and the batch's shape."""
    ids, mask = (torch.from_numpy(a).to(base.model.device) for a in right_pad(batch, base.pad_id))  # (batch, length)
    # Padding comes after all that is scored, and a causal model never looks ahead: it needs no mask.
    hidden = base.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (batch, length, hidden)
    scored = mask[:, 1:] == 1
    loss = head_loss(hidden[:, :-1][scored], base.model.get_output_embeddings(), ids[:, 1:][scored], characters)
    return loss, tuple(ids.shape)


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
    return total / count, spent
