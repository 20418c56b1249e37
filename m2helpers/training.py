"""Fine-tuning: LoRA updates and the head bias, trained on the text of many series.

The windows of a step, and its dropout, are functions of the seed and the step alone. So one seed gives one result on one
machine, and a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .data import Dataset
from .files import UserError, write_json
from .flops import forward_account
from .lora import WEIGHTS_NAME, apply_lora, load_weights, save_adapter, trainable_parameters
from .models import Base
from .runs import STAGES, STATE_NAME, TrainSettings, check_folder, describe, finish
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
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Fine-tune a base on the training split of a dataset.

    Parameters
    ----------
    base : Base
        As `load_base` gives it; its model is adapted in place.
    dataset : Dataset
    settings : TrainSettings
    output_dir : Path, optional
        The run folder. Without one, nothing is written.
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
    """
    folder = Path(output_dir) if output_dir is not None else None
    codec = Codec(fit_scale(dataset.part("train")), settings.precision)
    config = describe(base, dataset, settings, codec)
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
    cost = _forward_flops(base, settings)
    if resume:
        record = load_state(folder / STATE_NAME, parameters, optimizer)
    elif folder:
        write_json(folder / "config.json", config)
    best = {name: p.detach().clone() for name, p in parameters.items()}
    if record["best"] is not None:
        load_weights(best, folder / WEIGHTS_NAME)

    started, tokens = time.monotonic(), 0
    bar = tqdm(
        total=settings.max_steps,
        initial=record["step"],
        desc=folder.name if folder else "training",
        unit="step",
        disable=not progress,
    )
    while record["step"] < settings.max_steps:
        step = record["step"]
        torch.manual_seed(hash((settings.seed, step)) % 2**31)  # dropout, the same again after a resume
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        batch = [train[i] for i in _picks(settings.seed, step, settings.batch_size, len(train))]
        model.train()
        loss, shape = _loss(base, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record["losses"].append(loss.item())
        if not math.isfinite(record["losses"][-1]):
            raise UserError(f"step {step + 1}: the loss is no longer a number; use a smaller learning_rate")
        tokens += shape[0] * shape[1]
        record["flops"] += 3 * cost(shape)
        record["step"] = step + 1
        speed = tokens / (time.monotonic() - started)
        bar.update()
        bar.set_postfix_str(
            f"loss {record['losses'][-1]:.3f}, {speed:,.0f} tokens/s, {record['flops']:.2e} FLOPs", refresh=False
        )
        last = record["step"] == settings.max_steps
        if record["step"] % settings.eval_steps == 0 or last:
            val_loss, spent = _validate(base, settings, validation, cost)
            record["flops"] += spent
            row = {
                "step": record["step"],
                "loss": float(np.mean(record["losses"])),
                "val_loss": val_loss,
                "learning_rate": settings.rate(step),
            }
            record["history"].append(row | {"tokens_per_second": round(speed, 1), "flops": record["flops"]})
            record["losses"] = []
            if record["best"] is None or val_loss < record["best"]:
                record["best"] = val_loss
                best = {name: p.detach().clone() for name, p in parameters.items()}
                if folder:
                    save_adapter(model, folder, settings, base.name, base.sha256)
        if folder and (record["step"] % settings.save_steps == 0 or last):
            save_state(folder / STATE_NAME, parameters, optimizer, record)
    bar.close()
    for name, p in parameters.items():
        p.data.copy_(best[name])
    history = pd.DataFrame(record["history"])
    if folder:
        finish(folder, history, config, model)
    return TrainResult(model.eval(), history)


def series_loss(base: Base, codec: Codec, trajectories: np.ndarray, length: int = 512) -> float:
    """Mean loss per token of a model, in nats, on the text of series (n_series, n_steps, n_variables)."""
    return _validate(base, TrainSettings(), _windows(trajectories, codec, base, length), lambda shape: 0)[0]


def _windows(trajectories: np.ndarray, codec: Codec, base: Base, length: int) -> list[np.ndarray]:
    """Token ids of consecutive windows, the last of each series as short as it must be (one token predicts nothing)."""
    series = tokenise([codec.encode(values) for values in trajectories], base.tokenizer)
    return [ids[start:stop] for ids in series for start, stop in windows(len(ids), length, length) if stop - start > 1]


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


@torch.no_grad()
def _validate(
    base: Base, settings: TrainSettings, validation: list[np.ndarray], cost: Callable[[tuple[int, int]], int]
) -> tuple[float, int]:
    """Mean loss per token over the validation windows, and what it cost."""
    base.model.eval()
    total, count, flops = 0.0, 0, 0
    ordered = sorted(validation, key=len)
    for first in range(0, len(ordered), settings.batch_size):
        batch = ordered[first : first + settings.batch_size]
        loss, shape = _loss(base, batch)
        n = sum(len(w) - 1 for w in batch)
        total, count = total + loss.item() * n, count + n
        flops += cost(shape)
    return total / count, flops


def _forward_flops(base: Base, settings: TrainSettings) -> Callable[[tuple[int, int]], int]:
    """What a forward pass over a batch of some shape costs; remembers each, for as long as the run lasts."""
    adapted = {"lora_r": settings.lora_r, "target_modules": settings.target_modules}
    return lru_cache(None)(lambda shape: forward_account(base.model.config, *shape, loss=True, **adapted).forward)
