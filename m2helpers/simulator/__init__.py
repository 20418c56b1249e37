"""The equations, the simulator that made the shipped data, and the law of systems fitted to a training split."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
