"""Instructions in JSON lines: reading them strictly, the template they are written in, their tokens and the batches these fill."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..engine.losses import IGNORED
from ..files import UserError, read_at_most
from ..text import right_pad

TEMPLATE = "### Instruction:\n{instruction}\n\n### Input:\n{input}" + (TAIL := "\n\n### Response:\n")
LEAST_LENGTH = 64


class Row(NamedTuple):
    """One instruction; `input` may be empty."""

    instruction: str
    input: str
    output: str

    @property
    def prompt(self) -> str:
        """What the model reads before it answers."""
        return TEMPLATE.format(instruction=self.instruction, input=self.input)


class Tokens(NamedTuple):
    """A row as the model reads it."""

    ids: np.ndarray
    """(length,) of the prompt, the response and the end."""
    prompt: int
    """How many of them, at the beginning, are the prompt's and not scored."""


def read_rows(path: Path) -> list[Row]:
    """Read instructions, one JSON object a line with ``instruction``, ``input`` and ``output``; empty lines are passed over.

    Raises
    ------
    UserError
        If the file cannot be read or has no rows, or a line is no such object: names file, line and remedy.
    """
    path = Path(path)
    try:
        lines = read_at_most(path).removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of JSON lines") from None
    rows = [_read_row(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: holds no rows; give one JSON object a line, with {', '.join(Row._fields)}")
    return rows


def _read_row(place: str, line: bytes) -> Row:
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError:
        raise UserError(f"{place}: is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: is not JSON ({error}); write one object a line") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: is {_kind(value)}; write an object with {', '.join(Row._fields)}")
    if missing := [name for name in Row._fields if name not in value]:
        raise UserError(f"{place}: lacks {missing[0]!r}; add it (input may be an empty string)")
    if strange := sorted(value.keys() - set(Row._fields)):
        raise UserError(f"{place}: has {strange[0]!r}, which is not read; leave it out")
    for name in Row._fields:
        text = value[name]
        if not isinstance(text, str):
            raise UserError(f"{place}: {name} is {_kind(text)}; write it as a string")
        if not text.strip() and name != "input":
            raise UserError(f"{place}: {name} is empty; write it, or leave the line out")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{place}: {name} has half a surrogate pair, which is no character; write it whole")
    return Row(**value)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return dict(pairs)


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def end_and_pad(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of the token that ends a response, and of one that fills a batch and is another.

    Were they one, the end would be left out of the loss with the padding, and never learnt.

    Raises
    ------
    UserError
        If the tokenizer has no end.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if end is None:
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer has no end token; choose a base that has one")
    if pad is None or pad == end:
        others = [i for i in (*sorted(tokenizer.added_tokens_decoder), *tokenizer.all_special_ids, 0, 1) if i != end]
        pad = others[0]
    return end, pad


def tokenise_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, name: str) -> list[Tokens]:
    """Rows as token ids, at most `max_length` of them each, with a warning that says how many had to be cut.

    What is cut first is the end of the prompt's text before ``### Response:``. A response loses its end, and then is not followed by the
    end token, only where it takes more than half of the length: so each keeps one.

    Parameters
    ----------
    name : str
        Of the rows, for the warning.
    """
    end, _ = end_and_pad(tokenizer)
    tail = len(_ids(TAIL, tokenizer))
    made, cut = [], 0
    for row in rows:
        prompt, response = _ids(row.prompt, tokenizer), [*_ids(row.output, tokenizer), end]
        cut += len(prompt) + len(response) > max_length
        response = response[: max(max_length // 2, max_length - len(prompt))]
        if (room := max_length - len(response)) < len(prompt):
            prompt = prompt[: room - tail] + prompt[len(prompt) - tail :]
        made.append(Tokens(np.array(prompt + response), len(prompt)))
    if cut:
        warnings.warn(f"{name}: {cut:,} of {len(rows):,} rows were cut to {max_length} tokens", stacklevel=2)
    return made


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class Collator:
    """Rows to a batch, all as long as the longest of them; padded on the right with `pad_id`."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Tokens]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each (batch, length).

        Labels are the ids, and `IGNORED` in the prompt and where padded; rows whose `prompt` is 0 have ``labels = input_ids``.
        """
        ids, mask = map(torch.from_numpy, right_pad([row.ids for row in rows], self.pad_id))  # (batch, length)
        prompt = torch.tensor([[row.prompt] for row in rows])  # (batch, 1)
        scored = (mask == 1) & (torch.arange(ids.shape[1]) >= prompt)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~scored, IGNORED)}
