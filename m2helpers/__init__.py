"""m2helpers: fine-tune a small language model on numbers, on your own machine, and know what it cost."""

import os
from importlib.metadata import PackageNotFoundError, version

import lazy_loader

# The public names stand in __init__.pyi. A module is imported when a name of its is first asked for, so that what needs
# no torch (the command line's help, the ledger) answers at once.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
try:
    __version__ = version("m2helpers")
except PackageNotFoundError:  # a checkout that is run without being installed
    __version__ = "0+unknown"

# Threads that spin while they wait keep their cores from other programs, and beside those everything takes many times as
# long (`bench threads`). The OpenMP library reads this as it is loaded, with torch, so it is set before anything is.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
