"""QLoRA on instructions: rows, a base in four bits, training with `transformers.Trainer`, and the adapter it leaves."""

import lazy_loader

from .quietly import import_bitsandbytes

import_bitsandbytes()  # before whatever else of this room imports it along with other things
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
