"""The model card that goes with the embedded base."""

from __future__ import annotations

from dataclasses import fields

from ..settings import PretrainSettings


def model_card(record: dict) -> str:
    """The card that goes with the weights, every figure from the run's record."""
    settings, config = record["settings"], record["architecture"]
    sittings = [*record["before"], record | {"seed": settings["seed"], "val_loss": record["history"][-1]["val_loss"]}]
    families = "\n".join(
        f"| {name.replace('_', ' ')} | {loss:.3f} |" for name, loss in sorted(record["loss_by_family"].items())
    )
    rows = "\n".join(
        f"| {number} | {s['seed']} | {s['tokens']:,} | {s['seconds'] / 60:.0f} | {s['machine']} | {s['val_loss']:.4f} |"
        for number, s in enumerate(sittings, 1)
    )
    start = " --model BASE" if record["before"] else ""
    flags = [
        f" --{f.name.replace('_', '-')} {settings[f.name]}"
        for f in fields(PretrainSettings)
        if f.name in ("tokens", "seed") or settings[f.name] != f.default
    ]
    return f"""---
license: mit
library_name: transformers
---
# Embedded base: a small general model of numeric series

This is **not** Qwen2.5. It is a model of the same architecture (`Qwen2ForCausalLM`, {record["parameters"]:,} parameters:
hidden {config["hidden_size"]}, {config["num_hidden_layers"]} layers, {config["num_attention_heads"]} query and {config["num_key_value_heads"]} key-value heads,
intermediate {config["intermediate_size"]}, tied embeddings), trained from random weights by this project on synthetic series written
as LLMTime text. It has never seen a predator–prey system, and no words at all: it reads and writes numbers.

| | |
|---|---|
| tokens | {record["total"]["tokens"]:,} in {len(sittings)} sitting{"s" * (len(sittings) > 1)} |
| FLOPs (exact account, reported beside the 1e17 and not charged to it) | {record["total"]["flops"]:.3g} |
| time | {record["total"]["seconds"] / 60:.0f} minutes |
| last sitting | Muon {settings["learning_rate"]:g}, AdamW {settings["adamw_learning_rate"]:g} on embedding, norms and biases; batch {settings["batch_size"]} × {settings["max_length"]} tokens, {record["step"]:,} steps, torch {record["torch"]} |
| validation loss | {record["history"][-1]["val_loss"]:.4f} nats a token |

| sitting | seed | tokens | minutes | machine | validation loss |
|---|---|---|---|---|---|
{rows}

The last sitting was `python -m m2helpers pretrain --output-dir DIR{start}{"".join(flags)}`{f", where BASE is the model as the sitting before left it (SHA-256 {sittings[-2]['sha256'][:16]}…, in this repository's history)" if start else ""}.

## Mixture

An equal mixture of {len(record["loss_by_family"])} families{"; the sittings before drew from the mixture as it was then" if start else ""}. No predator–prey system is among them;
which families there are was chosen with such series in view, by how well their gradients agree with that of the validation split. Validation loss of each, in nats a token:

| family | loss |
|---|---|
{families}

## Limits

At most {settings["max_length"]:,} tokens of context were seen in training. One to three variables, mostly two decimals, numbers mostly below 25.
"""
