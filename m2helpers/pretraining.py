"""Pre-training of the embedded base on synthetic series: from random weights, from where a run stopped, or on from a base.

The batch of every step is a function of the seed and the step alone, so a stopped run goes on exactly as if it had not
been stopped. The learning rate warms up, stays, and decays linearly to zero at the end (warm-up–stable–decay, Hu et al.,
MiniCPM, 2024).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import Qwen2ForCausalLM

from .attention import attend_lean
from .cards import model_card
from .costs import forward_cost
from .families import FAMILIES
from .files import UserError, read_json, write_json, write_text
from .flops import forward_account
from .models import Base, embedded_config, embedded_tokenizer, has_bfloat16, load_base, mixed_precision
from .muon import Muon
from .signals import Stopped, stop_on_signal
from .state import delete_state, has_state, load_state, save_state
from .synthetic import draw_texts
from .text import right_pad, tokenise

BLOCK = 256  # steps whose texts are drawn together: the integrators work on many systems at once
VALIDATION_SEED = 999_983  # a stream of its own, apart from every training seed


@dataclass(frozen=True)
class PretrainSettings:
    """What fixes a pre-training run. With the same settings on the same machine the weights are the same."""

    tokens: int = 8_500_000
    """Length of the schedule: tokens seen in all."""
    batch_size: int = 8
    """Texts a step."""
    max_length: int = 1024
    """Tokens a text."""
    learning_rate: float = 2.5e-3
    """Muon's, for the matrices of the layers, at the plateau."""
    adamw_learning_rate: float = 1e-3
    """AdamW's, for the embedding, norms and biases, at the plateau."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_fraction: float = 0.7
    """Share of the steps, at the end, over which the learning rate falls to zero."""
    weight_decay: float = 0.05
    """On the matrices of the layers, not on the embedding, norms and biases."""
    max_grad_norm: float = 1.0
    """Gradient clipping."""
    log_steps: int = 25
    """Steps between rows of the history."""
    eval_steps: int = 500
    """Steps between validations; a multiple of `log_steps`."""
    save_steps: int = 100
    """Steps between saves."""
    seed: int = 0
    """Of the weights and of the stream of texts."""

    @property
    def max_steps(self) -> int:
        """Optimizer steps that `tokens` buys."""
        return max(1, self.tokens // (self.batch_size * self.max_length))

    def schedule(self, step: int) -> float:
        """Share of the plateau's learning rate at a step, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        decay = min(1.0, (self.max_steps - step) / max(1.0, self.decay_fraction * self.max_steps))
        return min(warm, decay)


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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = {"settings": asdict(settings), "step": 0, "seconds": 0.0, "history": [], "before": []}
    if start is None:
        model = Qwen2ForCausalLM(embedded_config(**(architecture or {})))
    else:
        model, record["before"] = _go_on(start, settings)
    model.to(device).train()
    tokenizer = embedded_tokenizer()
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
    shown = dict(desc="pre-training", unit="step", mininterval=1, total=settings.max_steps, initial=record["step"])
    with stop_on_signal() as asked_to_stop, _no_denormals(), tqdm(**shown) as bar:
        while record["step"] < settings.max_steps:
            step = record["step"]
            for group in optimizer.param_groups:
                group["lr"] = group["plateau"] * settings.schedule(step)
            with mixed_precision(model):
                loss = _loss(model, _batch(settings, step, tokenizer), device)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
            with mixed_precision(model):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            record["step"] = step + 1
            record["seconds"] = before + time.monotonic() - started
            speed = record["step"] * settings.batch_size * settings.max_length / record["seconds"]
            bar.update()
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed:,.0f} tokens/s", refresh=False)
            last = record["step"] == settings.max_steps
            out_of_time = stop_after is not None and time.monotonic() - started > 60 * stop_after
            stop = out_of_time or asked_to_stop()
            validate = record["step"] % settings.eval_steps == 0 or last
            if record["step"] % settings.log_steps == 0 or validate:
                row = {"step": step + 1, "loss": float(np.mean(losses)), "val_loss": None, "tokens_per_second": speed}
                row["learning_rate"] = settings.learning_rate * settings.schedule(step)
                if validate:
                    record["loss_by_family"] = _validate(model, tokenizer, settings, device)
                    row["val_loss"] = float(np.mean(list(record["loss_by_family"].values())))
                    bar.write(
                        f"step {step + 1}: training loss {row['loss']:.4f}, validation loss {row['val_loss']:.4f}"
                    )
                record["history"].append(row)
                losses.clear()
            if record["step"] % settings.save_steps == 0 or last or stop:
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
    tokenizer.save_pretrained(output_dir)
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


def mixture_loss(base: Base, n_per_family: int = 2, length: int = 512) -> dict[str, float]:
    """Loss per token of a model on held-out texts of each pre-training family: what fine-tuning made it forget.

    It is charged to the base's ledger, as if every text had `length` tokens.

    Returns
    -------
    dict
        Family → mean cross-entropy in nats.
    """
    settings = PretrainSettings(batch_size=n_per_family, max_length=length)
    cost = forward_cost(base.model.config, n_per_family, length, loss=True) * len(FAMILIES)
    with base.ledger.reserve(base.spender, validate=cost) as bill:
        losses = _validate(base.model, base.tokenizer, settings, base.model.device)
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


@lru_cache(maxsize=1)
def _block(settings: PretrainSettings, index: int) -> list[str]:
    return draw_texts([settings.seed, index], BLOCK * settings.batch_size, settings.max_length)


def _batch(settings: PretrainSettings, step: int, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of a training step, each (batch, at most max_length)."""
    first = step % BLOCK * settings.batch_size
    texts = _block(settings, step // BLOCK)[first : first + settings.batch_size]
    return right_pad(tokenise(texts, tokenizer), tokenizer.pad_token_id)


def _loss(model, batch: tuple[np.ndarray, np.ndarray], device) -> torch.Tensor:
    ids, mask = (torch.from_numpy(a).to(device) for a in batch)  # (batch, length)
    with attend_lean(model):
        logits = model(input_ids=ids, use_cache=False).logits  # (batch, length, vocab)
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten())


@torch.no_grad()
def _validate(model, tokenizer, settings: PretrainSettings, device) -> dict[str, float]:
    was_training = model.training
    model.eval()
    losses = {}
    for number, name in enumerate(FAMILIES):
        texts = draw_texts(
            [VALIDATION_SEED, number], settings.batch_size, settings.max_length, family=name, precision=2
        )
        losses[name] = _loss(model, right_pad(tokenise(texts, tokenizer), tokenizer.pad_token_id), device).item()
    model.train(was_training)
    return losses


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
