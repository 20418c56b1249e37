"""Tests and notebooks spend on a ledger of their own; `pytest --nbval` gives kernels what tools/notebooks.py gives them."""

import os
import tempfile

from tools.notebooks import ENVIRONMENT

_FOLDER = tempfile.TemporaryDirectory(prefix="m2helpers-")


def pytest_configure(config):
    """Set it before the first test is imported and the first kernel starts."""
    os.environ["M2_LEDGER"] = os.path.join(_FOLDER.name, "ledger.sqlite")
    if config.getoption("nbval"):
        os.environ.update(ENVIRONMENT)


def pytest_unconfigure():
    """Delete the ledger."""
    _FOLDER.cleanup()
