"""m2helpers: fine-tune a small language model on numbers, on your own machine, and know what it cost."""

from importlib import import_module

__version__ = "0.1.0"

# Public name → the module it lives in. A module is imported when a name of its is first asked for, so that what needs no
# torch (the command line's help, the ledger) answers at once.
_MODULES = {
    "data": ["load_dataset", "read_series"],
    "evaluation": ["evaluate"],
    "files": ["UserError"],
    "flops": ["forward_account", "generation_flops", "training_flops"],
    "forecasting": ["forecast", "sample_forecasts"],
    "ledger": ["Ledger", "default_ledger"],
    "lora": ["apply_lora", "load_adapter", "merge", "parameter_report", "save_adapter", "unmerge"],
    "models": ["Base", "add_head_bias", "default_model", "load_base"],
    "runs": ["Run", "load_run"],
    "settings": ["STAGES", "LoraSettings", "TrainSettings"],
    "text": ["Codec", "fit_scale"],
    "training": ["train_lora"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
