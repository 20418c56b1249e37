"""Training and decoding by other packages, at their best, beside ours: `peft` eager and compiled, TRL, `generate` with a static cache.

Every side does the same work in the same process, in turns. Where it compiles something, the repetitions before those that count do.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..data import Dataset
from ..evaluation.protocols import make_cases
from ..files import UserError
from ..flops.architecture import QWEN_05B
from ..flops.backward import lora_step_flops
from ..forecasting import generate
from ..ledger import Ledger
from ..models import Base, has_bfloat16
from ..settings import TrainSettings
from ..text import Codec, fit_scale, tokenise
from ..training import Training
from .timing import Row, matmul_peak, peak_memory, rows_of, timed, wait

NUMERIC = "numeric head"
Side = Callable[[], list[float]]
"""One turn of a side: seconds of each repetition, those to warm up first."""


def compare_training(
    make: Callable[[], Base], dataset: Dataset, settings: TrainSettings, *, rounds: int, steps: int, warm: int
) -> list[Row]:
    """Seconds of a training step with full windows, by `peft`, by TRL, and ours; how much of the machine's peak that is, and memory.

    `make` gives Qwen2.5-0.5B anew, with a head bias: ours trains it, the others leave it alone. Each turn takes `warm` steps first.
    """
    codec, peak = Codec(fit_scale(dataset.part("train"))), matmul_peak()
    settings = replace(settings, max_steps=warm + steps)
    numeric = replace(settings, numeric_head=True)
    sides: dict[str, Side] = {
        "peft + Trainer": lambda: trainer_steps(make(), codec, dataset, settings),
        "peft + Trainer, torch.compile": lambda: trainer_steps(make(), codec, dataset, settings, torch_compile=True),
        "TRL SFTTrainer, chunked loss": lambda: trainer_steps(make(), codec, dataset, settings, trl=True),
        "full vocabulary": lambda: our_steps(make(), codec, dataset, settings),
        NUMERIC: lambda: our_steps(make(), codec, dataset, numeric),
    }
    sizes = (settings.batch_size, settings.max_length)
    rows = _turns(sides, rounds, warm)
    for row in rows:
        scored = len(codec.alphabet) if row["side"] == NUMERIC else None
        work = lora_step_flops(QWEN_05B, *sizes, lora_r=settings.lora_r, vocabulary=scored)
        row |= {"work": "{} × {}".format(*sizes), "rows": sizes[0], "length": sizes[1], "numeric": scored is not None}
        row["utilisation"] = work / row["seconds"] / peak
    return rows


def _turns(sides: Mapping[str, Side], rounds: int, warm: int) -> list[Row]:
    """A row a side: what counts of its turns, the longest of the rest, and the most memory."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    first: dict[str, float] = dict.fromkeys(sides, 0.0)
    peaks: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            with peak_memory(peaks[name]):
                times = run()
            first[name] = max(first[name], *times[:warm])
            seconds[name] += times[warm:]
    rows = rows_of(seconds)
    for row in rows:
        row["first_seconds"] = first[row["side"]]
        if peaks[row["side"]]:
            row["peak_gb"] = max(peaks[row["side"]])
    return rows


def our_steps(base: Base, codec: Codec, dataset: Dataset, settings: TrainSettings) -> list[float]:
    """Seconds of `max_steps` steps of ours, all windows full; compiled on a GPU."""
    work = Training(base, dataset, settings, codec)
    work.train = [w for w in work.train if len(w) == settings.max_length]
    return [timed(work.step) for _ in range(settings.max_steps)]


def trainer_steps(
    base: Base, codec: Codec, dataset: Dataset, settings: TrainSettings, *, trl: bool = False, **options: Any
) -> list[float]:
    """Seconds of `max_steps` steps on the same windows and in the same precision by `peft` and `transformers.Trainer`, or TRL's.

    Options are those of `TrainingArguments`.
    """
    series = tokenise([codec.encode(values) for values in dataset.part("train")], base.tokenizer)
    windows = [ids[: settings.max_length].tolist() for ids in series]
    rows = [{"input_ids": ids, "labels": ids} for ids in windows if len(ids) == settings.max_length]
    adapter = LoraConfig(
        r=settings.lora_r,
        lora_alpha=int(settings.lora_alpha),
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
    )
    clock = _StepClock()
    with tempfile.TemporaryDirectory() as folder:
        options |= dict(
            output_dir=folder,
            per_device_train_batch_size=settings.batch_size,
            max_steps=settings.max_steps,
            use_cpu=base.model.device.type == "cpu",
            bf16=has_bfloat16(base.model.device.type),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = _trl_trainer if trl else _trainer
        trainer(base, adapter, rows, options, clock).train()
    return clock.seconds


def _trainer(
    base: Base, adapter: LoraConfig, rows: list[dict], options: dict[str, Any], clock: TrainerCallback
) -> Trainer:
    model = get_peft_model(base.model, adapter)
    return Trainer(model, TrainingArguments(**options), train_dataset=rows, callbacks=[clock])


def _trl_trainer(
    base: Base, adapter: LoraConfig, rows: list[dict], options: dict[str, Any], clock: TrainerCallback
) -> Trainer:
    try:
        import datasets
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer
    except ImportError:
        raise UserError("trl: the package is not installed; run 'pip install trl'") from None
    # Its own default would compute the layers twice, to save memory.
    arguments = SFTConfig(**options, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(
        base.model,
        arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=base.tokenizer,
        peft_config=adapter,
        callbacks=[clock],
    )


class _StepClock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        wait()
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        wait()
        self.seconds.append(time.perf_counter() - self.started)


def compare_decoding(
    base: Base, dataset: Dataset, ledger: Ledger, n: int, *, rounds: int, warm: int, work: str
) -> list[Row]:
    """Seconds of P5 forecasts of `n` windows at S = 512 in one batch: `generate`, the same with a static cache and compiled, ours."""
    codec = Codec(fit_scale(dataset.part("train")))
    contexts = [case.context for case in make_cases(dataset.part("validation"), codec, "P5", 512)[:n]]

    def ours() -> int:
        made = generate(base, codec, contexts, 6, 2, batch_size=n, constrained=True, ledger=ledger)
        return max(len(g.text) for g in made)

    longest = ours()  # the others write as many tokens as the longest forecast has
    runs: dict[str, Callable[[], object]] = {
        "transformers.generate": partial(generate_greedily, base, contexts, longest),
        "generate, static cache + torch.compile": partial(
            generate_greedily, base, contexts, longest, cache_implementation="static"
        ),
        "constrained": ours,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warm + rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    rows = rows_of({name: times[warm:] for name, times in seconds.items()})
    for row in rows:
        row |= {"work": work, "first_seconds": max(seconds[row["side"]][:warm])}
    return rows


def generate_greedily(base: Base, contexts: list[str], new_tokens: int, **options: Any) -> None:
    """Greedy decoding by `transformers`, so many tokens a row; with a static cache it compiles its step on a GPU by itself."""
    base.tokenizer.padding_side = "left"
    batch = base.tokenizer(contexts, return_tensors="pt", padding=True).to(base.model.device)
    how = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=base.pad_id)
    with torch.inference_mode():
        base.model.generate(**batch, **how, **options)  # type: ignore[operator]  # a causal model has it, not every PreTrainedModel
