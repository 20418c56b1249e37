"""Forecasts of a user's own table: series by series, as DataFrames, and how good they would have been."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
