"""Instruction tuning with `transformers.Trainer`: LoRA over a base in four bits, every batch of it on the ledger.

Unlike fine-tuning (`m2helpers.training`), which writes its own loop to be read, this follows the usual recipe with the usual tools. What it adds
is the bill, a stop between two steps, and results that are the same whether or not a run was stopped after an epoch. Several
processes share the rows of a step, as `Trainer` deals them out.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast

import pandas as pd
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..engine.loop import Stopped, stop_on_signal
from ..engine.losses import refuse_nan
from ..engine.processes import all_there, any_of, by_first, count, end, everyones, rank, sums
from ..engine.writer import one_writer
from ..files import UserError, write_json
from ..flops.costs import BatchCost, Cost
from ..ledger import Bill, Ledger, Spender, default_ledger
from ..models import Base
from ..settings import InstructSettings
from . import folders
from .answers import Answered, answer, cost_at_most, count_exact
from .prices import Prices
from .quantised import add_adapter, compute_dtype, four_bit_weights
from .rows import Collator, Row, Tokens, end_and_pad, tokenise_rows

STAGE = "instruct"


class Tuned(NamedTuple):
    """What `tune` gives back."""

    model: PreTrainedModel
    """A `peft.PeftModel` with the base inside, in evaluation mode."""
    history: pd.DataFrame
    """A row wherever something was logged: step, epoch, loss, val_loss, learning_rate, seconds, flops."""
    metrics: folders.Metrics


@one_writer
def tune(
    base: Base,
    rows: dict[str, list[Row]],
    settings: InstructSettings,
    output_dir: Path | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    ledger: Ledger | None = None,
) -> Tuned:
    """Tune a base on instructions, and charge it to the base's ledger.

    Parameters
    ----------
    base : Base
        As `quantised.load_for_tuning` gives it for the same settings; its model is adapted in place.
    rows : dict of str to list of Row
        ``train`` and ``validation``, as `rows.read_rows` gives them.
    settings : InstructSettings
    output_dir : Path, optional
        For ``adapters/``, ``adaptermodel.zip`` and the records. Without one, nothing is kept.
    resume : bool
        Go on from the last epoch that was saved in `output_dir`.
    progress : bool
        Show a bar with the loss and the time left.
    ledger : Ledger, optional
        Where it is charged; by default the base's own.

    Raises
    ------
    UserError
        If the folder holds a run already, or nothing to resume, or a run with other settings; or a response has no room.
    Diverged
        If the loss is no longer a finite number.
    CapReached
        If the next epoch does not fit under the cap; those before it stay, to be resumed.
    Stopped
        On Ctrl-C or SIGTERM, once the step in hand is done.
    """
    output_dir = Path(output_dir) if output_dir is not None else None
    config = folders.describe(base, rows, settings)
    last = by_first(lambda: folders.check(output_dir, config, resume))
    name = output_dir.resolve().name if output_dir else "unsaved"
    tokens = {part: tokenise_rows(r, base.tokenizer, settings.max_length, part) for part, r in rows.items()}
    work = _Work(base, rows, tokens, settings, ledger, Spender(name, STAGE, config["settings_sha256"]))
    first = rank() == 0
    if output_dir and first:
        write_json(output_dir / folders.CONFIG_NAME, config)
    before = folders.read_metrics(output_dir)["before"] if output_dir and last else work.answer()
    counts = cast(Any, work.model).get_nb_trainable_parameters()
    metrics: folders.Metrics = {"trainable": counts[0], "parameters": counts[1], "before": before, "after": None}
    if output_dir and last is None and first:
        write_json(output_dir / folders.METRICS_NAME, metrics)
    with tempfile.TemporaryDirectory() as scratch, stop_on_signal() as asked_to_stop:
        trainer = _trainer(work, Path(output_dir or scratch), save=bool(output_dir), label=name)
        charge = _Charge(trainer, asked_to_stop, progress)
        trainer.add_callback(charge)
        with trainer.stack, charge.bar, all_there():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    history = folders.history_of(trainer.state.log_history)
    metrics["after"] = work.answer()
    if output_dir and first:
        folders.finish(output_dir, work.model, base, config, history, metrics)
    return Tuned(work.model.eval(), history, metrics)


class _Work:
    """What a run works with: the adapted model, its rows, and what they cost."""

    def __init__(
        self,
        base: Base,
        rows: dict[str, list[Row]],
        tokens: dict[str, list[Tokens]],
        settings: InstructSettings,
        ledger: Ledger | None,
        spender: Spender,
    ) -> None:
        self.base, self.settings, self.ledger, self.spender = base, settings, ledger, spender
        self.batch_size, self.accumulation = _shares(settings)
        self.prices = Prices(base.model.config, settings.adaptation, four_bit_weights(base.model))
        self.train = tokens["train"] if settings.response_only else [row._replace(prompt=0) for row in tokens["train"]]
        self.validation = tokens["validation"]
        self.asked = rows["validation"][: settings.answers]
        used = {int(token) for row in self.train for token in row.ids}
        self.model = add_adapter(base.model, settings, used)

    def epoch_cost(self) -> dict[str, Cost]:
        """The most that the next epoch can cost, by kind."""
        lengths = [[len(row.ids) for row in rows] for rows in (self.train, self.validation)]
        return self.prices.epoch(lengths[0], lengths[1], (self.batch_size, self.settings.batch_size), count())

    def reserve(self, stack: ExitStack, place: str = "", **most: Cost) -> Bill | None:
        """Reserve costs until a stack is closed; of several processes, the first has the bill."""
        bill = None

        def reserve() -> None:
            nonlocal bill
            self.ledger = self.ledger or default_ledger(self.base)
            bill = stack.enter_context(self.ledger.reserve(self.spender, place, **most))

        by_first(reserve)
        return bill

    def answer(self) -> Answered:
        """Answer the validation rows as the model now is."""
        tokens = self.validation[: len(self.asked)]
        with ExitStack() as stack:
            bill = self.reserve(stack, generate=cost_at_most(tokens, self.prices))
            answers = answer(self.model, self.base.tokenizer, tokens, self.prices, bill) if tokens else []
        return count_exact(self.asked, answers)


def _shares(settings: InstructSettings) -> tuple[int, int]:
    """Rows of a forward pass, and passes of a step, for one of several processes: passes are dealt out first, then rows."""
    together = math.gcd(settings.accumulation, count())
    rows, left = divmod(settings.batch_size, count() // together)
    if left:
        shared = f"accumulation {settings.accumulation} × batch_size {settings.batch_size}"
        end(
            UserError(
                f"{shared}: not to be shared evenly by {count()} processes; give a multiple of that as accumulation"
            )
        )
    return rows, settings.accumulation // together


class _Trainer(Trainer):
    """Trainer that puts every batch on a bill."""

    work: _Work
    bill: Bill | None = None
    stack: ExitStack
    flops: int = 0
    """Of training and validation, of the steps that are kept."""
    label: str

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> torch.Tensor:
        """Take a step's forward and backward pass; a loss that is no number ends the run (`Diverged`)."""
        self._add("train", self.work.prices.step, inputs)
        loss = super().training_step(model, inputs, *rest, **named)
        refuse_nan(sums([loss.item()]), self.state.global_step + 1)
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> tuple:
        """The loss of a validation batch."""
        self._add("validate", self.work.prices.forward, inputs)
        return super().prediction_step(model, inputs, *rest, **named)

    def log(self, logs: dict[str, float], *rest: Any, **named: Any) -> None:
        """Log, with what has been spent; it is saved with the rest, and so survives a stop."""
        super().log(logs | {"flops": self.flops}, *rest, **named)

    def _add(self, kind: str, price: BatchCost, inputs: dict[str, Any]) -> None:
        for shape in everyones(tuple(inputs["input_ids"].shape)):
            cost = price(shape)
            if self.bill:
                self.bill.add(kind, cost)
            self.flops += cost.flops


def _trainer(work: _Work, folder: Path, *, save: bool, label: str) -> _Trainer:
    settings, device = work.settings, work.model.device.type
    half = compute_dtype(device)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=work.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=work.accumulation,
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        lr_scheduler_type="linear",
        fp16=half == torch.float16,
        bf16=half == torch.bfloat16,
        logging_steps=10,
        logging_nan_inf_filter=False,  # it would replace a loss that is no number
        eval_strategy="epoch",
        save_strategy="epoch" if save else "no",
        prediction_loss_only=True,
        seed=settings.seed,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )
    # Several processes have read the same frozen weights: they need not send them, and could not once four-bit ones are repacked.
    kept = [name for name, p in work.model.named_parameters() if not p.requires_grad]
    kept += [name for name, _ in work.model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(work.model, kept)
    trainer = _Trainer(
        work.model,
        arguments,
        data_collator=Collator(end_and_pad(work.base.tokenizer)[1]),
        train_dataset=cast(Any, work.train),  # a list has all that is asked of a dataset
        eval_dataset=cast(Any, work.validation),
    )
    trainer.work, trainer.stack, trainer.label = work, ExitStack(), label
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Charge(TrainerCallback):
    """Reserves each epoch on the ledger before it begins, shows how far the run is, and stops it between two steps."""

    def __init__(self, trainer: _Trainer, asked_to_stop: Callable[[], bool], progress: bool) -> None:
        self.trainer, self.asked_to_stop = trainer, asked_to_stop
        self.bar = tqdm(desc=trainer.label, unit="step", mininterval=1, disable=not progress or rank() > 0)
        self.resumable = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take up what an earlier sitting had come to."""
        self.trainer.flops = int(state.log_history[-1]["flops"]) if state.log_history else 0
        self.bar.reset(state.max_steps)
        self.bar.update(state.global_step)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Settle the epoch before, and reserve what this one can cost."""
        trainer, work, done = self.trainer, self.trainer.work, round(state.epoch or 0)
        if done and args.save_strategy != "no":
            self.resumable = f"; --resume goes on after epoch {done}"
        trainer.stack.close()
        place = f"stopped at step {state.global_step:,} of {state.max_steps:,}{self.resumable}. "
        trainer.bill = work.reserve(trainer.stack, place, **work.epoch_cost())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop if that was asked for."""
        self.bar.update()
        if any_of(self.asked_to_stop()) and state.global_step < state.max_steps:
            place = f"stopped at step {state.global_step:,} of {state.max_steps:,}"
            remedy = self.resumable or "; nothing is saved before the first epoch ends: begin again"
            end(Stopped(f"{self.trainer.label}: {place}{remedy}"))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let the mean of the losses begin anew, as it does after a stop."""
        control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Show the last loss."""
        known = {name: value for name, value in (logs or {}).items() if name in ("loss", "eval_loss")}
        if known:
            self.bar.set_postfix(known, refresh=False)
