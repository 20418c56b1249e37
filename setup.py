"""What pyproject.toml cannot say: the base, the data and the records travel in the package, and stay where they are here."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SHIPPED = (
    # The base, and the runs of the three stages, which the examples forecast with: the weights that commands load.
    "checkpoint/embedded/base/model.safetensors",
    *(f"checkpoint/embedded/{stage}/adapter_model.safetensors" for stage in ("initial", "final", "extended")),
    # Of every run the records, which the tables are made from (1 MB); the other weights (9 MB) are for the site alone.
    "checkpoint/embedded/ledger.csv",
    "checkpoint/embedded/**/*.json",
    "checkpoint/embedded/**/history.csv",
    "checkpoint/embedded/**/README.md",
    "data/lotka_volterra_data.h5",
    "data/instructions/*.jsonl",
    "data/baselines/*-39f17ee6eb7b17fd.npz",  # of that data: the ODE fits take minutes
    "data/law/39f17ee6eb7b17fd.json",
    "data/floor/*-39f17ee6eb7b17fd.npz",
    "docs/*.json",
)


class BuildWithShipped(build_py):
    """Copies the shipped files to where `m2helpers.paths` looks for them when there is no checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # then there is a checkout
            return
        target = Path(self.build_lib, "m2helpers", "shipped")
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        for path in sorted({path for pattern in SHIPPED for path in HERE.glob(pattern) if path.is_file()}):
            copy = target / path.relative_to(HERE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


setup(cmdclass={"build_py": BuildWithShipped})
