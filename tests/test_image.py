"""What goes into the image, and what the Dockerfile promises; tools/image.sh builds it and tries the rest."""

import re
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
DOCKERFILE = (CHECKOUT / "Dockerfile").read_text(encoding="utf-8")
PRIVATE = [
    "ledger.sqlite", "mine/ledger.sqlite-wal", "checkpoint/embedded/ledger.sqlite-shm", "checkpoint/x/state.safetensors", "a/b/state.previous.safetensors",
    ".env", "notebooks/.env", "dist/m2helpers.whl", "build/lib/a.py", ".venv/bin/python", ".git/config", "runs/.writer.part", "m2helpers/__pycache__/a.pyc",
    "m2helpers.egg-info/PKG-INFO", "docs/_build/html/index.html", "notebooks/.ipynb_checkpoints/a.ipynb",
]  # fmt: skip
SHIPPED = [
    "m2helpers/cli/parser.py", "checkpoint/embedded/base/model.safetensors", "checkpoint/embedded/final/adapter_model.safetensors", "data/lotka_volterra_data.h5",
    "notebooks/1_dataset_preprocess.ipynb", "docs/conf.py", "constraints.txt", "tests/conftest.py",
]  # fmt: skip


def _pattern(line):
    """A line of .dockerignore as Docker reads it: from the top of the context, ``**`` for any number of folders."""
    parts = []
    for part in line.strip("/").split("/"):
        parts.append("(?:[^/]+/)*" if part == "**" else re.escape(part).replace(r"\*", "[^/]*") + "/")
    return re.compile("".join(parts).removesuffix("/") + "(?:/.*)?")


def _ignored(path):
    lines = (CHECKOUT / ".dockerignore").read_text(encoding="utf-8").split()
    return any(_pattern(line).fullmatch(path) for line in lines)


@pytest.mark.parametrize("path", PRIVATE)
def test_what_is_private_or_built_stays_out_of_the_image_and_of_git(path):
    assert _ignored(path)
    if path.startswith(".git/"):
        return
    found = subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=CHECKOUT, capture_output=True)
    assert found.returncode in (0, 128)  # 128: no history here, as in an unpacked archive


@pytest.mark.parametrize("path", SHIPPED)
def test_what_is_needed_goes_in(path):
    assert (CHECKOUT / path).exists() and not _ignored(path)


def test_the_dockerfile_is_one_for_strangers():
    steps = re.findall(r"^(ARG|FROM|USER|COPY|RUN|EXPOSE|HEALTHCHECK|CMD|LABEL) (.*)", DOCKERFILE, re.MULTILINE)
    names = [name for name, _ in steps]
    assert ("ARG", "BASE=python:3.12-slim") in steps and ("FROM", "${BASE}") in steps
    assert ("ARG", "TORCH_INDEX=https://download.pytorch.org/whl/cpu") in steps  # CUDA is the argument, not the rule
    assert names.index("USER") < names.index("COPY") and not any(
        "root" in what for name, what in steps if name == "USER"
    )
    assert {"HEALTHCHECK", "LABEL", "EXPOSE"} <= set(names)
    copied = [what for name, what in steps if name == "COPY"]
    assert "requirements.txt constraints.txt" in copied[0] and copied[1].endswith(
        ". ."
    )  # a change of source installs nothing again
    assert DOCKERFILE.index("-r requirements.txt") < DOCKERFILE.index(copied[1])
