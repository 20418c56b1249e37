"""m2helpers: fine-tune a small language model on numbers, on your own machine, and know what it cost."""

from importlib.metadata import PackageNotFoundError, version

import lazy_loader

# The public names stand in __init__.pyi. A module is imported when a name of its is first asked for, so that what needs
# no torch (the command line's help, the ledger) answers at once.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
try:
    __version__ = version("m2helpers")
except PackageNotFoundError:  # a checkout that is run without being installed
    __version__ = "0+unknown"
