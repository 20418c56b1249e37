"""Commands about the data: simulate it, write it as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from ..files import UserError, check_folder_writable, check_memory, check_writable, write_json, write_text
from ..paths import DATA_FILE
from .options import DataFile, File, Flag, Folder

_AsShipped = Annotated[int | None, arg(help_behavior_hint="(default: as in the shipped file)")]


@dataclass(frozen=True, kw_only=True)
class Simulate:
    """Write a dataset of simulated predator-prey systems."""

    out: File
    """HDF5 file to write."""
    systems: _AsShipped = None
    """Number of systems."""
    classic: Flag = False
    """Classic Lotka-Volterra: no saturation, no damping."""
    seed: _AsShipped = None
    """Seed of the draw of parameters."""
    overwrite: Flag = False
    """Replace --out if it exists."""

    def __call__(self) -> None:
        from ..simulator import SimulatorSettings, simulate, write_dataset

        if self.out.is_file() and not self.overwrite:
            raise UserError(f"--out {self.out}: exists; give another name, or --overwrite to replace it")
        check_writable(self.out)
        shipped = SimulatorSettings()
        settings = SimulatorSettings(
            systems=shipped.systems if self.systems is None else self.systems,
            classic=self.classic,
            seed=shipped.seed if self.seed is None else self.seed,
        )
        check_memory(f"--systems {settings.systems:,}", settings.systems * settings.steps * 100, "give fewer")
        time, trajectories, _ = simulate(settings)
        write_dataset(self.out, time, trajectories, settings)
        print(f"{self.out}: {len(trajectories):,} systems of {len(time)} steps")


@dataclass(frozen=True, kw_only=True)
class Encode:
    """Write each split as LLMTime text, one series a line."""

    output_dir: Folder
    """For the texts and their settings."""
    precision: int = 2
    """Decimals."""
    data: DataFile = DATA_FILE

    def __call__(self) -> None:
        check_folder_writable(self.output_dir)
        from ..data import load_dataset
        from ..text import Codec, fit_scale

        dataset = load_dataset(self.data)
        codec = Codec(fit_scale(dataset.part("train")), self.precision)
        splits = ("train", "validation", "test")
        texts = {split: [codec.encode(values) + "\n" for values in dataset.part(split)] for split in splits}
        for split, lines in texts.items():  # all or none: a value may be too large to be written
            write_text(self.output_dir / f"{split}.txt", "".join(lines))
            print(f"{self.output_dir / split}.txt: {len(lines)} series")
        about = {"scale": codec.scale, "precision": codec.precision, "data_sha256": dataset.sha256}
        separators = {"variable_separator": codec.variable_separator, "step_separator": codec.step_separator}
        write_json(self.output_dir / "settings.json", about | separators)
