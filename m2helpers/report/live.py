"""What the live page needs of the records: a run's merged weights, its text, the price of a pass, and the test series, as scripts.

They are made when the site is built. A page that is opened from a file may load scripts and nothing else, so that is what they are.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..data import load_dataset
from ..files import write_text
from ..flops.account import CAP, generation_flops
from ..flops.costs import Adaptation, training_cost
from ..paths import checkpoint_folder
from ..runs import Run, load_run
from ..settings import EMBEDDED
from ..text import Codec, Grammar, numeric_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..flops.architecture import Config

STAGE = "final"  # the run that the page forecasts with
_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
    "rms_norm_eps", "rope_parameters", "vocab_size",
)  # fmt: skip


def live_run(base: str = EMBEDDED) -> Run:
    """The page's run, its updates merged, and every weight rounded to bfloat16 as the page has it (and kept in float32)."""
    run = load_run(checkpoint_folder(base) / STAGE)
    round_weights(run.base.model)
    return run


def round_weights(model: PreTrainedModel) -> None:
    """Round every weight of a model to the nearest bfloat16, in place; the dtype stays."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


def model_script(model: PreTrainedModel) -> dict[str, object]:
    """A Qwen2 model, its updates merged if it has any, as the page reads it.

    Returns
    -------
    dict
        ``config``, the part that the forward pass needs; ``tensors``, name and length of each parameter, a tied one once;
        ``weights``, all of them as bfloat16, base64.
    """
    kept = {
        name.replace(".base.", "."): parameter.detach().cpu()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name  # merged
    }
    numbers = torch.cat([parameter.flatten() for parameter in kept.values()]).to(torch.bfloat16)
    halves = numbers.view(torch.int16).numpy().astype("<i2")
    return {
        "config": {field: getattr(model.config, field) for field in _FIELDS},
        "tensors": [[name, parameter.numel()] for name, parameter in kept.items()],
        "weights": base64.b64encode(halves.tobytes()).decode("ascii"),
    }


def grammar_script(codec: Codec, tokenizer: PreTrainedTokenizerBase, n_variables: int) -> dict[str, object]:
    """The automaton of a codec's text, with the token of each of its characters."""
    grammar = Grammar(codec, n_variables)
    return {
        "alphabet": grammar.alphabet,
        "separator": codec.step_separator,
        "next": grammar.next.tolist(),
        "tokens": numeric_tokens(codec, tokenizer).tolist(),
    }


def price_script(config: Config, characters: int) -> dict[str, list[int]]:
    """FLOPs of reading a text, and of reading one more token after it, as the coefficients of polynomials.

    The account of a prompt of n tokens is a polynomial of second degree in n, that of one token after n cached ones of first degree:
    three and two values of the account hold all of it, and the page needs no account of its own.

    Parameters
    ----------
    config
        As in `forward_account`.
    characters : int
        Rows of the head that are scored.

    Returns
    -------
    dict
        ``prompt`` and ``token``: integers c, so that the price is c[0] + c[1]·n + c[2]·n².
    """
    prompts = [generation_flops(config, 1, n, 1, vocabulary=characters) for n in (1, 2, 3)]
    tokens = [generation_flops(config, 1, n, 2, vocabulary=characters) - prompts[n - 1] for n in (1, 2)]
    square = (prompts[2] - 2 * prompts[1] + prompts[0]) // 2
    slope = prompts[1] - prompts[0] - 3 * square
    per_token = tokens[1] - tokens[0]
    return {
        "prompt": [prompts[0] - slope - square, slope, square],
        "token": [tokens[0] - per_token, per_token],
    }


def live_scripts(run: Run) -> dict[str, str]:
    """The page's data as JavaScript, file name → text: ``weights.js``, and ``series.js`` with everything else."""
    data, settings, config = load_dataset(), run.settings, run.base.model.config
    adapted = Adaptation(settings.lora_r, settings.target_modules)
    everything = {
        "scale": run.codec.scale,
        "precision": run.codec.precision,
        "grammar": grammar_script(run.codec, run.base.tokenizer, data.trajectories.shape[-1]),
        "price": price_script(config, len(run.codec.alphabet)),
        "step": training_cost(config, settings.batch_size, settings.max_length, adapted).flops,
        "cap": CAP,
        "series": [run.codec.encode(values) for values in data.part("test")],  # rounded as the model's forecasts are
    }
    return {
        "weights.js": f"window.LIVE_MODEL={json.dumps(model_script(run.base.model))};\n",
        "series.js": f"window.LIVE={json.dumps(everything)};\n",
    }


def write_live(folder: Path) -> None:
    """Write `live_scripts` of the shipped run into a folder of the built site."""
    for name, text in live_scripts(live_run()).items():
        write_text(Path(folder) / name, text)
