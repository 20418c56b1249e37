"""Imports `bitsandbytes` without a word, before `peft` or `Trainer` does it in their way.

As it is imported it looks on a hub for a faster kernel, if the package `kernels` is there, and complains if that is not.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from types import ModuleType

from ..files import UserError


def import_bitsandbytes() -> ModuleType | Exception | None:
    """The package; None where it is not installed, and what went wrong where it does not work."""
    if "bitsandbytes" not in sys.modules and find_spec("bitsandbytes") is None:
        return None
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    hidden = "kernels" not in sys.modules
    if hidden:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # as Python marks what there is not
    try:
        import bitsandbytes
    except Exception as error:  # a library of its own that cannot be loaded: of any kind
        return error
    finally:
        if hidden:
            del sys.modules["kernels"]
    return bitsandbytes


def bitsandbytes() -> ModuleType:
    """The package.

    Raises
    ------
    UserError
        If it is not installed, or does not work on this machine.
    """
    found = import_bitsandbytes()
    if isinstance(found, ModuleType):
        return found
    reason = f" ({' '.join(str(found).split())[:160]})" if found else ""
    raise UserError(
        f"four_bit 1: needs bitsandbytes{', which does not work on this machine' if found else ''}{reason}; "
        "run 'pip install m2helpers[qlora]', or give --four-bit 0"
    )
