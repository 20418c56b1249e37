"""The trees of the numbers that a model may write next, grown on its cache, breadth first, for many paths at once.

A number is a few characters, and what may stand is few at each. Every beginning of one has a probability. Those with too little are
either left out with all that would follow, and the rest is exact; or thinned, so that every expectation stays what it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..files import UserError
from ..flops.costs import Adaptation, Cost, continuation_cost, generation_cost
from ..ledger import Bill
from ..models import Base
from ..text import Codec, Grammar
from .decoding import Rules, check_finite
from .reading import Reader

ROWS = 128  # paths whose trees grow at once: enough to keep a processor busy, few enough for their branches to fit
POINT, MINUS = 10, 11  # places in `Codec.alphabet`: digits come before, separators after


@dataclass(frozen=True)
class Begun:
    """How far a context has come in its last step."""

    known: tuple[int, ...]
    """The cells of the numbers that stand there whole."""
    number: int
    """The digits of the one that does not, read as one number."""
    negative: bool

    @classmethod
    def of(cls, context: str, codec: Codec) -> Begun:
        """Read the end of a context; refused (`UserError`) if nothing in it says where steps begin."""
        if codec.step_separator not in context:
            raise UserError(
                f"the context {context[-12:]!r} holds no {codec.step_separator!r}: give at least one whole step"
            )
        *whole, last = context.rpartition(codec.step_separator)[2].split(codec.variable_separator)

        def digits(text: str) -> int:
            return int(re.sub(r"\D", "", text) or 0)

        known = tuple(-digits(text) if text.startswith("-") else digits(text) for text in whole)
        return cls(known, digits(last), last.startswith("-"))


@dataclass(frozen=True, eq=False)
class Nodes:
    """Beginnings of numbers, (n,) each."""

    row: np.ndarray
    """Path that they go on from."""
    state: np.ndarray
    """Of the grammar."""
    mass: np.ndarray
    number: np.ndarray
    """Their digits as one number."""
    negative: np.ndarray
    written: np.ndarray
    """(n, longest): characters since the path ended, -1 beyond them."""
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def take(self, which: np.ndarray) -> Nodes:
        """Some of them, or some several times."""
        return Nodes(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    @property
    def cell(self) -> np.ndarray:
        """Of a number that is whole: its value in units of its last decimal."""
        return np.where(self.negative, -self.number, self.number)

    @property
    def whole(self) -> np.ndarray:
        """Whether a separator stands at the end."""
        return self.written[np.arange(len(self)), np.maximum(self.length, 1) - 1] > MINUS

    def append(self, characters: np.ndarray, grammar: Grammar) -> Nodes:
        """Each with one more character, by its place in the alphabet; -1 adds none."""
        some, digit = characters >= 0, (characters >= 0) & (characters < POINT)
        written = self.written.copy()
        written[np.flatnonzero(some), self.length[some]] = characters[some]
        return replace(
            self,
            state=np.where(some, grammar.next[self.state, characters], self.state),
            number=np.where(digit, self.number * 10 + characters, self.number),
            negative=self.negative | (characters == MINUS),
            written=written,
            length=self.length + some,
        )


class Account:
    """What trees cost, charged as they grow: `bill` is the one that is open.

    Parameters
    ----------
    prompt : int
        Tokens of the longest context.
    """

    def __init__(self, base: Base, prompt: int, adapted: Adaptation) -> None:
        self.config, self.prompt, self.adapted = base.model.config, prompt, adapted
        self.bill: Bill | None = None
        self._costs: dict[int, Cost] = {0: Cost()}

    def _upto(self, tokens: int) -> Cost:
        if tokens not in self._costs:
            self._costs[tokens] = continuation_cost(self.config, self.prompt, tokens, self.adapted)
        return self._costs[tokens]

    def most(self, contexts: int, own: int, beginnings: int, characters: int) -> Cost:
        """The most that a step can cost after so many tokens, if of every character of it so many beginnings are grown.

        Each is read once as it grows, one token or two a character, and once more as it is followed.
        """
        end = own + characters
        token = self._upto(end) - self._upto(end - 1)
        prompts = generation_cost(self.config, 1, self.prompt, 1, self.adapted)
        return prompts * contexts + token * (beginnings * 3 * characters)

    def prompts(self, n: int) -> None:
        """Charge reading so many contexts."""
        self._charge(generation_cost(self.config, 1, self.prompt, 1, self.adapted) * n)

    def tokens(self, rows: int, before: int, n: int) -> None:
        """Charge reading `n` tokens in each of some rows, after so many since their context."""
        self._charge((self._upto(before + n) - self._upto(before)) * rows)

    def _charge(self, cost: Cost) -> None:
        assert self.bill is not None  # trees grow inside a reservation
        self.bill.add("generate", cost)


class Forest:
    """Paths of several contexts, each with its mass, and the numbers that may come next in each.

    All contexts are as many numbers into their last step.

    Parameters
    ----------
    prompts : sequence of int arrays
        The contexts' tokens.
    """

    def __init__(
        self, base: Base, rules: Rules, contexts: Sequence[str], prompts: Sequence[np.ndarray], account: Account
    ) -> None:
        self.rules, self.grammar, self.account, n = rules, rules.grammar, account, len(contexts)
        codec = self.grammar.codec
        begun = [Begun.of(context, codec) for context in contexts]
        self.longest = codec.max_integer_digits + codec.precision + 3  # a minus, a point and a separator
        self.done = len(begun[0].known)  # numbers of this step
        self.window = np.arange(n)  # context of each path
        self.weight = np.ones(n)  # mass of each path
        self.cells = np.zeros((n, self.grammar.n_variables), dtype=np.int64)  # of this step, as far as it is done
        for row, one in enumerate(begun):
            self.cells[row, : self.done] = one.known
        self.state = np.array([self.grammar.walk(context) for context in contexts])
        self.number = np.array([one.number for one in begun], dtype=np.int64)
        self.negative = np.array([one.negative for one in begun])
        self.reader = Reader(base, prompts, branching=True)
        account.prompts(self.reader.n_prompts)

    def grow(
        self, temperature: float, cutoff: float, uniform: np.ndarray | None = None, rows: np.ndarray | None = None
    ) -> Nodes:
        """The next number of each path, whole, with its mass.

        Parameters
        ----------
        temperature : float
            Of the softmax of logits / temperature.
        cutoff : float
            Beginnings with less of their context's mass are left out ...
        uniform : (contexts, longest + 1), optional
            ... or, with these numbers in [0, 1), one a character, thinned: of every context's, systematic sampling keeps some, each
            with a chance in proportion to its mass, and with the cutoff for its mass.
        rows : int array, optional
            Only of these paths.
        """
        rows = np.arange(len(self.window)) if rows is None else rows
        parts = [self._grow(rows[i : i + ROWS], temperature, cutoff, uniform) for i in range(0, len(rows), ROWS)]
        return joined(parts)

    def _grow(self, rows: np.ndarray, temperature: float, cutoff: float, uniform: np.ndarray | None) -> Nodes:
        blank = np.full((len(rows), self.longest), -1, dtype=np.int64)
        nodes = Nodes(
            rows, self.state[rows], self.weight[rows], self.number[rows], self.negative[rows], blank, 0 * rows
        )
        hidden, twin, found, level = self.reader.hidden[torch.from_numpy(rows)], self.reader, list[Nodes](), 0
        while len(nodes):
            mass = nodes.mass[:, np.newaxis] * self._shares(hidden, nodes.state, temperature)
            if uniform is not None:
                mass = _thinned(mass, self.window[nodes.row], cutoff, uniform[:, level])
            parent, character = np.nonzero(mass >= cutoff)
            begun, nodes = nodes.length[parent], replace(nodes.take(parent), mass=mass[parent, character])
            nodes, level = nodes.append(character, self.grammar), level + 1
            while (forced := np.where(nodes.whole, -1, self.grammar.forced[nodes.state])).max(initial=-1) >= 0:
                nodes = nodes.append(forced, self.grammar)
            whole = nodes.whole
            found.append(nodes.take(whole))
            nodes, at = nodes.take(~whole), parent[~whole]
            if len(nodes):
                twin = twin.branch(rows[at]) if twin is self.reader else twin.branch(at)
                self._read(twin, nodes, begun[~whole])
                hidden = twin.hidden
        return joined(found)

    def _shares(self, hidden: torch.Tensor, state: np.ndarray, temperature: float) -> np.ndarray:
        """Of each character after each node: (nodes, characters)."""
        logits = self.rules.score(hidden, state)
        check_finite(logits)
        return (logits.cpu().double() / temperature).softmax(-1).numpy()

    def follow(self, leaves: Nodes, weight: np.ndarray, read: bool = True) -> None:
        """Go on from some numbers, each with a mass; without reading them if nothing comes after."""
        self.window, self.weight, self.state = self.window[leaves.row], weight, leaves.state
        self.number, self.negative = np.zeros(len(leaves), dtype=np.int64), np.zeros(len(leaves), dtype=bool)
        self.cells = self.cells[leaves.row]
        self.cells[:, self.done] = leaves.cell
        self.done = (self.done + 1) % self.grammar.n_variables
        if read:
            self.reader.select(leaves.row)
            self._read(self.reader, leaves, np.zeros(len(leaves), dtype=np.int64))

    def _read(self, reader: Reader, nodes: Nodes, begun: np.ndarray) -> None:
        """Let a reader read what each node has written since it was so long."""
        tokens = np.array(self.rules.tokens)
        new = [tokens[w[a:b]].tolist() for w, a, b in zip(nodes.written, begun, nodes.length, strict=True)]
        before = reader.own
        n = reader.read(new)
        self.account.tokens(len(nodes), before, n)


def joined(parts: Sequence[Nodes]) -> Nodes:
    return Nodes(*(np.concatenate([getattr(part, name) for part in parts]) for name in Nodes.__dataclass_fields__))


def _thinned(mass: np.ndarray, window: np.ndarray, cutoff: float, uniform: np.ndarray) -> np.ndarray:
    """Masses (nodes, characters) with those below the cutoff raised to it or set to 0, by systematic sampling within each window.

    Nodes of a window, (nodes,), stand side by side; `uniform` has a number for each.
    """
    light = np.where(mass < cutoff, mass, 0.0)
    up_to = light.ravel().cumsum().reshape(light.shape)
    first = np.flatnonzero(np.diff(window, prepend=-1))  # node of each window
    before = np.repeat(np.append(0.0, up_to[first[1:] - 1, -1]), np.diff(np.append(first, len(window))))  # (nodes,)
    places = np.floor((up_to - before[:, np.newaxis]) / cutoff + uniform[window][:, np.newaxis])
    left = np.column_stack([np.append(0.0, places[:-1, -1]), places[:, :-1]])  # of the one before, in reading order
    left[first, 0] = 0.0
    return np.where(mass < cutoff, np.where(places > left, cutoff, 0.0), mass)
