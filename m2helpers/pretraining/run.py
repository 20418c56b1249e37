"""Pre-training of the embedded base on synthetic series: from random weights, from where a run stopped, or on from a base.

The batch of every step is a function of the seed and the step alone, so a stopped run goes on exactly as if it had not
been stopped. The learning rate warms up, stays, and decays linearly to zero at the end (warm-up–stable–decay, Hu et al.,
MiniCPM, 2024).
"""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import Qwen2ForCausalLM

from ..engine.attention import attend_lean
from ..engine.loop import Stopped, stop_on_signal
from ..engine.losses import refuse_nan
from ..engine.resume import delete_state, has_state, load_state, save_state
from ..files import UserError, read_json, write_json, write_text
from ..flops.account import forward_account
from ..flops.costs import forward_cost
from ..ledger import Ledger, default_ledger, spender_of
from ..models import Base, choose_device, embedded_config, embedded_tokenizer, has_bfloat16, load_base, mixed_precision
from ..settings import PretrainSettings
from ..text import right_pad, tokenise
from .card import model_card
from .families import FAMILIES
from .muon import Muon
from .synthetic import draw_texts

BLOCK = 2048  # texts drawn together: the integrators work on many systems at once
CPU_TEXTS = 8  # of a step that a CPU works on at once: with 64, it took four times as long
VALIDATION_SEED = 999_983  # a stream of its own, apart from every training seed


def pretrain(
    settings: PretrainSettings,
    output_dir: Path,
    *,
    stop_after: float | None = None,
    resume: bool = False,
    start: str | None = None,
    architecture: dict | None = None,
) -> dict:
    """Train the embedded base and write it to `output_dir` in hub format, with tokenizer, record and model card.

    Parameters
    ----------
    settings : PretrainSettings
    output_dir : Path
        Where the model goes, and ``state.safetensors`` while it is being trained.
    stop_after : float, optional
        Minutes after which to save and stop; `resume` goes on from there.
    start : str, optional
        A base that was pre-trained here, to go on from its weights; give the run another seed than it had.
    architecture : dict, optional
        Changes to `embedded_config`, for tests.

    Returns
    -------
    dict
        The record: settings, history, validation loss by family, tokens, FLOPs, seconds, machine; under ``before``
        the sittings whose weights it went on from, under ``total`` the sums over all of them.

    Raises
    ------
    UserError
        If the folder holds another run, there is nothing to resume, or `start` has no record of its pre-training.
    Stopped
        On Ctrl-C or SIGTERM, after a save.
    """
    output_dir = Path(output_dir)
    if resume != has_state(output_dir):
        remedy = (
            "nothing to resume, leave --resume out"
            if resume
            else "holds a run that was stopped; add --resume or delete it"
        )
        raise UserError(f"{output_dir}: {remedy}")
    if not resume and (output_dir / "config.json").exists():
        raise UserError(f"{output_dir}: holds a model; choose another folder or delete it")
    torch.manual_seed(settings.seed)
    device = choose_device()
    record = {"settings": asdict(settings), "step": 0, "seconds": 0.0, "history": [], "before": []}
    if start is None:
        model = Qwen2ForCausalLM(embedded_config(**(architecture or {})))
    else:
        model, record["before"] = _go_on(start, settings)
    model.to(device).train()
    if device == "cuda":
        model.compile()  # inside its layers most of a GPU's time goes to reading and writing, which fused kernels save
    parameters = dict(model.named_parameters())
    optimizer = _optimizer(settings, parameters)
    if resume:
        asked, record = record, load_state(output_dir, parameters, optimizer)
        if record["before"] != asked["before"]:
            raise UserError(f"{output_dir}: started from other weights; give the same --model to resume")
        if record["settings"] != asked["settings"]:
            changed = [k for k, v in asked["settings"].items() if record["settings"].get(k) != v]
            raise UserError(
                f"{output_dir}: was started with other settings ({', '.join(changed)}); give the same ones to resume"
            )

    started, before = time.monotonic(), record["seconds"]
    losses = record.setdefault("losses", [])  # since the last row of the history
    texts = _texts(settings, record["step"], device)
    shown = dict(desc="pre-training", unit="step", mininterval=1, total=settings.max_steps, initial=record["step"])
    with stop_on_signal() as asked_to_stop, _no_denormals(), tqdm(**shown) as bar:
        while record["step"] < settings.max_steps:
            step = record["step"]
            for group in optimizer.param_groups:
                group["lr"] = group["plateau"] * settings.schedule(step)
            loss = _backward(model, next(texts))
            torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
            with mixed_precision(model):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            record["step"] = step + 1
            record["seconds"] = before + time.monotonic() - started
            speed = record["step"] * settings.batch_size * settings.max_length / record["seconds"]
            bar.update()
            last = record["step"] == settings.max_steps
            out_of_time = stop_after is not None and time.monotonic() - started > 60 * stop_after
            stop = out_of_time or asked_to_stop()
            validate = record["step"] % settings.eval_steps == 0 or last
            log = record["step"] % settings.log_steps == 0 or validate
            save = record["step"] % settings.save_steps == 0 or last or stop
            if log or save:
                losses[:] = map(float, losses)  # not at every step: reading one waits until a GPU has come to it
                refuse_nan(losses, step + 1)
            if log:
                row = {"step": step + 1, "loss": float(np.mean(losses)), "val_loss": None, "tokens_per_second": speed}
                row["learning_rate"] = settings.learning_rate * settings.schedule(step)
                bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
                if validate:
                    record["loss_by_family"] = _validate(model, settings)
                    row["val_loss"] = float(np.mean(list(record["loss_by_family"].values())))
                    bar.write(
                        f"step {step + 1}: training loss {row['loss']:.4f}, validation loss {row['val_loss']:.4f}"
                    )
                record["history"].append(row)
                losses.clear()
            if save:
                save_state(output_dir, parameters, optimizer, record)
            if stop and not last:
                break
    if record["step"] < settings.max_steps:
        if not out_of_time:
            raise Stopped(f"{output_dir}: stopped at step {record['step']:,}; --resume goes on from there")
        return record
    del record["losses"]  # empty by now
    record |= _account(settings, model)
    sittings = [*record["before"], record]
    record["total"] = {key: sum(sitting[key] for sitting in sittings) for key in ("tokens", "flops", "seconds")}
    model.eval().save_pretrained(output_dir)
    embedded_tokenizer().save_pretrained(output_dir)
    write_json(output_dir / "pretraining.json", record)
    write_text(output_dir / "README.md", model_card(record))
    delete_state(output_dir)
    return record


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


def _go_on(start: str, settings: PretrainSettings) -> tuple[Qwen2ForCausalLM, list[dict]]:
    """The weights of a base, and what every sitting before has cost, the latest last."""
    base = load_base(start, head_bias=False)
    path = Path(base.model.name_or_path) / "pretraining.json"
    if not path.is_file():
        raise UserError(
            f"{start}: no pretraining.json in {path.parent}; only a base pre-trained here can be gone on from"
        )
    last = read_json(path)
    if settings.seed in [sitting["seed"] for sitting in last["before"]] + [last["settings"]["seed"]]:
        raise UserError(f"{start}: has seen the texts of seed {settings.seed}; go on with another --seed")
    kept = {key: last[key] for key in ("tokens", "flops", "seconds", "machine")}
    kept |= {"seed": last["settings"]["seed"], "val_loss": last["history"][-1]["val_loss"], "sha256": base.sha256}
    return base.model, [*last["before"], kept]


def _optimizer(settings: PretrainSettings, parameters: dict[str, torch.nn.Parameter]) -> Muon:
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in parameters.items() if p.ndim != 2 or "embed" in name]
    groups = [
        {"params": matrices, "muon": True, "weight_decay": settings.weight_decay, "plateau": settings.learning_rate},
        {"params": others, "weight_decay": 0.0, "plateau": settings.adamw_learning_rate},
    ]
    return Muon(groups, lr=settings.learning_rate)


class _Blocks(Dataset):
    """Blocks of texts by number, each as token ids (texts, at most max_length): functions of the seed and the number."""

    def __init__(self, settings: PretrainSettings) -> None:
        self.settings = settings
        self.steps = max(1, BLOCK // settings.batch_size)  # that one block is enough for

    def __getitem__(self, index: int) -> np.ndarray:
        settings = self.settings
        return _ids([settings.seed, index], self.steps * settings.batch_size, settings.max_length)


def _texts(settings: PretrainSettings, first: int, device: str) -> Iterator[torch.Tensor]:
    """Token ids of the texts of every step from `first` on, each (batch, length).

    Beside a GPU, all cores but one draw texts ahead of it; a CPU that trains too is better left at that.
    """
    blocks = _Blocks(settings)
    loader = DataLoader(
        blocks,
        batch_size=None,  # a block is one already
        sampler=range(first // blocks.steps, -(-settings.max_steps // blocks.steps)),
        num_workers=(os.cpu_count() or 1) - 1 if device == "cuda" else 0,
        worker_init_fn=_settle,
    )
    skipped = first % blocks.steps * settings.batch_size
    for block in loader:
        yield from block[skipped:].split(settings.batch_size)
        skipped = 0


def _settle(worker: int) -> None:
    """A worker has one core, and leaves signals to the run, which saves first and ends its workers then."""
    threadpool_limits(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _ids(seed: list[int], n: int, length: int, **options) -> np.ndarray:
    """Texts as token ids, short ones padded: int16 (n, length), for they wait in memory."""
    tokenizer = embedded_tokenizer()
    ids, _ = right_pad(tokenise(draw_texts(seed, n, length, **options), tokenizer), tokenizer.pad_token_id)
    return ids.astype(np.int16)


def _backward(model, ids: torch.Tensor) -> torch.Tensor:
    """The loss of a step's texts (batch, length), its gradients added up; a CPU takes a few texts at a time, that fit its caches."""
    tokens, total = _scored(model, ids), torch.zeros((), device=model.device)
    for part in ids.split(len(ids) if model.device.type == "cuda" else CPU_TEXTS):
        with mixed_precision(model):
            loss = _loss(model, part) * (_scored(model, part) / tokens)
        loss.backward()
        total += loss.detach()
    return total


def _scored(model, ids: torch.Tensor) -> int:
    """How many tokens of texts are predicted from the ones before them."""
    return int((ids[:, 1:] != model.config.pad_token_id).sum())


def _loss(model, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the tokens of texts (batch, length), padding left out."""
    ids = ids.to(model.device, torch.int64)
    forward = model if model.training else model.forward  # only the shape of training is worth a compilation
    with attend_lean(model):
        logits = forward(input_ids=ids, use_cache=False).logits  # (batch, length, vocab)
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), ignore_index=model.config.pad_token_id
    )


@torch.no_grad()
def _validate(model, settings: PretrainSettings) -> dict[str, float]:
    was_training = model.training
    model.eval()
    shape = (settings.eval_texts, settings.max_length)
    losses = {name: _loss(model, _held_out(number, *shape)).item() for number, name in enumerate(FAMILIES)}
    model.train(was_training)
    return losses


@lru_cache(maxsize=2 * len(FAMILIES))
def _held_out(number: int, n: int, length: int) -> torch.Tensor:
    """Held-out texts of a family by its number: ids (n, length)."""
    return torch.from_numpy(_ids([VALIDATION_SEED, number], n, length, family=list(FAMILIES)[number], precision=2))


def _account(settings: PretrainSettings, model) -> dict:
    step = 3 * forward_account(model.config, settings.batch_size, settings.max_length, head_bias=False).forward
    device = model.device.type
    machine = f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    machine += ", bfloat16" if has_bfloat16(device) else ", float32"
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return {
        "architecture": {name: getattr(model.config, name) for name in sizes},
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": settings.max_steps * settings.batch_size * settings.max_length,
        "flops": settings.max_steps * step,
        "machine": machine,
        "torch": torch.__version__,
    }
