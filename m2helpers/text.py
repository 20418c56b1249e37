"""LLMTime text: numbers written so that a language model can read them and go on writing.

A series of steps of variables becomes one line of text: every value times one `scale`, rounded to `precision`
decimals, ``,`` between variables and ``;`` after each step, as in ``1.16,1.27;0.90,0.95;0.83,0.69;``.

Source: Gruver et al., "Large Language Models Are Zero-Shot Time Series Forecasters" (LLMTime), NeurIPS 2023.
Unlike the original code, decoding here is strict: what does not parse is reported, never padded or read as zero.
`Grammar` is the same rule as an automaton over characters: what may stand next, after a text that was cut anywhere.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .files import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The share of training values that lie below 10 once scaled; the rest have more integer digits.
SCALE_PERCENTILE = 99.7
SCALE_TARGET = 10.0


class Decoded(NamedTuple):
    """What strict decoding found: the whole steps at the start of a text, and where they end."""

    values: np.ndarray
    """float64 (n_steps, n_variables), in the units of the series."""
    stop: int
    """Characters parsed; equal to the length of the text when all of it is whole steps."""


@dataclass(frozen=True)
class Codec:
    """How numbers are written: the settings that belong to a run and are stored with it.

    Raises
    ------
    UserError
        If the scale is not positive and finite, the precision or the digit limit is out of range, or a separator
        is not one character, or is one that numbers use.

    Examples
    --------
    >>> codec = m2helpers.Codec(scale=2.0)
    >>> codec.encode([[1.0, 0.125], [1.5, 0.25]])
    '2.00,0.25;3.00,0.50;'
    >>> codec.decode("2.00,0.25;3.00,0.", n_variables=2).values
    array([[1.   , 0.125]])
    """

    scale: float
    """Values are multiplied by this before they are written (text = value × scale)."""
    precision: int = 2
    """Decimals written."""
    variable_separator: str = ","
    """Between the variables of one step."""
    step_separator: str = ";"
    """After each step."""
    max_integer_digits: int = 3
    """Digits allowed before the point; a larger value is an error, not a longer number."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise UserError(f"scale {self.scale} is not a positive number; fit it with fit_scale(training values)")
        if not (0 <= self.precision <= 17 and 1 <= self.max_integer_digits <= 308):
            raise UserError(
                f"precision {self.precision} with {self.max_integer_digits} integer digits: "
                "precision must be from 0 to 17 and integer digits from 1 to 308"
            )
        separators = (self.variable_separator, self.step_separator)
        if len(set(separators)) < 2 or any(len(s) != 1 or s in "0123456789.-" for s in separators):
            raise UserError(
                f"separators {separators}: give two different single characters that numbers do not use, such as , and ;"
            )

    @property
    def alphabet(self) -> str:
        """Every character that encoded text can hold."""
        return "0123456789.-" + self.variable_separator + self.step_separator

    @property
    def resolution(self) -> float:
        """How far apart two neighbouring numbers of the text are, in the units of the series."""
        return 10.0**-self.precision / self.scale

    def shortest_step(self, n_variables: int) -> int:
        """Characters in the shortest possible step: 10 for two variables at precision 2 (``0.00,0.00;``)."""
        return n_variables * (2 + (self.precision + 1 if self.precision else 0))

    def encode(self, values: ArrayLike) -> str:
        """Write a series as text.

        Parameters
        ----------
        values : array_like, (n_steps, n_variables)
            The series, in its own units.

        Returns
        -------
        str
            One line; each value is within ``0.5 · 10**-precision`` of the truth in scaled units.

        Raises
        ------
        UserError
            If the shape is wrong, or a value is not finite or needs more digits than the limit.
        """
        series = np.asarray(values, dtype=np.float64)
        if series.ndim != 2 or series.shape[1] == 0:
            raise UserError(f"a series of shape {series.shape} cannot be encoded: give (steps, variables)")
        scaled = self._on_the_grid(series)
        limit = 10**self.max_integer_digits
        bad = ~(np.abs(scaled) < limit)  # written so that NaN is caught too
        if bad.any():
            step, variable = np.argwhere(bad)[0]
            raise UserError(
                f"value {series[step, variable]:g} (step {step}, variable {variable}) is {scaled[step, variable]:g} "
                f"once scaled by {self.scale:g}, not a number under the limit {limit:,}: use a smaller scale"
            )
        between, after = (s.replace("%", "%%") for s in (self.variable_separator, self.step_separator))
        step = between.join([f"%.{self.precision}f"] * series.shape[1]) + after
        return "".join(step % tuple(row) for row in scaled.tolist())

    def rounded(self, values: ArrayLike) -> np.ndarray:
        """What is left of numbers once they are written: values of any shape, in the units of the series, on the text's grid."""
        return self._on_the_grid(np.asarray(values, dtype=np.float64)) / self.scale

    def _on_the_grid(self, values: np.ndarray) -> np.ndarray:
        return np.round(values * self.scale, self.precision) + 0.0  # adding 0.0 turns -0.0 into 0.0

    def decode(self, text: str, n_variables: int) -> Decoded:
        """Read the whole steps at the start of a text; stop at the first character that breaks the grammar.

        The grammar is what `encode` writes (and ``-0.00``): an optional sign, at most `max_integer_digits` digits without
        leading zeros, `precision` decimals, `n_variables` values a step. A step without its separator is not whole.

        Returns
        -------
        Decoded
            Values in the units of the series, float64 (n_steps, n_variables), and the index where parsing stopped.
        """
        digits = rf"-?(?:0|[1-9]\d{{0,{self.max_integer_digits - 1}}})"
        number = digits + (rf"\.\d{{{self.precision}}}" if self.precision else "")
        step = re.compile(
            re.escape(self.variable_separator).join([f"({number})"] * n_variables) + re.escape(self.step_separator),
            re.ASCII,
        )
        rows, stop = [], 0
        while match := step.match(text, stop):
            rows.append([float(group) for group in match.groups()])
            stop = match.end()
        values = np.array(rows, dtype=np.float64).reshape(-1, n_variables) / self.scale
        return Decoded(values, stop)


def fit_scale(values: np.ndarray) -> float:
    """The scale that puts the 99.7th percentile of the training values (any shape) at 10.

    Raises
    ------
    UserError
        If that percentile is not positive, so that no scale exists.

    Examples
    --------
    >>> m2helpers.fit_scale([4.0] * 100)
    2.5
    """
    top = float(np.percentile(np.abs(values), SCALE_PERCENTILE))
    if not (np.isfinite(top) and top > 0):
        raise UserError(
            f"the {SCALE_PERCENTILE}th percentile of the values is {top:g}: nothing to scale by; check the series"
        )
    return SCALE_TARGET / top


def tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Token ids of encoded texts, one token a character.

    Vocabularies of natural language have tokens for ``,-`` and ``;-``. They are left unused: a minus is always a token of its own, so
    that a separator before a negative number is the same separator as anywhere else.

    Parameters
    ----------
    texts : sequence of str
        What `Codec.encode` wrote.
    tokenizer : transformers tokenizer

    Returns
    -------
    list of int64 arrays, each (n_characters,)

    Raises
    ------
    UserError
        If the tokenizer merges characters (as digit-merging vocabularies do), adds its own, or does not know one.
    """
    if not len(texts):
        return []
    ask = dict(add_special_tokens=False, return_attention_mask=False)
    unsigned = [text.replace("-", "") for text in texts]
    encoded = tokenizer(unsigned, **ask)["input_ids"]
    name = tokenizer.name_or_path or type(tokenizer).__name__
    pairs: set[tuple[str, int]] = set()
    if any("-" in text for text in texts):
        unsigned.append("-")
        encoded.append(tokenizer("-", **ask)["input_ids"])
    for text, ids in zip(unsigned, encoded, strict=True):
        if len(ids) != len(text):
            raise UserError(
                f"tokenizer {name!r} writes {text[:12]!r}… as {len(ids)} tokens, "
                f"not {len(text)}: it merges characters; use a base whose tokenizer splits digits, such as Qwen2.5"
            )
        pairs.update(zip(text, ids, strict=True))
    characters, tokens = (set(column) for column in zip(*pairs, strict=True)) if pairs else (set(), set())
    if not len(pairs) == len(characters) == len(tokens) or tokenizer.unk_token_id in tokens:
        raise UserError(
            f"tokenizer {name!r} does not give each character of numeric text a token of its own; "
            "use a base whose tokenizer splits digits, such as Qwen2.5"
        )
    ids = dict(pairs)
    return [np.array([ids[character] for character in text], dtype=np.int64) for text in texts]


def numeric_tokens(codec: Codec, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Ids of every character that encoded text can hold, in the order of `Codec.alphabet`: int64 (characters,)."""
    return np.concatenate(tokenise(list(codec.alphabet), tokenizer))


def windows(n_tokens: int, length: int, stride: int) -> list[tuple[int, int]]:
    """Where windows of at most `length` tokens begin and end: one every `stride`, the last one as short as it must be.

    No window starts past the end, and none repeats only what the one before it already covered.
    """
    starts = [start for start in range(0, n_tokens, stride) if start == 0 or start - stride + length < n_tokens]
    return [(start, min(start + length, n_tokens)) for start in starts]


def left_pad(sequences: Sequence[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """One batch of sequences of different lengths, padded on the left so that all end together.

    Returns
    -------
    input_ids : int64 (batch, longest)
    attention_mask : int64 (batch, longest)
        1 on tokens, 0 on padding.
    """
    longest = max(len(s) for s in sequences)
    input_ids = np.full((len(sequences), longest), pad_id, dtype=np.int64)  # (batch, longest)
    attention_mask = np.zeros_like(input_ids)  # (batch, longest)
    for row, sequence in enumerate(sequences):
        input_ids[row, longest - len(sequence) :] = sequence
        attention_mask[row, longest - len(sequence) :] = 1
    return input_ids, attention_mask


def right_pad(sequences: Sequence[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """`left_pad` the other way round, so that all begin together: for training, where no token sees what comes after it."""
    ids, mask = left_pad([s[::-1] for s in sequences], pad_id)
    return ids[:, ::-1].copy(), mask[:, ::-1].copy()


# A place in a step: which variable, and what of its number has been written.
START, SIGN, ZERO = "start", "sign", "zero"  # nothing; a minus; a leading 0
Kind = str | tuple[str, int]  # ("integer", digits so far) and ("decimal", decimals so far) besides
Place = tuple[int, Kind]


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
        numbers, table = {whole: 0}, []  # state 0: anything may have come before
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
            table.append(row)
        self.next = np.array(table)  # (states, characters), -1 where a character may not stand
        allowed = self.next >= 0
        self.forced = np.where(allowed.sum(1) == 1, allowed.argmax(1), -1)  # (states,): the only character that may

    def _places(self) -> list[Place]:
        kinds: list[Kind] = [START, SIGN, ZERO]
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
