"""Tests and notebooks spend on a ledger of their own; `pytest --nbval` gives kernels what tools/notebooks.py gives them."""

import os
import tempfile

import m2helpers  # noqa: F401 (says how threads wait before anything imports torch)

_FOLDER = tempfile.TemporaryDirectory(prefix="m2helpers-")
os.environ.setdefault("M2_DEVICE", "cpu")  # where bases go: tests make tensors there, and committed outputs are a CPU's
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several side by side, each with a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    """Set it before the first test is imported and the first kernel starts."""
    os.environ["M2_LEDGER"] = os.path.join(_FOLDER.name, "ledger.sqlite")
    if config.getoption("nbval"):
        from tools.notebooks import ENVIRONMENT

        os.environ.update(ENVIRONMENT)


def pytest_unconfigure():
    """Delete the ledger."""
    _FOLDER.cleanup()
