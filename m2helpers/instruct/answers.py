"""What a model answers, and how often that is exactly the response that was asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypedDict, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..engine.processes import everyones, rank, share
from ..flops.costs import Cost
from ..ledger import Bill
from ..text import left_pad
from .prices import Prices
from .rows import Row, Tokens, end_and_pad

BATCH = 16


class Answered(TypedDict):
    """How a model did on some rows."""

    rows: int
    exact: int
    """Answers that are the response to the letter, and then end."""
    by_instruction: dict[str, list[int]]
    """Instruction → how many were exact, and of how many; for the instructions that stand in more than one row."""
    answers: list[str]
    """In the order of the rows; ``…`` where the model had not ended by the length of the longest response."""


def longest_response(rows: Sequence[Tokens]) -> int:
    """Tokens of the longest response of some rows, its end among them."""
    return max(len(row.ids) - row.prompt for row in rows)


def cost_at_most(rows: Sequence[Tokens], prices: Prices) -> Cost:
    """The most that answering some rows can cost: every batch full, with the longest prompt and the longest answer."""
    if not rows:
        return Cost()
    prompt = max(row.prompt for row in rows)
    return prices.generation(BATCH, prompt, longest_response(rows)) * math.ceil(len(rows) / BATCH)


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[Tokens],
    prices: Prices,
    bill: Bill | None = None,
) -> list[str]:
    """Answer prompts greedily, and put that on a bill (as ``generate``); several processes share the batches.

    Returns
    -------
    list of str
        A text for each row, ``…`` at its end where the model had not ended.
    """
    end, pad = end_and_pad(tokenizer)
    model.eval()
    answers: dict[int, str] = {}
    spent = Cost()
    order = sorted(range(len(tokens)), key=lambda i: tokens[i].prompt)
    for first in share(range(0, len(order), BATCH)):
        places = order[first : first + BATCH]
        prompts = left_pad([tokens[i].ids[: tokens[i].prompt] for i in places], pad)
        ids, mask = (torch.from_numpy(a).to(model.device) for a in prompts)  # (batch, prompt)
        made = cast(Any, model).generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=longest_response(tokens),
            do_sample=False,
            eos_token_id=end,
            pad_token_id=pad,
        )[:, ids.shape[1] :]  # (batch, new)
        cost = prices.generation(len(ids), ids.shape[1], made.shape[1])
        spent += cost
        if bill:
            bill.add("generate", cost)
        for i, row in zip(places, made.tolist(), strict=True):
            ended = end in row
            text = str(tokenizer.decode(row[: row.index(end)] if ended else row, clean_up_tokenization_spaces=False))
            answers[i] = text if ended else text + "…"
    for number, (theirs, cost) in enumerate(everyones((answers, spent))):
        answers |= theirs
        if bill and number != rank():
            bill.add("generate", cost)
    return [answers[i] for i in range(len(tokens))]


def count_exact(rows: Sequence[Row], answers: Sequence[str]) -> Answered:
    """Hold answers against the responses that were asked for."""
    exact = [given == row.output for row, given in zip(rows, answers, strict=True)]
    by_instruction: dict[str, list[int]] = {}
    for row, right in zip(rows, exact, strict=True):
        count = by_instruction.setdefault(row.instruction, [0, 0])
        count[0] += right
        count[1] += 1
    repeated = {instruction: count for instruction, count in sorted(by_instruction.items()) if count[1] > 1}
    return {"rows": len(rows), "exact": sum(exact), "by_instruction": repeated, "answers": list(answers)}
