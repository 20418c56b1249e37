"""The command that tunes a base on instructions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ..files import check_folder_writable
from ..paths import INSTRUCTIONS
from ..settings import EMBEDDED_RATE, InstructSettings, default_model, instruct_settings
from .options import BaseName, Flag, Folder, changed, flags_of, show

_RowsFile = Annotated[Path, arg(metavar="FILE", help_behavior_hint="(default: the shipped rows)")]
_InstructFlags = Annotated[
    InstructSettings,
    flags_of(
        InstructSettings,
        "What fixes the run. The defaults below are those of common recipes; the embedded base, which is small and never "
        f"read a word, has a learning rate of {EMBEDDED_RATE:g}.",
        lambda setting: show(setting.default),
    ),
]


@dataclass(frozen=True, kw_only=True)
class Instruct:
    """Tune a base on instructions: LoRA over its weights in four bits (QLoRA)."""

    output_dir: Folder
    """Folder of the run: adapters/, adaptermodel.zip and the records."""
    train: _RowsFile = INSTRUCTIONS / "train.jsonl"
    """JSON lines with instruction, input and output, to train on."""
    val: _RowsFile = INSTRUCTIONS / "val.jsonl"
    """The same, to validate on."""
    resume: Flag = False
    """Continue a run that was stopped, from the last whole epoch."""
    model: BaseName = field(default_factory=default_model)
    settings: _InstructFlags

    def __call__(self) -> None:
        check_folder_writable(self.output_dir)
        from ..instruct.folders import parameter_line
        from ..instruct.quantised import load_for_tuning
        from ..instruct.rows import read_rows
        from ..instruct.tuning import tune

        rows = {"train": read_rows(self.train), "validation": read_rows(self.val)}
        settings = changed(instruct_settings(self.model), self.settings)
        done = tune(load_for_tuning(self.model, settings), rows, settings, self.output_dir, resume=self.resume)
        before, after = done.metrics["before"], done.metrics["after"]
        assert after is not None  # the run is done
        print(parameter_line(done.metrics))
        print(
            f"{self.output_dir}: exact answers {before['exact']:,} before, {after['exact']:,} after, of {after['rows']:,}; "
            f"validation loss {done.history['val_loss'].dropna().iloc[-1]:.4f}; {done.history['flops'].iloc[-1]:.3g} FLOPs; "
            f"adapter in {self.output_dir / 'adaptermodel.zip'}"
        )
