"""`pytest --nbval` gives the notebooks' kernels the environment that tools/notebooks.py gives them."""

import os

from tools.notebooks import ENVIRONMENT


def pytest_configure(config):
    """Set it before the first kernel starts."""
    if config.getoption("nbval"):
        os.environ.update(ENVIRONMENT)
