"""The ledger: what has been spent, by run and kind, under one cap that cannot be passed."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
