"""Fine-tuning: LoRA updates and the head bias, trained on the text of many series."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
