"""Decoding: prompts are read once into a cache, and every row is continued token by token until it is done."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F

from ..files import UserError
from ..models import Base
from ..text import Grammar, numeric_tokens
from .reading import Reader


@dataclass(frozen=True)
class End:
    """Where a row is done."""

    separator: int
    """Token after each step."""
    n_separators: int
    """Separators to write."""
    max_new_tokens: int
    """Tokens after which it stops without them."""


Choose = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
"""Logits (rows, choices), and which rows of the batch they are → the choice of each, (rows,)."""


Progress = Callable[[int], object]
"""Told how many more are done."""


class Rules:
    """A grammar and the head's part for its characters: only they are scored, and only those that may stand are chosen."""

    def __init__(self, grammar: Grammar, base: Base) -> None:
        self.grammar, tokens = grammar, numeric_tokens(grammar.codec, base.tokenizer)
        head = base.model.get_output_embeddings()
        self.tokens, self.next, self.forced = tokens.tolist(), grammar.next.tolist(), grammar.forced.tolist()
        self.weight = head.weight[tokens]  # (characters, hidden)
        self.bias = 0 if head.bias is None else head.bias[tokens]  # (characters,)
        self.allowed = torch.from_numpy(grammar.next >= 0).to(base.model.device)  # (states, characters)

    def score(self, hidden: torch.Tensor, states: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """(batch, hidden) → logits (batch, characters), minus infinity where a character may not stand."""
        logits = F.linear(hidden, self.weight).float() + self.bias
        return logits.masked_fill(~self.allowed[states], -torch.inf)


class _Batch:
    """Rows while they are continued: what each has written, and the reader of those that are not done."""

    def __init__(self, base: Base, prompts: list[np.ndarray], end: End, progress: Progress) -> None:
        self.model, self.end, self.progress, self.reader = base.model, end, progress, Reader(base, prompts)
        self.written: list[list[int]] = [[] for _ in prompts]
        self.read = [0] * len(prompts)  # tokens, padding too, after the prompt
        self.left = [end.n_separators] * len(prompts)  # separators still to write
        self.alive = list(range(len(prompts)))  # rows that are not done

    def write(self, new: list[list[int]]) -> None:
        """Add the tokens chosen for each row alive; those that are done leave, and the others' tokens are read."""
        for row, tokens in zip(self.alive, new, strict=True):
            self.written[row] += tokens
            self.left[row] -= tokens.count(self.end.separator)
        self.progress(sum(tokens.count(self.end.separator) for tokens in new))
        most = self.end.max_new_tokens
        keep = [i for i, row in enumerate(self.alive) if self.left[row] and len(self.written[row]) < most]
        before = len(self.alive)
        self.alive, new = [self.alive[i] for i in keep], [new[i] for i in keep]
        if not keep:
            return
        if len(keep) < before:
            self.reader.select(keep)
        n = self.reader.read(new)
        for row in self.alive:
            self.read[row] += n


def continue_prompts(
    base: Base,
    prompts: list[np.ndarray],
    end: End,
    choose: Choose,
    rules: Rules | None,
    states: list[int],
    progress: Progress = lambda n: None,
) -> tuple[list[list[int]], list[int]]:
    """Token ids written after each prompt, up to and including its last separator, and how many were read, padding too.

    `states` are those of the grammar after each prompt, and change; `progress` is told of separators as they are written.
    """
    batch = _Batch(base, prompts, end, progress)
    if rules:
        _write_by_rules(batch, choose, rules, states)
    else:
        _write_freely(batch, choose)
    return batch.written, batch.read


def _write_freely(batch: _Batch, choose: Choose) -> None:
    """One token a pass, any of the vocabulary."""
    head = batch.model.get_output_embeddings()
    while batch.alive:
        batch.write([[token] for token in choose(head(batch.reader.hidden), batch.alive).tolist()])


def _write_by_rules(batch: _Batch, choose: Choose, rules: Rules, states: list[int]) -> None:
    """Only tokens that may stand; where one alone may, it joins the token before it in the same forward pass."""
    while batch.alive:
        logits = rules.score(batch.reader.hidden, [states[row] for row in batch.alive])  # (alive, characters)
        new: list[list[int]] = []
        for row, choice in zip(batch.alive, choose(logits, batch.alive).tolist(), strict=True):
            tokens: list[int] = []
            while choice >= 0:
                tokens.append(rules.tokens[choice])
                states[row] = rules.next[states[row]][choice]
                left = batch.left[row] - tokens.count(batch.end.separator)
                choice = rules.forced[states[row]] if left else -1
            new.append(tokens)
        batch.write(new)


class Chooser:
    """Chooses the likeliest at temperature 0, else draws, each row by a series of uniform numbers of its own.

    So what a row draws does not depend on the rows beside it, nor on how many there are at once.

    Parameters
    ----------
    temperature : float
        Of the softmax of logits / temperature.
    uniform : (rows, passes)
        Numbers in [0, 1): each row's, one a pass.
    """

    def __init__(self, temperature: float, uniform: torch.Tensor) -> None:
        self.temperature, self.uniform, self.passes = temperature, uniform, 0

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """See `Choose`.

        Raises
        ------
        UserError
            If a row's largest logit is NaN or infinite. A grammar's minus infinity elsewhere is as it should be.
        """
        check_finite(logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        self.passes += 1
        return draw((logits.float() / self.temperature).softmax(-1), self.uniform[rows, self.passes - 1])


def check_finite(logits: torch.Tensor) -> None:
    """Refuse (`UserError`) a row (…, choices) whose largest is NaN or infinite."""
    if not finite(logits).all():
        refuse_damaged()


def finite(logits: torch.Tensor) -> torch.Tensor:
    """Whether the largest of each row (…, choices) is a finite number, (…,); NaN counts as the largest."""
    return logits.gather(-1, logits.argmax(-1, keepdim=True)).isfinite()[..., 0]


def refuse_damaged() -> NoReturn:
    """Say that the model gave no number, and what to do (`UserError`)."""
    raise UserError(
        "the model's output is not a number: its weights are damaged or overflow; fetch or copy the model again"
    )


def draw(shares: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The choice of each row (rows, choices) that holds its uniform number (rows,): never one without a share."""
    up_to = shares.to(uniform.dtype).cumsum(-1)
    return (up_to <= uniform[:, None] * up_to[:, -1:]).sum(-1)


def uniform_numbers(contexts: Sequence[str], n: int, seed: int, device: torch.device) -> torch.Tensor:
    """For each row, (rows, n) in [0, 1): they follow from the seed, its context, and how many rows of that came before."""
    seen: Counter[str] = Counter()
    numbers = np.empty((len(contexts), n))
    for row, context in enumerate(contexts):
        digest = hashlib.sha256(f"{seed} {seen[context]} {context}".encode()).digest()
        numbers[row] = (
            np.random.default_rng(int.from_bytes(digest)).random(n).clip(max=1 - 1e-7)
        )  # below 1 in float32 too
        seen[context] += 1
    return torch.from_numpy(numbers).to(device, torch.float32 if device.type == "mps" else torch.float64)
