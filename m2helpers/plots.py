"""The pictures under their short name: `m2helpers.report.plots`."""

from .report.plots import *  # noqa: F403
