"""The grammar of encoded text as an automaton over characters: what may stand next, after a text that was cut anywhere."""

from __future__ import annotations

from collections import deque

import numpy as np

from .files import UserError
from .text import Codec

# A place in a step: which variable, and what of its number has been written.
START, SIGN, ZERO = "start", "sign", "zero"  # nothing; a minus; a leading 0
Place = tuple[int, str | tuple[str, int]]  # ("integer", digits so far) and ("decimal", decimals so far) besides


class Grammar:
    """A deterministic automaton of what `Codec.decode` reads.

    A context may begin inside a number, so that its first characters fit several places of a step. A state is therefore the
    set of places that are still possible (subset construction; Rabin and Scott, *Finite automata and their decision
    problems*, 1959); after the first step separator it is one place.

    Parameters
    ----------
    codec : Codec
    n_variables : int
        Variables a step.
    """

    def __init__(self, codec: Codec, n_variables: int) -> None:
        self.codec, self.n_variables = codec, n_variables
        self.alphabet = codec.alphabet
        whole = frozenset(self._places())
        numbers, self.next = {whole: 0}, []  # state 0: anything may have come before
        queue = deque([whole])
        while queue:
            places = queue.popleft()
            row = []
            for character in self.alphabet:
                after = frozenset(new for place in places if (new := self._step(place, character)) is not None)
                if after and after not in numbers:
                    numbers[after] = len(numbers)
                    queue.append(after)
                row.append(numbers[after] if after else -1)
            self.next.append(row)
        self.next = np.array(self.next)  # (states, characters), -1 where a character may not stand
        allowed = self.next >= 0
        self.forced = np.where(allowed.sum(1) == 1, allowed.argmax(1), -1)  # (states,): the only character that may

    def _places(self) -> list[Place]:
        kinds: list = [START, SIGN, ZERO]
        kinds += [("integer", k) for k in range(1, self.codec.max_integer_digits + 1)]
        kinds += [("decimal", k) for k in range(self.codec.precision + 1) if self.codec.precision]
        return [(variable, kind) for variable in range(self.n_variables) for kind in kinds]

    def _step(self, place: Place, character: str) -> Place | None:
        """Where a character leads from a place; None where it breaks the grammar."""
        (variable, kind), codec = place, self.codec
        if character.isdigit():
            if kind in (START, SIGN):
                return variable, ZERO if character == "0" else ("integer", 1)
            name, digits = kind if isinstance(kind, tuple) else (kind, 0)
            limit = {"integer": codec.max_integer_digits, "decimal": codec.precision}.get(name, 0)
            return (variable, (name, digits + 1)) if digits < limit else None
        if character == "-":
            return (variable, SIGN) if kind == START else None
        integer = kind == ZERO or kind[0] == "integer"
        if character == ".":
            return (variable, ("decimal", 0)) if integer and codec.precision else None
        last = variable == self.n_variables - 1
        if character != (codec.step_separator if last else codec.variable_separator):
            return None
        whole = integer if not codec.precision else kind == ("decimal", codec.precision)
        return ((variable + 1) % self.n_variables, START) if whole else None

    def walk(self, text: str, state: int = 0) -> int:
        """The state after a text.

        Raises
        ------
        UserError
            If the text breaks the grammar.
        """
        for position, character in enumerate(text):
            index = self.alphabet.find(character)
            state = int(self.next[state, index]) if index >= 0 else -1
            if state < 0:
                raise UserError(
                    f"a context breaks the grammar at character {position} ({text[max(0, position - 8) : position + 1]!r}); "
                    f"it should hold {self.n_variables} variables a step and {self.codec.precision} decimals"
                )
        return state
