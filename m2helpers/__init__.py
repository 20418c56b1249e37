"""m2helpers: fine-tune a small language model on numbers, on your own machine, and know what it cost."""

from .data import load_dataset, read_series
from .evaluation import evaluate
from .files import UserError
from .flops import forward_account, generation_flops, training_flops
from .forecasting import forecast, sample_forecasts
from .lora import LoraSettings, apply_lora, load_adapter, merge, parameter_report, save_adapter, unmerge
from .models import Base, add_head_bias, default_model, load_base
from .runs import STAGES, Run, TrainSettings, load_run
from .text import Codec, fit_scale
from .training import train_lora

__version__ = "0.1.0"

__all__ = [
    "STAGES",
    "Base",
    "Codec",
    "LoraSettings",
    "Run",
    "TrainSettings",
    "UserError",
    "add_head_bias",
    "apply_lora",
    "default_model",
    "evaluate",
    "fit_scale",
    "forecast",
    "forward_account",
    "generation_flops",
    "load_adapter",
    "load_base",
    "load_dataset",
    "load_run",
    "merge",
    "parameter_report",
    "read_series",
    "sample_forecasts",
    "save_adapter",
    "train_lora",
    "training_flops",
    "unmerge",
]
