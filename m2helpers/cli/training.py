"""Commands that train: pre-training, one fine-tuning run, plans of them; and the export of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import Field, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ..files import UserError, check_folder_writable
from ..paths import DATA_FILE, own_folder
from ..settings import AMORTISED, STAGES, PretrainSettings, TrainSettings, default_model
from .options import BaseName, DataFile, Flag, Folder, Track, changed, flags_of, one_of, show

if TYPE_CHECKING:
    from ..experiments.runner import Executor, Work


def _by_stage(setting: Field) -> str:
    """A setting in each stage of the embedded base's plan, once where they agree."""
    values = [show(getattr(stage, setting.name)) for stage in STAGES.values()]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


_PretrainFlags = Annotated[
    PretrainSettings,
    flags_of(PretrainSettings, "What fixes the run.", lambda setting: show(setting.default)),
]
_TrainFlags = Annotated[
    TrainSettings,
    flags_of(
        TrainSettings,
        "A setting that is not given stays as the --stage of the base's plan has it. The defaults below are those of the "
        f"embedded base ({' / '.join(STAGES)}); another base's plan has its own.",
        _by_stage,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Train the embedded base on synthetic series."""

    output_dir: Folder
    """Folder of the base, in hub format."""
    stop_after: Annotated[float | None, arg(metavar="MINUTES", help_behavior_hint="(default: at the end)")] = None
    """Save and stop then; --resume continues."""
    resume: Flag = False
    """Continue a run that was stopped, from its last save."""
    model: Annotated[
        str | None, arg(metavar="NAME_OR_DIR", help_behavior_hint="(default: start from random weights)")
    ] = None
    """Continue from this base, with another seed."""
    settings: _PretrainFlags

    def __call__(self) -> None:
        check_folder_writable(self.output_dir)
        from ..pretraining.run import pretrain

        settings = changed(PretrainSettings(), self.settings)
        record = pretrain(settings, self.output_dir, stop_after=self.stop_after, resume=self.resume, start=self.model)
        done = record["step"] == settings.max_steps
        print(
            f"{self.output_dir}: {'finished' if done else 'stopped, go on with --resume'} at step {record['step']:,} of {settings.max_steps:,}"
        )


@dataclass(frozen=True, kw_only=True)
class Train:
    """Fine-tune a base with LoRA."""

    output_dir: Folder
    """Folder of the run."""
    stage: Annotated[str, one_of((*STAGES, AMORTISED))] = "initial"
    """Stage of the base's plan whose settings to start from; amortised trains on series simulated from the data's fitted law."""
    resume: Flag = False
    """Continue a run that was stopped, from its last save."""
    track: Track = None
    compile: Literal["auto", "never"] = "auto"
    """auto compiles the training step on a GPU, which takes a minute or so; on a CPU nothing is compiled."""
    data: DataFile = DATA_FILE
    model: BaseName = field(default_factory=default_model)
    settings: _TrainFlags

    def __call__(self) -> None:
        check_folder_writable(self.output_dir)
        from ..data import load_dataset
        from ..experiments.planning import plan_of
        from ..models import load_base
        from ..simulator import law_of
        from ..training import train_lora

        planned = getattr(plan_of(self.model), self.stage)  # learning rates that suit the base
        if planned is None:
            raise UserError(f"--stage {self.stage}: the plan of {self.model} has no such run; give initial or final")
        settings, dataset = changed(planned, self.settings), load_dataset(self.data)
        result = train_lora(
            load_base(self.model),
            dataset,
            settings,
            self.output_dir,
            stage=self.stage,
            law=law_of(dataset) if self.stage == AMORTISED else None,
            resume=self.resume,
            track=self.track,
            compiled=self.compile == "auto",
        )
        best = result.history["val_loss"].min()
        print(f"{self.output_dir}: best validation loss {best:.4f}, {result.history['flops'].iloc[-1]:.3g} FLOPs")


@dataclass(frozen=True, kw_only=True)
class Experiments:
    """A whole plan: untrained, initial, grid, context, precision, final, extended, and their measurements."""

    output_dir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: checkpoint/<base>)")] = None
    """For the folders of the runs."""
    plan: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the base's)")] = None
    """embedded or qwen2.5-0.5b."""
    resume: Flag = False
    """Continue a run that was stopped, from its last save."""
    track: Track = None
    seeds: int = 1
    """Number of seeds for each of the long runs at the end."""
    cluster: Annotated[Literal["ray"] | None, arg(help_behavior_hint="(default: one run after another)")] = None
    """ray: runs side by side, on the cluster that RAY_ADDRESS names, or the cores of this machine."""
    cpus_per_run: int = 1
    """Cores of each run on a cluster, and its number of threads."""
    gpus_per_run: Annotated[float | None, arg(metavar="N", help_behavior_hint="(default: 1 where there is one)")] = None
    """GPUs of each run on a cluster; with 0, it runs on the CPU."""
    data: DataFile = DATA_FILE
    model: BaseName = field(default_factory=default_model)

    def __call__(self) -> None:
        self._run_stages()

    def _run_stages(self, stages: Sequence[str] | None = None) -> None:
        from ..data import load_dataset
        from ..experiments.planning import STAGE_ORDER, find_plan, plan_of
        from ..experiments.runner import run_plan, sweep_table
        from ..models import fetch_base

        if self.output_dir is None:
            fetch_base(self.model)  # its weights say which folder is its own
        folder = self.output_dir or Path(os.path.relpath(own_folder(self.model)))  # records hold it
        check_folder_writable(folder)
        plan = replace(find_plan(self.plan) if self.plan else plan_of(self.model), seeds=self.seeds)
        if stages and not plan.runs_of(stages):
            raise UserError(
                f"sweep {', '.join(stages)}: this plan has no such runs; choose another sweep or --plan embedded"
            )
        run_plan(
            plan,
            self.model,
            load_dataset(self.data),
            folder,
            stages=stages or STAGE_ORDER,
            resume=self.resume,
            track=self.track,
            executor=self._executor(),
        )
        for kind in ("sweep", "ablation"):
            table = sweep_table(folder, kind)
            if len(table):
                print(table.to_string(index=False, float_format="{:.4g}".format))
        print(f"{folder}: done")

    def _executor(self) -> Callable[[Work], AbstractContextManager[Executor]]:
        from ..experiments.runner import in_turn

        if self.cluster is None:
            return in_turn
        from ..experiments.cluster import on_ray
        from ..models import choose_device

        gpus = float(choose_device() == "cuda") if self.gpus_per_run is None else self.gpus_per_run
        if self.cpus_per_run < 1 or gpus < 0:
            raise UserError(f"--cpus-per-run {self.cpus_per_run}, --gpus-per-run {gpus:g}: give 1 or more, 0 or more")
        return partial(on_ray, cpus=self.cpus_per_run, gpus=gpus)


@dataclass(frozen=True, kw_only=True)
class Sweep(Experiments):
    """One part of a plan: learning rate x rank, context length, decimals, or changes to the final setting."""

    sweep: Positional[Literal["grid", "context", "precision", "ablation"]]
    """Which part."""

    def __call__(self) -> None:
        self._run_stages([self.sweep])


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run as a plain model that transformers loads by itself."""

    run: Folder
    """Folder of a finished run."""
    output_dir: Folder
    """For the model."""

    def __call__(self) -> None:
        check_folder_writable(self.output_dir)
        from ..runs import export_run

        export_run(self.run, self.output_dir)
        print(f"{self.output_dir}: a plain model for transformers, updates merged")
