"""Fine-tuning: LoRA updates and the head bias, trained on the text of many series.

The windows of a step, and its dropout, are functions of the seed and the step alone. So one seed gives one result on one
machine, and a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .costs import Cost, forward_cost
from .data import Dataset
from .files import UserError, write_json
from .ledger import Spender
from .lora import WEIGHTS_NAME, apply_lora, load_weights, save_adapter, trainable_parameters
from .models import Base
from .runs import STATE_NAME, check_folder, describe, finish
from .settings import STAGES, TrainSettings
from .state import load_state, save_state
from .text import Codec, fit_scale, left_pad, tokenise, windows


class TrainResult(NamedTuple):
    """What `train_lora` gives back."""

    model: nn.Module
    """The base with the best updates loaded, in evaluation mode."""
    history: pd.DataFrame
    """One row a validation: step, loss, val_loss, learning_rate, tokens_per_second, flops."""


def train_lora(
    base: Base,
    dataset: Dataset,
    settings: TrainSettings = STAGES["initial"],
    output_dir: Path | None = None,
    *,
    stage: str = "trial",
    resume: bool = False,
    progress: bool = True,
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

    Returns
    -------
    TrainResult

    Raises
    ------
    UserError
        If the folder holds a run already, or nothing to resume, or a run with other settings; or the loss diverges.
    CapReached
        If the steps up to the next save do not fit under the cap; what was saved before stays, to be gone on with.
    """
    folder = Path(output_dir) if output_dir is not None else None
    codec = Codec(fit_scale(dataset.part("train")), settings.precision)
    config = describe(base, dataset, settings, codec, stage)
    check_folder(folder, config, resume)
    train = _windows(dataset.part("train"), codec, base, settings.max_length)
    validation = _windows(dataset.part("validation"), codec, base, settings.max_length)
    chosen = np.random.default_rng(0).permutation(len(validation))[: settings.eval_windows]
    validation = [validation[i] for i in chosen]

    torch.manual_seed(settings.seed)
    model = apply_lora(base.model, settings)
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    record = {"step": 0, "flops": 0, "history": [], "best": None, "losses": []}  # losses since the last validation
    cost = _forward_cost(base, settings)
    if resume:
        record = load_state(folder / STATE_NAME, parameters, optimizer)
    elif folder:
        write_json(folder / "config.json", config)
    best = {name: p.detach().clone() for name, p in parameters.items()}
    if record["best"] is not None:
        load_weights(best, folder / WEIGHTS_NAME)

    spender = Spender(folder.resolve().name if folder else "unsaved", stage, config["settings_sha256"])
    ledger = base.ledger
    full = cost((settings.batch_size, max(map(len, train))))  # no batch costs more
    validate_once = _validation_at_most(validation, settings, cost)
    started, tokens = time.monotonic(), 0
    name = folder.name if folder else "training"
    with tqdm(total=settings.max_steps, initial=record["step"], desc=name, unit="step", disable=not progress) as bar:
        while (first := record["step"]) < settings.max_steps:
            stop = min(settings.max_steps, (first // settings.save_steps + 1) * settings.save_steps)
            train_most, validate_most = full * (3 * (stop - first)), validate_once * settings.validations(first, stop)
            saved = f"; --resume goes on from step {first:,}" if folder and first else ""
            place = f"stopped at step {first:,} of {settings.max_steps:,}{saved}. "
            with ledger.reserve(spender, place, train=train_most, validate=validate_most) as bill:
                for step in range(first, stop):
                    loss, shape = _step(base, settings, train, step, parameters, optimizer)
                    bill.add("train", cost(shape) * 3)
                    if not math.isfinite(loss):
                        raise UserError(f"step {step + 1}: the loss is no longer a number; use a smaller learning_rate")
                    record["losses"].append(loss)
                    record["flops"] += 3 * cost(shape).flops
                    record["step"] = step + 1
                    tokens += shape[0] * shape[1]
                    speed = tokens / (time.monotonic() - started)
                    bar.update()
                    shown = f"loss {loss:.3f}, {speed:,.0f} tokens/s, {record['flops']:.2e} FLOPs"
                    bar.set_postfix_str(shown, refresh=False)
                    if not settings.validates(step + 1):
                        continue
                    val_loss, spent = _validate(base, settings, validation, cost)
                    bill.add("validate", spent)
                    record["flops"] += spent.flops
                    row = {"step": step + 1, "loss": float(np.mean(record["losses"])), "val_loss": val_loss}
                    row |= {"learning_rate": settings.rate(step), "tokens_per_second": round(speed, 1)}
                    record["history"].append(row | {"flops": record["flops"]})
                    record["losses"] = []
                    if record["best"] is None or val_loss < record["best"]:
                        record["best"] = val_loss
                        best = {name: p.detach().clone() for name, p in parameters.items()}
                        if folder:
                            save_adapter(model, folder, settings, base.name, base.sha256)
            if folder:
                save_state(folder / STATE_NAME, parameters, optimizer, record)
    for name, p in parameters.items():
        p.data.copy_(best[name])
    history = pd.DataFrame(record["history"])
    if folder:
        finish(folder, history, config, model)
    return TrainResult(model.eval(), history)


def series_loss(base: Base, codec: Codec, trajectories: np.ndarray, length: int = 512) -> float:
    """Mean loss per token of a model, in nats, on the text of series (n_series, n_steps, n_variables); charged."""
    settings, parts = TrainSettings(lora_r=0), _windows(trajectories, codec, base, length)
    cost = _forward_cost(base, settings)
    with base.ledger.reserve(base.spender, validate=_validation_at_most(parts, settings, cost)) as bill:
        loss, spent = _validate(base, settings, parts, cost)
        bill.add("validate", spent)
    return loss


def _windows(trajectories: np.ndarray, codec: Codec, base: Base, length: int) -> list[np.ndarray]:
    """Token ids of consecutive windows, the last of each series as short as it must be (one token predicts nothing)."""
    series = tokenise([codec.encode(values) for values in trajectories], base.tokenizer)
    return [ids[start:stop] for ids in series for start, stop in windows(len(ids), length, length) if stop - start > 1]


def _step(
    base: Base,
    settings: TrainSettings,
    train: Sequence[np.ndarray],
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> tuple[float, tuple[int, int]]:
    """Take one optimizer step; return the loss before it and the shape of the batch."""
    torch.manual_seed(hash((settings.seed, step)) % 2**31)  # dropout, the same again after a resume
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(step)
    base.model.train()
    loss, shape = _loss(base, [train[i] for i in _picks(settings.seed, step, settings.batch_size, len(train))])
    loss.backward()
    nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), shape


def _picks(seed: int, step: int, batch_size: int, n: int) -> list[int]:
    """The windows of one step: consecutive places in an endless row of shuffled epochs."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(_epoch(seed, place // n, n)[place % n]) for place in places]


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def _loss(base: Base, batch: Sequence[np.ndarray]) -> tuple[torch.Tensor, tuple[int, int]]:
    """Mean cross-entropy over the tokens of a batch, padding left out, and the batch's shape."""
    ids, mask = (torch.from_numpy(a).to(base.model.device) for a in left_pad(batch, base.pad_id))  # (batch, length)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (batch, length)
    attention = None if bool(mask.all()) else mask
    hidden = base.model.base_model(
        input_ids=ids, attention_mask=attention, position_ids=positions
    ).last_hidden_state  # (batch, length, hidden)
    scored = (mask[:, :-1] == 1) & (mask[:, 1:] == 1)  # a prediction needs a real token before it and one to be
    logits = base.model.get_output_embeddings()(hidden[:, :-1][scored])  # (scored tokens, vocab)
    return F.cross_entropy(logits.float(), ids[:, 1:][scored]), tuple(ids.shape)


def _validation_at_most(
    validation: Sequence[np.ndarray], settings: TrainSettings, cost: Callable[[tuple[int, int]], Cost]
) -> Cost:
    """What one validation can cost: every batch full, and as long as its longest window."""
    longest = max(map(len, validation))
    return cost((settings.batch_size, longest)) * math.ceil(len(validation) / settings.batch_size)


@torch.no_grad()
def _validate(
    base: Base, settings: TrainSettings, validation: list[np.ndarray], cost: Callable[[tuple[int, int]], Cost]
) -> tuple[float, Cost]:
    """Mean loss per token over the validation windows, and what it cost."""
    base.model.eval()
    total, count, spent = 0.0, 0, Cost()
    ordered = sorted(validation, key=len)
    for first in range(0, len(ordered), settings.batch_size):
        batch = ordered[first : first + settings.batch_size]
        loss, shape = _loss(base, batch)
        n = sum(len(w) - 1 for w in batch)
        total, count = total + loss.item() * n, count + n
        spent += cost(shape)
    return total / count, spent


def _forward_cost(base: Base, settings: TrainSettings) -> Callable[[tuple[int, int]], Cost]:
    """What a forward pass over a batch of some shape costs; remembers each, for as long as the run lasts."""
    adapted = {"lora_r": settings.lora_r, "target_modules": settings.target_modules}
    return lru_cache(None)(lambda shape: forward_cost(base.model.config, *shape, loss=True, **adapted))
