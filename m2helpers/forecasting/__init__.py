"""Forecasts: a series, or a table of them, becomes text; the model writes on; what it wrote is read strictly back into numbers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
