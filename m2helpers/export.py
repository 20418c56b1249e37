"""A finished run as a plain model that `transformers` loads without this package."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from .files import UserError, write_text
from .lora import lora_layers
from .runs import load_run
from .text import numeric_tokens


def export_run(folder: Path, output_dir: Path) -> None:
    """Write a run's base with the updates merged into it, and its tokenizer, in hub format.

    A plain model has no place for the head bias: it travels as `sequence_bias` in the generation settings. So `generate`
    writes what our own decoding writes, and the logits of a plain forward pass lack the bias. Where a numeric head was
    trained, `generate` is kept to its characters; it has no grammar, so its forecasts may fail to parse.

    Raises
    ------
    UserError
        If `folder` is not a finished run, or `output_dir` exists already.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise UserError(f"{output_dir}: exists already; choose another folder or delete it")
    run = load_run(folder)
    model = _plain(run.base.model)
    if run.constrained:
        numeric = set(numeric_tokens(run.codec, run.base.tokenizer).tolist())
        model.generation_config.suppress_tokens = [t for t in range(model.config.vocab_size) if t not in numeric]
    temporary = output_dir.with_name(output_dir.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    run.base.tokenizer.save_pretrained(temporary)
    card = (
        (Path(folder) / "README.md")
        .read_text(encoding="utf-8")
        .replace("library_name: peft", "library_name: transformers")
    )
    about = (
        "\nThis folder holds the whole model, the adapter merged into it. The trained bias of the LM head is in "
        "`generation_config.json` as `sequence_bias`: `generate` adds it, a plain forward pass does not. Where a numeric "
        "head was trained, `suppress_tokens` there keeps `generate` to the characters of numbers.\n"
    )
    write_text(temporary / "README.md", card + about)
    temporary.rename(output_dir)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without wrappers: merged layers as they are, a head without bias, the bias beside it."""
    for name, layer in list(lora_layers(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
    head = model.get_output_embeddings()
    plain = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    plain.weight = head.weight
    model.set_output_embeddings(plain)
    bias = head.bias.detach().tolist()
    model.generation_config.sequence_bias = [[[token], value] for token, value in enumerate(bias) if value]
    return model
