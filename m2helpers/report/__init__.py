"""What the records say: tables, findings, pictures, and the marked blocks of the pages."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
